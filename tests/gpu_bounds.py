"""How far a GPU kernel may be from the float64 reference (see `bounds`): any order of sums.

Arguments are the kernel's own, rounded to its dtype; results are rounded to `dtype` once more.
"""

import torch
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32
UNITS = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUM = 2 * U  # of each term of a product: matrix units cut what they add instead of rounding it


def assert_within(got: Tensor, want: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """Hold a result to its bound, and the rounding to its dtype; NaN is never within."""
    assert got.dtype == dtype and got.shape == want.shape
    got, want, bound = (t.cpu().double() for t in (got, want, bound))
    tiny = torch.finfo(dtype).tiny  # results below this may be flushed to zero
    allowed = bound + UNITS[dtype] * (want.abs() + bound) + tiny
    error = (got - want).abs()
    assert (error <= allowed).all(), f"{(error / allowed).nan_to_num(torch.inf).max():.2f} bounds"
    # A bound that admits a wrong answer is none.
    assert allowed.max() < (5e-3 if dtype == torch.float32 else 5e-2) * want.abs().max()


def rms_norm(x: Tensor, want: Tensor) -> Tensor:
    # the mean's error counts half; then its root, to 2 bits, and three products
    return (0.5 * x.shape[-1] + 8) * U * want.abs()


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Bounds of the gradients of x and of the weight, all float64."""
    cols = x.shape[-1]
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, inner = (x * factor).abs(), (grad * weight).abs()
    size = factor * (inner + 2 * normed * (inner * normed).mean(-1, keepdim=True))
    shares = (grad * normed).abs().flatten(0, -2)
    return (cols + 16) * U * size, (0.5 * cols + len(shares) + 8) * U * shares.sum(0)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.abs().chunk(2, -1)
    cos, sin = cos.abs().unsqueeze(-2), sin.abs().unsqueeze(-2)
    return 2 * U * torch.cat((first * cos + second * sin, second * cos + first * sin), -1)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.shape[-1] * SUM * (x.abs() @ weight.abs().T)


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    gate, up = x @ gate_weight.T, x @ up_weight.T
    gate_error, up_error = product(x, gate_weight), product(x, up_weight)
    silu = torch.nn.functional.silu(gate).abs()
    # slope at most 1.1; an exponential is as far off as its argument is large
    silu_error = 1.1 * gate_error + (gate.abs() + 8) * U * silu
    return up.abs() * silu_error + silu * up_error + silu_error * up_error + U * silu * up.abs()


def swiglu_derivative(
    grad: Tensor, gate: Tensor, up: Tensor, unit: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradients of the projections, and their bounds with a rounding to a dtype of that unit."""
    sigmoid = gate.sigmoid()
    far = (gate.abs() + 12) * U
    sizes = sigmoid * (1 + gate.abs() * (1 - sigmoid)), (gate * sigmoid).abs()
    exact = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    errors = (grad * up).abs() * sizes[0] * far, grad.abs() * sizes[1] * far
    rounded = (e + unit * (d.abs() + e) for e, d in zip(errors, exact, strict=True))
    return exact, tuple(rounded)


def gumbel(noise: Tensor) -> Tensor:
    # rounding u near 1 shows in the least noise, -log(e) with 1 - u = exp(-e)
    e = torch.exp(-noise)
    return 16 * U * (1 + noise.abs()) + 2 * U * torch.exp(e) / e
