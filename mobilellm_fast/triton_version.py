"""Whether Triton is there, and new enough for the kernels, without importing it."""

import functools
import importlib.metadata
import importlib.util

LEAST = (3, 5)  # with `constexpr_function` and `tensor_descriptor`; torch brings it from 2.9 on


@functools.cache
def has_triton() -> bool:
    """Tell whether the kernels can be compiled; torch 2.6 to 2.8 bring a Triton that is too old."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # it comes under other names, too
        return True
    return tuple(int(number) for number in version.split(".")[:2]) >= LEAST
