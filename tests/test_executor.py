"""The executor against transformers, and against itself: threads, chunks, tables, caches."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

from mobilellm_fast import _C, ops, quant, reference
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.executor import KV_FORMATS, Executor, available_cpus
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.rope import cos_sin
from mobilellm_fast.sampling import Sampler, Sampling

INTEGER_FORMATS = quant.INTEGER_FORMATS


def weights_in(format, config, seed=0):
    return {
        name: values
        if values.ndim == 1
        else quant.pack(values, quant.kind_of(format, name, "float32"))
        for name, values in random_weights(config, seed).items()
    }


def make_executor(config, format="fp32", seed=0, **options) -> Executor:
    return Executor(config, weights_in(format, config, seed), format, **options)


def run(executor, ids, chunk=None) -> np.ndarray:
    """Logits of all tokens, fed `chunk` tokens at a time."""
    cache = executor.new_cache()
    chunk = chunk or len(ids)
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    logits = [executor.forward(part, cache, all_logits=True) for part in parts]
    assert cache.length == len(ids)
    return np.concatenate(logits)


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_minimums_that_are_not_stored_change_no_bit(isa):
    """The grid of Q4_0 in 4.5 bits, and in the 5 that Q4_1 takes."""
    config = tiny_config(layer_sharing="reverse", vocab_size=150)  # tied: embedding and head, too
    short, long = random_weights(config), {}
    for name, values in short.items():
        if values.ndim == 2:
            grid = quant.quantize(values, "int4_sym_g32")
            mins = grid.minimums.astype(np.float16)
            stored = quant.QuantizedTensor("int4_g32", grid.codes, grid.scales, mins)
            short[name], long[name] = quant.pack(grid), quant.pack(stored)
        else:
            long[name] = values
    ids = random_ids(config, 70)
    for chunk in (1, 5, 70):
        a, b = (run(Executor(config, w, "int4_all", isa=isa), ids, chunk) for w in (short, long))
        assert np.array_equal(a, b)


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


def test_dynamic_rope_equals_transformers_step_by_step():
    """Beyond the trained length, where transformers' keys, too, stay as they were written."""
    config = MODEL_CONFIGS["rope_dynamic"]
    weights = random_weights(config)
    ids = random_ids(config, 60)
    assert len(ids) > 2 * config.max_position_embeddings
    oracle = transformers_model(config, weights)
    past, want = None, []
    with torch.no_grad():
        for token in ids:
            out = oracle(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            want.append(out.logits[0])
    executor = Executor(config, packed_weights(weights), "fp32")
    assert_logits_close(run(executor, ids, chunk=1), torch.cat(want))
    assert np.array_equal(run(executor, ids), run(executor, ids, chunk=1))


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


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", quant.FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_has_the_bits_of_its_sequences(format, threads):
    """Prompts and single tokens together, across pages, chunks and both ways to share work."""
    config = tiny_config(max_position_embeddings=1024, layer_sharing="immediate")
    executor = make_executor(config, format, threads=threads)
    rng = np.random.default_rng(0)
    for lengths in ([1], [1] * 64, [127, 1, 129], [300, 5, 1, 20], rng.integers(1, 40, 64)):
        sequences = [random_ids(config, n, seed=i) for i, n in enumerate(lengths)]
        want = [run(executor, ids) for ids in sequences]
        caches = [executor.new_cache() for _ in sequences]
        got = executor.forward_batch(sequences, caches, all_logits=True)
        assert np.array_equal(got, np.concatenate(want))
        assert [cache.length for cache in caches] == list(lengths)
        # The same in pieces: beginnings of any length, then 1 to 19 tokens of each that is left.
        caches = [executor.new_cache() for _ in sequences]
        steps = rng.integers(1, 20, len(sequences))
        parts = [ids[: rng.integers(1, len(ids) + 1)] for ids in sequences]
        left = range(len(sequences))
        while left:
            got = executor.forward_batch(parts, [caches[i] for i in left])
            for row, i in zip(got, left, strict=True):
                assert np.array_equal(row, want[i][caches[i].length - 1])
            left = [i for i in left if caches[i].length < len(sequences[i])]
            parts = [sequences[i][caches[i].length :][: steps[i]] for i in left]


def test_decode_of_ragged_batches_has_the_bits_of_single_steps():
    config = tiny_config(max_position_embeddings=1024)
    want = None
    for threads in (1, 2, 5):
        executor = make_executor(config, "int8", threads=threads)
        prompts = [random_ids(config, n, seed=n) for n in range(1, 640, 10)]
        caches = [executor.new_cache() for _ in prompts]
        logits = [executor.forward_batch(prompts, caches)]
        for _ in range(4):
            picked = logits[-1].argmax(axis=1)
            logits.append(executor.forward_batch(picked[:, None], caches))
        if want is None:
            want = logits
            cache = executor.new_cache()
            alone = [executor.forward(prompts[40], cache)]
            for _ in range(4):
                alone.append(executor.forward([int(alone[-1].argmax())], cache))
            assert np.array_equal(np.stack(alone)[:, 0], np.stack(logits)[:, 40])
        assert np.array_equal(logits, want)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_not_finite_tokens_reach_no_earlier_ones(kv_format):
    config = tiny_config()
    weights = weights_in("int8", config)
    weights["model.embed_tokens.weight"].data[:] = 0
    executor = Executor(config, weights, "int8", kv_format=kv_format)
    ids = [1, 2, 7, 3]

    # a row of NaN: the scale of row 7 of the first tile
    weights["model.embed_tokens.weight"].data[:64].view(np.float32)[7] = np.nan
    want = [True, True, False, False]
    for chunk in (4, 2, 1):
        assert np.isfinite(run(executor, ids, chunk)[:, :7]).all(axis=1).tolist() == want


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
    # Rounding activations to 8 bits costs this much in a model without training ...
    assert_logits_close(run(executor, ids), want, 0.1)


@pytest.mark.parametrize("format", INTEGER_FORMATS)
def test_integer_formats_round_as_the_reference_does(format, monkeypatch):
    config = tiny_config()
    executor = make_executor(config, format)
    model = MobileLLM.from_weights(config, weights_in(format, config), format)
    monkeypatch.setattr(ops, "linear", reference.linear)
    ids = random_ids(config, 40)
    want = model(torch.from_numpy(np.asarray(ids)[None]))[0]
    # ... but is specified: what is left is the cache, and codes on the other side of a half.
    assert_logits_close(run(executor, ids), want, 2e-2)


def test_w8a8_rounds_activations_on_one_scale():
    config = tiny_config()
    ids = random_ids(config, 40)
    groups, whole = (run(make_executor(config, format), ids) for format in ("int8", "w8a8"))
    assert np.abs(groups - whole).max() > 1e-3 * np.abs(groups).max()


def test_only_the_last_logits_by_default():
    executor = make_executor(tiny_config())
    ids = random_ids(executor.config, 200)
    last = executor.forward(ids, executor.new_cache())
    assert last.shape == (1, executor.config.vocab_size)
    assert np.array_equal(last[0], run(executor, ids)[-1])


SAMPLINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 7, "min_p": 0.1, "repetition_penalty": 0.9},
]


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("options", SAMPLINGS)
def test_next_token_is_forward_and_choose(format, options):
    """The same tokens, log-probabilities and caches, over the edge of a page and of the table."""
    config = tiny_config(max_position_embeddings=2000, vocab_size=1000)
    executor = make_executor(config, format, threads=2)
    prompt = random_ids(config, 1020).tolist()
    sampling = Sampling(seed=3, **options)
    samplers = [Sampler(sampling, prompt, config.vocab_size) for _ in range(2)]
    caches = [executor.new_cache() for _ in range(2)]
    for cache in caches:
        executor.forward(prompt, cache)
    token_id = 5
    for _ in range(20):
        plain = samplers[0].choose(executor.forward([token_id], caches[0])[0])
        assert executor.next_token(token_id, caches[1], samplers[1]) == plain
        token_id = plain[0]
    assert [cache.length for cache in caches] == [1040, 1040]
    assert caches[0].pages()[:8] == caches[1].pages()[:8]
    last = [executor.forward([1], cache) for cache in caches]
    assert np.array_equal(*last)


