"""Generation and scoring: one decoding loop, and what is built on it. numpy only.

An *engine* is anything with `.config`, `.tokenizer` (or None), `.chat_template` (or None),
`.new_cache()` and `.forward(token_ids, cache, all_logits=False) -> float32 (1 or n, vocab)`,
which appends to the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from .errors import MobileLLMError
from .prompt import chat_ids, prompt_ids, token_ids
from .sampling import Sampler, Sampling, check_integer, logprob
from .text_stream import TextStream

SCORE_CHUNK = 128  # positions scored at once: 25 MB of logits at a vocabulary of 49152


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """The options of `generate`, `stream` and `chat`: those of `Sampling`, and when to stop.

    Args:
        max_new_tokens: most tokens to generate, >= 1.
        stop: string or strings at which the answer ends; the text ends before it.

    Raises:
        MobileLLMError: a value is of the wrong type or out of range.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_new_tokens", check_integer, at_least=1)
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

    `prefill_tokens` are those of the prompt. `decode_tokens` counts decode steps: the first
    token needs none of its own, an end-of-text token needs one.
    """

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int
    decode_tokens: int

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


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    `logprobs[i]` is the natural log of the probability of `token_ids[i + 1]` after the tokens
    before it: nothing predicts the first token, so there is one fewer.
    """

    token_ids: list[int]
    logprobs: list[float]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(nll), inf where that overflows."""
        return math.exp(self.nll) if self.nll < 709 else math.inf


class Stream(Iterator[Token]):
    """Iterates over an answer's `Token`s while they are computed; use `stream` to make one.

    Leaving the loop early stops the computation; `generation` is then what came so far.
    """

    def __init__(
        self, engine, prompt_ids: list[int], options: Options, continues_prompt: bool = True
    ) -> None:
        if options.stop and engine.tokenizer is None:
            raise MobileLLMError("[generate] stop needs a tokenizer, and this model has none")
        self._engine = engine
        self._prompt_ids = prompt_ids
        self._options = options
        context = prompt_ids if continues_prompt else ()
        self._text_stream = TextStream(engine.tokenizer, context, options.stop)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._finish_reason: str | None = None
        self._busy_seconds = 0.0
        self._prefill_seconds = 0.0
        self._decode_tokens = 0
        self._tokens = self._run()

    def __next__(self) -> Token:
        resumed = perf_counter()
        try:
            return next(self._tokens)
        finally:
            self._busy_seconds += perf_counter() - resumed

    @property
    def generation(self) -> Generation:
        """The answer so far; complete when the iteration has ended."""
        return Generation(
            text=self._text,
            token_ids=list(self._token_ids),
            logprobs=list(self._logprobs),
            finish_reason=self._finish_reason,
            prompt_token_ids=list(self._prompt_ids),
            timings=Timings(
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._busy_seconds - self._prefill_seconds,
                prefill_tokens=len(self._prompt_ids) if self._prefill_seconds else 0,
                decode_tokens=self._decode_tokens,
            ),
        )

    def _run(self) -> Iterator[Token]:
        """Decide about each token the model proposes: keep it, show it, end with it."""
        end_ids = _end_ids(self._engine)
        for token_id, token_logprob in self._steps():
            if token_id in end_ids:
                self._finish_reason = "stop"
                if rest := self._text_stream.finish():
                    self._text += rest
                    yield Token(rest, None, None)
                return
            self._token_ids.append(token_id)
            self._logprobs.append(token_logprob)
            text = self._text_stream.push(token_id)
            self._finish_reason = self._reason_to_finish()
            if self._finish_reason:
                text += self._text_stream.finish()
            self._text += text
            yield Token(text, token_id, token_logprob)
            if self._finish_reason:
                return

    def _steps(self) -> Iterator[tuple[int, float]]:
        """Run the model: prompt first, then token by token, for as long as tokens are taken."""
        sampler = Sampler(self._options, self._prompt_ids, self._engine.config.vocab_size)
        cache = self._engine.new_cache()
        started = perf_counter()
        logits = self._engine.forward(self._prompt_ids, cache)
        self._prefill_seconds = perf_counter() - started
        while True:
            token_id = sampler.pick(logits[-1])
            yield token_id, logprob(logits[-1], token_id)
            logits = self._engine.forward([token_id], cache)
            self._decode_tokens += 1

    def _reason_to_finish(self) -> str | None:
        if self._text_stream.stopped:
            return "stop"
        if len(self._token_ids) == self._options.max_new_tokens:
            return "length"
        length = len(self._prompt_ids) + len(self._token_ids)
        return "context" if length == self._engine.config.context_length else None


def stream(engine, prompt: str | Sequence[int], **options: Any) -> Stream:
    """Start generating; the tokens come from iterating over the result.

    Args:
        prompt: text, or token ids (1-D integers); not empty, shorter than the context.
        **options: see `Options` and `Sampling`.

    Raises:
        MobileLLMError: a bad argument; nothing was computed.
    """
    checked = Options(**options)
    return Stream(engine, prompt_ids(engine, prompt, "[generate] prompt"), checked)


def generate(engine, prompt: str | Sequence[int], **options: Any) -> Generation:
    """Continue a prompt. Arguments and errors are those of `stream`."""
    return _run_to_end(stream(engine, prompt, **options))


def stream_chat(engine, messages: Sequence[Mapping[str, Any]], **options: Any) -> Stream:
    """Start answering a chat; the tokens come from iterating over the result.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
        **options: see `Options` and `Sampling`.

    Raises:
        MobileLLMError: a bad argument, no chat template or tokenizer, a template that refuses
            the messages, or a chat that fills the context.
    """
    checked = Options(**options)
    # An answer is a text of its own: no space before its first word.
    return Stream(engine, chat_ids(engine, messages), checked, continues_prompt=False)


def chat(engine, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
    """Answer a chat. Arguments and errors are those of `stream_chat`."""
    return _run_to_end(stream_chat(engine, messages, **options))


def score(engine, text_or_ids: str | Sequence[int], *, window: int | None = None) -> Score:
    """Compute the log-probability of each token of a text given those before it.

    Args:
        text_or_ids: text, or token ids (1-D integers); at least two tokens.
        window: score longer texts in windows of this many tokens, each with an empty context but
            for one token: the text's first if that is the beginning-of-text token, else the one
            before. Every token but the first is scored once. None: one window.

    Raises:
        MobileLLMError: a bad argument, or more tokens than the context and no window.
    """
    limit = engine.config.context_length
    if window is not None and check_integer("[score] window", window, at_least=2) > limit:
        raise MobileLLMError(f"[score] window must be at most the context, {limit}, got {window}")
    ids = token_ids(engine, text_or_ids, "[score] text")
    if len(ids) < 2:
        raise MobileLLMError(f"[score] text must have at least 2 tokens, got {len(ids)}")
    if window is None and len(ids) > limit:
        raise MobileLLMError(
            f"[score] text must fit the context of {limit} tokens unless a window is given, "
            f"got {len(ids)} tokens"
        )
    step = (window or limit) - 1
    starts_text = ids[0] == engine.config.bos_token_id
    logprobs: list[float] = []
    for start in range(0, len(ids) - 1, step):
        first = ids[0] if starts_text else ids[start]
        logprobs += _window_logprobs(engine, [first, *ids[start + 1 : start + 1 + step]])
    return Score(ids, logprobs)


def _window_logprobs(engine, ids: list[int]) -> Iterable[float]:
    cache = engine.new_cache()
    inputs, targets = ids[:-1], ids[1:]
    for start in range(0, len(inputs), SCORE_CHUNK):
        chunk = slice(start, start + SCORE_CHUNK)
        rows = engine.forward(inputs[chunk], cache, all_logits=True)
        for row, target in zip(rows, targets[chunk], strict=True):
            yield logprob(row, target)


def _run_to_end(tokens: Stream) -> Generation:
    for _ in tokens:
        pass
    return tokens.generation


def _end_ids(engine) -> frozenset[int]:
    """Return the ids that end a text, by the configuration or the tokenizer."""
    configured = engine.config.eos_token_id
    if configured is None:
        configured = ()
    elif isinstance(configured, int):
        configured = (configured,)
    own = () if engine.tokenizer is None else engine.tokenizer.eos_token_ids
    return frozenset((*configured, *own))
