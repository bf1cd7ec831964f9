"""Decoding on a GPU: every tier against the CPU engine, and the tiers against each other.

Without a GPU, Triton interprets its kernels: one kernel per stage, and the persistent one as a grid
of a single program; the ring, in CUDA C++, runs with its threads as fibers.
"""

import dataclasses

import numpy as np
import pytest
import torch
from emulated_cuda import compile_kernel
from interpreted import DEVICE, HAS_GPU
from random_cuda_weights import random_cuda_weights

from mobilellm_fast import quant
from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.engine import Engine
from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.executor import Executor
from mobilellm_fast.model import MobileLLM

pytest.importorskip("triton")

import triton.language as tl

from mobilellm_fast.cuda import geometry, ring, steps
from mobilellm_fast.cuda.engine import CudaEngine
from mobilellm_fast.cuda.executor import CudaExecutor, best_tiers
from mobilellm_fast.cuda.weights import CudaWeights, Matrix
from mobilellm_fast.kernels.decode import attention, grid_sync, step

TINY = MobileLLMConfig(
    vocab_size=62,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.3,
    max_position_embeddings=256,
)
TIERS = ["graph", "persistent", "ring"] + (["pdl"] if HAS_GPU else [])
FEW_WARPS = {"WARPS": 2, "THREADS": 96, "SHARED_LIMIT": 1 << 18}
OPTIONS = (
    {}
    if HAS_GPU
    else {
        "persistent": {"warps": 16},
        "ring": {"programs": 3, "constants": FEW_WARPS},
    }
)
U = 2.0**-24

pytestmark = [pytest.mark.gpu] if HAS_GPU else []


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Make attention split and merge at lengths that the interpreter has time for."""
    monkeypatch.setattr(geometry, "BLOCK", 128)
    monkeypatch.setattr(geometry, "SPLITS", 5)  # read four at a time
    if not HAS_GPU:  # the interpreter's time goes by programs
        monkeypatch.setattr(steps, "STAGE_WARPS", 16)
        monkeypatch.setattr(ring.RingSteps, "_launch", emulate)


def emulate(self, arguments):
    """Launch the ring's kernel on this CPU, each time in another order of its threads."""
    seed = self._epoch % 12
    compile_kernel(ring.SOURCE, self.constants)(arguments, self.programs, seed, 1 << 18)


def packed(config, format, seed=0):
    torch.manual_seed(seed)
    weights = MobileLLM(config).weights()
    if format == "fp32":
        return weights
    return {
        name: quant.pack(weight.data, quant.kind_of(format, name, "fp32"))
        if isinstance(weight, quant.PackedWeight)
        else weight
        for name, weight in weights.items()
    }


def executors(config, tier, format=None, kv_format="fp32"):
    """Of random weights, by default in fp32, or bf16 for the ring, which takes no others."""
    weights = packed(config, format or ("bf16" if tier == "ring" else "fp32"))
    ours = CudaExecutor(
        config,
        CudaWeights.from_packed(config, weights, DEVICE),
        tier,
        kv_format,
        **OPTIONS.get(tier, {}),
    )
    plain = {
        name: quant.pack(weight.dequantize()) if hasattr(weight, "dequantize") else weight
        for name, weight in weights.items()
    }
    return ours, Executor(config, plain, "fp32", threads=1)


def read(ours, prompt, cache):
    """Read a prompt; in bf16 token by token, as a prompt rounds its activations to that, too."""
    if ours.tier != "ring":
        return ours.forward(prompt, cache)
    for token in prompt:
        logits = ours.forward([token], cache)
    return logits


def assert_close(got, want, steps=400):
    """Within `steps` roundings of the largest logit: a few per layer and per element of a sum."""
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= steps * U * np.abs(want).max()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("sharing", [False, "immediate"])
def test_steps_equal_the_cpu(tier, sharing):
    """Over the lengths at which attention takes another block, and another part."""
    vocab_size = 64 if tier == "ring" else TINY.vocab_size
    config = dataclasses.replace(TINY, layer_sharing=sharing, vocab_size=vocab_size)
    ours, oracle = executors(config, tier)
    cache, expected = ours.new_cache(), oracle.new_cache()
    prompt = np.arange(14) * 7 % 61
    assert_close(read(ours, prompt, cache), oracle.forward(prompt, expected))
    for token in (3, 60) if sharing else (3,):
        got, want = ours.forward([token], cache), oracle.forward([token], expected)
        assert_close(got, want)
    assert cache.length == expected.length