def test_bad_arguments_of_next_token():
    executor = make_executor(tiny_config(max_position_embeddings=8))
    config, cache = executor.config, executor.new_cache()
    sampler = Sampler(Sampling(), [], config.vocab_size)
    for token_id in (-1, 97):
        with pytest.raises(MobileLLMError, match=rf"must be in \[0, 97\), got {token_id}"):
            executor.next_token(token_id, cache, sampler)
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


def test_next_token_refuses_broken_logits():
    config = tiny_config()
    weights = weights_in("fp32", config)
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    executor = Executor(config, weights, "fp32")
    with pytest.raises(MobileLLMError, match="the model's logits must be finite"):
        executor.next_token(1, executor.new_cache(), Sampler(Sampling(), [], config.vocab_size))


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


def test_cache_has_16_bits_for_integer_formats():
    ids = random_ids(tiny_config(), 10)
    sizes = {}
    for format in ("fp32", "int8"):
        executor = make_executor(tiny_config(), format)
        cache = executor.new_cache()
        assert cache.nbytes == 0
        executor.forward(ids, cache)
        sizes[format] = cache.nbytes
    # but for two scales per token, a float each
    config = tiny_config()
    heads = len(config.schedule) * config.num_key_value_heads
    assert sizes["fp32"] == 2 * (sizes["int8"] - heads * 128 * 2 * 4)


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


