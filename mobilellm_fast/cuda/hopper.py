"""Which GPUs run CUDA C++ for Hopper, and its kernels, loaded once."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from .cuda_source import Kernel, kernel

HALVES = (torch.bfloat16, torch.float16)

_loaded: dict[tuple, Kernel] = {}


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether a GPU has the instructions, and the machine what compiles them."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError):
        return False
    return True


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def loaded(source: Path, constants: tuple[tuple[str, int], ...], device: int) -> Kernel | None:
    """Return a kernel of the current GPU; None if, as a graph is captured, it cannot be loaded."""
    key = source, constants, device
    found = _loaded.get(key)
    if found is None and not torch.cuda.is_current_stream_capturing():
        found = _loaded[key] = kernel(*key)
    return found
