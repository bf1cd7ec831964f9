"""Cross entropy of a linear head, a chunk of tokens at a time.

The logits of a training step are its largest tensor by far: 2048 tokens of a vocabulary of 32000
take 262 MB, their gradient as much again. Here they exist for one chunk only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .errors import MobileLLMError
from .op_watch import function_transform, has_tangent

IGNORED = -100  # a label that does not count, as in transformers
# Tokens whose logits exist at once: 65 MB of float32 at a vocabulary of 32000, and wide enough a
# product. A GPU wants wider ones, and adds to the gradient of the head, as large, less often.
CHUNK = 512
GPU_CHUNK = 2048


def next_token_loss(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    labels: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross entropy of each position's prediction of the next label.

    Args:
        hidden: (batch, seq, n) float.
        head: (vocab, n), the matrix of the head, or what maps (tokens, n) to (tokens, vocab).
        labels: (batch, seq) int64; `hidden[:, t]` predicts `labels[:, t + 1]`, -100 does not count.
        chunk: tokens whose logits exist at once; None: 512, on a GPU 2048.

    Returns:
        A scalar: float32, or float64 for float64 `hidden`; NaN if no label counts.
    """
    if labels.shape != hidden.shape[:2] or labels.shape[1] < 2:
        raise MobileLLMError(
            f"[loss] labels must have shape {tuple(hidden.shape[:2])} and at least 2 tokens, "
            f"got {tuple(labels.shape)}"
        )
    chunk = chunk or (GPU_CHUNK if hidden.is_cuda else CHUNK)
    hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long()
    transformed = _is_transformed((hidden, head))
    if isinstance(head, Tensor) and not transformed:
        total = LinearCrossEntropy.apply(hidden, head, labels, chunk)
    else:
        project = functools.partial(F.linear, weight=head) if isinstance(head, Tensor) else head
        sum_of = functools.partial(checkpoint, _cross_entropy, use_reentrant=False)
        if transformed:
            sum_of = _cross_entropy
        parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        total = sum(sum_of(project, *part) for part in parts)
    return total / (labels != IGNORED).sum()


def _is_transformed(values: tuple) -> bool:
    """Tell if transforms of functions are at work, which see neither nodes nor checkpoints."""
    if torch.compiler.is_compiling():  # torch 2.11 would compile what follows to True
        return False
    return function_transform() is not None or has_tangent(values)


def _cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of `cross_entropy(hidden weight^T, labels)`, with its gradients computed on the way.

    The gradient of a chunk's logits, `softmax - one_hot`, is known as soon as they are, so they are
    neither kept nor computed again: three products per chunk, like the plain form. If one chunk is
    all, that gradient is kept instead of those of both factors, of which the weight's is larger.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        ctx.dtype, ctx.one_chunk = weight.dtype, len(hidden) <= chunk
        sums = torch.promote_types(hidden.dtype, torch.float32)
        weight = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=sums)
        grad_hidden = grad_weight = None
        if not ctx.one_chunk:
            grad_hidden = torch.empty_like(hidden) if wanted[0] else None
            grad_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            x, target = hidden[part], labels[part]
            logprobs = (x @ weight.t()).to(sums).log_softmax(-1)  # (chunk, vocab)
            # not in place: torch 2.11, compiling, would lose the gradient of what it returns
            total = total + F.nll_loss(logprobs, target, ignore_index=IGNORED, reduction="sum")
            if not any(wanted):
                continue
            grad = _grad_of_logits(logprobs, target, x.dtype)
            if ctx.one_chunk:
                ctx.save_for_backward(grad, hidden, weight)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ x
        if not ctx.one_chunk:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.one_chunk:
            logits, hidden, weight = ctx.saved_tensors
            scale = grad.to(hidden.dtype)
            grad_hidden = (logits @ weight) * scale if ctx.needs_input_grad[0] else None
            grad_weight = logits.t() @ (hidden * scale) if ctx.needs_input_grad[1] else None
        else:
            grad_hidden, grad_weight = ctx.saved_tensors
            grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight * grad
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtype)
        return grad_hidden, grad_weight, None, None


def _grad_of_logits(logprobs: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """`softmax - one_hot`, zero where the target does not count; overwrites its input."""
    grad = logprobs.exp_()
    ones = grad.new_full((len(target), 1), -1.0)
    grad.scatter_add_(1, target.clamp(min=0)[:, None], ones)
    counts = (target != IGNORED)[:, None]
    if dtype == grad.dtype:
        return grad.mul_(counts)
    return torch.mul(grad, counts, out=torch.empty_like(grad, dtype=dtype))  # one pass for both