def is_idle(cache):
    """Tell whether no step uses it."""
    try:
        return cache.nbytes >= 0
    except MobileLLMError:
        return False


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_tokens_do_not_wait_for_the_whole_of_a_prompt_beside_them(options):
    """Nor in the middle of being chosen: a token and a chunk of the prompt take turns."""
    executor = make_executor(tiny_config(max_position_embeddings=8192), threads=2)
    ids = np.asarray(random_ids(executor.config, 4096), np.int32)
    cos, sin = cos_sin(executor.config, np.arange(len(ids)))
    prompt, answer = executor.new_cache(), executor.new_cache()
    sampler = Sampler(Sampling(temperature=1.0, seed=3, **options), [], executor.config.vocab_size)
    chunks = len(ids) // executor._executor.chunk_rows
    got, chosen = [], [(1, 0.0)]

    def read():
        got.append(executor._executor.forward([prompt], ids, [len(ids)], [1], cos, sin))

    reading = threading.Thread(target=read)
    reading.start()
    while is_idle(prompt) and not prompt.length:
        time.sleep(1e-4)
    while not is_idle(prompt):
        chosen.append(executor.next_token(chosen[-1][0], answer, sampler))
    reading.join()
    assert chunks >= 16
    assert len(chosen) > chunks // 2
    # and get what they would get alone
    assert np.array_equal(got[0], run(executor, ids)[-1:])
    alone = Sampler(Sampling(temperature=1.0, seed=3, **options), [], executor.config.vocab_size)
    cache, again = executor.new_cache(), [(1, 0.0)]
    for _ in chosen[1:]:
        again.append(executor.next_token(again[-1][0], cache, alone))
    assert again == chosen


def test_two_executors_at_once():
    config = tiny_config()
    ids = random_ids(config, 60)
    executors = [make_executor(config, seed=seed, threads=2) for seed in (0, 1)]
    want = [run(executor, ids) for executor in executors]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: run(executors[i % 2], ids, chunk=7), range(8)))
    assert all(np.array_equal(got[i], want[i % 2]) for i in range(8))


def test_threads_with_contexts_of_different_length():
    """Each makes the rotary table it needs; none may take away another's."""
    executor = make_executor(tiny_config(max_position_embeddings=4096))
    lengths = [3000, 20, 1500, 700]
    ids = random_ids(executor.config, 3000)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda n: run(executor, ids[:n]), lengths))
    want = run(make_executor(executor.config), ids)
    assert all(np.array_equal(g, want[:n]) for g, n in zip(got, lengths, strict=True))


