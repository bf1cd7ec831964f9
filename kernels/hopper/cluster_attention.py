"""Decode attention by clusters of programs, which merge what they found in shared memory."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from .loader import HALVES, loaded, multiprocessors, one_token_on

SOURCE = Path(__file__).parent / "one_token" / "gqa_decode.cu"
HEAD_DIM, LARGEST_GROUP = 64, 8
LARGEST_BATCH = 2**16 - 1  # of a grid
LARGEST_CAPACITY = 2**28  # so that the bytes of a warp's keys are counted in 32 bits
THREADS, RESIDENT = 128, 3  # of a program, and programs that a multiprocessor has room for
WIDE, NARROW = 16, 8  # programs of a cluster
LOG2_E = math.log2(math.e)


class Arguments(ctypes.Structure):
    """`Arguments` of the source; strides in bytes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "lengths", "out")),
        *((name, ctypes.c_longlong) for name in ("q_batch", "q_head")),
        *((name, ctypes.c_longlong) for name in ("k_batch", "k_head", "k_seq")),
        *((name, ctypes.c_longlong) for name in ("v_batch", "v_head", "v_seq")),
        *((name, ctypes.c_longlong) for name in ("out_batch", "out_head")),
        ("scale", ctypes.c_float),
        ("capacity", ctypes.c_int),
    ]


@functools.cache
def constants(
    group: int, dtype: torch.dtype, in_one_piece: bool, cluster: int
) -> tuple[tuple[str, int], ...]:
    """Return the constants of the source; `in_one_piece`: rows lie one behind the other."""
    return tuple(
        dict(
            CLUSTER=cluster,
            THREADS=THREADS,
            GROUP=group,
            HALF_IS_BF16=int(dtype == torch.bfloat16),
            IN_ONE_PIECE=int(in_one_piece),
            RESIDENT=RESIDENT,
        ).items()
    )


def cluster_of(pairs: int, processors: int) -> int:
    """Return how many programs take a sequence and key/value head.

    The more the sooner, as long as all are on the GPU at once. Results do not depend on it.
    """
    return WIDE if pairs * WIDE <= processors * RESIDENT else NARROW


def takes(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these; head_dim lies in one piece in the first three."""
    if q.shape[-1] != HEAD_DIM or q.dtype not in HALVES or not one_token_on(q.device):
        return False
    if not len(q) <= LARGEST_BATCH >= k_cache.shape[1]:
        return False
    if {k_cache.dtype, v_cache.dtype, out.dtype} != {q.dtype} or out.stride(-1) != 1:
        return False
    if q.shape[1] > LARGEST_GROUP * k_cache.shape[1] or k_cache.shape[2] > LARGEST_CAPACITY:
        return False
    bits = 0
    for tensor in (q, k_cache, v_cache, out):
        bits |= tensor.data_ptr()
        for stride in tensor.stride()[:-1]:
            bits |= stride * tensor.element_size()
    return bits % 16 == 0


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float, out: Tensor
) -> bool:
    """Write the attention of `gqa_decode` to `out`; False, and nothing, if that cannot be now.

    Args: those that `takes` lets pass, on the current GPU; `scale` is positive.
    """
    batch, heads, _ = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    in_one_piece = k_cache.stride(2) == v_cache.stride(2) == HEAD_DIM
    cluster = cluster_of(batch * kv_heads, multiprocessors(q.device))
    chosen = constants(heads // kv_heads, q.dtype, in_one_piece, cluster)
    found = loaded(SOURCE, chosen, q.get_device())
    if found is None:
        return False
    nbytes = q.element_size()
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2])
    arguments = Arguments(
        *(tensor.data_ptr() for tensor in (q, k_cache, v_cache, lengths, out)),
        *(stride * nbytes for stride in strides),
        scale * LOG2_E,
        capacity,
    )
    stream = torch.cuda.current_stream(q.device).cuda_stream
    found.launch_clusters(arguments, (cluster, kv_heads, batch), THREADS, cluster, stream)
    return True