@pytest.fixture
def halves_by_default():
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tier", TIERS)
def test_buffers_do_not_have_the_default_dtype(tier, halves_by_default):
    """Kernels write float32: past the end of a buffer of halves."""
    weights = random_cuda_weights(dataclasses.replace(TINY, vocab_size=64), "bf16", 0, DEVICE)
    ours = CudaExecutor(weights.config, weights, tier, **OPTIONS.get(tier, {}))
    for part in (ours._steps, ours._batch_step(2)):
        buffers = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        dtypes = {buffer.dtype for buffer in buffers if buffer.is_floating_point()}
        assert dtypes == {torch.float32}


@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier != "ring"])
@pytest.mark.parametrize("length", [17, 90, 330])
def test_attention_joins_its_parts(tier, length):
    """One part, two, and more than are read together; the ring's is in test_ring.py."""
    config = dataclasses.replace(TINY, num_hidden_layers=1, max_position_embeddings=512)
    ours, oracle = executors(config, tier)
    cache, expected = ours.new_cache(), oracle.new_cache()
    prompt = np.arange(length) * 5 % 61
    oracle.forward(prompt, expected)
    ours.forward(prompt, cache)
    assert_close(ours.forward([9], cache), oracle.forward([9], expected))


def test_weights_that_are_too_large_are_computed_again():
    """Scores far above that of the new token, in the first part, in the last and in none."""
    config = dataclasses.replace(TINY, num_hidden_layers=1, initializer_range=1.2)
    ours, oracle = executors(config, "graph")
    cache, expected = ours.new_cache(), oracle.new_cache()
    prompt = np.arange(90) * 5 % 61
    oracle.forward(prompt, expected)
    ours.forward(prompt, cache)
    for token in range(0, 61, 6):
        # scores of several hundred: their roundings move the weights by as many
        got, want = ours.forward([token], cache), oracle.forward([token], expected)
        assert_close(got, want, steps=40_000)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("format", ["int8", "int4", "int4_all"])
def test_quantized_weights(tier, format):
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=40)
    ours, oracle = executors(config, tier, format)
    # the ring's inputs have 16 bits then, see test_ring.py
    steps = 2.0**-11 / U if tier == "ring" else 400
    cache, expected = ours.new_cache(), oracle.new_cache()
    for token in (5, 6):
        got, want = ours.forward([token], cache), oracle.forward([token], expected)
        assert_close(got, want, steps)


@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("cols", [32, 40, 576])
def test_row_major_weights_keep_their_values(kind, cols):
    values = np.random.default_rng(0).normal(size=(7, cols)).astype(np.float32)
    weight = quant.pack(quant.quantize(values, kind))
    matrix = Matrix.stack([[weight, weight]], "cpu")
    assert matrix.codes.shape[:2] == (1, 14)
    assert torch.equal(matrix[0].dequantize()[7:], torch.from_numpy(weight.dequantize()))


@pytest.mark.parametrize("tier", TIERS)
def test_decode_continues_by_itself(tier):
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=24)
    ours, oracle = executors(config, tier)
    cache, expected = ours.new_cache(), oracle.new_cache()
    tokens, logprobs = ours.decode(cache, 4, 3)
    token = 4
    for chosen, logprob in zip(tokens, logprobs, strict=True):
        logits = oracle.forward([token], expected)[0].astype(np.float64)
        assert chosen == logits.argmax()
        want = logits[chosen] - np.log(np.exp(logits).sum())
        assert abs(logprob - want) <= 1e-5
        token = chosen
    assert cache.length == 3


@pytest.mark.parametrize("tier", TIERS)
def test_draws_depend_on_seed_and_position_alone(tier):
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=24)
    ours, _ = executors(config, tier)
    first, second = (ours.decode(ours.new_cache(), 4, 2, 5.0, seed=7)[0] for _ in range(2))
    assert first == second
    cache = ours.new_cache()
    one_by_one = [ours.decode(cache, 4, 1, 5.0, seed=7)[0][0]]
    one_by_one += ours.decode(cache, one_by_one[0], 1, 5.0, seed=7)[0]
    assert one_by_one == first
    others = {tuple(ours.decode(ours.new_cache(), 4, 1, 5.0, seed=s)[0]) for s in range(6)}
    assert len(others) > 1