NO_THREADS = """
import resource, sys
sys.path[:0] = sys.argv[1:]
import numpy as np
from helpers import tiny_config
from test_executor import make_executor
few, many = (make_executor(tiny_config(), threads=n) for n in (2, 200))
want = few.forward([1, 2, 3], few.new_cache())
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), hard))
for _ in range(2):
    try:
        many.forward([1, 2, 3], many.new_cache())
        print("no limit")
    except (RuntimeError, MemoryError, OSError) as error:
        print("refused")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert np.array_equal(many.forward([1, 2, 3], many.new_cache()), want)
print("recovered")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits threads through memory")
def test_a_system_without_threads_is_an_error_not_a_hang():
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS, tests], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["refused", "refused", "recovered"], done.stdout + done.stderr


NO_MEMORY = """
import resource, sys
sys.path[:0] = sys.argv[1:]
from helpers import tiny_config
from test_executor import make_executor
executor = make_executor(tiny_config(max_position_embeddings=4096), threads=1)
cache = executor.new_cache()
executor.forward([1] * 2015, cache)
executor.forward([1], cache)  # whatever a step allocates for itself is there
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
while cache.length < 2048:
    executor.forward([1], cache)
print("full")
try:
    executor.forward([1], cache)
except MemoryError:
    print("refused")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
executor.forward([1], cache)
print(cache.length)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory")
def test_a_page_for_later_that_finds_no_memory_fails_no_step():
    """The next one, of 16 that are allocated together, is touched 32 tokens before it is needed."""
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY, tests], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["full", "refused", "2049"], done.stdout + done.stderr


ON_ONE_CORE = """
import os
import numpy as np
from helpers import tiny_config
from test_executor import make_executor

config = tiny_config(hidden_size=192, intermediate_size=1024)
alone, both = (make_executor(config, "int8", threads=n) for n in (1, 2))
caches = [alone.new_cache(), both.new_cache()]

def same_step():
    if caches[0].length == 60:
        for cache in caches:
            cache.truncate(0)
    want, got = (e.forward([5], c) for e, c in zip((alone, both), caches))
    assert np.array_equal(want, got)
    return both._executor.active_threads

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
seen = [same_step() for _ in range(300)]
assert seen.count(1) > 200, seen
tried = [i for i, threads in enumerate(seen) if threads == 2]
assert tried[-1] > seen.index(1), "a second thread is not tried again"
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities")
def test_a_thread_without_a_core_is_left_out_and_tried_again():
    code = [sys.executable, "-c", ON_ONE_CORE]
    done = subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_not_finite_stays_not_finite():
    """A model whose numbers have left float's range says so, on every ISA."""
    config = tiny_config()
    for format in quant.FORMATS:
        weights = {
            name: values
            if values.ndim == 1
            else quant.pack(values, quant.kind_of(format, name, "float32"))
            for name, values in random_weights(config).items()
        }
        weights["model.layers.1.post_attention_layernorm.weight"][3] = np.nan
        for isa in _C.supported_isas():
            executor = Executor(config, weights, format, isa=isa)
            assert np.isnan(run(executor, [1, 2])).all()


def test_values_beyond_fp16_do_not_reach_earlier_tokens():
    config = tiny_config(num_hidden_layers=1)
    weights = random_weights(config)
    weights["model.layers.0.self_attn.v_proj.weight"] *= 1e6
    executor = Executor(config, packed_weights(weights, "int8"), "int8")
    ids = random_ids(config, 60)
    want = run(executor, ids, chunk=1)
    assert np.isfinite(want).all()
    assert np.array_equal(run(executor, ids), want)


@pytest.mark.parametrize("name", ["odd_everything", "gqa5", "wide_heads", "narrow_heads"])
@pytest.mark.parametrize("format", INTEGER_FORMATS)
def test_odd_sizes_agree_between_tables_and_splits(name, format):
    config = MODEL_CONFIGS[name]
    ids = random_ids(config, 40)
    want = run(make_executor(config, format, threads=1), ids)
    for isa in _C.supported_isas():
        for threads, chunk in ((2, 1), (5, 7)):
            executor = make_executor(config, format, threads=threads, isa=isa)
            assert np.array_equal(run(executor, ids, chunk), want)


