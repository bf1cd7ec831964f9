"""Generation and scoring: one decoding loop, and what is built on it. No torch."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from time import perf_counter
from typing import Any, overload

from .answer import Answer, Generation, Options, Timings, Token
from .batch import generate_batch, is_batch
from .context import Context
from .errors import MobileLLMError
from .interface import TextEngine
from .prompt import chat_ids, prompt_ids, token_ids
from .prompt_lookup import PromptLookup
from .sampling import Sampler, check_integer, logprob

Prompt = str | Sequence[int]
Prompts = list[str] | list[list[int]] | list[Prompt] | tuple[Prompt, ...]
MOST_STEPS = 64  # tokens that a device chooses before any of them is shown
SCORE_CHUNK = 128  # positions scored at once: 25 MB of logits at a vocabulary of 49152


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
        self,
        engine: TextEngine,
        prompt_ids: list[int],
        options: Options,
        *,
        continues_prompt: bool = True,
        context: Context | None = None,
    ) -> None:
        self._answer = Answer(engine, prompt_ids, options, continues_prompt)
        self._engine = engine
        self._context = context
        self._options = options
        self._busy_seconds = 0.0
        self._prefill_seconds = 0.0
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._draft_tokens = 0
        self._accepted_tokens = 0
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
        return self._answer.generation(
            Timings(
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._busy_seconds - self._prefill_seconds,
                prefill_tokens=self._prefill_tokens,
                decode_tokens=self._decode_tokens,
                reused_tokens=len(self._answer.prompt_ids) - self._prefill_tokens
                if self._prefill_tokens
                else 0,
                draft_tokens=self._draft_tokens,
                accepted_tokens=self._accepted_tokens,
            )
        )

    def _run(self) -> Iterator[Token]:
        for token_id, token_logprob in self._steps():
            token = self._answer.take(token_id, token_logprob)
            if token:
                yield token
            if self._answer.finish_reason:
                return

    def _steps(self) -> Iterator[tuple[int, float]]:
        """Run the model: prompt first, then token by token, for as long as tokens are taken."""
        prompt_ids = self._answer.prompt_ids
        sampler = Sampler(self._options, prompt_ids, self._engine.config.vocab_size)
        context = self._context or Context(self._engine)
        started = perf_counter()
        unread = context.resume(prompt_ids, self)
        logits = context.extend(unread)
        self._prefill_seconds = perf_counter() - started
        self._prefill_tokens = len(unread)
        first = sampler.choose(logits[0])
        yield first
        if self._chosen_on_device():
            yield from self._device_steps(context, first[0])
        elif self._options.prompt_lookup:
            yield from self._guessed_steps(context, sampler, first[0])
        else:
            yield from self._single_steps(context, sampler, first[0])

    def _check_reader(self, context: Context) -> None:
        if context.reader is not self:
            raise MobileLLMError("[generate] the session has begun another answer")

    def _single_steps(
        self, context: Context, sampler: Sampler, token_id: int
    ) -> Iterator[tuple[int, float]]:
        """Go on from the first token, one by one."""
        while True:
            self._check_reader(context)
            chosen = context.next_token(token_id, sampler)
            self._decode_tokens += 1
            yield chosen
            token_id = chosen[0]

    def _guessed_steps(
        self, context: Context, sampler: Sampler, token_id: int
    ) -> Iterator[tuple[int, float]]:
        """Go on from the first token, with guesses of what follows."""
        answer, options = self._answer, self._options
        lookup = PromptLookup(answer.prompt_ids, options.prompt_lookup_ngram)
        lookup.push(token_id)
        draft: list[int] = []
        while True:
            self._check_reader(context)
            if draft:  # forget what was read of a wrong one
                context.rewind(len(answer.prompt_ids) + len(answer.token_ids) - 1)
            draft = lookup.draft(min(options.prompt_lookup, answer.room - 1))
            self._draft_tokens += len(draft)
            logits = context.extend([token_id, *draft], all_logits=bool(draft))
            # Row i of the logits follows the first i tokens of the draft: it counts if they came.
            for row, guess in zip_longest(logits, draft):
                self._decode_tokens += 1
                token_id, token_logprob = sampler.choose(row)
                yield token_id, token_logprob
                lookup.push(token_id)
                if token_id != guess:
                    break
                self._accepted_tokens += 1

    def _chosen_on_device(self) -> bool:
        """Tell whether the engine can choose these tokens without showing their logits."""
        options = self._options
        plain = options.repetition_penalty == 1 and not options.prompt_lookup
        kept = (options.top_k, options.top_p, options.min_p)
        return plain and kept == (None, None, None) and hasattr(self._engine, "decode")

    def _device_steps(self, context: Context, token_id: int) -> Iterator[tuple[int, float]]:
        """Go on from the first token, some steps at a time: more and more, up to `MOST_STEPS`."""
        options = self._options
        seed = secrets.randbits(62) if options.seed is None else options.seed % (1 << 62)
        count = 4
        while True:
            self._check_reader(context)
            start = len(context.token_ids)
            count = min(count, self._answer.room)
            chosen = context.decode(token_id, count, options.temperature, seed)
            taken = 0
            try:
                for token_id, token_logprob in chosen:
                    self._check_reader(context)
                    taken += 1
                    self._decode_tokens += 1
                    yield token_id, token_logprob
            finally:  # an answer that ends early has read no further
                if context.reader is self and taken < count:
                    context.rewind(start + taken)
            count = min(2 * count, MOST_STEPS)

    def run_to_end(self) -> Generation:
        """Compute the rest of the answer and return all of it."""
        for _ in self:
            pass
        return self.generation


def stream(engine: TextEngine, prompt: Prompt, **options: Any) -> Stream:
    """Start generating; the tokens come from iterating over the result.

    Args:
        prompt: text, or token ids (1-D integers); not empty, shorter than the context.
        **options: see `Options` and `Sampling`.

    Raises:
        MobileLLMError: a bad argument; nothing was computed.
    """
    checked = Options.of(options)
    return Stream(engine, prompt_ids(engine, prompt, "[generate] prompt"), checked)


@overload
def generate(engine: TextEngine, prompt: Prompt, **options: Any) -> Generation: ...


@overload
def generate(engine: TextEngine, prompt: Prompts, **options: Any) -> list[Generation]: ...


def generate(
    engine: TextEngine, prompt: Prompt | Prompts, **options: Any
) -> Generation | list[Generation]:
    """Continue a prompt, or up to 64 prompts at once.

    Args:
        prompt: as in `stream`, or a list of such prompts of any lengths.
        **options: see `Options` and `Sampling`; prompt i of a list draws with `seed + i`.

    Returns:
        The answer, or a list of them: the same that prompts one by one get (on a GPU but for
        rounding, and for draws, which come from the device for one prompt).

    Raises:
        MobileLLMError: as `stream`; names the prompt of a list.
    """
    if is_batch(prompt):
        return generate_batch(engine, prompt, Options.of(options))
    return stream(engine, prompt, **options).run_to_end()


def stream_chat(
    engine: TextEngine, messages: Sequence[Mapping[str, Any]], **options: Any
) -> Stream:
    """Start answering a chat; the tokens come from iterating over the result.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
        **options: see `Options` and `Sampling`.

    Raises:
        MobileLLMError: a bad argument, no chat template or tokenizer, a template that refuses
            the messages, or a chat that fills the context.
    """
    checked = Options.of(options)
    # An answer is a text of its own: no space before its first word.
    return Stream(engine, chat_ids(engine, messages), checked, continues_prompt=False)


def chat(engine: TextEngine, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
    """Answer a chat. Arguments and errors are those of `stream_chat`."""
    return stream_chat(engine, messages, **options).run_to_end()


def score(engine: TextEngine, text_or_ids: Prompt, *, window: int | None = None) -> Score:
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


def _window_logprobs(engine: TextEngine, ids: list[int]) -> Iterable[float]:
    cache = engine.new_cache()
    inputs, targets = ids[:-1], ids[1:]
    for start in range(0, len(inputs), SCORE_CHUNK):
        chunk = slice(start, start + SCORE_CHUNK)
        rows = engine.forward(inputs[chunk], cache, all_logits=True)
        for row, target in zip(rows, targets[chunk], strict=True):
            yield logprob(row, target)