def test_batches_equal_sequences_one_by_one():
    ours, oracle = executors(dataclasses.replace(TINY, num_hidden_layers=1), "graph")
    prompts = [[1, 2, 3], list(range(20)), [5]]
    caches = [ours.new_cache() for _ in prompts]
    expected = [oracle.new_cache() for _ in prompts]
    got = ours.forward_batch(prompts, caches)
    assert_close(got, oracle.forward_batch(prompts, expected))
    for tokens in ([7, 8, 9], [1, 0, 2]):
        parts = [[token] for token in tokens]
        got = ours.forward_batch(parts, caches)
        assert_close(got, oracle.forward_batch(parts, expected))
    chosen = ours.decode_batch(caches, [1, 1, 1], 1)
    assert chosen[:, 0].tolist() == oracle.forward_batch([[1]] * 3, expected).argmax(-1).tolist()


def test_caches_grow_copy_rewind_and_last():
    config = dataclasses.replace(TINY, num_hidden_layers=1, max_position_embeddings=512)
    ours, _ = executors(config, "graph")
    cache = ours.new_cache()
    prompt = np.arange(130) % 61
    want = ours.forward(prompt, cache)
    fork = cache.copy()
    restored = ours.new_cache()
    restored.restore(cache.length, cache.pages())
    other = ours.forward(prompt, cache)  # moves: beyond the first capacity
    assert cache.capacity >= 260
    for same in (fork, restored):
        again = ours.forward(prompt[:100], same)
        assert np.isfinite(again).all()
        assert np.array_equal(ours.forward(prompt[100:], same), other)
    cache.truncate(0)
    assert np.array_equal(ours.forward(prompt, cache), want)
    restored.restore(cache.length, cache.pages())  # in the memory that it has used
    assert restored.pages() == cache.pages()
    with pytest.raises(MobileLLMError, match=r"length must be in 0..130, got 131"):
        cache.truncate(131)
    with pytest.raises(MobileLLMError, match="pages of 3 tokens must be 1 of"):
        restored.restore(3, [])


def test_wrong_arguments_are_refused():
    ours, _ = executors(dataclasses.replace(TINY, num_hidden_layers=1), "graph")
    weights = ours.weights
    deeper, _ = executors(TINY, "graph")
    other = CudaExecutor(ours.config, weights, "graph", "fp16")
    for call, message in (
        (lambda: CudaExecutor(TINY, weights, "fast"), "tier must be 'auto' or one of"),
        (lambda: CudaExecutor(TINY, weights, kv_format="int8"), "kv_format must be one of"),
        (lambda: ours.forward([62], ours.new_cache()), r"token_ids must be in \[0, 62\), got 62"),
        (lambda: ours.decode(ours.new_cache(), 0, 257), "context holds 256 tokens, got 257"),
        (lambda: ours.forward_batch([[1]], []), "each with a cache"),
        # of more blocks, of other numbers, and of none: a GPU would write beyond its memory
        (lambda: ours.forward([1], deeper.new_cache()), "cache must be of new_cache"),
        (lambda: ours.decode(other.new_cache(), 1, 1), "cache must be of new_cache"),
        (lambda: ours.forward_batch([[1]], [object()]), "cache must be of new_cache"),
    ):
        with pytest.raises(MobileLLMError, match=message):
            call()


def test_logits_that_are_no_numbers_are_an_error():
    ours, _ = executors(dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=24), "graph")
    ours.weights.final_norm.fill_(float("nan"))
    with pytest.raises(MobileLLMError, match="logits must be finite"):
        ours.decode(ours.new_cache(), 1, 1)


def test_generation_on_the_device():
    """The same answers, streams and sessions as by logits; the model reads the same memory."""
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=40, eos_token_id=None)
    weights = packed(config, "fp32")
    engine = CudaEngine(config, weights, "fp32", device=DEVICE)
    oracle = Engine(config, weights, "fp32", threads=1)
    options = {"max_new_tokens": 7}
    want = oracle.generate([3, 1], **options)
    got = engine.generate([3, 1], **options)
    assert got.token_ids == want.token_ids and got.finish_reason == "length"
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    assert got.timings.decode_tokens == 6

    session = engine.session()
    stream = session.stream([3, 1], **options)
    first = [next(stream).token_id for _ in range(3)]
    assert first == want.token_ids[:3]
    del stream
    again = session.generate([3, 1, *first], max_new_tokens=2)
    assert again.token_ids == want.token_ids[3:5]
    assert again.timings.reused_tokens >= 4

    seeded = [engine.generate([3], temperature=2.0, seed=5, **options).token_ids for _ in range(2)]
    assert seeded[0] == seeded[1]
    filtered = {"temperature": 1.0, "top_k": 1, "max_new_tokens": 3}
    assert engine.generate([3, 1], **filtered).token_ids == want.token_ids[:3]

    model = MobileLLM.from_engine(engine)
    ids = torch.tensor([[3, 1]], device=DEVICE)
    logits = model(ids)[0, -1].detach().cpu().numpy()
    assert_close(logits, oracle.forward([3, 1], oracle.new_cache())[0])
    assert model.engine is engine
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert model.engine is engine
    assert model.engine.generate([3, 1], **options).token_ids != want.token_ids


