"""What compilers make of the Triton kernels, for GPUs that need not be here.

Every test run compiles the few quick builds; `pytest tests/test_gpu_compile.py --all-builds` all.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_ahead import ARCHES, Code, all_builds

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
HARNESS = Path(__file__).with_name("compile_ahead.py")
# bytes of shared memory that a program may have: on an A100 (a Build says it for an H100), an MI300
SHARED = {"sm_80": 163 * 1024, "gfx942": 64 * 1024}
STORES = ("ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UTMASTG")
LOADS = ("LD", "LDG", "LDGSTS", "UTMALDG")


def pytest_generate_tests(metafunc):
    if "build" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-builds")
        cases = [(b, a) for b in all_builds() if b.quick or everything for a in b.arches]
        ids = [f"{build.name}-{arch}" for build, arch in cases]
        metafunc.parametrize(("build", "arch"), cases, ids=ids)


@pytest.fixture(scope="module")
def compiled(request):
    """The code of each build that is asked for, by arch and name; one process per arch."""
    known: dict[str, dict[str, Code]] = {}

    def code(build, arch):
        if arch not in known:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            quick = [] if request.config.getoption("--all-builds") else ["--quick"]
            done = subprocess.run(
                [sys.executable, str(HARNESS), arch, *quick],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            codes = (Code(**json.loads(line)) for line in done.stdout.splitlines())
            known[arch] = {code.name: code for code in codes}
        return known[arch][build.name]

    return code


@pytest.mark.timeout(900)
def test_build(build, arch, compiled):
    code = compiled(build, arch)
    assert code.spilled <= build.spilled
    if ARCHES[arch][0] == "cuda":
        assert code.registers <= build.registers
    assert code.shared <= SHARED.get(arch, build.shared)
    products = code.count("HGMMA") + code.count("IGMMA")
    # else the compiler has given up to keep several products in flight
    assert build.serial or code.count("WARPGROUP.DEPBAR") <= products / 2
    for instruction in build.needs.get(arch, ()):
        assert code.count(instruction), f"{instruction} is not in {sorted(code.instructions)}"
    if build.options.get("launch_pdl"):
        early = list(code.instructions)[: list(code.instructions).index("ACQBULK")]
        kept = STORES if "WAIT" in build.constants else STORES + LOADS  # of weights, if need be
        assert not [i for i in early if i.split(".")[0] in kept], "the kernel before may still run"


def test_names_are_unique():
    names = [build.name for build in all_builds()]
    assert len(names) == len(set(names))
