"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import MobileLLMError
from ..model import MobileLLM
from . import checkpoints
from .checkpoints import State
from .recipe import DTYPES, Recipe
from .text import Corpus

VALIDATION_BATCH = 16  # sequences


class Trainer:
    """Trains a model on a corpus, from its checkpoint if it has one.

    Args:
        model: float32 weights, trained in place.
        corpus: what to train on and to validate with.
        recipe: see `Recipe`.
        checkpoint: the file to keep the state in; None keeps none.
        resume: go on from that file, bit for bit as if there had been no interruption.
        save_every, validate_every: steps between; both are done at the end, too.
        compiled: run the model through `torch.compile`.

    Raises:
        CheckpointError: the checkpoint to resume from is missing, damaged or of another run.
        MobileLLMError: sequences longer than the context, or none to resume from.
    """

    def __init__(
        self,
        model: MobileLLM,
        corpus: Corpus,
        recipe: Recipe,
        checkpoint: Path | None = None,
        *,
        resume: bool = False,
        save_every: int = 200,
        validate_every: int = 200,
        compiled: bool = False,
    ) -> None:
        if recipe.seq_len > model.config.context_length:
            raise MobileLLMError(
                f"[train] seq_len must be at most the context of {model.config.context_length}, "
                f"got {recipe.seq_len}"
            )
        self.model, self.corpus, self.recipe = model, corpus, recipe
        self.checkpoint = checkpoint
        self.save_every, self.validate_every = save_every, validate_every
        self.optimizer = recipe.optimizer(model.parameters())
        self.state = State()
        self._run: nn.Module | Callable = torch.compile(model) if compiled else model
        if resume:
            self.state = checkpoints.restore(
                self._file(), model, self.optimizer, recipe, corpus.digest
            )

    def run(self) -> Iterator[State]:
        """Do the steps that are left; yields the state after each.

        Raises:
            MobileLLMError: a loss or a gradient is not finite. The step is not taken, and the
                last checkpoint stays as it is.
        """
        while self.state.step < self.recipe.steps:
            self.state.losses.append(self._step(self.state.step))
            self.state.step += 1
            if self._due(self.validate_every):
                self.state.validations[self.state.step] = self.validate()
            if self.checkpoint and self._due(self.save_every):
                self.save()
            yield self.state

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            MobileLLMError: there is no file for it.
        """
        checkpoints.save(
            self._file(), self.model, self.optimizer, self.recipe, self.state, self.corpus.digest
        )

    def _file(self) -> Path:
        if self.checkpoint is None:
            raise MobileLLMError("[train] checkpoint must be the path of a file, got None")
        return self.checkpoint

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross entropy per token of the validation text, in nats."""
        total, count = 0.0, 0
        for ids in self.corpus.windows(self.recipe.seq_len).split(VALIDATION_BATCH):
            predicted = len(ids) * (self.recipe.seq_len - 1)
            total += self._loss(ids, self.model).item() * predicted
            count += predicted
        return total / count

    def _step(self, step: int) -> float:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        ids = self.corpus.batch(recipe.seed, step, recipe.batch_size, recipe.seq_len)
        loss = self._loss(ids, self._run)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for name, value in (("loss", loss.item()), ("norm of the gradients", norm.item())):
            if not math.isfinite(value):
                raise MobileLLMError(
                    f"[train] the {name} is {value} at step {step}{self._advice()}"
                )
        self.optimizer.step()
        return loss.item()

    def _loss(self, ids: Tensor, model: Callable) -> Tensor:
        device = next(self.model.parameters()).device
        ids = ids.to(device)
        mixed = self.recipe.dtype != "fp32"
        dtype = DTYPES[self.recipe.dtype]
        with torch.autocast(device.type, dtype) if mixed else nullcontext():
            return model(ids, ids)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.recipe.steps

    def _advice(self) -> str:
        kept = ""
        if self.checkpoint and self.checkpoint.exists():
            kept = f"; the last good checkpoint is {self.checkpoint}"
        return f"{kept}; a lower learning rate or a longer warm-up may help"
