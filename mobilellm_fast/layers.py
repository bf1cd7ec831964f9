"""The layers that hold a model's float parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import ops


class Linear(nn.Linear):
    """A linear layer that leaves it to the model to draw its weights."""

    def reset_parameters(self) -> None:
        """Do nothing; see `MobileLLM.reset_parameters`."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module is the forward of that class, seen by nobody else."""
    state = module.__dict__  # several times faster than attributes of a module
    return type(module) is kind and not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        # of all modules
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def plain_weight(layer: nn.Module, kind: type[nn.Module]) -> Tensor | None:
    """Return the weight of a layer whose call is the class's product with it; None for others."""
    if not is_plain(layer, kind):
        return None
    state = layer.__dict__
    weight = state["_parameters"].get("weight")
    biased = state["_parameters"].get("bias") is not None or state.get("bias") is not None
    return weight if type(weight) is nn.Parameter and not biased else None


class Embedding(nn.Embedding):
    """A token embedding that can serve as the output head too."""

    def reset_parameters(self) -> None:
        """Do nothing; see `MobileLLM.reset_parameters`."""

    def project(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        return F.linear(hidden, self.weight)


class RMSNorm(nn.Module):
    """Scale each row to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, eps: float, **options: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, **options))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
