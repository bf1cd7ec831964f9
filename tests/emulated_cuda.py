"""CUDA kernels on machines without a GPU: compiled for the CPU, their threads run as fibers.

The kernels reach the GPU only through `#include <primitives.cuh>`; for CPUs, the folder of
tests/cpp/ that is named as the kernel's has it.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

INCLUDE = Path(__file__).parent / "cpp" / "ring"
# No contraction: a product and a sum are fused where the source says so. A fortified longjmp takes
# a jump to another stack for an error.
FLAGS = "-std=c++17 -O1 -shared -fPIC -fvisibility=hidden -ffp-contract=off -U_FORTIFY_SOURCE"


def compile_kernel(
    source: Path,
    constants: Mapping[str, int | str],
    include: Path = INCLUDE,
    name: str | None = None,
) -> Callable[..., None]:
    """Compile a kernel of a CUDA source for the CPU, with the C++ compiler that installing takes.

    `constants` become macros, THREADS among them. `name` is the kernel's, by default the file's.
    What is returned is called with `(arguments: ctypes.Structure, programs: int, seed: int = 0,
    shared_nbytes: int = 65536)`, and raises RuntimeError if the threads wait for each other
    forever or misuse a primitive. Other seeds are other orders of the threads (scheduler.h).
    """
    library = _library(source.resolve(), tuple(sorted(constants.items())), include.resolve())
    name = name or source.stem
    emulate = library[f"emulate_{name}"]
    emulate.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
    arguments_nbytes = library[f"arguments_nbytes_{name}"]()

    def run(
        arguments: ctypes.Structure, programs: int, seed: int = 0, shared_nbytes: int = 65536
    ) -> None:
        if ctypes.sizeof(arguments) != arguments_nbytes:
            raise TypeError(
                f"{name} takes {arguments_nbytes} bytes of arguments, "
                f"got {ctypes.sizeof(arguments)} of {type(arguments).__name__}"
            )
        if programs < 1:
            raise ValueError(f"programs must be at least 1, got {programs}")
        if emulate(ctypes.addressof(arguments), programs, seed, shared_nbytes):
            error = library.emulation_error().decode()
            raise RuntimeError(f"{name}, seed {seed}: {error}")

    return run


@functools.cache
def _library(source: Path, constants: tuple, include: Path) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{source.stem}.so")
        macros = [f"-D{key}={value}" for key, value in constants]
        command = [*compiler, *FLAGS.split(), *macros, f"-I{include}", "-x", "c++", source]
        done = subprocess.run([*command, "-o", path], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
        library = ctypes.CDLL(str(path))
    library.emulation_error.restype = ctypes.c_char_p
    return library
