"""Quantized weights as a GPU reads them: row by row, codes and scales apart.

The layouts are stated in `kernels/weight_rows.py`.
"""

from __future__ import annotations

import numpy as np

from .quant import GROUP, INT4_KINDS, QuantizedTensor

KINDS = ("int8", "int8_g32", "int4_g32")  # what is stored so


def stored_kind(kind: str) -> str:
    """What a matrix of this kind is stored as: 4 bits have minimums here, whatever they are."""
    return "int4_g32" if kind in INT4_KINDS else kind


def to_row_major(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Lay codes out for a GPU.

    Args:
        tensor: (rows, cols) codes on a grid.

    Returns:
        codes and scales: (rows, cols) int8 and (rows,) float32 or (rows, groups) float16, or for
        `INT4_KINDS` (rows, groups * 16) uint8 and (rows, groups, 2) float16.
    """
    if tensor.kind not in INT4_KINDS:
        return np.ascontiguousarray(tensor.codes), np.ascontiguousarray(tensor.scales)
    rows, cols = tensor.shape
    codes = np.pad(tensor.codes, ((0, 0), (0, -cols % GROUP))).reshape(rows, -1, GROUP)
    low, high = codes[..., : GROUP // 2], codes[..., GROUP // 2 :]
    scales = np.stack((tensor.scales, tensor.minimums.astype(np.float16)), axis=-1)
    return (low | high << 4).reshape(rows, -1), scales
