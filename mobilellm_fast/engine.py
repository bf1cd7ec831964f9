"""A model ready to generate: executor, tokenizer and chat template. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from . import _C, calibration, generate
from .config import MobileLLMConfig
from .executor import Executor, check_isa, check_kv_format, check_threads
from .generate import Generation, Prompt, Prompts, Score, Stream
from .packing import load_image
from .sampling import Sampler
from .session import Session
from .tokenizer import Tokenizer
from .weights import Weights


class Engine:
    """Generates text on the CPU from packed weights.

    Use `Engine.load`; `mobilellm_fast.load` returns the same engine inside a `torch.nn` model.

    Args:
        config: the architecture.
        weights: what the executor runs, see `Executor`.
        format: one of `quant.FORMATS`.
        tokenizer: a `Tokenizer`, or None for token ids only.
        chat_template: Jinja source, or None.
        name: for display.
        threads, isa, kv_format, fetch_ahead: see `Executor`.
    """

    on_gpu = False

    def __init__(
        self,
        config: MobileLLMConfig,
        weights: Weights,
        format: str,
        *,
        tokenizer: Tokenizer | None = None,
        chat_template: str | None = None,
        name: str = "model",
        threads: int | None = None,
        isa: str | None = None,
        kv_format: str | None = None,
        fetch_ahead: bool = True,
    ) -> None:
        self.config = config
        self.weights = weights
        self.format = format
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.name = name
        self.executor = Executor(
            config, weights, format, threads, isa, kv_format, fetch_ahead=fetch_ahead
        )

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        format: str = "auto",
        threads: int | None = None,
        revision: str | None = None,
        isa: str | None = None,
        kv_format: str | None = None,
    ) -> Engine:
        """Load a model from a directory, hub id, .gguf or .mlf file, or by default SmolLM2-135M.

        Args:
            source: see `packing.load_image`.
            format: `fp32`, `bf16`, `int8`, `w8a8`, `int4` or `int4_all`, which has 4 bits in the
                embedding and the head, too; `auto` keeps a GGUF file's own grid where there are
                kernels for it, and takes `int8` otherwise.
            threads: how many to use; None means as many as decode fastest among those that this
                process may run on, measured once for each model, see `calibration`.
            revision: branch, tag or commit of a hub id.
            isa: name of a kernel table, see `mobilellm-fast info`; None means the best.
            kv_format: `int16`, `int8`, `fp16` or `fp32`, how keys and values are kept; None takes
                `fp32` for float formats, else `int16`.

        Raises:
            MobileLLMError: an argument is out of range.
            CheckpointError: the source cannot be found, read or trusted.
        """
        isa = check_isa(isa)  # now, not after a long load
        check_kv_format(kv_format)
        image = load_image(source, format, revision, check_threads(threads))
        fetch_ahead = True
        if threads is None:
            model = image.config, image.weights, image.format
            choice = calibration.choose(
                lambda choice: Executor(
                    *model, choice.threads, isa, kv_format, fetch_ahead=choice.fetch_ahead
                ),
                f"{image.config.to_hf()} {image.format} {isa}",
            )
            threads, fetch_ahead = choice.threads, choice.fetch_ahead
        return cls(
            image.config,
            image.weights,
            image.format,
            tokenizer=image.tokenizer,
            chat_template=image.chat_template,
            name=image.name,
            threads=threads,
            isa=isa,
            kv_format=kv_format,
            fetch_ahead=fetch_ahead,
        )

    def new_cache(self) -> _C.KVCache:
        """Return an empty KV cache, see `Executor.new_cache`."""
        return self.executor.new_cache()

    def forward(
        self, token_ids: Sequence[int], cache: _C.KVCache, all_logits: bool = False
    ) -> np.ndarray:
        """Append tokens to a cache and return logits, see `Executor.forward`."""
        return self.executor.forward(token_ids, cache, all_logits)

    def next_token(self, token_id: int, cache: _C.KVCache, sampler: Sampler) -> tuple[int, float]:
        """Append a token to a cache and choose the next, see `Executor.next_token`."""
        return self.executor.next_token(token_id, cache, sampler)

    def forward_batch(
        self,
        sequences: Sequence[Sequence[int]],
        caches: Sequence[_C.KVCache],
        all_logits: bool = False,
    ) -> np.ndarray:
        """Append tokens to several caches and return logits, see `Executor.forward_batch`."""
        return self.executor.forward_batch(sequences, caches, all_logits)

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Prompts, **options: Any) -> list[Generation]: ...

    def generate(self, prompt: Prompt | Prompts, **options: Any) -> Generation | list[Generation]:
        """Continue a text or token ids, or a list of up to 64 of them, see `generate.generate`."""
        return generate.generate(self, prompt, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Continue a text or token ids, token by token, see `generate.stream`."""
        return generate.stream(self, prompt, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """Answer a conversation, see `generate.chat`."""
        return generate.chat(self, messages, **options)

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Stream:
        """Answer a conversation, token by token, see `generate.stream_chat`."""
        return generate.stream_chat(self, messages, **options)

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """Return a `Session`, which does not compute again what its prompts have in common.

        Args:
            messages: beginning of its conversation, such as a system message.
        """
        return Session(self, messages)

    def restore_session(self, path: str | Path) -> Session:
        """Read a session from a file of `Session.save`, see `Session.restore`."""
        return Session.restore(path, self)

    def score(self, text_or_ids: Prompt, *, window: int | None = None) -> Score:
        """Measure how likely the model finds a text, see `generate.score`."""
        return generate.score(self, text_or_ids, window=window)
