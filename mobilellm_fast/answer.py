"""One answer as it grows: its options, its text, why it ends. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .errors import MobileLLMError
from .interface import TextEngine
from .sampling import Sampling, check_integer
from .text_stream import TextStream


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """The options of `generate`, `stream` and `chat`: those of `Sampling`, and when to stop.

    Args:
        max_new_tokens: most tokens to generate, >= 1.
        stop: string or strings at which the answer ends; the text ends before it.
        prompt_lookup: guess up to so many tokens (1 to 64) per step where the text repeats itself,
            and have the model check them together: the same answer, sooner. Needs temperature 0.
            None guesses none.
        prompt_lookup_ngram: how many last tokens to look for in the text, 1 to 16.

    Raises:
        MobileLLMError: a value is of the wrong type or out of range.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] | None = None
    prompt_lookup: int | None = None
    prompt_lookup_ngram: int = 3

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Check the keyword arguments of a call.

        Raises:
            TypeError: there is no such option, as for any other function's arguments.
            MobileLLMError: its value is wrong.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise TypeError(
                f"[generate] options must be among {', '.join(known)}, got {unknown[0]!r}"
            )
        return cls(**given)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_new_tokens", check_integer, at_least=1)
        self._check("prompt_lookup_ngram", check_integer, at_least=1)
        if self.prompt_lookup is not None:
            self._check("prompt_lookup", check_integer, at_least=1)
        for name, limit in (("prompt_lookup", 64), ("prompt_lookup_ngram", 16)):
            if (got := getattr(self, name) or 0) > limit:
                raise MobileLLMError(f"[generate] {name} must be at most {limit}, got {got}")
        if self.prompt_lookup is not None and self.temperature > 0:
            raise MobileLLMError(
                f"[generate] prompt_lookup needs temperature 0, got {self.temperature}"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = () if stop is None else stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in stop):
            raise MobileLLMError(
                f"[generate] stop must be a non-empty string or a list of them, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(stop))


@dataclass(frozen=True)
class Timings:
    """Seconds spent in the model, the sampler and the detokenizer (not in the caller's code).

    `prefill_tokens` are those of the prompt that were computed, `reused_tokens` those that a
    session had in its cache. `decode_tokens` counts decode steps: the first token needs none of its
    own, an end-of-text token needs one. Of the `draft_tokens` that `prompt_lookup` guessed,
    `accepted_tokens` came: each made one of those steps for free. In a batch, the seconds are those
    of all its prompts together, until this one's answer ended.
    """

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int
    decode_tokens: int
    reused_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0.0 before anything ran."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode steps per second; 0.0 before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


@dataclass(frozen=True)
class Token:
    """One step of a stream.

    `text` is what can be shown now: empty while a character or a possible stop string is
    incomplete. `logprob` is as in `Generation`. Both others are None in an extra last step that
    brings text still held back when the model ended its answer.
    """

    text: str
    token_id: int | None
    logprob: float | None


@dataclass(frozen=True)
class Generation:
    """An answer; `str()` of it is its text.

    `token_ids` has all generated tokens but the one that ends a text; where a stop string came
    it includes the tokens that spelled it. `logprobs[i]` is the natural log of the probability
    of `token_ids[i]` in the model's own distribution: temperature 1, no filters, no penalty.
    `finish_reason` is "stop" (end-of-text token or stop string), "length" (`max_new_tokens`),
    "context" (no room left), or None if the stream was not run to its end.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    prompt_token_ids: list[int]
    timings: Timings

    def __str__(self) -> str:
        return self.text


class Answer:
    """Decides about each token the model proposes: keep it, show it, end with it.

    Args:
        engine: has the configuration and the tokenizer.
        prompt_ids: tokens of the prompt.
        options: when to stop.
        continues_prompt: whether its text continues that of the prompt.

    Raises:
        MobileLLMError: a stop string, and no tokenizer to look for it.
    """

    def __init__(
        self,
        engine: TextEngine,
        prompt_ids: list[int],
        options: Options,
        continues_prompt: bool = True,
    ) -> None:
        if options.stop and engine.tokenizer is None:
            raise MobileLLMError("[generate] stop needs a tokenizer, and this model has none")
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._logprobs: list[float] = []
        self._pieces: list[str] = []  # of the text
        self._options = options
        self._limit = min(options.max_new_tokens, engine.config.context_length - len(prompt_ids))
        self._end_ids = end_ids(engine)
        context = prompt_ids if continues_prompt else ()
        self._text_stream = TextStream(engine.tokenizer, context, options.stop)

    @property
    def room(self) -> int:
        """How many more tokens may come."""
        return self._limit - len(self.token_ids)

    def take(self, token_id: int, logprob: float) -> Token | None:
        """Take the next token; return what is to be shown of it, or None at the end of a text."""
        if token_id in self._end_ids:
            self.finish_reason = "stop"
            rest = self._text_stream.finish()
            self._pieces.append(rest)
            return Token(rest, None, None) if rest else None
        self.token_ids.append(token_id)
        self._logprobs.append(logprob)
        text = self._text_stream.push(token_id)
        if self._text_stream.stopped or len(self.token_ids) == self._limit:
            self.finish_reason = self._reason_to_finish()
            text += self._text_stream.finish()
        self._pieces.append(text)
        return Token(text, token_id, logprob)

    def _reason_to_finish(self) -> str:
        if self._text_stream.stopped:
            return "stop"
        return "length" if self._limit == self._options.max_new_tokens else "context"

    def generation(self, timings: Timings) -> Generation:
        """Return the answer so far."""
        return Generation(
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            logprobs=list(self._logprobs),
            finish_reason=self.finish_reason,
            prompt_token_ids=list(self.prompt_ids),
            timings=timings,
        )


def end_ids(engine: TextEngine) -> frozenset[int]:
    """Return the ids that end a text, by the configuration or the tokenizer."""
    configured = engine.config.eos_token_id
    if configured is None:
        configured = ()
    elif isinstance(configured, int):
        configured = (configured,)
    own = () if engine.tokenizer is None else engine.tokenizer.eos_token_ids
    return frozenset((*configured, *own))
