"""The step: one call runs a prompt chunk or a decode step through the whole model. No torch."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import _C, quant
from .config import MobileLLMConfig
from .errors import MobileLLMError
from .files import brief
from .rope import cos_sin
from .sampling import Sampler, broken_logits
from .weights import Weights

KV_FORMATS = ("fp16", "fp32", "int16", "int8")
PIECE = 512  # tokens per call into C++, which cannot be interrupted: at most about a second
_PROJECTIONS = {
    "q": "self_attn.q",
    "k": "self_attn.k",
    "v": "self_attn.v",
    "o": "self_attn.o",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}


class Executor:
    """Runs a model's weights on the CPU.

    Results do not depend on the thread count, on the instruction set, on how a sequence is split
    over calls, or on what else is in a batch.

    Args:
        config: the architecture.
        weights: one entry per name of `expected_shapes(config)`: float32 arrays for norms, packed
            weights for matrices. They are read where they lie and must not move.
        format: one of `quant.FORMATS`; says what inputs of quantized layers are rounded to.
        threads: how many to use; None means as many as this process may run on.
        isa: name of a kernel table; None takes the environment's `MLF_ISA`, or else the best.
        kv_format: one of `KV_FORMATS`, how the KV cache stores keys and values: floats, or codes of
            16 or 8 bits with a scale for each key and each value. None takes `fp32` for float
            formats, else `int16`, which is faster than `fp16` and has about twice its error.
        cache_nbytes: size of the last-level cache to plan for; None asks the system.
        fetch_ahead: whether blocks that run several times in a row fetch the next one meanwhile.

    Raises:
        MobileLLMError: `threads`, `isa` or `kv_format` is not possible here.
    """

    def __init__(
        self,
        config: MobileLLMConfig,
        weights: Weights,
        format: str,
        threads: int | None = None,
        isa: str | None = None,
        kv_format: str | None = None,
        cache_nbytes: int | None = None,
        fetch_ahead: bool = True,
    ) -> None:
        self.config = config
        self.kv_format = check_kv_format(kv_format) or (
            "fp32" if format in ("fp32", "bf16") else "int16"
        )
        self.num_parameters = config.num_parameters
        self.weight_nbytes = sum(weight.nbytes for weight in weights.values())
        self._rotary = np.empty((2, 0, config.head_dim // 2), np.float32)

        def block(index: int) -> dict:
            prefix = f"model.layers.{index}."
            projections = {
                name: weights[f"{prefix}{path}_proj.weight"].as_tuple()
                for name, path in _PROJECTIONS.items()
            }
            return projections | {
                "attention_norm": weights[f"{prefix}input_layernorm.weight"],
                "ffn_norm": weights[f"{prefix}post_attention_layernorm.weight"],
            }

        embedding = weights["model.embed_tokens.weight"]
        head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self._executor = _C.Executor(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            activation=quant.activation_of(format),
            kv_format=self.kv_format,
            schedule=list(config.schedule),
            blocks=[block(index) for index in range(config.num_hidden_layers)],
            final_norm=weights["model.norm.weight"],
            embedding=embedding.as_tuple(),
            head=head.as_tuple(),
            threads=check_threads(threads),
            isa=check_isa(isa),
            cache_nbytes=_C.last_level_cache_nbytes() if cache_nbytes is None else cache_nbytes,
            fetch_ahead=fetch_ahead,
        )
        self._piece = max(PIECE // self._executor.chunk_rows, 1) * self._executor.chunk_rows

    @property
    def threads(self) -> int:
        """How many threads there are; decoding may leave some out for a while."""
        return self._executor.threads

    @property
    def isa(self) -> str:
        """Name of the kernel table in use."""
        return self._executor.isa

    @property
    def fetches_ahead(self) -> bool:
        """Whether some block is fetched while the one before it runs again."""
        return self._executor.fetches_ahead

    @property
    def memory_nbytes_per_token(self) -> int:
        """Weight bytes that a decode step is predicted to read from memory."""
        return self._executor.memory_nbytes_per_token

    @property
    def cache_nbytes_per_token(self) -> int:
        """Weight bytes that a decode step is predicted to read again, from cache."""
        return self._executor.cache_nbytes_per_token

    def new_cache(self) -> _C.KVCache:
        """Return an empty KV cache.

        It has `.length`, `.nbytes`, `.truncate(tokens)`, and `.copy()`, which shares memory until
        one of the two grows; `.pages()` and `.restore(length, pages)` give and take it as bytes.
        While a call uses it, other threads that want to are refused by a MobileLLMError.
        """
        return self._executor.new_cache()

    def forward(
        self, token_ids: Sequence[int], cache: _C.KVCache, all_logits: bool = False
    ) -> np.ndarray:
        """Append tokens to the cache and return the logits that follow them.

        Args:
            token_ids: one or more, each in [0, vocab_size).
            cache: from `new_cache`; grows by as many tokens.
            all_logits: return those of every token, not of the last alone.

        Returns:
            float32 (1, vocab_size), or (tokens, vocab_size).

        Raises:
            MobileLLMError: no token, an id out of range, or more tokens than the context holds.
        """
        # Few calls of numpy: between two steps none of its code is in the caches.
        ids = checked_ids(token_ids, self.config.vocab_size)
        check_cache(cache)
        count, start = len(ids), cache.length
        if count > self._piece:
            return self.forward_batch([ids], [cache], all_logits)
        cos, sin = self._rotary_upto(start + count)
        end = start + count
        wanted = [count if all_logits else 1]
        return self._executor.forward([cache], ids, [count], wanted, cos[start:end], sin[start:end])

    def next_token(self, token_id: int, cache: _C.KVCache, sampler: Sampler) -> tuple[int, float]:
        """Append a token to the cache and choose the next: `forward` and `Sampler.choose` at once.

        Args:
            token_id: in [0, vocab_size).
            cache: from `new_cache`; grows by one token.
            sampler: of this sequence.

        Returns:
            The id of the token after it, and its `logprob`.

        Raises:
            MobileLLMError: as `forward` and `Sampler.choose`.
        """
        try:
            if not 0 <= token_id < self.config.vocab_size:
                checked_ids([token_id], self.config.vocab_size)  # says so
            rotary = self._rotary_upto(cache.length + 1)
            chosen = self._executor.next_token(cache, token_id, rotary, sampler.compiled)
        except (AttributeError, TypeError):  # to look before would take 6 us after a step
            checked_ids([token_id], self.config.vocab_size)
            check_cache(cache)
            raise
        if chosen[1] != chosen[1]:  # NaN; a function that tells it would take 6 us after a step
            raise broken_logits()
        return chosen

    def forward_batch(
        self,
        sequences: Sequence[Sequence[int]],
        caches: Sequence[_C.KVCache],
        all_logits: bool = False,
    ) -> np.ndarray:
        """Append tokens to several caches at once: weights are read once for all of them.

        Args:
            sequences: one or more, each as in `forward`.
            caches: one for each, all different.
            all_logits: return those of every token, not of each sequence's last alone.

        Returns:
            float32 (sequences, vocab_size), or (tokens of all in order, vocab_size): the same bits
            as from calls one by one.

        Raises:
            MobileLLMError: as `forward`; nothing was computed.
        """
        ids = [checked_ids(part, self.config.vocab_size) for part in sequences]
        counts = [len(part) for part in ids]
        for cache in caches:
            check_cache(cache)
        check_batch(ids, caches)
        starts = [cache.length for cache in caches]
        positions = [np.arange(s, s + count) for s, count in zip(starts, counts, strict=True)]
        positions = np.concatenate(positions)
        rotary = self._rotary_upto(int(positions.max()) + 1).take(positions, axis=1)
        ends = np.cumsum(counts)
        tokens = np.concatenate(ids)
        parts = []
        for first in range(0, len(tokens), self._piece):
            # the part of each sequence in this piece, and how many of its tokens want logits
            last = min(first + self._piece, len(tokens))
            chosen, lengths, wanted = [], [], []
            for cache, count, end in zip(caches, counts, ends.tolist(), strict=True):
                length = min(end, last) - max(end - count, first)
                if length > 0:
                    chosen.append(cache)
                    lengths.append(length)
                    wanted.append(length if all_logits else int(end <= last))
            cos, sin = rotary[:, first:last]
            parts.append(
                self._executor.forward(chosen, tokens[first:last], lengths, wanted, cos, sin)
            )
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rotary_upto(self, end: int) -> np.ndarray:
        """Return cos and sin of positions 0..end-1 and perhaps more: float32 (2, n, head_dim / 2).

        Raises:
            MobileLLMError: the context holds fewer.
        """
        if end > self.config.context_length:
            raise MobileLLMError(
                f"[forward] the context holds {self.config.context_length} tokens, got {end}"
            )
        rotary = self._rotary  # another thread may replace it meanwhile
        if end > rotary.shape[1]:  # in steps, so that decoding rarely stops for it
            longer = np.arange(min(end + 1024, self.config.context_length))
            rotary = self._rotary = np.stack(cos_sin(self.config, longer))
        return rotary


def checked_ids(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return token ids as int32 (n,), n >= 1, each in [0, vocab_size)."""
    if type(token_ids) is list and len(token_ids) == 1:  # a step of decoding, where time counts
        (token_id,) = token_ids
        if type(token_id) is int and 0 <= token_id < vocab_size:
            return np.array(token_ids, np.int32)
    try:
        ids = np.asarray(token_ids)
    except ValueError:  # ragged
        ids = np.asarray(token_ids, object)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise MobileLLMError(
            f"[forward] token_ids must be a non-empty list of integers, got {ids.dtype} {ids.shape}"
        )
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if len(bad):
        raise MobileLLMError(f"[forward] token_ids must be in [0, {vocab_size}), got {bad[0]}")
    return ids.astype(np.int32)


