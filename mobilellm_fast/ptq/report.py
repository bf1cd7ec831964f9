"""What a format costs: bits per weight, perplexity, divergence."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine import Engine
from ..errors import MobileLLMError
from .quantize import quantize_

if TYPE_CHECKING:
    from ..model import MobileLLM

CHUNK = 64  # tokens whose log-probabilities exist at once


@dataclass(frozen=True)
class Line:
    """A format, compared with the float model.

    Args:
        format: its name.
        bits_per_weight: of all weights held, scales and minimums included.
        perplexity: on the text.
        ratio: of its perplexity to that of the float model.
        kl: mean of `KL(float || quantized)` of the next-token distributions, in nats.
        same_top: part of the positions where both find the same token most likely.
    """

    format: str
    bits_per_weight: float
    perplexity: float
    ratio: float
    kl: float
    same_top: float


def report(lm: MobileLLM, ids: Sequence[int], formats: Iterable[str], **options: Any) -> list[Line]:
    """Quantize copies of a float model and compare them on a text.

    Args:
        lm: float parameters on the CPU; it stays as it is.
        ids: the text, at least 2 tokens.
        formats: see `quantize_`.
        **options: of `quantize_`.
    """
    if len(ids) < 2:
        raise MobileLLMError(f"[report] ids must have at least 2 tokens, got {len(ids)}")
    return [
        compare(format, lm.engine, quantize_(copy.deepcopy(lm), format, **options).engine, ids)
        for format in formats
    ]


def compare(name: str, exact: Engine, rounded: Engine, ids: Sequence[int]) -> Line:
    """Run two engines over a text, as far as their context goes at a time."""
    losses = np.zeros(2)
    kl = same = 0.0
    count = len(ids) - 1
    limit = exact.config.context_length
    caches: tuple = ()
    size = min(CHUNK, limit)
    for start in range(0, count, size):
        chunk = list(ids[start : min(start + size, count)])
        if not caches or caches[0].length + len(chunk) > limit:
            caches = exact.new_cache(), rounded.new_cache()
        targets = np.asarray(ids[start + 1 : start + 1 + len(chunk)])
        p, q = (
            _log_softmax(engine.forward(chunk, cache, all_logits=True))
            for engine, cache in zip((exact, rounded), caches, strict=True)
        )
        rows = np.arange(len(chunk))
        losses -= p[rows, targets].sum(), q[rows, targets].sum()
        kl += float((np.exp(p) * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
    losses /= count
    bits = 8 * rounded.executor.weight_nbytes / rounded.config.num_parameters
    ratio = math.exp(losses[1] - losses[0])
    return Line(name, bits, math.exp(losses[1]), ratio, kl / count, same / count)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
