"""Plain float tensors in a file: float32, float16 and bfloat16, widened to float32."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import CheckpointError
from ..quant import from_bf16

FLOAT_TYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # numpy has no bfloat16; its bits are the upper half of a float32
}
CHUNK = 1 << 18  # elements widened at a time, so that a tensor is held once and not twice


def read_floats(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Read a tensor that starts at byte `offset`; returns float32 of `shape`.

    The file is read, not mapped: mapped pages would count as memory of the process until the end.
    """
    out = np.empty(math.prod(shape), np.float32)
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, out.size, CHUNK):
            part = out[start : start + CHUNK]
            part[:] = widen(read_array(file, FLOAT_TYPES[dtype], part.size), dtype)
    return out.reshape(shape)


def read_array(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    """Read `count` elements at the file's position; a short file is an error, not a short array."""
    array = np.fromfile(file, dtype, count)
    if array.size != count:
        raise CheckpointError(f"{file.name}: the file ends inside a tensor")
    return array


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Convert numbers as stored to float32; exact."""
    return from_bf16(stored) if dtype == "bfloat16" else stored.astype(np.float32, copy=False)
