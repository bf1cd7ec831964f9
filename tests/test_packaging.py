"""The package as installed: metadata, what an import costs, what the binary may contain."""

import ast
import importlib.metadata
import importlib.resources
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mobilellm_fast
from mobilellm_fast import _C
from mobilellm_fast.version import __version__

# VEX and EVEX instructions begin with v; the rest is BMI. tzcnt is left out: every x86-64 runs it.
NEWER_THAN_V2 = re.compile(
    r"\t(v[a-z]\w+|andn|bextr|bls\w+|bzhi|lzcnt|movbe|mulx|pdep|pext|rorx|sarx|shlx|shrx)\b"
)


def run_python(code: str, cwd: Path) -> str:
    """Runs `code` in a fresh interpreter that sees the package under test; returns its output."""
    env = dict(os.environ, PYTHONPATH=str(Path(mobilellm_fast.__file__).parents[1]))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def binutil(name: str, *args: str) -> str:
    """Runs a tool of binutils over the extension; returns its output."""
    if sys.platform != "linux" or not shutil.which(name):
        pytest.skip(f"needs {name} and an ELF binary")
    extension = importlib.util.find_spec("mobilellm_fast._C").origin
    return subprocess.run(
        [name, *args, extension], capture_output=True, text=True, check=True
    ).stdout


def test_metadata():
    metadata = importlib.metadata.metadata("mobilellm_fast")
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert (importlib.resources.files("mobilellm_fast") / "py.typed").is_file()
    kernels = importlib.resources.files("mobilellm_fast.kernels")
    for name in (
        "decode/step.py",
        "ring/decode.cu",
        "hopper/wgmma/product.cu",
        "hopper/one_token/primitives.cuh",
    ):
        assert (kernels / name).is_file(), name


def test_types_of_the_public_names_are_visible():
    """Type checkers do not run `__getattr__`: they read imports and `__all__`."""
    tree = ast.parse(Path(mobilellm_fast.__file__).read_text(encoding="utf-8"))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(branch.test) == "TYPE_CHECKING"
    seen = {name.name: node.module for node in branch.body for name in node.names}
    assert seen == mobilellm_fast._HOME
    assert mobilellm_fast.__all__ == sorted(["__version__", *seen])
    for name in mobilellm_fast.__all__:
        getattr(mobilellm_fast, name)


def test_the_types_of_a_cache_are_its_members():
    stub = (importlib.resources.files("mobilellm_fast") / "_C.pyi").read_text(encoding="utf-8")
    (cache,) = (node for node in ast.parse(stub).body if isinstance(node, ast.ClassDef))
    stated = {node.name for node in cache.body if isinstance(node, ast.FunctionDef)}
    assert stated == {name for name in dir(_C.KVCache) if not name.startswith("_")}


def test_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="mobilellm-fast")
    assert entry.value == "mobilellm_fast.cli:main"
    command = Path(sysconfig.get_path("scripts"), "mobilellm-fast")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_inference_imports_without_torch_and_in_silence(tmp_path):
    code = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None, triton=None)  # importing one fails\n"
        "import mobilellm_fast, mobilellm_fast.cli, mobilellm_fast.engine, mobilellm_fast._C\n"
    )
    assert run_python(code, tmp_path) == ""


def test_our_symbols_are_hidden():
    exported = binutil("nm", "-D", "-C", "--defined-only")
    assert "PyInit__C" in exported
    assert "mlf::" not in exported


def test_no_newer_instruction_outside_the_tables():
    """Baseline code runs on x86-64-v2: only functions compiled from isa.cpp may need more."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86-64 instructions")
    tables, source = set(), ""
    for line in binutil("readelf", "-sW").splitlines():
        fields = line.split()  # Num: Value Size Type Bind Vis Ndx Name
        if len(fields) > 3 and fields[3] == "FILE":
            source = fields[7] if len(fields) > 7 else ""  # of the local symbols that follow
        elif len(fields) > 7 and fields[3] == "FUNC" and source == "isa.cpp":
            tables.add(int(fields[1], 16))
    if not source and not tables:
        pytest.skip("the extension is stripped")
    newer = {}  # address -> first instruction that an x86-64-v2 may not have
    for line in binutil("objdump", "-d", "-C", "--no-show-raw-insn").splitlines():
        if start := re.match(r"([0-9a-f]+) <(.*)>:$", line):
            address, name = int(start[1], 16), start[2]
        elif NEWER_THAN_V2.search(line):
            newer.setdefault(address, f"{name}:{line}")
    assert tables & newer.keys(), "the AVX tables were not found: this test looks at nothing"
    assert [newer[address] for address in newer.keys() - tables] == []
