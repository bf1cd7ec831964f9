"""Which GPUs run CUDA C++ for Hopper, and its kernels, loaded once."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

from ...errors import MobileLLMError
from ..cuda_source import Kernel, NotNow, kernel

HALVES = (torch.bfloat16, torch.float16)
ONE_TOKEN = "MOBILELLM_FAST_ONE_TOKEN"  # 1 takes the kernels of one_token/

_loaded: dict[tuple, Kernel | None] = {}


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


def one_token_on(device: torch.device) -> bool:
    """Whether the kernels of one_token/ are taken: `runs_on`, and the environment asks.

    As they are, they ran as drafts and on a CPU alone (docs/gpu-decisions.md); tests on a GPU ask
    for them.
    """
    return os.environ.get(ONE_TOKEN) == "1" and runs_on(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def loaded(
    source: Path, constants: tuple[tuple[str, int], ...], device: int, own: str = ""
) -> Kernel | None:
    """Return a kernel of the current GPU, see `cuda_source.kernel`.

    None if it cannot be loaded: as a graph is captured, or memory is short, or, which a warning
    tells once, if the compiler and the driver do not suit each other.
    """
    key = source, constants, device, own
    if key not in _loaded and not torch.cuda.is_current_stream_capturing():
        try:
            _loaded[key] = kernel(*key)
        except NotNow:
            return None  # tried again by the next call
        except MobileLLMError as error:
            _loaded[key] = None
            warnings.warn(f"Triton's kernel is taken: {error}", stacklevel=2)
    return _loaded.get(key)
