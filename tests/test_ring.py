"""The kernel of the tier `ring`, its threads run as fibers in many orders, against a plain model.

`test_cuda_decode.py` holds it to the CPU engine, too.
"""

import dataclasses
import warnings

import interpreted
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import compile_kernel

pytest.importorskip("triton")

from random_cuda_weights import random_cuda_cache, random_cuda_matrix, random_cuda_weights

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.cuda import executor, ring
from mobilellm_fast.cuda.executor import CudaExecutor
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.rope import cos_sin

TINY = MobileLLMConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.3,
    max_position_embeddings=1024,
)
U = 2.0**-24
SEEDS = range(6)
# Inputs of integer weights have 16 bits, relative to the largest of a few: half a step is 2^-16 of
# that, about 2^-14.5 of most, in each of five products. A new key or value in 16 bits can fall to
# the other side of a rounding than the oracle's, whose inputs differ in their last bits: 2^-11.
COARSE = 2.0**-11
COARSE_HEAD = 2.0**-14  # of the product of an integer head alone

pytestmark = pytest.mark.skipif(interpreted.HAS_GPU, reason="for machines without a GPU")


@pytest.fixture
def seed(monkeypatch):
    """Run the kernel on this CPU; what is returned has the seed of the next launch."""
    chosen = [0]

    def emulate(self, arguments):
        launch = compile_kernel(ring.SOURCE, self.constants)
        launch(arguments, self.programs, chosen[0], 1 << 18)

    monkeypatch.setattr(ring.RingSteps, "_launch", emulate)
    return chosen


def make(
    config,
    kind="bf16",
    kv_format="fp32",
    programs=3,
    warps=2,
    tier="ring",
    weights=None,
    finishers=0,
    **constants,
):
    weights = weights or random_cuda_weights(config, kind, 0, "cpu")
    if tier != "ring":
        return CudaExecutor(config, weights, tier, kv_format)
    threads = 32 * (warps + finishers + 1)
    constants |= {"WARPS": warps, "THREADS": threads, "SHARED_LIMIT": 1 << 18}
    options = dict(programs=programs, finishers=finishers, constants=constants)
    return CudaExecutor(config, weights, tier, kv_format, **options)


