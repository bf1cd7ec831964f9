"""The executor against transformers, and against itself: formats, tables, chunks, caches."""

import sys

import numpy as np
import pytest
import torch
from helpers import (
    MODEL_CONFIGS,
    assert_logits_close,
    make_executor,
    packed_weights,
    random_ids,
    random_weights,
    run,
    tiny_config,
    transformers_logits,
    transformers_model,
    weights_in,
    words_of_script,
)

from mobilellm_fast import _C, ops, quant, reference
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.executor import KV_FORMATS, Executor
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.sampling import Sampler, Sampling

INTEGER_FORMATS = quant.INTEGER_FORMATS


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


NO_MEMORY = """
import resource, sys
sys.path[:0] = sys.argv[1:]
from helpers import make_executor, tiny_config
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
    assert words_of_script(NO_MEMORY) == ["full", "refused", "2049"]


def test_not_finite_stays_not_finite():
    """A model whose numbers have left float's range says so, on every ISA."""
    config = tiny_config()
    for format in quant.FORMATS:
        weights = weights_in(format, config)
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
