"""Imports within the package go one way, those inside of functions included (ARCHITECTURE.md)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mobilellm_fast
import mobilellm_fast.kernels

ROOT = Path(mobilellm_fast.__file__).parent
KERNELS = Path(mobilellm_fast.kernels.__file__).parent  # may lie elsewhere


def modules() -> dict[str, Path]:
    """Name, with dots, -> file of every module."""
    names = {}
    for folder, package in (ROOT, "mobilellm_fast"), (KERNELS, "mobilellm_fast.kernels"):
        for path in folder.rglob("*.py"):
            parts = package, *path.relative_to(folder).with_suffix("").parts
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


def test_kernels_import_only_what_is_below_them():
    known = modules()
    kernels = {name: path for name, path in known.items() if ".kernels" in name}
    assert "mobilellm_fast.kernels.hopper.products" in kernels
    found = set().union(*(imported(name, path, known) for name, path in kernels.items()))
    below = {f"mobilellm_fast.{name}" for name in ("cache", "errors", "files")}
    assert found <= kernels.keys() | below