def plain_step(weights, cached, token):
    """One token after (positions, 2, KV heads, tokens, head_dim), in float32.

    Returns its logits, and what it adds to the cache: (positions, 2, KV heads, head_dim).
    """
    config, position = weights.config, cached.shape[-2]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def normal(x, weight):
        return F.rms_norm(x, x.shape, weight, config.rms_norm_eps)

    cos, sin = (torch.from_numpy(table) for table in cos_sin(config, np.array([position])))
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    x = weights.embedding.dequantize()[token]
    added = []
    for kept, block in zip(cached.float(), config.schedule, strict=True):
        qkv, output, gate_up, down = (
            getattr(weights, name)[block].dequantize()
            for name in ("qkv", "output", "gate_up", "down")
        )
        new = (qkv @ normal(x, weights.attention_norms[block])).view(-1, config.head_dim)
        turned = new * cos + new.roll(config.head_dim // 2, -1) * sin
        added.append(torch.stack((turned[heads : heads + kv_heads], new[heads + kv_heads :])))
        keys, values = torch.cat((kept, added[-1][:, :, None].to(cached.dtype).float()), 2)
        mixed = F.scaled_dot_product_attention(turned[:heads, None], keys, values, enable_gqa=True)
        x = x + output @ mixed.flatten()
        gate, up = (gate_up @ normal(x, weights.ffn_norms[block])).chunk(2)
        x = x + down @ (F.silu(gate) * up)
    return weights.head.dequantize() @ normal(x, weights.final_norm), torch.stack(added)


def assert_plain_steps(ours, length, tokens=(3, 5)):
    """Hold steps to `plain_step`, after the same keys and values."""
    is_coarse = ours.weights.qkv.kind.startswith("int") or ours.kv_format != "fp32"
    bound = COARSE if is_coarse else 400 * U
    of_head = COARSE_HEAD if ours.weights.head.kind.startswith("int") else 0
    cache = random_cuda_cache(ours, length)
    for token in tokens:
        before = cache.data[..., : cache.length, :].clone()
        want, added = plain_step(ours.weights, before, token)
        got = torch.from_numpy(ours.forward([token], cache)[0])
        assert got.isfinite().all()
        assert (got - want).abs().max() <= max(bound, of_head) * want.abs().max()
        # roundings of sums; a half may fall to the other side of one
        relative = {"fp32": bound, "fp16": 2.0**-10, "bf16": 2.0**-7}[cache.format]
        kept = cache.data[..., : cache.length, :]
        torch.testing.assert_close(kept[..., -1, :].float(), added, rtol=relative, atol=relative)
        assert torch.equal(kept[..., :-1, :], before)


@pytest.mark.parametrize(
    "kind, length, heads, programs, warps, tiles",
    [
        ("bf16", 70, 4, 3, 2, None),  # a program attends with several heads, one after another
        ("int8", 70, 3, 5, 2, None),
        ("int4", 0, 3, 3, 2, None),
        ("bf16", 560, 1, 8, 4, None),  # one program joins the parts of a head
        ("bf16", 150, 3, 9, 4, "fp16"),  # attention by tensor cores, to a cache of this type
        ("int8", 290, 1, 9, 4, "bf16"),
    ],
)
def test_the_same_bits_in_every_order_of_threads(seed, kind, length, heads, programs, warps, tiles):
    """Words that are seen late, slow programs, warps in any order; whoever finishes the results."""
    config = dataclasses.replace(
        TINY,
        num_hidden_layers=2,
        layer_sharing="immediate",
        num_attention_heads=heads,
        num_key_value_heads=2 if heads == 4 else 1,
        head_dim=64 if tiles else TINY.head_dim,
    )
    options = dict(programs=programs, warps=warps, ATTEND_BY_TILES=int(bool(tiles)))
    makers = [make(config, kind, tiles or "fp32", finishers=f, **options) for f in (0, 1)]
    outputs = []
    for seed[0] in SEEDS:
        ours = makers[seed[0] % 2]
        tokens, logprobs = ours.decode(random_cuda_cache(ours, length), 4, 2)
        outputs.append((tokens, logprobs, ours._steps.logits.tolist()))
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize(
    "size, kind, length, finishers",
    [("125M", "bf16", 700, 0), ("125M", "int4", 100, 1)],
)
def test_blocks_of_real_size_on_as_many_programs_as_an_h100_has(
    seed, size, kind, length, finishers
):
    config = dataclasses.replace(
        MobileLLMConfig.preset(f"MobileLLM-{size}"),
        num_hidden_layers=1,
        layer_sharing="immediate",
        vocab_size=1024,
        initializer_range=0.04,
    )
    weights = random_cuda_weights(config, kind, 0, "cpu")
    options = dict(programs=132, finishers=finishers, constants={"SHARED_LIMIT": 227 << 10})
    ours = CudaExecutor(config, weights, "ring", "fp16", **options)
    cache = random_cuda_cache(ours, length)
    want, _ = plain_step(weights, cache.data[..., :length, :].clone(), 3)
    got = torch.from_numpy(ours.forward([3], cache)[0])
    bound = {"bf16": 1.5e-4, "int4": 1e-3}[kind]  # those of test_ring_gpu.py
    assert (got - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("kind, kv_format", [("bf16", "fp16"), ("int8", "fp32"), ("int4", "fp32")])
def test_kinds_of_weights(seed, kind, kv_format):
    """Rows of several chunks that several warps share, and tails of chunks."""
    config = dataclasses.replace(TINY, intermediate_size=1056)
    ours = make(config, kind, kv_format, programs=9, warps=4)
    assert_plain_steps(ours, 20, tokens=(3,))


def test_scales_of_groups_of_int8(seed):
    config = dataclasses.replace(TINY, intermediate_size=1088, num_attention_heads=4)
    weights = random_cuda_weights(config, "int8", 0, "cpu")
    generator = torch.Generator().manual_seed(0)
    body = {
        name: random_cuda_matrix("int8_g32", (1, matrix.rows, matrix.cols), 0.3, generator)
        for name in ("qkv", "output", "gate_up", "down")
        for matrix in [getattr(weights, name)]
    }
    weights = dataclasses.replace(weights, **body)
    ours = make(config, programs=9, warps=4, weights=weights)
    assert_plain_steps(ours, 20, (3,))


def test_blocks_and_a_head_of_other_kinds(seed):
    """A head in bf16 after integers, whose bytes can be no number at all."""
    config = dataclasses.replace(TINY, intermediate_size=1088, num_attention_heads=4)
    weights = random_cuda_weights(config, "int8", 0, "cpu")
    floats = random_cuda_weights(config, "bf16", 1, "cpu")
    weights = dataclasses.replace(weights, head=floats.head, embedding=floats.embedding)
    # few slots, so that the head finds what others left in them
    ours = make(config, "int8", "fp32", 9, 4, weights=weights, RING_SLOTS=4)
    assert_plain_steps(ours, 20, (3,))


def test_a_warp_with_a_share_of_blocks_and_none_of_the_head(seed):
    """It comes to the head before others are through, and must not store where they read."""
    weights = random_cuda_weights(TINY, "bf16", 0, "cpu")
    codes = random_cuda_weights(TINY, "int8", 1, "cpu")
    weights = dataclasses.replace(weights, head=codes.head)
    ours = make(TINY, "bf16", "fp32", 3, 2, weights=weights, finishers=1)
    for seed[0] in (9, 11, 14):  # orders in which it would
        assert_plain_steps(ours, 5, (3,))


def test_a_head_that_is_added_up_in_several_turns(seed):
    config = dataclasses.replace(TINY, vocab_size=416)
    for seed[0] in SEEDS[:4]:
        assert_plain_steps(make(config, "bf16", "fp32", 1, 4), 5, (3,))


def test_a_launch_that_fails_leaves_nothing_that_the_next_takes_for_its_own(seed, monkeypatch):
    """After seven steps of six epochs old values would have the last bits of new ones."""
    ours = make(dataclasses.replace(TINY, num_hidden_layers=1), "bf16", "fp32")
    want = ours.decode(random_cuda_cache(ours, 5), 4, 2)
    launch = ring.RingSteps._launch
    for count in range(1, 9):

        def fails(self, arguments):
            raise MobileLLMError("[cuda] driver failed")

        monkeypatch.setattr(ring.RingSteps, "_launch", fails)
        with pytest.raises(MobileLLMError, match="driver failed"):
            ours.decode(random_cuda_cache(ours, 5), 4, count)
        monkeypatch.setattr(ring.RingSteps, "_launch", launch)
        assert ours.decode(random_cuda_cache(ours, 5), 4, 2) == want


def test_a_warp_that_finishes_has_several_pairs_of_rows(seed):
    config = dataclasses.replace(TINY, hidden_size=128)  # two of the residual, three of the gate
    ours = make(config, "int8", "fp32", 1, 4, finishers=1, LEAVE_FIRST=1)
    assert_plain_steps(ours, 9)


@pytest.mark.parametrize("warps", [3, 5])
def test_warps_that_are_no_multiple_of_four(seed, warps):
    ours = make(TINY, "bf16", "fp32", 20, warps)
    assert_plain_steps(ours, 170, (3,))


@pytest.mark.parametrize(
    "length, programs, kv_format",
    [(0, 1, "fp32"), (1, 3, "fp16"), (70, 3, "fp32"), (260, 3, "fp16"), (600, 8, "fp32")],
)
def test_attention_joins_its_parts(seed, length, programs, kv_format):
    """No tokens, one part, and several that one program joins."""
    config = dataclasses.replace(TINY, num_attention_heads=1)
    ours = make(config, "bf16", kv_format, programs, warps=4)
    assert_plain_steps(ours, length)


@pytest.mark.parametrize(
    "length, heads, programs, finishers, kv_format",
    [(70, 4, 3, 1, "fp16"), (600, 1, 8, 0, "bf16")],
)
def test_attention_by_tensor_cores(seed, length, heads, programs, finishers, kv_format):
    """`test_ring_attention.py` has it alone."""
    config = dataclasses.replace(
        TINY, head_dim=64, num_attention_heads=heads, num_key_value_heads=2 if heads == 4 else 1
    )
    ours = make(config, "bf16", kv_format, programs, 4, finishers=finishers, ATTEND_BY_TILES=1)
    assert_plain_steps(ours, length)


@pytest.mark.parametrize("head_dim, kv_format", [(32, "fp16"), (64, "fp32")])
def test_attention_that_is_not_by_tensor_cores(seed, head_dim, kv_format):
    """Heads of other sizes and a cache in float32 are attended to as ever."""
    config = dataclasses.replace(TINY, head_dim=head_dim)
    asked, ever = (make(config, "bf16", kv_format, 5, 4, ATTEND_BY_TILES=tiles) for tiles in (1, 0))
    got, want = (ours.forward([3], random_cuda_cache(ours, 40)) for ours in (asked, ever))
    assert np.array_equal(got, want)


def test_a_program_attends_to_several_parts(seed):
    config = dataclasses.replace(TINY, num_attention_heads=6, max_position_embeddings=1024)
    ours = make(config, "bf16", "fp32", 12, 4)
    seed[0] = 5
    assert_plain_steps(ours, 600, (3,))


@pytest.mark.parametrize("head_dim, kv_format", [(32, "fp16"), (64, "fp16"), (64, "fp32")])
def test_heads_of_other_sizes(seed, head_dim, kv_format):
    config = dataclasses.replace(
        TINY, head_dim=head_dim, num_attention_heads=4, num_key_value_heads=2
    )
    ours = make(config, "bf16", kv_format, programs=5, warps=4)
    assert_plain_steps(ours, 40, tokens=(3,))


@pytest.mark.parametrize("finishers", [0, 1])
def test_warps_without_a_share(seed, finishers):
    """More programs and warps than there are chunks."""
    ours = make(TINY, programs=30, warps=4, finishers=finishers)
    assert_plain_steps(ours, 9, tokens=(3,))


def test_draws_are_those_of_the_other_tiers(seed):
    ours, oracle = make(TINY), make(TINY, tier="graph")
    got, _ = ours.decode(random_cuda_cache(ours, 5), 4, 3, 5.0, seed=7)
    want, _ = oracle.decode(random_cuda_cache(oracle, 5), 4, 3, 5.0, seed=7)
    assert got == want


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (
            {"vocab_size": 41},
            "bf16",
            "vocab_size, hidden_size and intermediate_size of multiples of 4, got 41, 64 and 96",
        ),
        ({"intermediate_size": 94}, "int4", "got 40, 64 and 94"),
        ({}, "fp32", "blocks and a head in bf16, int8 or int4, got fp32"),
        ({"hidden_size": 72}, "int8", "needs rows of a multiple of 16 bytes, got 72"),
        ({"head_dim": 24}, "bf16", "needs a head_dim of a power of two, 16 to 512 bytes, got 24"),
    ],
)
def test_models_that_it_does_not_take(changes, kind, message):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(MobileLLMError, match=message):
        make(config, kind)


