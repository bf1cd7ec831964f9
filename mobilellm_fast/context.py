"""A KV cache together with the tokens in it, so that what is computed is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .interface import Cache, TextEngine
from .sampling import Sampler


class Context:
    """The tokens a model has read so far. Not for concurrent use.

    Args:
        engine: reads the tokens.
        cache: one of its caches; None makes an empty one.
        token_ids: the tokens in `cache`.
    """

    def __init__(
        self, engine: TextEngine, cache: Cache | None = None, token_ids: Sequence[int] = ()
    ) -> None:
        self.cache: Any = engine.new_cache() if cache is None else cache
        self.token_ids = list(token_ids)
        self.reader: object = None  # whoever extends it now
        self._engine = engine

    def resume(self, token_ids: list[int], reader: object) -> list[int]:
        """Keep what this and a text have in common; return the text's tokens left to read.

        At least one is left, because logits come from reading a token. `reader` extends it from now
        on, and nobody else; unless that is refused, because another thread is reading.
        """
        limit = min(len(self.token_ids), len(token_ids) - 1)
        pairs = zip(self.token_ids[:limit], token_ids, strict=False)
        common = next((i for i, (ours, new) in enumerate(pairs) if ours != new), limit)
        before, self.reader = self.reader, reader
        try:
            self.rewind(common)
        except BaseException:
            self.reader = before
            raise
        return token_ids[common:]

    def rewind(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.cache.truncate(length)
        del self.token_ids[length:]

    def extend(self, token_ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Read tokens, return logits: see `Executor.forward`."""
        before = self.cache.length
        try:
            return self._engine.forward(token_ids, self.cache, all_logits)
        finally:  # an interrupted call may have read some of them
            self.token_ids += token_ids[: self.cache.length - before]

    def next_token(self, token_id: int, sampler: Sampler) -> tuple[int, float]:
        """Read a token, choose the next: see `Executor.next_token`."""
        try:
            self.token_ids.append(token_id)
            return self._engine.next_token(token_id, self.cache, sampler)
        except BaseException:  # an interrupted call may have read it
            del self.token_ids[self.cache.length :]
            raise

    def decode(
        self, token_id: int, count: int, temperature: float, seed: int
    ) -> list[tuple[int, float]]:
        """Read a token, then what is chosen after it; return choices and log-probabilities.

        For engines that choose by themselves: see `CudaExecutor.decode`.
        """
        before = self.cache.length
        try:
            tokens, logprobs = self._engine.decode(self.cache, token_id, count, temperature, seed)
        except BaseException:  # whatever it has read is not known
            self.cache.truncate(before)
            raise
        self.token_ids += [token_id, *tokens[:-1]]
        return list(zip(tokens, logprobs, strict=True))

    def copy(self) -> Context:
        """Return another one with the same tokens; memory is shared until either changes it."""
        return Context(self._engine, self.cache.copy(), self.token_ids)
