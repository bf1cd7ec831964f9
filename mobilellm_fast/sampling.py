"""From logits to the next token: filters, seeded sampling, log-probabilities. No torch."""

from __future__ import annotations

import math
import operator
import reprlib
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from . import _C
from .errors import MobileLLMError

DRAWN = 64  # random numbers at once


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The steps run in the order of the fields.

    Args:
        repetition_penalty: tokens of the prompt and of the answer so far have positive logits
            divided by it and negative ones multiplied; 1.0 changes nothing.
        temperature: logits are divided by it; 0 takes the most likely token (the first on ties).
        top_k: keep the k most likely tokens (more if the last ones tie); None keeps all.
        top_p: keep the smallest set of most likely tokens (the first of equal ones) whose
            probabilities sum to at least this, in (0, 1]; None keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1]; None
            keeps all. `candidates` says it all precisely.
        seed: integer >= 0; the same seed gives the same tokens again. None draws a fresh one.

    Raises:
        MobileLLMError: a value is of the wrong type or out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check("repetition_penalty", check_number, above=0)
        self._check("temperature", check_number, at_least=0)
        if self.top_k is not None:
            self._check("top_k", check_integer, at_least=1)
        if self.top_p is not None:
            self._check("top_p", check_number, above=0, at_most=1)
        if self.min_p is not None:
            self._check("min_p", check_number, at_least=0, at_most=1)
        if self.seed is not None:
            self._check("seed", check_integer, at_least=0)

    def _check(self, name: str, check, **bounds: float) -> None:
        # the way into a frozen dataclass: a checked value is kept as a plain int or float
        object.__setattr__(self, name, check(f"[generate] {name}", getattr(self, name), **bounds))


class Sampler:
    """Chooses the tokens of one sequence; knows the tokens seen and the state of the generator.

    Args:
        sampling: how.
        prompt_ids: tokens seen before, each in [0, vocab_size).
        vocab_size: how many logits there are.

    `compiled` is what does it, for steps that choose without showing their logits. While a call
    uses it, other threads that want to are refused by a MobileLLMError.
    """

    def __init__(self, sampling: Sampling, prompt_ids: list[int], vocab_size: int) -> None:
        draw = None
        if sampling.temperature > 0:
            draw = partial(np.random.Generator(np.random.PCG64(sampling.seed)).random, DRAWN)
        self.compiled = _C.Sampler(
            vocab=vocab_size,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k or 0, vocab_size),
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            min_p=sampling.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty,
            seen=prompt_ids,
            draw=draw,
        )

    def choose(self, logits: np.ndarray) -> tuple[int, float]:
        """Choose the next token from float32 logits (vocab,), which are left unchanged.

        Returns:
            Its id, and its `logprob`: in the model's own distribution, not the one drawn from.

        Raises:
            MobileLLMError: a logit is no number or the largest not finite, also after the penalty.
        """
        chosen = self.compiled.choose(logits)
        if math.isnan(chosen[1]):
            raise broken_logits()
        return chosen


def broken_logits() -> MobileLLMError:
    """Return what to raise where `Sampler.compiled` found no log-probability but NaN."""
    return MobileLLMError("[generate] the model's logits must be finite, got nan or inf")


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Apply temperature > 0, top_k, top_p and min_p: the specification of `_C.Sampler`.

    A token weighs `exp((logit - largest) / temperature)`. Of two tokens the likelier is the one of
    the larger logit, then the first by id, also where their weights are the same float.

    - `top_k` keeps the k likeliest, and whatever has the logit of the last of them;
    - `top_p` the fewest of those, likeliest first, that weigh at least p times as much as all of
      those together. Weights are summed, not probabilities: of equal tokens they are exactly 1,
      where sums of thousands of rounded probabilities miss p by some tokens;
    - `min_p` those of the rest that weigh at least p.

    Args:
        logits: (vocab,), the largest finite.
    Returns:
        Token ids (n,) int64, ascending, and their weights (n,) float64.
    Numerics: float64. `_C.Sampler` sums all tokens' weights from float32, within 1e-6: where the
        sum of some tokens is that close to p, it may keep one more or fewer.
    """
    logits = logits.astype(np.float64)
    # Dividing what is at most 0 cannot overflow upwards, however small the temperature.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / sampling.temperature)
    token_ids = np.arange(logits.size)
    if sampling.top_k is not None:
        token_ids = token_ids[top_k_mask(logits, sampling.top_k)]
    if sampling.top_p is not None:
        token_ids = token_ids[top_p_mask(logits[token_ids], weights[token_ids], sampling.top_p)]
    if sampling.min_p is not None:
        token_ids = token_ids[weights[token_ids] >= sampling.min_p]
    return token_ids, weights[token_ids]


def draw(logits: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """Return the token that a number in [0, 1) chooses: the specification of `_C.Sampler`.

    The first by id at which the cumulated weight of the `candidates` reaches `1 - uniform` times
    the weight of all of them.
    """
    token_ids, weights = candidates(logits, sampling)
    place = np.searchsorted(weights.cumsum(), weights.sum() * (1 - uniform))
    return int(token_ids[min(place, len(token_ids) - 1)])


def penalise(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return logits (vocab,) with those marked in `seen` (vocab,) bool made less likely.

    The specification of `_C.Sampler`, as `candidates` is.

    Reference: Keskar et al. 2019 (CTRL), with transformers' rule for negative logits.
    """
    penalised, token_ids = logits.copy(), np.flatnonzero(seen)
    values = logits[token_ids]
    with np.errstate(over="ignore"):
        penalised[token_ids] = np.where(values < 0, values * penalty, values / penalty)
    return penalised


def top_k_mask(logits: np.ndarray, k: int) -> np.ndarray:
    """Mark the k largest of logits (n,), and whatever ties with the smallest of them."""
    k = min(k, logits.size)
    return logits >= np.partition(logits, -k)[-k]


def top_p_mask(logits: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """Mark the fewest of largest logits (n,) whose weights sum to at least p times all weights."""
    likeliest_first = np.argsort(-logits, kind="stable")
    count = 1 + np.searchsorted(weights[likeliest_first].cumsum(), p * weights.sum())
    mask = np.zeros(logits.size, bool)
    mask[likeliest_first[: count if p < 1 else None]] = True
    return mask


def logprob(logits: np.ndarray, token_id: int) -> float:
    """Return the natural log of a token's probability under softmax(logits), NaN if that is none.

    Args:
        logits: (vocab,) float32.
    Numerics: exponentials and their sums of 64 in float32, the sum of those in float64: within
        1e-6 of a float64 log-softmax.
    """
    return _C.logprob(logits, token_id)


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """Return an argument as an int; `name` is what an error calls it: "[operation] argument".

    Raises:
        MobileLLMError: it is no integer (a bool is none), or too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise _argument_error(name, f"an integer >= {at_least}", value)
    return number


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """Return an argument as a float; `name` is what an error calls it: "[operation] argument".

    Raises:
        MobileLLMError: it is no number (a bool is none), not finite, or out of bounds.
    """
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    good = math.isfinite(number) and not isinstance(value, bool)
    if not (good and at_least <= number <= at_most and number > above):
        bounds = ((">=", at_least), (">", above), ("<=", at_most))
        wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds if math.isfinite(bound))
        raise _argument_error(name, f"a finite number {wanted}", value)
    return number


def _argument_error(name: str, expected: str, value: Any) -> MobileLLMError:
    return MobileLLMError(f"{name} must be {expected}, got {reprlib.repr(value)}")
