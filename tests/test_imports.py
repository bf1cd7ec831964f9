"""Imports within the package go one way, those inside of functions included (ARCHITECTURE.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mobilellm_fast

ROOT = Path(mobilellm_fast.__file__).parent


def modules() -> dict[str, Path]:
    """Name, with dots, -> file of every module but those of `kernels`, which lie elsewhere."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that one imports, but for types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found, rest = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            if node.module:
                found.add(f"{base}.{node.module}")
            names = [".".join(filter(None, (base, node.module, a.name))) for a in node.names]
            found |= set(names) if node.module or known.keys() & set(names) else {base}
        rest += ast.iter_child_nodes(node)
    return found & known.keys() - {name}


def test_the_import_graph_has_no_cycles():
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert "mobilellm_fast.sampling" in graph["mobilellm_fast.generate"]
    # the package itself imports when asked for a name: whoever imports `_C` from it does not ask
    del graph["mobilellm_fast"]
    assert list(TopologicalSorter(graph).static_order())
