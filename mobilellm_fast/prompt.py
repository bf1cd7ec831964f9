"""What a caller gives, checked and turned into token ids: texts, ids, chats."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .chat_template import render
from .errors import MobileLLMError
from .interface import TextEngine


def prompt_ids(engine: TextEngine, prompt: Any, name: str) -> list[int]:
    """Return a prompt as token ids: not empty, and with room in the context for one more.

    Args:
        prompt: text, or token ids (1-D integers).
        name: what an error calls it: "[operation] argument".

    Raises:
        MobileLLMError: anything else.
    """
    ids = token_ids(engine, prompt, name)
    limit = engine.config.context_length
    if len(ids) >= limit:
        raise MobileLLMError(
            f"{name} must be shorter than the context of {limit} tokens, got {len(ids)} tokens"
        )
    return ids


def token_ids(engine: TextEngine, value: Any, name: str) -> list[int]:
    """Return a text or a sequence of ids as a non-empty list of ids the model knows.

    Args and errors are those of `prompt_ids`; the result may be longer than the context.
    """
    if isinstance(value, str):
        if engine.tokenizer is None:
            raise MobileLLMError(f"{name} must be token ids: this model has no tokenizer")
        # An empty text stays empty, even where the tokenizer would begin it with a token.
        value = engine.tokenizer.encode(value) if value else []
    try:
        ids = np.asarray(value)
    except ValueError:  # rows of different lengths
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        raise MobileLLMError(f"{name} must not be empty")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise MobileLLMError(
            f"{name} must be a string or a flat sequence of token ids, got {reprlib.repr(value)}"
        )
    vocab_size = engine.config.vocab_size
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        raise MobileLLMError(
            f"{name} token ids must be in 0..{vocab_size - 1}, "
            f"got {ids[wrong[0]]} at position {wrong[0]}"
        )
    return ids.tolist()


def chat_ids(engine: TextEngine, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids of a chat, up to where the assistant's answer begins.

    Raises:
        MobileLLMError: no chat template or tokenizer, a template that refuses the messages, or a
            chat that fills the context.
    """
    tokenizer = engine.tokenizer
    if engine.chat_template is None or tokenizer is None:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise MobileLLMError(f"[chat] this model has no {missing}; use generate")

    def spelling(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.decode([token_id], skip_special_tokens=False)

    text = render(
        engine.chat_template,
        messages,
        bos_token=spelling(tokenizer.bos_token_id),
        eos_token=spelling(next(iter(tokenizer.eos_token_ids), None)),
    )
    # The template has written the special tokens itself.
    ids = tokenizer.encode(text, add_special_tokens=False)
    return prompt_ids(engine, ids, "[chat] messages")
