"""What the executor refuses, and what it takes by itself."""

import os
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeCache
from helpers import make_executor, random_ids, tiny_config

from mobilellm_fast import _C
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.executor import available_cpus
from mobilellm_fast.sampling import Sampler, Sampling


def test_one_cache_twice_is_refused_before_anything_is_computed():
    executor = make_executor(tiny_config())
    cache, ids = executor.new_cache(), random_ids(executor.config, 40)
    with pytest.raises(MobileLLMError, match="caches must be different"):
        executor.forward_batch([ids, ids], [cache, cache])
    assert cache.length == 0


def test_bad_batches():
    executor = make_executor(tiny_config(max_position_embeddings=8))
    caches = [executor.new_cache() for _ in range(2)]
    for sequences, message in [
        ([], "sequences must be one or more, each with a cache, got 0 and 2 caches"),
        ([[1]], "each with a cache, got 1 and 2 caches"),
        ([[1], []], "token_ids must be a non-empty list"),
        ([[1], [97]], r"token_ids must be in \[0, 97\), got 97"),
        ([[1], [0] * 9], "the context holds 8 tokens, got 9"),
    ]:
        with pytest.raises(MobileLLMError, match=message):
            executor.forward_batch(sequences, caches)
    assert [cache.length for cache in caches] == [0, 0]


def test_bad_arguments_of_next_token():
    executor = make_executor(tiny_config(max_position_embeddings=8))
    config, cache = executor.config, executor.new_cache()
    sampler = Sampler(Sampling(), [], config.vocab_size)
    for token_id in (-1, 97):
        with pytest.raises(MobileLLMError, match=rf"must be in \[0, 97\), got {token_id}"):
            executor.next_token(token_id, cache, sampler)
    for token_id in (1.5, "1", None):
        with pytest.raises(MobileLLMError, match="token_ids must be a non-empty list of integers"):
            executor.next_token(token_id, cache, sampler)
    for wrong in (None, "cache", FakeCache([1, 2])):
        with pytest.raises(
            MobileLLMError, match=r"\[forward\] cache must be of new_cache\(\), got"
        ):
            executor.next_token(1, wrong, sampler)
    with pytest.raises(AttributeError):
        executor.next_token(1, cache, None)
    with pytest.raises(ValueError, match="sampler must be for 97 tokens, got one for 5"):
        executor.next_token(1, cache, Sampler(Sampling(), [], 5))
    other = make_executor(tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="cache was made by another model"):
        other.next_token(1, cache, sampler)
    assert cache.length == 0
    executor.forward([0] * 8, cache)
    with pytest.raises(MobileLLMError, match="the context holds 8 tokens, got 9"):
        executor.next_token(1, cache, sampler)
    native, rotary = executor._executor, np.zeros((2, 8, config.head_dim // 2), np.float32)
    with pytest.raises(ValueError, match="token must be in 0..96, got 97"):
        native.next_token(cache, 97, rotary, sampler.compiled)
    with pytest.raises(ValueError, match="rotary must have more than 8 positions, got 8"):
        native.next_token(cache, 1, rotary, sampler.compiled)
    with pytest.raises(ValueError, match="rotary must be C-contiguous float32"):
        native.next_token(cache, 1, rotary[:, ::2], sampler.compiled)
    assert cache.length == 8


def test_bad_arguments():
    executor = make_executor(tiny_config(max_position_embeddings=8))
    cache = executor.new_cache()
    for ids, message in [
        ([], r"\[forward\] token_ids must be a non-empty list of integers, got float64 \(0,\)"),
        ([1.5], "non-empty list of integers, got float64"),
        ([[1]], r"non-empty list of integers, got int64 \(1, 1\)"),
        ([3, 97], r"token_ids must be in \[0, 97\), got 97"),
        ([-1], r"token_ids must be in \[0, 97\), got -1"),
        ([0] * 9, "the context holds 8 tokens, got 9"),
    ]:
        with pytest.raises(MobileLLMError, match=message):
            executor.forward(ids, cache)
    for wrong in (None, "cache"):
        message = rf"\[forward\] cache must be of new_cache\(\), got {wrong!r}"
        with pytest.raises(MobileLLMError, match=message):
            executor.forward([1], wrong)
        with pytest.raises(MobileLLMError, match=message):
            executor.forward_batch([[1], [2]], [cache, wrong])
    assert cache.length == 0
    with pytest.raises(MobileLLMError, match=r"threads must be an integer in 1\.\.1024, got 0"):
        make_executor(tiny_config(), threads=0)
    with pytest.raises(MobileLLMError, match="isa must be one of .*, got 'sse9', which is unknown"):
        make_executor(tiny_config(), isa="sse9")
    other = make_executor(tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="cache was made by another model"):
        other.forward([1], cache)


def test_isa_from_the_environment(monkeypatch):
    monkeypatch.setenv("MLF_ISA", "scalar")
    assert make_executor(tiny_config()).isa == "scalar"
    assert make_executor(tiny_config(), isa=_C.supported_isas()[0]).isa == _C.supported_isas()[0]
    monkeypatch.setenv("MLF_ISA", "nonsense")
    with pytest.raises(MobileLLMError, match="nonsense"):
        make_executor(tiny_config())


@pytest.mark.parametrize(
    ("limit", "affinity", "threads"),
    [("max 100000", 3, 3), ("200000 100000", 3, 2), ("50000 100000", 3, 1), ("", 1, 1)],
)
def test_threads_default_to_what_this_process_may_use(monkeypatch, limit, affinity, threads):
    """The affinity, and the container's share of time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: limit)
    assert available_cpus() == threads
    assert make_executor(tiny_config()).threads == threads