def test_quantized_models_on_the_device():
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=40)
    weights = packed(config, "int4")
    engine = CudaEngine(config, weights, "int4", device=DEVICE, kv_format="fp32")
    model = MobileLLM.from_engine(engine)
    logits = model(torch.tensor([[3, 1]], device=DEVICE))[0, -1].detach().cpu().numpy()
    cache = engine.new_cache()
    engine.forward([3], cache)
    # on a GPU, inputs of matrix products are rounded to bfloat16, whose unit is 2^16 as large
    assert_close(logits, engine.forward([1], cache)[0], 400 if not HAS_GPU else 8 * 2**16)
    with pytest.raises(MobileLLMError, match="quantized for a GPU"):
        model.weights()


def test_sessions_stay_on_their_kind_of_device(tmp_path):
    """Pages of a GPU have as many bytes as a CPU's, in another order."""
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=40, eos_token_id=None)
    weights = packed(config, "fp32")
    engine = CudaEngine(config, weights, "fp32", device=DEVICE)
    on_cpu = Engine(config, weights, "fp32", threads=1)
    path = tmp_path / "a.session"
    session = engine.session()
    answer = session.generate([3, 1], max_new_tokens=3)
    session.save(path)
    again = engine.restore_session(path)
    want = session.generate([3, 1, *answer.token_ids], max_new_tokens=2)
    assert again.generate([3, 1, *answer.token_ids], max_new_tokens=2).token_ids == want.token_ids
    with pytest.raises(CheckpointError, match="page_layout"):
        on_cpu.restore_session(path)
    other = on_cpu.session()
    other.generate([3, 1], max_new_tokens=3)
    other.save(path)
    with pytest.raises(CheckpointError, match="page_layout"):
        engine.restore_session(path)


def test_what_the_context_cannot_hold_is_refused():
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    ours, _ = executors(config, "graph")
    cache = ours.new_cache()
    for call in (
        lambda: cache.reserve(257),
        lambda: ours.decode_batch([cache], [1], 257),
        lambda: ours.decode(cache, 1, 257),
    ):
        with pytest.raises(MobileLLMError, match="context holds 256 tokens, got 257"):
            call()
    assert cache.length == 0


def test_answers_end_on_the_device_as_on_the_host():
    """At a token that ends texts, at the end of the context, and in the middle of a run."""
    config = dataclasses.replace(
        TINY, num_hidden_layers=1, vocab_size=40, max_position_embeddings=12
    )
    weights = packed(config, "fp32")
    ends = Engine(config, weights, "fp32", threads=1).generate([3, 1], max_new_tokens=6).token_ids
    for eos in (None, ends[4]):
        each = dataclasses.replace(config, eos_token_id=eos)
        engine = CudaEngine(each, weights, "fp32", device=DEVICE)
        want = Engine(each, weights, "fp32", threads=1).generate([3, 1], max_new_tokens=50)
        got = engine.generate([3, 1], max_new_tokens=50)
        assert got.token_ids == want.token_ids
        assert got.finish_reason == want.finish_reason


@pytest.mark.parametrize("tier", TIERS)
def test_half_precision_caches_and_weights(tier):
    """Keys and values in float16 and bfloat16, bfloat16 weights: errors of their own units."""
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=40)
    exact, oracle = executors(config, tier)
    for kv_format, unit in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        halved = CudaExecutor(config, exact.weights, tier, kv_format, **OPTIONS.get(tier, {}))
        cache, expected = halved.new_cache(), oracle.new_cache()
        for token in (3, 1):
            got, want = halved.forward([token], cache), oracle.forward([token], expected)
        assert_close(got, want, 4 * unit / U)
    weights = {
        name: quant.pack(weight.data, "bf16") if isinstance(weight, quant.PackedWeight) else weight
        for name, weight in packed(config, "fp32").items()
    }
    rounded = CudaExecutor(
        config,
        CudaWeights.from_packed(config, weights, DEVICE),
        tier,
        "fp32",
        **OPTIONS.get(tier, {}),
    )
    want = Executor(config, weights, "bf16", threads=1)
    assert_close(rounded.forward([3], rounded.new_cache()), want.forward([3], want.new_cache()))


