"""CUDA C++ compiled for the GPU that is there, by NVRTC, which torch's CUDA builds bring along."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..cache import cache_directory
from ..errors import MobileLLMError
from ..files import whole_file

PORTABLE_CLUSTER = 8  # programs that every GPU with clusters has in one
CONFIGS = 1024  # of launches of clusters that are kept: each stream and grid has its own
DIGEST_NBYTES = 32  # of machine code in the cache, before it
PASSING = ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_STREAM_CAPTURE_")  # see `NotNow`
INVALID_CONTEXT = 201  # CUresult of cuda.h: this thread has none


class NotNow(MobileLLMError):
    """The driver refuses what it may do later: memory is short, or a thread captures a graph."""


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
    name = f"{source.stem}-{key[:32]}.cubin"
    with contextlib.suppress(OSError):
        stored = (cache_directory() / "cuda" / name).read_bytes()
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
    # a cache that cannot be written, or is nowhere, costs compiling again
    with contextlib.suppress(OSError), whole_file(cache_directory() / "cuda" / name) as file:
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
        use_context()
        (self._module,) = self._call(driver.cuModuleLoadData(code))
        (self._function,) = self._call(driver.cuModuleGetFunction(self._module, name.encode()))
        place, size = self._call(
            driver.cuModuleGetGlobal(self._module, f"{name}_shared_nbytes".encode())
        )
        shared = ctypes.c_uint()
        self._call(driver.cuMemcpyDtoH(ctypes.addressof(shared), place, size))
        self.shared_nbytes = shared.value
        self._large_clusters = False
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call(driver.cuFuncSetAttribute(self._function, attribute, self.shared_nbytes))

    def launch(self, arguments: ctypes.Structure, programs: int, threads: int, stream: int) -> None:
        """Start `programs` that are on the GPU all at once (a cooperative launch)."""
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._call(
            with_context(
                self._driver.cuLaunchCooperativeKernel,
                self._function,
                *(programs, 1, 1),
                *(threads, 1, 1),
                self.shared_nbytes,
                stream,
                ctypes.addressof(addresses),
            )
        )

    def launch_clusters(
        self,
        arguments: ctypes.Structure,
        grid: tuple[int, int, int],
        threads: int,
        cluster: int,
        stream: int,
        early: bool = True,
    ) -> None:
        """Start programs in clusters along x.

        Args:
            early: they are set up while the kernel before still runs, for which the kernel waits
                itself.
        """
        driver = self._driver
        if cluster > PORTABLE_CLUSTER and not self._large_clusters:
            allowed = (
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            )
            self._call(driver.cuFuncSetAttribute(self._function, allowed, 1))
            self._large_clusters = True
        config = _cluster_config(grid, threads, cluster, self.shared_nbytes, stream, early)
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        place = ctypes.addressof(addresses)
        self._call(with_context(driver.cuLaunchKernelEx, config, self._function, place, 0))

    def _call(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = result
        _check(status, self._driver)
        return tuple(values)


def with_context(call: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[Any, ...]:
    """Call the driver; in a thread that has no context yet, with that of the current GPU.

    torch's calls give a thread one where they need it, which not all do: what is allocated may come
    from torch's cache.

    Args:
        call: returns a CUresult, and what else.
    """
    result = call(*args)
    if int(result[0]) == INVALID_CONTEXT:
        use_context()
        result = call(*args)
    return result


def use_context() -> None:
    """Give this thread the context of the current GPU."""
    from cuda.bindings import driver

    _check(*driver.cuCtxSetCurrent(_context(torch.cuda.current_device())), driver)


@functools.cache
def _context(device: int) -> Any:
    """Return the context of a GPU that torch uses, too."""
    from cuda.bindings import driver

    status, handle = driver.cuDeviceGet(device)
    _check(status, driver)
    status, context = driver.cuDevicePrimaryCtxRetain(handle)
    _check(status, driver)
    return context


def _check(status: Any, library: Any) -> None:
    if int(status):
        name = library.__name__.rsplit(".", 1)[-1]
        passes = status.name.startswith(PASSING)
        raise (NotNow if passes else MobileLLMError)(f"[cuda] {name} failed: {status.name}")


@functools.lru_cache(CONFIGS)
def _cluster_config(
    grid: tuple[int, int, int], threads: int, cluster: int, shared: int, stream: int, early: bool
) -> Any:
    """Make what `cuLaunchKernelEx` wants, which takes longer than the launch."""
    from cuda.bindings import driver

    names = driver.CUlaunchAttributeID
    size = driver.CUlaunchAttribute()
    size.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    value = driver.CUlaunchAttributeValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
    size.value = value
    attributes = [size]
    if early:
        allowed = driver.CUlaunchAttribute()
        allowed.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        allowed.value.programmaticStreamSerializationAllowed = 1
        attributes.append(allowed)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@functools.cache
def kernel(
    source: Path, constants: tuple[tuple[str, int], ...], device: int, own: str = ""
) -> Kernel:
    """Compile and load the kernel of a file's name for the current GPU, once.

    Args:
        own: "a" for a kernel with instructions that no other generation of GPUs has.
    """
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) + own
    return Kernel(compile_source(source, dict(constants), arch), source.stem)
