"""Programmatic dependent launch: a kernel is set up while the one before it still runs.

Such a kernel waits before it touches memory, so it is launched with no other care than any kernel;
it saves most of the time between the end of one and the first instructions of the next.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether kernels of a device can be set up before the one before has ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def early_options(device: torch.device) -> dict[str, bool]:
    """Return the options of a launch of a kernel that takes EARLY and waits as said below."""
    early = can_start_early(device)
    return {"EARLY": early, **({"launch_pdl": True} if early else {})}


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Let the kernel behind be set up."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait for the kernel before to end, and for what it wrote: before any load and store."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
