"""Matrix products of Hopper's tensor cores, `wgmma/product.cu`: W8A8, and SwiGLU.

Triton's kernels take every product; `kernels/int8_gemm.py` and `kernels/swiglu.py` decide which are
faster here.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MobileLLMError
from ..cuda_source import with_context
from .loader import HALVES, loaded, multiprocessors, runs_on

SOURCE = Path(__file__).parent / "wgmma" / "product.cu"
__all__ = ["HALVES", "int8_gemm", "runs_on", "swiglu"]

THREADS, CLUSTER = 384, 2
CLUSTER_ROWS = 256  # of the tiles of a cluster, which lie below each other
INT8_WIDTH, SWIGLU_WIDTH = 192, 128  # of the tiles
STRIP_ROWS, STRIP = 64, 64  # of a box of the result
STEP_NBYTES = 128  # of a box of a factor
KEPT = 4096  # arguments, by the addresses in them
# CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion of cuda.h
DATA_TYPES = {torch.int8: 0, torch.float16: 6, torch.bfloat16: 9}
SWIZZLE_128B, PROMOTE_TO_256B = 3, 3
MAP_NBYTES, MAP_ALIGNMENT = 128, 64

TensorMap = ctypes.c_ubyte * MAP_NBYTES


class Arguments(ctypes.Structure):
    """`Arguments` of the source, whose size is a multiple of its alignment."""

    _fields_ = [
        *((name, TensorMap) for name in ("x", "weight", "second", "out")),
        *((name, ctypes.c_void_p) for name in ("x_scales", "weight_scales")),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "cols")),
        ("padding", ctypes.c_int * 9),
    ]


def constants(int8: bool, dtype: torch.dtype) -> dict[str, int]:
    """Return the constants of the source for results of a dtype."""
    return dict(THREADS=THREADS, INT8=int(int8), HALF_IS_BF16=int(dtype == torch.bfloat16))


def int8_gemm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, out: Tensor
) -> bool:
    """Write the product of `kernels.int8_gemm` without a bias; False, and nothing, if it cannot.

    Args:
        x, weight, out: matrices whose rows lie one behind the other, addresses and rows multiples
            of 16 bytes, on a GPU of `runs_on`, the current one.
        out: bfloat16 or float16.
    """
    if out.dtype not in HALVES or weight_scales.data_ptr() % 8:
        return False
    scales = x_scales.data_ptr(), weight_scales.data_ptr()
    return _multiply((x, weight, weight, out), scales, INT8_WIDTH, INT8_WIDTH // 2, early=True)


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, out: Tensor) -> bool:
    """Write the result of `kernels.swiglu`; False, and nothing, if it cannot.

    Args: as of `int8_gemm`, in one dtype.

    Numerics: as of `kernels.swiglu`, with the exponential and the quotient of fast arithmetic.
    """
    if out.dtype not in HALVES:
        return False
    # kernels as long as this gain nothing by being set up early
    matrices = x, gate_weight, up_weight, out
    return _multiply(matrices, (0, 0), SWIGLU_WIDTH, SWIGLU_WIDTH, early=False)


def _multiply(
    matrices: tuple[Tensor, Tensor, Tensor, Tensor],
    scales: tuple[int, int],
    width: int,
    weight_rows: int,
    early: bool,
) -> bool:
    x, weight, _, out = matrices
    device = x.get_device()
    chosen = tuple(constants(x.dtype == torch.int8, out.dtype).items())
    product = loaded(SOURCE, chosen, device, "a")
    if product is None:
        return False
    (rows, cols), outputs = x.shape, len(weight)
    addresses = tuple(matrix.data_ptr() for matrix in matrices)
    arguments = _arguments(addresses, scales, rows, outputs, cols, weight_rows, x.dtype, out.dtype)
    tiles = -(-rows // CLUSTER_ROWS) * -(-outputs // width)
    programs = CLUSTER * min(tiles, _clusters(device))
    stream = torch.cuda.current_stream(device).cuda_stream
    product.launch_clusters(arguments, (programs, 1, 1), THREADS, CLUSTER, stream, early)
    return True


@functools.cache
def _clusters(device: int) -> int:
    """Clusters that a GPU runs at a time: a program fills a multiprocessor's shared memory."""
    return multiprocessors(torch.device("cuda", device)) // CLUSTER


@functools.lru_cache(KEPT)
def _arguments(
    addresses: tuple[int, int, int, int],
    scales: tuple[int, int],
    rows: int,
    outputs: int,
    cols: int,
    weight_rows: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Arguments:
    """Describe matrices at addresses; nobody writes to what is returned."""
    x, weight, second, out = addresses
    inputs = STEP_NBYTES // dtype.itemsize
    tile = (weight_rows, inputs)
    first_map = tensor_map(weight, (outputs, cols), tile, dtype)
    same = second == weight
    return Arguments(
        tensor_map(x, (rows, cols), (CLUSTER_ROWS // CLUSTER, inputs), dtype),
        first_map,
        first_map if same else tensor_map(second, (outputs, cols), tile, dtype),
        tensor_map(out, (rows, outputs), (STRIP_ROWS, STRIP), out_dtype),
        *scales,
        *(rows, outputs, cols),
    )


@functools.lru_cache(KEPT)
def tensor_map(
    address: int, shape: tuple[int, int], box: tuple[int, int], dtype: torch.dtype
) -> TensorMap:
    """Describe boxes (rows, cols) of a row-major matrix, their rows swizzled, to the copy engine.

    `cuda.bindings` has this function, too, but gives it a place that is not aligned as C has it.
    """
    place = (ctypes.c_ubyte * (MAP_NBYTES + MAP_ALIGNMENT))()
    start = -ctypes.addressof(place) % MAP_ALIGNMENT
    (rows, cols), nbytes = shape, dtype.itemsize
    arguments = (
        ctypes.c_void_p(ctypes.addressof(place) + start),
        DATA_TYPES[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(cols, rows),
        (ctypes.c_uint64 * 1)(cols * nbytes),
        (ctypes.c_uint32 * 2)(*box[::-1]),
        (ctypes.c_uint32 * 2)(1, 1),  # no element is left out
        0,  # not interleaved
        SWIZZLE_128B,
        PROMOTE_TO_256B,
        0,  # zeros outside of the matrix
    )
    (status,) = with_context(lambda: (_driver().cuTensorMapEncodeTiled(*arguments),))
    if status:
        raise MobileLLMError(f"[cuda] cuTensorMapEncodeTiled failed: {status}")
    return TensorMap.from_buffer_copy(place, start)


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuTensorMapEncodeTiled.restype = ctypes.c_int
    return library
