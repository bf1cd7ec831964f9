"""Several prompts at once: weights are read once for all of them. numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from .answer import Answer, Generation, Options, Timings
from .errors import MobileLLMError
from .interface import TextEngine
from .prompt import prompt_ids
from .sampling import Sampler

MAX_PROMPTS = 64


def is_batch(prompt: Any) -> bool:
    """Tell a list of prompts from one prompt: it holds texts or sequences."""
    return isinstance(prompt, (list, tuple)) and any(
        isinstance(element, (str, list, tuple)) or getattr(element, "ndim", 0) > 0
        for element in prompt  # arrays and tensors: this module knows no torch
    )


def generate_batch(engine: TextEngine, prompts: Sequence, options: Options) -> list[Generation]:
    """Continue 1 to 64 prompts of any lengths; each answer is the one it would get alone.

    Args:
        engine: computes the answers.
        prompts: texts or token ids.
        options: for all of them; prompt i draws with `seed + i`.

    Raises:
        MobileLLMError: a bad prompt, named by its index, or too many; nothing was computed.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise MobileLLMError(
            f"[generate] prompts must be a list of 1 to {MAX_PROMPTS}, got {len(prompts)}"
        )
    if options.prompt_lookup:
        raise MobileLLMError("[generate] prompt_lookup takes one prompt, not a list of them")
    rows = [
        _Row(engine, prompt_ids(engine, prompt, f"[generate] prompts[{i}]"), options, i)
        for i, prompt in enumerate(prompts)
    ]
    started = perf_counter()
    logits = engine.forward_batch([row.next_ids for row in rows], [row.cache for row in rows])
    prefill_seconds = perf_counter() - started
    left = rows
    while left:
        for row, row_logits in zip(left, logits, strict=True):
            row.take(row_logits, started)
        left = [row for row in left if not row.answer.finish_reason]
        if left:
            logits = engine.forward_batch(
                [row.next_ids for row in left], [row.cache for row in left]
            )
    return [row.generation(prefill_seconds) for row in rows]


class _Row:
    """One prompt of a batch, and its answer."""

    def __init__(self, engine: TextEngine, ids: list[int], options: Options, index: int) -> None:
        if options.seed is not None:
            options = dataclasses.replace(options, seed=options.seed + index)
        self.answer = Answer(engine, ids, options)
        self.next_ids = ids
        self.cache = engine.new_cache()
        self._sampler = Sampler(options, ids, engine.config.vocab_size)
        self._steps = 0
        self._seconds = 0.0

    def take(self, logits: np.ndarray, started: float) -> None:
        token_id, token_logprob = self._sampler.choose(logits)
        self.answer.take(token_id, token_logprob)
        self.next_ids = [token_id]
        self._steps += 1
        if self.answer.finish_reason:
            self._seconds = perf_counter() - started
            self.cache = None  # its memory serves the others

    def generation(self, prefill_seconds: float) -> Generation:
        return self.answer.generation(
            Timings(
                prefill_seconds=prefill_seconds,
                decode_seconds=self._seconds - prefill_seconds,
                prefill_tokens=len(self.answer.prompt_ids),
                decode_tokens=self._steps - 1,
            )
        )
