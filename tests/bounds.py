"""How far a float32 kernel may be from the float64 reference: first-order rounding analysis.

Each bound counts the roundings on the longest chain of operations of one output element, times
the size of what is rounded (Higham, "Accuracy and Stability of Numerical Algorithms", ch. 3).
Vectors have 16 lanes and their lanes are added in a tree of 4 levels.
"""

import math

import torch
from torch import Tensor

from mobilellm_fast import reference
from mobilellm_fast.quant import GROUP, PackedWeight, unpack

U = 2.0**-24  # unit roundoff of float32
PAGE = 128  # tokens that attention reduces at once


def _chain(n: int) -> int:
    """Roundings of a sum of n products: one fma per vector, then the lanes."""
    return -(-n // 16) + 4


def assert_right(stem: str, args: tuple, got: Tensor | tuple[Tensor, ...]) -> None:
    """Hold the result of a kernel to the reference: exactly where it is exact, else in its bound.

    Args:
        stem: name of the op.
        args: its arguments, float32 where floating.
        got: what `cases.run_kernel` returned for them.
    """
    if stem == "quantize_per_token":
        for part, want in zip(got, reference.quantize_per_token(*args), strict=True):
            assert torch.equal(part, want), f"{stem} is not the reference's"
    elif stem == "linear" and args[2] == args[5] == "int8":  # integer sums: exact
        assert torch.equal(got, reference.linear(*args)), f"{stem} is not the reference's"
    else:
        exact = tuple(
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
        want = _exact(stem, exact)
        bound, error = error_bound(stem, exact), (got.double() - want).abs()
        assert got.shape == want.shape, f"{stem} has shape {got.shape}, not {want.shape}"
        worst = (error / bound.clamp(min=1e-300)).max()
        # a comparison with NaN is false
        assert (error <= bound).all(), f"error of {stem} is {worst:.2f} times its bound"
        # A bound that admits a wrong answer is none.
        assert bound.max() < 1e-3 * want.abs().max()


def _exact(stem: str, args: tuple) -> Tensor:
    if stem == "swiglu" and len(args) > 3:
        x, gate, up, kind, activation, rows, cols = args
        gate, up = (reference.linear(x, w, kind, rows, cols, activation) for w in (gate, up))
        return torch.nn.functional.silu(gate) * up
    return getattr(reference, stem)(*args)


def error_bound(stem: str, args: tuple) -> Tensor:
    """Return the largest allowed error of each output element.

    Args:
        stem: name of the op.
        args: its arguments, float64 where floating.
    """
    return _BOUNDS[stem](*args)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # The root halves the error of the mean; then: mean, eps, root, reciprocal, two products.
    return (0.5 * _chain(x.shape[-1]) + 6) * U * reference.rms_norm(x, weight, eps).abs()


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (
        2
        * U
        * reference.rope(x.abs(), cos.abs(), -sin.abs())
        .abs()
        .maximum(reference.rope(x.abs(), cos.abs(), sin.abs()).abs())
    )


def _gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    seq, heads, dim = q.shape[1:]
    kv_seq, kv_heads = k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    hidden = torch.ones(seq, kv_seq, dtype=torch.bool).tril(kv_seq - seq).logical_not()
    # a score is one chain over head_dim, scaled by a rounded product, reduced by the largest
    sizes = torch.einsum("bshd,bthd->bhst", q.abs(), k.abs()) * scale
    scores, sizes = scores.masked_fill(hidden, -math.inf), sizes.masked_fill(hidden, 0)
    distance = (scores - scores.amax(-1, keepdim=True)).masked_fill(hidden, 0).abs()
    weights = scores.softmax(-1)
    score_error = (dim + 3) * U * sizes.amax(-1, keepdim=True) + U * distance
    pages = -(-kv_seq // PAGE)
    rest = (min(kv_seq, PAGE) + 8 * pages + 16) * U  # values, e^x (4), sums, merges, division
    # an error e of all scores changes a weight by 2e, through its own term and through the sum
    total = torch.expm1(2 * score_error) + rest
    return torch.einsum("bhst,bthd->bshd", weights * total, v.abs())


def _swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, *packed) -> Tensor:
    if packed:
        kind, activation, rows, cols = packed
        shape = (kind, rows, cols, activation)
        gate, up = (reference.linear(x, w, *shape) for w in (gate_weight, up_weight))
        gate_error, up_error = (
            # exact integers, then two products
            2 * U * gate.abs().maximum(up.abs())
            if kind == activation == "int8"
            else _linear(x, w, *shape)
            for w in (gate_weight, up_weight)
        )
    else:
        terms = _chain(x.shape[-1])
        gate, up = x @ gate_weight.T, x @ up_weight.T
        gate_error = terms * U * (x.abs() @ gate_weight.abs().T)
        up_error = terms * U * (x.abs() @ up_weight.abs().T)
    silu = torch.nn.functional.silu(gate).abs()
    silu_error = 1.1 * gate_error + 6 * U * silu  # slope at most 1.1; e^x (4), sum, quotient
    return up.abs() * silu_error + silu * up_error + silu_error * up_error + U * silu * up.abs()


def _linear(x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str) -> Tensor:
    if activation == "float":
        weight = reference.dequantize(packed, kind, rows, cols).to(torch.float64)
        return _chain(cols) * U * (x.abs() @ weight.abs().T)
    assert (kind, activation) != ("int8", "int8"), "exact"
    grid = unpack(PackedWeight(kind, rows, cols, packed.numpy()))
    values = reference.round_activations(x.to(torch.float32), activation)
    values, weight_codes = (
        torch.nn.functional.pad(t.to(torch.float64), (0, -cols % GROUP)).unflatten(-1, (-1, GROUP))
        for t in (values, torch.from_numpy(grid.codes))
    )
    # what is added up: a product with the scale of each group, and one with its min
    sums = torch.einsum("mgi,rgi->mrg", values, weight_codes)
    scales = torch.from_numpy(grid.scales).to(torch.float64).reshape(rows, -1)
    size = (sums * scales).abs().sum(-1)
    if grid.minimums is not None:
        mins = torch.from_numpy(grid.minimums).to(torch.float64).abs()
        size += values.sum(-1).abs() @ mins.T
    # an fma for each of them; the products with the scales of input and weight
    terms = 2 * weight_codes.shape[1] + 3
    return terms * U * size


_BOUNDS = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "gqa_attention": _gqa_attention,
    "swiglu": _swiglu,
    "linear": _linear,
}