def check_cache(cache: _C.KVCache) -> None:
    """Refuse what is no KV cache of a CPU."""
    if not isinstance(cache, _C.KVCache):
        raise MobileLLMError(f"[forward] cache must be of new_cache(), got {brief(cache)}")


def check_batch(sequences: Sequence, caches: Sequence) -> None:
    """Refuse a batch without sequences, or not with a cache of its own for each."""
    if not len(sequences) or len(sequences) != len(caches):
        raise MobileLLMError(
            f"[forward] sequences must be one or more, each with a cache, "
            f"got {len(sequences)} and {len(caches)} caches"
        )
    if len({id(cache) for cache in caches}) < len(caches):
        raise MobileLLMError("[forward] caches must be different, got one twice")


def check_threads(threads: int | None) -> int:
    """Return a thread count: `threads`, or for None what this process may use."""
    if threads is None:
        return available_cpus()
    try:
        count = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        count = 0
    if not 1 <= count <= 1024:
        raise MobileLLMError(f"[load] threads must be an integer in 1..1024, got {threads!r}")
    return count


def check_isa(isa: str | None) -> str:
    """Return the name of a kernel table: `isa`, or for None the environment's, or the best."""
    supported = _C.supported_isas()
    isa = isa or os.environ.get("MLF_ISA") or supported[0]
    if isa not in supported:
        fault = "cannot run on this machine" if isa in _C.compiled_isas() else "is unknown"
        raise MobileLLMError(
            f"[load] isa must be one of {', '.join(supported)}, got {isa!r}, which {fault}"
        )
    return isa


def check_kv_format(kv_format: str | None) -> str | None:
    """Return `kv_format` if it is one of `KV_FORMATS`, or None for the default of the weights."""
    if kv_format is not None and kv_format not in KV_FORMATS:
        raise MobileLLMError(
            f"[load] kv_format must be one of {', '.join(KV_FORMATS)}, got {kv_format!r}"
        )
    return kv_format


def available_cpus() -> int:
    """Count the processors that this process may use: its affinity and its container's limit."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cpus, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return cpus
