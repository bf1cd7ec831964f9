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


def from_row_major(codes: np.ndarray, scales: np.ndarray, cols: int) -> QuantizedTensor:
    """Undo `to_row_major` for a matrix with that many columns."""
    if codes.dtype == np.int8:
        return QuantizedTensor("int8" if scales.ndim == 1 else "int8_g32", codes, scales)
    pairs = codes.reshape(len(codes), -1, GROUP // 2)
    values = np.concatenate((pairs & 15, pairs >> 4), axis=-1).reshape(len(codes), -1)
    return QuantizedTensor(
        "int4_g32", np.ascontiguousarray(values[:, :cols]), scales[..., 0], scales[..., 1]
    )
