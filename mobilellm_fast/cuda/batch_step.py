"""One decode step of several sequences at once, recorded as a CUDA graph per batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.decode import step
from .cache import CudaCache
from .geometry import Geometry, softmax_scale
from .layers import hidden_states, logits
from .recording import recorded
from .steps import ATTENTION_WARPS
from .weights import CudaWeights

MERGE_SIZE = 256  # values that a program merges


class BatchStep:
    """Reads one token of each of up to `size` sequences; fixed buffers, for one call at a time.

    Rows without a sequence read a token of `spare`, an empty cache.
    """

    def __init__(
        self,
        weights: CudaWeights,
        rotary: tuple[Tensor, Tensor],
        kv: Any,
        size: int,
        spare: CudaCache,
    ) -> None:
        device, config = weights.device, weights.config
        self._weights = weights
        self._rotary = rotary
        self._kv = kv
        self._geometry = Geometry(weights)
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._positions, self._capacities = torch.zeros(2, size, dtype=torch.int32, device=device)
        self._addresses = torch.zeros(size, dtype=torch.int64, device=device)
        queries = config.num_attention_heads * config.head_dim
        self._partial, self._attended = (
            torch.zeros(size, count, dtype=torch.float32, device=device)
            for count in (self._geometry.partial_size, queries)
        )
        spare.reserve(1)
        self._spare = spare
        self._logits: Tensor | None = None
        self._graph: Any = None

    def run(self, token_ids: Sequence[int], caches: Sequence[CudaCache]) -> Tensor:
        """Append a token to each cache; return float32 (caches, vocab_size), for now."""
        for cache in caches:
            cache.reserve(cache.length + 1)
        missing = len(self._ids) - len(caches)
        rows = [*caches, *[self._spare] * missing]
        self._positions.copy_(torch.tensor([c.length for c in rows], dtype=torch.int32))
        self._capacities.copy_(torch.tensor([c.capacity for c in rows], dtype=torch.int32))
        self._addresses.copy_(torch.tensor([cache.address for cache in rows]))
        self._ids.copy_(torch.tensor([*token_ids, *[0] * missing]))
        if self._weights.device.type != "cuda":
            self._logits = self._compute()
        elif self._graph is None:
            self._compute()  # compiles: a recording must not
            self._graph = recorded(self._record, self._weights.device)
            self._graph.replay()
        else:
            self._graph.replay()
        for cache in caches:
            cache.length += 1
        return self._logits[: len(caches)]

    def _record(self) -> None:
        self._logits = self._compute()

    def _compute(self) -> Tensor:
        return logits(self._weights, hidden_states(self._weights, self._ids, self._attention))

    def _attention(self, slot: int, qkv: Tensor) -> Tensor:
        sizes = self._geometry.attention
        size = len(self._ids)
        heads = sizes["HEADS"] + 2 * sizes["KV_HEADS"]
        place = (self._addresses, self._capacities, slot)
        step.rotate_kernel[(size, heads)](
            self._positions,
            *self._rotary,
            *place,
            qkv,
            KV=self._kv,
            HEADS=sizes["HEADS"],
            KV_HEADS=sizes["KV_HEADS"],
            HEAD_DIM=sizes["HEAD_DIM"],
            BLOCK=sizes["DIM"],
        )
        step.attention_kernel[(sizes["HEADS"] * sizes["SPLITS"], size)](
            self._positions,
            *place,
            qkv,
            softmax_scale(self._weights),
            self._partial,
            self._attended,
            KV=self._kv,
            WARPS=ATTENTION_WARPS,
            WAIT="none",
            num_warps=ATTENTION_WARPS,
            **sizes,
        )
        step.merge_kernel[(-(-self._attended.shape[1] // MERGE_SIZE), size)](
            self._positions,
            self._partial,
            self._attended,
            SIZE=MERGE_SIZE,
            **self._geometry.merging,
        )
        return self._attended