# --- the plan ----------------------------------------------------------------------------------


def planned(cache_nbytes, **changes):
    executor = make_executor(tiny_config(**changes), "int8", cache_nbytes=cache_nbytes)
    return executor.memory_nbytes_per_token, executor.cache_nbytes_per_token


def test_plan_counts_bytes():
    base = planned(0)
    head = quant.packed_nbytes("int8", 97, 48)
    blocks = base[0] - head
    assert blocks > 0
    assert base[1] == 0
    large = 1 << 30
    assert planned(large) == base  # every block once
    assert planned(large, layer_sharing="immediate") == (head + blocks, blocks)
    assert planned(large, layer_sharing="immediate", layer_repeats=3) == (head + blocks, 2 * blocks)
    # too large to stay for the second pass
    assert planned(100, layer_sharing="immediate") == (head + 2 * blocks, 0)
    # only the turning point runs a block twice in a row
    assert planned(large, layer_sharing="repeat_all") == (head + 2 * blocks, 0)
    assert planned(large, layer_sharing="reverse") == (head + 3 * blocks // 2, blocks // 2)


def test_plan_does_not_change_results():
    config = tiny_config(layer_sharing="immediate", num_hidden_layers=4)
    ids = random_ids(config, 20)
    results = [
        run(make_executor(config, "int4", cache_nbytes=n), ids) for n in (0, 20_000, 1 << 30)
    ]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def _run_in_child(executor, ids, queue):
    queue.put(run(executor, ids))


def test_a_cache_in_use_is_refused_to_other_threads():
    """Steps run without the GIL: pages that are being written must not be copied or replaced."""
    config = tiny_config(max_position_embeddings=4096)
    executor = make_executor(config, threads=1, isa="scalar")  # takes a while
    context = executor.new_cache()
    executor.forward(random_ids(config, 600), context)
    pages, ids = context.pages(), random_ids(config, 512)
    sampler = Sampler(Sampling(), [], config.vocab_size)
    attempts = {
        "copy": lambda cache: cache.copy(),
        "pages": lambda cache: cache.pages(),
        "nbytes": lambda cache: cache.nbytes,
        "truncate": lambda cache: cache.truncate(1),
        "restore": lambda cache: cache.restore(600, pages),
        "forward": lambda cache: executor.forward([1], cache),
        "next_token": lambda cache: executor.next_token(1, cache, sampler),
    }

    def is_refused(attempt):
        """Tell whether it was refused; it may come too late where this thread had no core."""
        cache = context.copy()
        reader = threading.Thread(target=executor.forward, args=(ids, cache))
        reader.start()
        try:
            while reader.is_alive():
                try:
                    _ = cache.nbytes  # not in the step yet
                except MobileLLMError:
                    attempt(cache)
        except MobileLLMError as error:
            assert str(error) == "[forward] a cache must be used by one thread at a time"
            return True
        finally:
            reader.join()
        return False

    for name, attempt in attempts.items():
        assert any(is_refused(attempt) for _ in range(5)), name


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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_works_after_a_fork_during_a_step(threads):
    """What threads of the parent had half done, in attention over a long context, is not there."""
    executor = make_executor(tiny_config(max_position_embeddings=4096), threads=threads)
    cache = executor.new_cache()
    executor.forward(random_ids(executor.config, 3000), cache)
    want = executor.forward([3], executor.new_cache())
    ended = threading.Event()

    def step():
        while not ended.is_set():
            cache.truncate(3000)
            executor.forward([1], cache)

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        for i in range(40):
            time.sleep(i % 8 * 3e-4)
            child = os.fork()
            if child == 0:  # nothing of pytest's may run in it
                signal.alarm(30)
                got = executor.forward([3], executor.new_cache())
                os._exit(0 if np.array_equal(got, want) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        stepping.join()


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
