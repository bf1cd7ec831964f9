"""Rounding to 4 bits better than to the nearest code of the group's range.

With the second moments of a layer's inputs, the scale and the minimum of a group are searched, and
the error of each column is made up for by the columns that are still to be rounded.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..quant import GROUP, QuantizedTensor

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range; below, too much is cut off
REFITS = 2  # least-squares fits of scale and minimum to the codes; a third changes nothing
DAMPING = 0.01  # of the mean second moment: keeps the inverse finite
HIGHEST = 15


def round_int4(weight: Tensor, moments: Tensor, symmetric: bool = False) -> QuantizedTensor:
    """Round a matrix to 4-bit codes in groups of 32 with a scale and a minimum each.

    Minimises `trace((W - W') M (W - W')^T)`, the squared error of the layer's outputs, column by
    column.

    Args:
        weight: (rows, cols) float32.
        moments: (cols, cols) float32, the mean of `x x^T` over inputs x.
        symmetric: take the grid of GGUF's Q4_0, on which the minimum is -8 scales: 4.5 bits per
            weight instead of 5.

    Returns:
        of kind "int4_g32" or "int4_sym_g32".

    Reference: Frantar et al., https://arxiv.org/abs/2210.17323, with the group's grid searched
    """
    rest = weight.detach().to(torch.float32, copy=True)
    rows, cols = rest.shape
    groups = -(-cols // GROUP)
    moments = moments.clone()
    diagonal = moments.diagonal()
    diagonal += DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(rows, cols)
    scales, mins = torch.empty(rows, groups), torch.empty(rows, groups)
    for group in range(groups):
        start, end = group * GROUP, min((group + 1) * GROUP, cols)
        part = rest[:, start:end]  # (rows, 32)
        scale, low = search_grid(part, diagonal[start:end], symmetric)
        scales[:, group], mins[:, group] = scale, low
        errors = torch.empty_like(part)
        for column in range(start, end):
            value = rest[:, column]
            code = to_codes(value, scale, low)
            codes[:, column] = code
            error = (value - (code * scale + low)) / inverse[column, column]
            rest[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    grid = codes.to(torch.uint8).numpy(), scales.numpy().astype(np.float16)
    if symmetric:
        return QuantizedTensor("int4_sym_g32", *grid)
    return QuantizedTensor("int4_g32", *grid, mins.numpy().astype(np.float16))


def search_grid(part: Tensor, importance: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Find scale and minimum, (rows,) each and exact in float16, for groups (rows, n).

    Args:
        importance: (n,), weights of the squared errors.
    """
    best = scale = low = None
    for shrink in SHRINKS:
        candidate = _range(part, shrink, symmetric)
        for refit in range(REFITS + 1):
            codes = to_codes(part, *(t[:, None] for t in candidate))
            values = codes * candidate[0][:, None] + candidate[1][:, None]
            error = ((part - values).square() * importance).sum(-1)
            if best is None:
                best, (scale, low) = error, candidate
            else:
                better = error < best
                best = torch.where(better, error, best)
                scale, low = (
                    torch.where(better, c, old)
                    for c, old in zip(candidate, (scale, low), strict=True)
                )
            if refit < REFITS:
                candidate = _fit(part, codes, importance, symmetric)
    return scale, low


def to_codes(values: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The nearest codes, as floats; 0 where the scale is 0."""
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return ((values - low) * inverse).round_().clamp_(0, HIGHEST)


def _range(part: Tensor, shrink: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:  # as Q4_0: the value of largest magnitude is code 0 or, shrunk, beyond it
        peak = part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0]
        return _symmetric(peak * shrink / -8)
    low, high = part.amin(1), part.amax(1)
    middle, half = (low + high) / 2, (high - low) / 2 * shrink
    low = _half(middle - half)
    return _half((middle + half - low) / HIGHEST), low


def _fit(part: Tensor, codes: Tensor, importance: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and minimum with the least squared error for given codes."""
    if symmetric:
        centred = codes - 8
        norm = (importance * centred.square()).sum(-1)
        return _symmetric((importance * centred * part).sum(-1) / norm.clamp(min=1e-30))
    total = importance.sum()
    code_mean, part_mean = (codes * importance).sum(-1) / total, (part * importance).sum(-1) / total
    off = codes - code_mean[:, None]
    spread = (importance * off.square()).sum(-1)
    scale = (importance * off * part).sum(-1) / spread.clamp(min=1e-30)
    scale = _half(scale.clamp(min=0))
    return scale, _half(part_mean - scale * code_mean)


def _symmetric(scale: Tensor) -> tuple[Tensor, Tensor]:
    scale = _half(scale)
    return scale, -8 * scale


def _half(values: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).to(torch.float16).to(torch.float32)
