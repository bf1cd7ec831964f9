"""The executor against transformers, and against itself: threads, chunks, tables, caches."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from helpers import (
    MODEL_CONFIGS,
    SHARING,
    assert_logits_close,
    packed_weights,
    random_ids,
    random_weights,
    tiny_config,
    transformers_logits,
    transformers_model,
)

from mobilellm_fast import _C, quant
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.executor import Executor, available_cpus

INTEGER_FORMATS = ("int8", "w8a8", "int4")


def make_executor(config, format="fp32", seed=0, **options) -> Executor:
    weights = {
        name: values
        if values.ndim == 1
        else quant.pack(values, quant.kind_of(format, name, "float32"))
        for name, values in random_weights(config, seed).items()
    }
    return Executor(config, weights, format, **options)


def run(executor, ids, chunk=None) -> np.ndarray:
    """Logits of all tokens, fed `chunk` tokens at a time."""
    cache = executor.new_cache()
    chunk = chunk or len(ids)
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    logits = [executor.forward(part, cache, all_logits=True) for part in parts]
    assert cache.length == len(ids)
    return np.concatenate(logits)


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_prefill_and_steps_equal_transformers(name):
    config = MODEL_CONFIGS[name]
    weights = random_weights(config)
    executor = Executor(config, packed_weights(weights), "fp32", threads=2)
    # "dynamic" rotates each key for the length at which it was written: equal to transformers at
    # once up to the trained length, and step by step (with its cache) beyond it.
    dynamic = config.rope_scaling and config.rope_scaling["rope_type"] == "dynamic"
    ids = random_ids(config, config.max_position_embeddings if dynamic else 40)
    with torch.no_grad():
        want = transformers_logits(config, transformers_model(config, weights), ids[None])[0]
    assert_logits_close(run(executor, ids), want)
    assert_logits_close(run(executor, ids, chunk=1), want)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("repeats", [2, 3])
def test_layer_sharing_equals_a_loop_over_transformers_layers(sharing, repeats):
    config = tiny_config(num_hidden_layers=3, layer_sharing=sharing, layer_repeats=repeats)
    weights = random_weights(config)
    ids = random_ids(config, 30)
    with torch.no_grad():
        want = transformers_logits(config, transformers_model(config, weights), ids[None])[0]
    executor = Executor(config, packed_weights(weights), "fp32", threads=2)
    assert_logits_close(run(executor, ids), want)
    assert_logits_close(run(executor, ids, chunk=1), want)


@pytest.mark.parametrize("sharing", [False, *SHARING])
def test_200_greedy_tokens_with_the_cache_equal_those_without(sharing):
    config = tiny_config(layer_sharing=sharing)
    executor = make_executor(config)
    cache = executor.new_cache()
    ids = random_ids(config, 7).tolist()
    logits = executor.forward(ids, cache)
    for _ in range(200):
        token = int(logits[-1].argmax())
        without_cache = executor.forward(ids, executor.new_cache())
        assert token == without_cache[-1].argmax()
        ids.append(token)
        logits = executor.forward([token], cache)


# 300 tokens fill pages of the cache and chunks of a prompt, with a rest in each.
@pytest.mark.parametrize("format", quant.FORMATS)
def test_bits_do_not_depend_on_threads_chunks_or_table(format):
    config = tiny_config(max_position_embeddings=512, layer_sharing="immediate")
    ids = random_ids(config, 300)
    isas = _C.supported_isas()
    want = run(make_executor(config, format, threads=1, isa=isas[0]), ids)
    assert np.isfinite(want).all()
    for threads in (2, 3, 4, 7):
        assert np.array_equal(run(make_executor(config, format, threads=threads), ids), want)
    for isa in isas[1:]:
        assert np.array_equal(run(make_executor(config, format, threads=2, isa=isa), ids), want)
    two = make_executor(config, format, threads=2)
    for chunk in (1, 2, 3, 37, 128, 129):
        assert np.array_equal(run(two, ids, chunk), want)


@pytest.mark.parametrize("format", INTEGER_FORMATS)
def test_integer_formats_equal_their_dequantized_weights(format):
    config = tiny_config()
    executor = make_executor(config, format)
    weights = random_weights(config)
    exact = {
        name: values
        if values.ndim == 1
        else quant.pack(quant.pack(values, quant.kind_of(format, name, "float32")).dequantize())
        for name, values in weights.items()
    }
    ids = random_ids(config, 40)
    want = run(Executor(config, exact, "fp32"), ids)
    # int16 activations and an fp16 cache cost little; the paper's 8-bit ones cost more.
    assert_logits_close(run(executor, ids), want, 5e-2 if format == "w8a8" else 2e-3)


def test_w8a8_rounds_activations_to_8_bits():
    config = tiny_config()
    ids = random_ids(config, 40)
    wide, narrow = (run(make_executor(config, format), ids) for format in ("int8", "w8a8"))
    assert np.abs(wide - narrow).max() > 1e-3 * np.abs(wide).max()


def test_only_the_last_logits_by_default():
    executor = make_executor(tiny_config())
    ids = random_ids(executor.config, 200)
    last = executor.forward(ids, executor.new_cache())
    assert last.shape == (1, executor.config.vocab_size)
    assert np.array_equal(last[0], run(executor, ids)[-1])


def test_truncated_cache_forgets():
    executor = make_executor(tiny_config())
    ids = random_ids(executor.config, 150)
    cache = executor.new_cache()
    executor.forward(ids, cache)
    cache.truncate(131)
    assert cache.length == 131
    again = executor.forward(ids[131:], cache, all_logits=True)
    assert np.array_equal(again, run(executor, ids)[131:])
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.150, got 151"):
        cache.truncate(151)


def test_cache_is_fp16_for_integer_formats():
    ids = random_ids(tiny_config(), 10)
    sizes = {}
    for format in ("fp32", "int8"):
        executor = make_executor(tiny_config(), format)
        cache = executor.new_cache()
        assert cache.nbytes == 0
        executor.forward(ids, cache)
        sizes[format] = cache.nbytes
    assert sizes["fp32"] == 2 * sizes["int8"]


def test_concurrent_calls_take_turns():
    executor = make_executor(tiny_config(), threads=2)
    ids = random_ids(executor.config, 60)
    want = run(executor, ids)
    got = [None] * 4

    def work(i):
        got[i] = run(executor, ids, chunk=5 + i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(np.array_equal(result, want) for result in got)


def test_two_executors_at_once():
    config = tiny_config()
    ids = random_ids(config, 60)
    executors = [make_executor(config, seed=seed, threads=2) for seed in (0, 1)]
    want = [run(executor, ids) for executor in executors]
    for _ in range(3):
        for executor, logits in zip(executors, want, strict=True):
            assert np.array_equal(run(executor, ids, chunk=7), logits)


def _run_in_child(executor, ids, queue):
    queue.put(run(executor, ids))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_fork():
    executor = make_executor(tiny_config(), threads=3)
    ids = random_ids(executor.config, 20)
    want = run(executor, ids)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_in_child, args=(executor, ids, queue))
    child.start()
    got = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert np.array_equal(got, want)
    assert np.array_equal(run(executor, ids), want)


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


def test_threads_default_to_the_processors_of_this_process():
    assert make_executor(tiny_config()).threads == available_cpus() >= 1
