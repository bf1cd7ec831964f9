"""The next token from one hidden state, the head's rows streamed through shared memory."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..counters import counters_of
from .loader import HALVES, loaded, multiprocessors, one_token_on

SOURCE = Path(__file__).parent / "one_token" / "head_sample.cu"
THREADS = 512
RING_NBYTES = 100 << 10  # of a program, of which a multiprocessor has room for the next kernel's
DEEPEST = 16  # rows of a warp that are on their way
SHALLOWEST = 2  # that keep memory busy
NARROWEST = 256  # columns for which all lanes copy


class Arguments(ctypes.Structure):
    """`Arguments` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "rows", "shares", "counter", "id", "logprob")),
        ("seed", ctypes.c_ulonglong),
        ("inverse", ctypes.c_float),
        ("vocab", ctypes.c_int),
    ]


def depth(cols: int) -> int:
    """Return how many rows of a warp are on their way."""
    return min(RING_NBYTES // (THREADS // 32 * cols * 2), DEEPEST)


@functools.cache
def constants(cols: int, dtype: torch.dtype, sample: bool) -> tuple[tuple[str, int], ...]:
    """Return the constants of the source."""
    return tuple(
        dict(
            COLS=cols,
            THREADS=THREADS,
            DEPTH=depth(cols),
            HALF_IS_BF16=int(dtype == torch.bfloat16),
            SAMPLE=int(sample),
            RESIDENT=1,
        ).items()
    )


def takes(x: Tensor, codes: Tensor) -> bool:
    """Whether the kernel takes one hidden state and a head's weights, both contiguous."""
    cols = codes.shape[-1]
    if x.dtype not in HALVES or codes.dtype != x.dtype or not one_token_on(x.device):
        return False
    if cols % 8 or cols < NARROWEST or depth(cols) < SHALLOWEST:
        return False
    return (x.data_ptr() | codes.data_ptr()) % 16 == 0


def choose(
    x: Tensor, codes: Tensor, inverse: float, seed: int, ids: Tensor, logprobs: Tensor
) -> bool:
    """Write the choice of `head_sample` to ids and logprobs; False, and nothing, if it cannot now.

    Args:
        x, codes: that `takes` lets pass, on the current GPU.
        inverse: of the temperature; 0 takes the largest logit.
    """
    vocab, cols = codes.shape
    found = loaded(SOURCE, constants(cols, x.dtype, inverse > 0), x.get_device())
    if found is None:
        return False
    programs = multiprocessors(x.device)
    shares = x.new_empty(programs, 2, 4, dtype=torch.float32)
    counter = counters_of(x.device, 1)
    arguments = Arguments(
        *(tensor.data_ptr() for tensor in (x, codes, shares, counter, ids, logprobs)),
        seed & 2**64 - 1,
        inverse,
        vocab,
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream
    found.launch_clusters(arguments, (programs, 1, 1), THREADS, 1, stream)
    return True