@pytest.mark.parametrize("finishers", [-1, 15])
def test_warps_that_finish_leave_some_that_multiply(finishers):
    with pytest.raises(MobileLLMError, match=f"finishers must be from 0 to 14, got {finishers}"):
        make(TINY, finishers=finishers)


def test_blocks_of_several_kinds_are_not_taken():
    weights = random_cuda_weights(TINY, "bf16", 0, "cpu")
    mixed = dataclasses.replace(weights, down=random_cuda_weights(TINY, "int8", 0, "cpu").down)
    assert "one kind of weights, got bf16, bf16, bf16, int8" in ring.obstacle(mixed, "fp32")


def test_auto_falls_back_where_the_ring_cannot_be(monkeypatch):
    """A GPU without enough shared memory, no compiler: told, since it is slower."""

    def fails(self, *arguments, **options):
        raise MobileLLMError("[load] decode.cu does not compile: more shared memory\nline 1")

    monkeypatch.setattr(executor, "best_tiers", lambda *_: ["ring", "graph"])
    monkeypatch.setattr(ring.RingSteps, "__init__", fails)
    weights = random_cuda_weights(TINY, "bf16", 0, "cpu")
    with pytest.warns(UserWarning, match="tier 'ring' is left out, .* more shared memory$"):
        assert CudaExecutor(TINY, weights).tier == "graph"
    with pytest.raises(MobileLLMError, match="more shared memory"):
        CudaExecutor(TINY, weights, "ring")


def test_a_model_that_it_does_not_take_is_no_news(monkeypatch):
    monkeypatch.setattr(executor, "best_tiers", lambda *_: ["ring", "graph"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CudaExecutor(TINY, random_cuda_weights(TINY, "fp32", 0, "cpu")).tier == "graph"
