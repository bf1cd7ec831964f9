"""Whether Triton is there, and new enough for the kernels, without importing it."""

import functools
import importlib.metadata
import importlib.util
import re

NAMES = ("triton", "pytorch-triton-rocm", "pytorch-triton")  # under which it is installed
LEAST = (3, 5)  # with `constexpr_function` and `tensor_descriptor`; torch brings it from 2.9 on


@functools.cache
def has_triton() -> bool:
    """Tell whether the kernels can be compiled; torch 2.6 to 2.8 bring a Triton that is too old."""
    if importlib.util.find_spec("triton") is None:
        return False
    for name in NAMES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", version)
        return numbers is None or tuple(map(int, numbers.groups())) >= LEAST
    return True
