"""The step on a GPU: prompts by matrix products, single tokens by the decode kernels."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from ..config import MobileLLMConfig
from ..errors import MobileLLMError
from ..executor import check_batch, checked_ids
from ..files import brief
from ..rope import cos_sin
from ..sampling import Sampler
from ..triton_version import LEAST, has_triton
from .cache import FORMATS, CudaCache
from .weights import CudaWeights

TIERS = ("graph", "pdl", "persistent", "ring")
# Below it one Triton kernel is faster than one per stage (docs/gpu-decisions.md).
PERSISTENT_WIDTH = 960
PIECE = 2048  # tokens of a prompt at once: bounds the memory of activations


def _one_at_a_time(method: Callable) -> Callable:
    """Let one thread at a time use the buffers, with the weights' GPU as the current one."""

    @functools.wraps(method)
    def guarded(self: CudaExecutor, *args: Any, **options: Any) -> Any:
        with self._lock, self._device(), torch.inference_mode():
            return method(self, *args, **options)

    return guarded


class CudaExecutor:
    """Runs a model's weights on a GPU, with the interface of `Executor`.

    Bits depend on whether a token is read in a prompt, a batch or alone: matrix products of
    many tokens round their inputs to bfloat16, steps of one do not.

    Args:
        config: the architecture.
        weights: on the device.
        tier: how single tokens are decoded, see `steps`; "auto" takes the first of `best_tiers`
            that takes the model.
        kv_format: "fp16", "bf16" or "fp32"; None takes fp32 for fp32 weights, else fp16.
        options: of the tier, for measurements, see `PersistentSteps` and `RingSteps`.

    Raises:
        MobileLLMError: an argument is not possible here.
    """

    def __init__(
        self,
        config: MobileLLMConfig,
        weights: CudaWeights,
        tier: str = "auto",
        kv_format: str | None = None,
        **options: Any,
    ) -> None:
        from .steps import NotTaken

        if kv_format is None:
            kv_format = "fp32" if weights.qkv.kind == "fp32" else "fp16"
        check_options(tier, kv_format)
        check_sizes(config, weights)
        self._lock = threading.RLock()
        self.config = config
        self.weights = weights
        self.kv_format = kv_format
        self.num_parameters = config.num_parameters
        self.weight_nbytes = weights.nbytes
        tables = cos_sin(config, np.arange(config.context_length))
        self._rotary = tuple(torch.from_numpy(table).to(weights.device) for table in tables)
        tiers = best_tiers(weights.device, config) if tier == "auto" else [tier]
        for self.tier in tiers:
            try:
                self._steps = self._make_steps(options)
                break
            except MobileLLMError as error:
                if self.tier == tiers[-1]:
                    raise
                if not isinstance(error, NotTaken):  # what a user may mend, or should know of
                    text = f"tier {self.tier!r} is left out, a slower one is taken: {brief(error)}"
                    warnings.warn(text, stacklevel=2)
        if weights.device.type == "cuda":  # calls may come on other streams than the buffers' zeros
            torch.cuda.current_stream(weights.device).synchronize()
        self._batches: dict[int, Any] = {}
        self._cache_kind = self.new_cache().kind

    def _make_steps(self, options: dict[str, Any]) -> Any:
        from .ring import RingSteps
        from .steps import PersistentSteps, StagedSteps

        check_tier(self.tier, self.weights.device)
        arguments = (self.weights, self._rotary, self.kv_format)
        if self.tier == "ring":
            return RingSteps(*arguments, **options)
        if self.tier == "persistent":
            return PersistentSteps(*arguments, **options)
        return StagedSteps(*arguments, pdl=self.tier == "pdl", **options)

    @property
    def max_steps(self) -> int:
        """Most tokens of one call of `decode`."""
        from .steps import MAX_STEPS

        return MAX_STEPS

    def new_cache(self) -> CudaCache:
        """Return an empty KV cache, see `Executor.new_cache`."""
        return CudaCache(self.config, self.kv_format, self.weights.device)

    @_one_at_a_time
    def forward(
        self, token_ids: Sequence[int], cache: CudaCache, all_logits: bool = False
    ) -> np.ndarray:
        """Append tokens to the cache and return the logits that follow, see `Executor.forward`."""
        ids = self._checked(token_ids, cache)
        if len(ids) == 1:
            self._steps.run(cache, int(ids[0]), 1, 0.0, 0)
            return self._steps.logits.cpu().numpy()[None].copy()
        return self._read(ids, cache, all_logits).cpu().numpy()

    def next_token(self, token_id: int, cache: CudaCache, sampler: Sampler) -> tuple[int, float]:
        """Append a token and choose the next on the CPU, see `Executor.next_token`."""
        return sampler.choose(self.forward([token_id], cache)[0])

    @_one_at_a_time
    def forward_batch(
        self,
        sequences: Sequence[Sequence[int]],
        caches: Sequence[CudaCache],
        all_logits: bool = False,
    ) -> np.ndarray:
        """Append tokens to several caches, see `Executor.forward_batch`."""
        check_batch(sequences, caches)
        checked = [self._checked(s, c) for s, c in zip(sequences, caches, strict=True)]
        if len(checked) > 1 and all(len(ids) == 1 for ids in checked):
            token_ids = [int(ids[0]) for ids in checked]
            return self._batch_step(len(caches)).run(token_ids, caches).cpu().numpy().copy()
        rows = [self.forward(ids, c, all_logits) for ids, c in zip(checked, caches, strict=True)]
        return np.concatenate(rows)

    @_one_at_a_time
    def decode(
        self,
        cache: CudaCache,
        token_id: int,
        count: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> tuple[list[int], list[float]]:
        """Read a token, then what is chosen after it, without leaving the device.

        Args:
            cache: grows by `count` tokens.
            token_id: the first token to read.
            count: how many to choose; the last one chosen is not read.
            temperature: 0 takes the likeliest token (the first on ties), else tokens are drawn from
                the softmax of logits / temperature.
            seed: of the draws; the same seed at the same positions draws the same.

        Returns:
            The tokens chosen and their natural log-probabilities in the model's own distribution.

        Raises:
            MobileLLMError: the context holds fewer tokens; a logit was not finite.
        """
        self._checked([token_id] * count, cache)
        tokens: list[int] = []
        logprobs: list[float] = []
        if temperature > 0:  # beyond these, logits over it are no numbers, or all alike
            temperature = min(max(temperature, 1e-30), 1e30)
        while len(tokens) < count:
            part = min(count - len(tokens), self.max_steps)
            chosen, probable = self._steps.run(cache, token_id, part, temperature, seed)
            tokens += chosen.tolist()
            logprobs += probable.tolist()
            token_id = tokens[-1]
        if not np.isfinite(logprobs).all():
            raise MobileLLMError("[generate] the model's logits must be finite, got nan or inf")
        return tokens, logprobs

    @_one_at_a_time
    def decode_batch(
        self, caches: Sequence[CudaCache], token_ids: Sequence[int], count: int
    ) -> np.ndarray:
        """Take the likeliest token of each sequence, `count` times: int64 (sequences, count)."""
        for cache, token_id in zip(caches, token_ids, strict=True):
            self._checked([token_id] * count, cache)
        chosen = []
        step = self._batch_step(len(caches))
        for _ in range(count):
            token_ids = step.run(token_ids, caches).argmax(-1).tolist()
            chosen.append(token_ids)
        return np.array(chosen).T

    def _batch_step(self, size: int) -> Any:
        from .batch_step import BatchStep
        from .geometry import power_of_two

        size = power_of_two(size)  # few sizes: each is recorded as a graph
        if size not in self._batches:
            self._batches[size] = BatchStep(
                self.weights, self._rotary, self._steps.kv, size, self.new_cache()
            )
        return self._batches[size]

    def _device(self) -> AbstractContextManager:
        device = self.weights.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _read(self, ids: np.ndarray, cache: CudaCache, all_logits: bool) -> torch.Tensor:
        from .layers import hidden_states, logits, prompt_attention

        cache.reserve(cache.length + len(ids))
        parts = []
        for start in range(0, len(ids), PIECE):
            piece = torch.from_numpy(ids[start : start + PIECE]).to(self.weights.device)
            attention = prompt_attention(self.weights, cache, self._rotary, len(piece))
            hidden = hidden_states(self.weights, piece.long(), attention)
            cache.length += len(piece)
            parts.append(logits(self.weights, hidden if all_logits else hidden[-1:]))
        return torch.cat(parts) if all_logits else parts[-1]

    def _checked(self, token_ids: Sequence[int], cache: CudaCache) -> np.ndarray:
        ids = checked_ids(token_ids, self.config.vocab_size)
        # kernels would read and write wherever another model's keys and values lie
        if not isinstance(cache, CudaCache) or cache.kind != self._cache_kind:
            raise MobileLLMError(f"[forward] cache must be of new_cache(), got {brief(cache)}")
        end = cache.length + len(ids)
        if end > self.config.context_length:
            raise MobileLLMError(
                f"[forward] the context holds {self.config.context_length} tokens, got {end}"
            )
        return ids


def best_tiers(device: torch.device, config: MobileLLMConfig) -> list[str]:
    """Say how this GPU can decode, the fastest first; the last takes every model."""
    if device.type != "cuda" or torch.version.hip:
        return ["graph"]
    from ..kernels.decode import grid_sync
    from .geometry import vector_size

    generation, _ = torch.cuda.get_device_capability(device)
    tiers = ["ring"] if generation >= 9 else []
    fits = vector_size(config) <= grid_sync.COPY_STRIDE.value and config.head_dim <= 128
    if generation >= 8 and fits and config.hidden_size < PERSISTENT_WIDTH:
        tiers.append("persistent")
    return [*tiers, "pdl" if generation >= 9 else "graph"]


def check_tier(tier: str, device: torch.device) -> None:
    """Refuse a tier that a GPU has no instructions, or not enough shared memory, for."""
    if device.type != "cuda" or tier == "graph":
        return
    needs = {"pdl": 9, "persistent": 8, "ring": 9}[tier]
    found = "HIP" if torch.version.hip else torch.cuda.get_device_capability(device)
    if torch.version.hip or found[0] < needs:
        raise MobileLLMError(
            f"[load] tier {tier!r} needs an NVIDIA GPU of compute capability {needs}, got {found}"
        )


def check_sizes(config: MobileLLMConfig, weights: CudaWeights) -> None:
    """Refuse matrices whose elements 32 bits cannot count, as the kernels do within a block."""
    for matrix in (weights.embedding, weights.head, weights.gate_up, weights.down):
        count = matrix.rows * matrix.codes.shape[-1]
        if count >= 1 << 31:
            raise MobileLLMError(
                f"[load] a matrix on cuda must have fewer than 2^31 elements, got {count}"
            )


def check_options(tier: str, kv_format: str | None) -> None:
    """Refuse a tier or a format of the KV cache that there is not on a GPU."""
    if kv_format is not None and kv_format not in FORMATS:
        raise MobileLLMError(
            f"[load] kv_format must be one of {', '.join(FORMATS)} on cuda, got {kv_format!r}"
        )
    if tier not in ("auto", *TIERS):
        raise MobileLLMError(
            f"[load] tier must be 'auto' or one of {', '.join(TIERS)}, got {tier!r}"
        )


def check_cuda(device: str) -> None:
    """Refuse a device on which nothing of this can run.

    Raises:
        MobileLLMError: no such device, or no Triton that is new enough.
    """
    index = device.removeprefix("cuda").removeprefix(":") or "0"
    count = torch.cuda.device_count()
    if not index.isdecimal() or int(index) >= count:
        raise MobileLLMError(
            f"[load] device {device!r} must be a GPU that torch can use, got {count} of them"
        )
    if not has_triton():
        least = ".".join(map(str, LEAST))
        raise MobileLLMError(f"[load] device {device!r} needs Triton {least} or later")
