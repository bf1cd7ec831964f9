"""Compile Triton kernels for GPUs that are not here, and read what came out of the compiler.

A kernel's *build* is its function with the types and constants of one launch, and what must hold
of the machine code: registers, no spills, instructions that must appear. `builds_<area>.py` beside
this file each list some, `BUILDS`; `test_gpu_compile.py` checks all of them. Interpreted kernels
cannot be compiled, so this runs in a process of its own:

    python tests/compile_ahead.py sm_90 [-k WORD]    # prints one line of JSON per build
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ARCHES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Build:
    """A kernel as it is launched.

    Args:
        name: of the build, unique; begins with that of the kernel.
        kernel: "module:function" in `mobilellm_fast.kernels`.
        types: of the arguments that are no constants: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128,64]>", of a Gluon kernel with the layout behind the shape;
            ":16" behind one says that it is divisible by 16.
        constants: values of `tl.constexpr` parameters, and of those that are 1 or None.
        warps, stages: options of the launch.
        registers: the most that a thread may use on an NVIDIA GPU.
        spilled: the most bytes of a thread that may lie in memory instead, on an NVIDIA GPU.
        shared: the most bytes of shared memory on sm_90.
        needs: per arch, instructions that must appear: "LDG.E.128" also stands for
            "LDG.E.128.CONSTANT".
        serial: its matrix products may wait for each other, since factors come from registers.
        arches: that it is compiled for.
        quick: one of the few that every test run compiles.
        options: further options of the launch.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    registers: int = 255
    spilled: int = 0
    shared: int = 227 * 1024
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    serial: bool = False
    arches: tuple[str, ...] = tuple(ARCHES)
    quick: bool = False
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Code:
    """What the compiler made.

    Args:
        name: of the build.
        registers, spilled: per thread; registers, and bytes that did not fit into them.
        shared: bytes of shared memory per program.
        instructions: how often each stands in the code (NVIDIA only), in the order in which they
            first do.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]

    def count(self, instruction: str) -> int:
        """Count an instruction in all its forms."""
        forms = (n for k, n in self.instructions.items() if f"{k}.".startswith(f"{instruction}."))
        return sum(forms)


def all_builds() -> list[Build]:
    """List the builds of all `builds_*.py` beside this file."""
    here = Path(__file__).parent
    modules = sorted(path.stem for path in here.glob("builds_*.py"))
    return [build for module in modules for build in importlib.import_module(module).BUILDS]


def compile_build(build: Build, arch: str) -> Code:
    """Compile for an arch of `ARCHES`; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = build.kernel.split(":")
    kernel = getattr(importlib.import_module(f"mobilellm_fast.kernels.{module}"), function)
    types = {name: kind.removesuffix(":16") for name, kind in build.types.items()}
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    divisible = [kernel.arg_names.index(n) for n, k in build.types.items() if k.endswith(":16")]
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    dtypes = {"tl.float16": triton.language.float16}
    constants = {name: dtypes.get(value, value) for name, value in build.constants.items()}
    source = source(kernel, signature, constants, attributes)
    target = GPUTarget(*ARCHES[arch])
    options = {"num_warps": build.warps, "num_stages": build.stages, **build.options}
    compiled = triton.compile(source, target=target, options=options)
    read = _read_amd if target.backend == "hip" else _read_nvidia
    return Code(build.name, *read(compiled))


def _read_nvidia(compiled) -> tuple[int, int, int, dict[str, int]]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.a-z]*)", text, re.M)
    instructions = Counter(code)
    # a spill is a local load or store; the stack alone may hold an indexed array
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local, compiled.metadata.shared, dict(instructions)


def _read_amd(compiled) -> tuple[int, int, int, dict[str, int]]:
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spilled, compiled.metadata.shared, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=ARCHES)
    parser.add_argument("-k", default="", help="compile builds with this in their name")
    parser.add_argument("--quick", action="store_true", help="only those of every test run")
    options = parser.parse_args()
    for build in all_builds():
        chosen = options.k in build.name and (build.quick or not options.quick)
        if chosen and options.arch in build.arches:
            print(json.dumps(asdict(compile_build(build, options.arch))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
