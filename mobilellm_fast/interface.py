"""What generation needs of an engine and its caches: `Engine`, `CudaEngine`, or anything alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .config import MobileLLMConfig

if TYPE_CHECKING:
    from .sampling import Sampler
    from .weights import Weights


class Cache(Protocol):
    """The keys and values of the tokens that one sequence has read."""

    @property
    def length(self) -> int:
        """How many tokens are in it."""

    def truncate(self, tokens: int) -> None:
        """Forget all but the first tokens."""

    def copy(self) -> Cache:
        """Return the same tokens; memory may be shared until either changes."""


class TextEngine(Protocol):
    """What `generate`, `stream`, `chat` and `score` call.

    It may have `decode(cache, token_id, count, temperature, seed)`, too: the same as `count` calls
    of `next_token` that draw by temperature alone, without leaving a device.
    """

    config: MobileLLMConfig
    tokenizer: Any  # a `Tokenizer`, or None
    chat_template: str | None

    def new_cache(self) -> Any:
        """Return an empty `Cache`."""

    def forward(self, token_ids: Sequence[int], cache: Any, all_logits: bool = False) -> np.ndarray:
        """Append tokens to a cache; return the last one's logits (1, vocab), or all (n, vocab)."""

    def next_token(self, token_id: int, cache: Any, sampler: Sampler) -> tuple[int, float]:
        """Append a token to a cache; choose the next one: its id and log-probability."""

    def forward_batch(self, sequences: Sequence[Sequence[int]], caches: Sequence) -> np.ndarray:
        """Append tokens to several caches; return each one's last logits (sequences, vocab)."""


class StoredEngine(TextEngine, Protocol):
    """What a saved session compares, beside that."""

    weights: Weights
    format: str
