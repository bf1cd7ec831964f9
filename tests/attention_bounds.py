"""How far attention kernels may be from the float64 reference, element by element and on average.

With u the unit roundoff of the tensors' dtype and U that of float32: a kernel rounds the weights of
the softmax and the gradients of its scores to the dtype before it multiplies them, and its results;
all else is float32. `worst` adds up the largest that each rounding can be (Higham, "Accuracy and
Stability of Numerical Algorithms", ch. 3). `variance` takes them for independent, with a standard
deviation of at most u / sqrt(3) of what is rounded: a tight test of a result as a whole.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

U = 2.0**-24
UNIT = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {
    torch.float32: 0.0,
    torch.float16: 2.0**-25,
    torch.bfloat16: 0.0,
}  # half of the least number


@dataclass
class Expected:
    """A result in float64, the largest error of each element, and the square of a typical one."""

    value: Tensor
    worst: Tensor
    variance: Tensor

    def check(self, name: str, got: Tensor) -> None:
        error = (got.double() - self.value).abs()
        assert got.shape == self.value.shape, f"{name} has shape {tuple(got.shape)}"
        excess = (error / self.worst.clamp(min=1e-300)).max()
        # a comparison with NaN is false
        assert (error <= self.worst).all(), f"error of {name} is {excess:.2f} times its bound"
        typical, root = self.variance.mean().sqrt(), error.square().mean().sqrt()
        if got.dtype != torch.float32 and typical > 0:  # roundings to float32 are not in it
            few = 1 + 4 / math.sqrt(got.numel())
            assert root <= few * typical, (
                f"{name}: typical error is {root / typical:.2f} of its bound"
            )


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Expected:
    """Expect the result of causal attention; arguments as the kernel's."""
    return _Attention(q, k, v, scale).out()


def decode(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Expected:
    """Expect the result (1, heads, head_dim) of one sequence of a KV cache."""
    if length == 0:
        return Expected(*(torch.zeros_like(q, dtype=torch.float64) for _ in range(3)))
    k, v = (t[:, :, :length].transpose(1, 2) for t in (k, v))
    found = _Attention(q[:, None], k, v, scale).out()
    return Expected(found.value[:, 0], found.worst[:, 0], found.variance[:, 0])


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> tuple[Expected, Expected, Expected]:
    """Expect the gradients of q, k and v; `out` is the rounded result that the kernel is given."""
    return _Attention(q, k, v, scale).gradients(grad, out)


class _Attention:
    """Attention with heads of keys repeated; weights are (batch, heads, seq, kv_seq)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.u, self.tiny = UNIT[q.dtype], TINY[q.dtype]
        self.scale, self.group = scale, q.shape[2] // k.shape[2]
        self.q, self.k, self.v = q.double(), *(self._repeat(t.double()) for t in (k, v))
        seq, kv_seq = q.shape[1], k.shape[1]
        hidden = torch.ones(seq, kv_seq, dtype=torch.bool, device=q.device).tril(kv_seq - seq)
        hidden = hidden.logical_not()
        scores = torch.einsum("bshd,bthd->bhst", self.q, self.k) * scale
        scores = scores.masked_fill(hidden, -math.inf)
        self.weights = scores.softmax(-1)
        sizes = torch.einsum("bshd,bthd->bhst", self.q.abs(), self.k.abs()) * abs(scale)
        sizes = sizes.masked_fill(hidden, 0)
        distance = (scores - scores.amax(-1, keepdim=True)).masked_fill(hidden, 0).abs()
        largest = sizes.amax(-1, keepdim=True)
        # A score is a sum over head_dim in any order, which tensor cores may truncate, then scaled;
        # what is taken off it may have been rounded as a logarithm of a sum.
        self.score_error = (2 * q.shape[-1] + 8) * U * largest + 2 * U * distance
        self.terms = 2 * (max(kv_seq, seq * self.group) + 4 * kv_seq // 16 + 16) * U  # sums, merges

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.group, dim=2)

    def _reduce(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.group)).sum(3)

    def _weight_error(self) -> Tensor:
        """Relative, before rounding to the dtype: through a weight's own score and the sum's."""
        return torch.expm1(2 * self.score_error) + self.terms

    def out(self) -> Expected:
        value = torch.einsum("bhst,bthd->bshd", self.weights, self.v)
        error = self.weights * (self._weight_error() + self.u)
        worst = torch.einsum(
            "bhst,bthd->bshd", error + self.tiny * (self.weights > 0), self.v.abs()
        )
        variance = torch.einsum("bhst,bthd->bshd", self.weights**2, self.v**2) + value**2
        worst = worst + (self.u + U) * value.abs() + self.tiny
        return Expected(value, worst, variance * self.u**2 / 3)

    def gradients(self, grad: Tensor, out: Tensor) -> tuple[Expected, Expected, Expected]:
        u, tiny, scale, weights = self.u, self.tiny, self.scale, self.weights
        grad, out = grad.double(), out.double()
        exact_out = torch.einsum("bhst,bthd->bshd", weights, self.v)
        grad_weights = torch.einsum("bshd,bthd->bhst", grad, self.v)
        delta = torch.einsum("bshd,bshd->bhs", grad, exact_out)[..., None]
        grad_scores = weights * (grad_weights - delta)
        # the kernel's delta is that of the rounded result
        delta_error = torch.einsum("bshd,bshd->bhs", grad.abs(), (out - exact_out).abs())[..., None]
        sizes = torch.einsum("bshd,bthd->bhst", grad.abs(), self.v.abs())
        sizes = sizes + torch.einsum("bshd,bshd->bhs", grad.abs(), out.abs())[..., None]
        seen = weights > 0
        score_grad_error = (
            weights * (delta_error + (2 * grad.shape[-1] + 8) * U * sizes)
            + grad_scores.abs() * (self._weight_error() + u)
            + tiny * seen
        )
        weight_error = weights * (self._weight_error() + u) + tiny * seen

        def expect(value: Tensor, error: Tensor, variance: Tensor) -> Expected:
            worst = error + (u + U) * value.abs() + tiny
            return Expected(value, worst, variance + u**2 / 3 * value**2)

        to_queries, to_keys = "bhst,bthd->bshd", "bhst,bshd->bthd"
        squares = grad_scores**2 * (u**2 / 3)
        # delta's error is that of a whole row, known here
        shift = torch.einsum("bshd,bshd->bhs", grad, out - exact_out)[..., None] * weights
        products = scale * torch.einsum(to_queries, grad_scores, self.k)
        size = scale * torch.einsum(
            to_queries, score_grad_error + self.terms * grad_scores.abs(), self.k.abs()
        )
        dq = expect(
            products,
            size.abs(),
            scale**2 * torch.einsum(to_queries, squares, self.k**2)
            + (scale * torch.einsum(to_queries, shift, self.k)) ** 2,
        )
        products = scale * torch.einsum(to_keys, grad_scores, self.q)
        size = scale * torch.einsum(
            to_keys, score_grad_error + self.terms * grad_scores.abs(), self.q.abs()
        )
        dk = expect(
            self._reduce(products),
            self._reduce(size.abs()),
            self._reduce(scale**2 * torch.einsum(to_keys, squares, self.q**2))
            + self._reduce(scale * torch.einsum(to_keys, shift, self.q)) ** 2,
        )
        products = torch.einsum(to_keys, weights, grad)
        size = torch.einsum(to_keys, weight_error + self.terms * weights, grad.abs())
        variance = torch.einsum(to_keys, weights**2 * (u**2 / 3), grad**2)
        dv = expect(self._reduce(products), self._reduce(size), self._reduce(variance))
        return dq, dk, dv
