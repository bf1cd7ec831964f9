"""CUDA C++ compiled for the GPU that is there, by NVRTC, which torch's CUDA builds bring along."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..cache import cache_directory
from ..errors import MobileLLMError
from ..files import whole_file

DIGEST_NBYTES = 32  # of machine code in the cache, before it


def compile_source(source: Path, constants: Mapping[str, int], arch: str) -> bytes:
    """Compile a file, and those beside it that it includes, to machine code.

    Args:
        constants: macros.
        arch: such as "sm_90".

    Raises:
        MobileLLMError: the compiler is missing, or refuses; with its words.
    """
    try:
        from cuda.bindings import nvrtc

        _, *version = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise MobileLLMError(f"[load] {source.name} needs NVRTC: {error}") from None
    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--device-as-default-execution-space",
        f"--include-path={source.parent}",
        *(f"-D{name}={value}" for name, value in constants.items()),
    ]
    files = sorted((*source.parent.glob("*.cuh"), source))
    texts = [file.read_bytes() for file in files]
    chosen = [option for option in options if not option.startswith("--include-path")]
    key = hashlib.sha256(repr((version, chosen, texts)).encode()).hexdigest()
    cached = cache_directory() / "cuda" / f"{source.stem}-{key[:32]}.cubin"
    with contextlib.suppress(OSError):
        stored = cached.read_bytes()
        digest, code = stored[:DIGEST_NBYTES], stored[DIGEST_NBYTES:]
        if digest == hashlib.sha256(code).digest():
            return code

    status, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    _check(status, nvrtc)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise MobileLLMError(f"[load] {source.name} does not compile:\n{log.decode()}")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status, nvrtc)
        code = b" " * size
        _check(*nvrtc.nvrtcGetCUBIN(program, code), nvrtc)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    # a cache that cannot be written costs compiling again
    with contextlib.suppress(OSError), whole_file(cached) as file:
        file.write(hashlib.sha256(code).digest() + code)
    return code


class Kernel:
    """A kernel on the current GPU, which is launched with one structure of arguments.

    Args:
        code: what `compile_source` returned.
        name: of the function; the unsigned `<name>_shared_nbytes` beside it says how much shared
            memory a program takes.
    """

    def __init__(self, code: bytes, name: str) -> None:
        from cuda.bindings import driver

        self._driver = driver
        (self._module,) = self._call(driver.cuModuleLoadData(code))
        (self._function,) = self._call(driver.cuModuleGetFunction(self._module, name.encode()))
        place, size = self._call(
            driver.cuModuleGetGlobal(self._module, f"{name}_shared_nbytes".encode())
        )
        shared = ctypes.c_uint()
        self._call(driver.cuMemcpyDtoH(ctypes.addressof(shared), place, size))
        self.shared_nbytes = shared.value
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call(driver.cuFuncSetAttribute(self._function, attribute, self.shared_nbytes))

    def launch(self, arguments: ctypes.Structure, programs: int, threads: int, stream: int) -> None:
        """Start `programs` that are on the GPU all at once (a cooperative launch)."""
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._call(
            self._driver.cuLaunchCooperativeKernel(
                self._function,
                *(programs, 1, 1),
                *(threads, 1, 1),
                self.shared_nbytes,
                stream,
                ctypes.addressof(addresses),
            )
        )

    def _call(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = result
        _check(status, self._driver)
        return tuple(values)


def _check(status: Any, library: Any) -> None:
    if int(status):
        name = library.__name__.rsplit(".", 1)[-1]
        raise MobileLLMError(f"[cuda] {name} failed: {status.name}")


@functools.cache
def kernel(source: Path, constants: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """Compile and load the kernel of a file's name for the current GPU, once."""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return Kernel(compile_source(source, dict(constants), arch), source.stem)