def test_a_part_may_weigh_next_to_nothing():
    """Weights relative to the new token's that add up to less than a float can divide by."""
    parts, block, dim = 2, 4, 8
    length = 2 * 2 * block  # two blocks each, the new token among the second part
    keys, values = torch.zeros(2, length, dim), torch.randn(2, length, dim)
    exponents = torch.linspace(-148, -126, 50).tolist()
    for exponent in exponents:
        # in units of the query: scores of the first part are that many powers of two lower
        keys[0, : length // 2, 0] = exponent
        cache = torch.stack((keys[0], values[0])).unsqueeze(1).contiguous().to(DEVICE)
        new = torch.zeros(3, dim)
        new[0, 0], new[2] = 1.0, values[0, -1]
        partial = torch.zeros(parts, dim + 1, device=DEVICE)
        _launch_attention(cache, new.to(DEVICE), length, partial, parts, block, dim)
        got = partial.cpu().double()
        assert got.isfinite().all(), exponent
        total = got[:, -1].exp2()
        joined = (got[:, :-1] * total[:, None]).sum(0) / total.sum()
        want = values[0, length // 2 :].double().mean(0)
        assert (joined - want).abs().max() <= 8 * length * U


def _launch_attention(cache, new, length, partial, parts, block, dim):
    def numbers(value, dtype):
        return torch.tensor([value], dtype=dtype, device=DEVICE)

    step.attention_kernel[(parts, 1)](
        numbers(length - 1, torch.int32),
        numbers(cache.data_ptr(), torch.int64),
        numbers(length, torch.int32),
        0,
        new,
        1 / attention.LOG2_E.value,
        partial,
        torch.zeros(dim, device=DEVICE),
        KV=tl.float32,
        HEADS=1,
        KV_HEADS=1,
        HEAD_DIM=dim,
        DIM=dim,
        SPLITS=parts,
        BLOCK_KV=block,
        WARPS=4,
        WAIT="none",
        num_warps=4,
    )


@pytest.mark.parametrize("parts", range(1, 10))
def test_threads_poll_a_power_of_two_of_elements(parts):
    """As Triton wants of what an instruction takes; all words of a thread are at most 32."""
    for size in (256, 1024, 4096, 8192):
        count = grid_sync.per_thread(size, 8, parts)
        assert size % count == 0 and count & (count - 1) == 0 and count * parts <= 32
        constraints = grid_sync.poll_constraints(size, 8, parts).split(",")
        assert constraints.count("=&r") == count * parts
        code = grid_sync.poll_asm(size, 8, parts, size)
        assert code.count("ld.relaxed") == count * parts
        assert f"${len(constraints) - 1}" in code and f"${len(constraints)}," not in code


def test_the_tier_goes_by_width_and_room(monkeypatch):
    base = dataclasses.replace(TINY, hidden_size=576, intermediate_size=1536)
    # queries alone of 64 heads leave no room for the parts of each
    many = dataclasses.replace(base, num_attention_heads=64, num_key_value_heads=64, head_dim=128)
    wide = dataclasses.replace(base, hidden_size=960)
    monkeypatch.setattr(geometry, "SPLITS", 8)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda")
    configs = (base, many, wide)
    wanted = {
        9: (["ring", "persistent", "pdl"], ["ring", "pdl"], ["ring", "pdl"]),
        8: (["persistent", "graph"], ["graph"], ["graph"]),
        7: (["graph"], ["graph"], ["graph"]),
    }
    for generation, tiers in wanted.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, g=generation: (g, 0))
        assert tuple(best_tiers(device, config) for config in configs) == tiers
    assert best_tiers(torch.device("cpu"), base) == ["graph"]


@pytest.mark.skipif(HAS_GPU, reason="counts epochs of a grid of one")
@pytest.mark.parametrize("tier", ["persistent", "ring"])
def test_epochs_begin_again_before_they_run_out(tier):
    config = dataclasses.replace(TINY, num_hidden_layers=1, vocab_size=24)
    ours, _ = executors(config, tier)
    want = ours.decode(ours.new_cache(), 4, 1)
    ours._steps._epoch = (1 << 31) - 3
    assert ours.decode(ours.new_cache(), 4, 1) == want
    assert ours._steps._epoch == 7
