"""How a model is trained: the paper's optimizer and schedule, and the sizes of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import MobileLLMError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a run; the defaults that are not sizes are MobileLLM's.

    Args:
        steps: optimizer steps.
        batch_size: sequences per step.
        seq_len: tokens per sequence.
        learning_rate: the peak, reached after the warm-up.
        warmup_steps: steps of linear warm-up.
        final_ratio: the learning rate falls along a cosine to this part of its peak.
        betas, eps, weight_decay: of AdamW; decay spares the norms.
        clip: largest norm of all gradients together.
        dtype: "fp32", or "bf16": matrix products in bfloat16, weights and sums in float32.
        seed: draws the fresh weights and the batches.

    Raises:
        MobileLLMError: a value is out of range.

    Reference: Liu et al., https://arxiv.org/abs/2402.14905, section 4.1
    """

    steps: int = 1000
    batch_size: int = 16
    seq_len: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    final_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, from JSON
        least = dict(steps=1, batch_size=1, seq_len=2, warmup_steps=0, seed=0)
        for name, value in dataclasses.asdict(self).items():
            if name == "dtype":
                _require(value in DTYPES, name, f"one of {', '.join(DTYPES)}", value)
            elif name in least:
                fits = isinstance(value, int) and value >= least[name]
                _require(fits, name, f"an integer from {least[name]}", value)
            elif name == "betas":
                fits = len(value) == 2 and all(0 <= beta < 1 for beta in value)
                _require(fits, name, "two numbers in [0, 1)", value)
            else:
                fits = isinstance(value, (int, float)) and 0 <= value < math.inf
                _require(fits, name, "a number from 0", value)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, 2, ...: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * cosine)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over parameters; norms, the vectors among them, do not decay."""
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True
        )


def _require(fits: bool, name: str, wanted: str, got: object) -> None:
    if not fits:
        raise MobileLLMError(f"[train] {name} must be {wanted}, got {got!r}")
