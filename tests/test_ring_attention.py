"""Attention of the kernel `ring` alone, by lanes and by tensor cores, against sums in float64."""

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulated_cuda import INCLUDE, compile_kernel

pytest.importorskip("triton")

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.cuda import ring

SOURCE = INCLUDE / "attention.cu"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_DIM, SCALE = 64, 0.125
U = 2.0**-24
# What a query's components and a token's weights are off by, of themselves: a value in the vectors
# has 20 bits; two digits of the cache's type, each rounded, have 23 or 17.
LANES_PRECISION = 2.0**-20
TILES_PRECISION = {"fp16": 2.0**-23, "bf16": 2.0**-17}
STORED = 2.0**-20  # of a result


class Arguments(ctypes.Structure):
    """`AttentionArguments` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "cache", "values", "handed", "partial")),
        *((name, ctypes.c_int) for name in ("capacity", "position")),
        ("scale", ctypes.c_float),
    ]


@dataclass
class Case:
    """One token: `new` has its query heads, keys and values, `cache` those before it."""

    new: torch.Tensor  # (heads + 2 * kv_heads, HEAD_DIM)
    cache: torch.Tensor  # (2, kv_heads, capacity, HEAD_DIM)
    length: int

    @property
    def kv_heads(self) -> int:
        return self.cache.shape[1]

    @property
    def heads(self) -> int:
        return len(self.new) - 2 * self.kv_heads


def random_case(length, kv_format, heads=3, kv_heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(heads + 2 * kv_heads, HEAD_DIM, generator=generator)
    # what lies beyond the tokens is no number
    cache = torch.full((2, kv_heads, length + 3, HEAD_DIM), math.nan, dtype=DTYPES[kv_format])
    cache[:, :, :length] = torch.randn(2, kv_heads, length, HEAD_DIM, generator=generator)
    return Case(new, cache, length)


def kernel_of(case, kv_format, tiles, programs, warps):
    config = MobileLLMConfig(
        vocab_size=40,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=HEAD_DIM,
    )
    constants = ring.kernel_constants(config, "bf16", "bf16", "bf16", kv_format, programs, 1)
    constants |= {"WARPS": warps, "THREADS": 32 * (warps + 2), "SHARED_LIMIT": 1 << 18}
    return compile_kernel(SOURCE, constants | {"ATTEND_BY_TILES": tiles}), constants["VECTORS"]


def attended(case, kv_format, tiles=1, programs=5, warps=4, seed=0):
    """(heads, HEAD_DIM) of the kernel."""
    launch, words = kernel_of(case, kv_format, tiles, programs, warps)
    values = torch.zeros((len(case.new) + case.heads) * HEAD_DIM, dtype=torch.int32)
    handed, partial = (torch.zeros(words, dtype=torch.int64) for _ in range(2))
    tensors = (case.new, case.cache, values, handed, partial)
    pointers = [tensor.contiguous().data_ptr() for tensor in tensors]
    launch(Arguments(*pointers, case.cache.shape[2], case.length, SCALE), programs, seed, 1 << 18)
    results = values[case.new.numel() :] & ~15
    return results.view(torch.float32).double().view(case.heads, HEAD_DIM)


def expected(case):
    """The same in float64; the magnitudes of what scores are sums of, and of values, by heads."""
    new = case.new[case.heads :].view(2, case.kv_heads, 1, HEAD_DIM).to(case.cache.dtype)
    kept = torch.cat([case.cache[:, :, : case.length], new], dim=2).double()
    groups = case.heads // case.kv_heads
    keys, values = (part.repeat_interleave(groups, 0) for part in kept)
    queries = case.new[: case.heads].double() * SCALE
    weights = torch.softmax(torch.einsum("hd,htd->ht", queries, keys), -1)
    magnitudes = torch.einsum("hd,htd->ht", queries.abs(), keys.abs()).amax(-1)
    return torch.einsum("ht,htd->hd", weights, values), magnitudes, values.abs().amax((1, 2))


def assert_attends(case, kv_format, tiles=1, **options):
    got = attended(case, kv_format, tiles, **options)
    want, magnitudes, largest = expected(case)
    precision = TILES_PRECISION[kv_format] if tiles else LANES_PRECISION
    # A score is off by what its query is, and by the roundings of a sum of some dozens; relative
    # to the new token's twice that. Weights are off by as much, by their digits, and by what scores
    # in float32 are, of their size; they divide by a sum that has the same errors.
    scores = 2 * magnitudes * (precision + 32 * U)
    bound = largest * (2 * (scores + precision + 32 * U) + STORED)
    assert ((got - want).abs() <= bound[:, None]).all(), (got - want).abs().amax(1) / bound
    return got


# tokens; heads, KV heads; programs, warps: no tokens, a tile and around, all in one part, a part of
# two turns, several parts, programs with several tasks
CASES = [
    (0, 3, 1, 5, 4),
    (1, 3, 1, 5, 4),
    (16, 3, 3, 5, 4),
    (17, 4, 2, 5, 4),
    (64, 1, 1, 5, 4),
    (70, 4, 2, 2, 2),
    (128, 3, 1, 3, 3),
    (260, 3, 1, 3, 4),
    (600, 1, 1, 8, 4),
    (600, 6, 1, 12, 5),
    (600, 2, 1, 9, 12),
]


@pytest.mark.parametrize(
    "length, heads, kv_heads, programs, warps, tiles, kv_format",
    [
        *((*case, 1, "fp16") for case in CASES),
        *((*case, 1, "bf16") for case in CASES[-4:]),
        *((*case, 0, "fp16") for case in CASES[-3:]),
    ],
)
def test_random_tokens(length, heads, kv_heads, programs, warps, tiles, kv_format):
    case = random_case(length, kv_format, heads, kv_heads)
    assert_attends(case, kv_format, tiles, programs=programs, warps=warps)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
@pytest.mark.parametrize("length, programs", [(33, 2), (150, 3), (300, 8)])
def test_the_same_bits_in_every_order_of_threads(length, programs, kv_format):
    case = random_case(length, kv_format, heads=4, kv_heads=2)
    case.cache[0, :, length // 2] *= 20  # a warp takes its largest score
    results = [attended(case, kv_format, 1, programs, seed=seed) for seed in range(12)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("place", [0, 63, 64, 127, 290])
def test_one_token_has_a_far_larger_score(place, tiles, kv_format):
    """Of the first tile, of a warp's second one, of another part; by itself, and with a second."""
    # by some 41 and some 124 powers of two: only then do weights in float32 get another base
    for factor, second in ((4, None), (4, 5), (4, 100), (12, None), (12, 5)):
        case = random_case(300, kv_format, heads=2)
        direction = case.new[0] + case.new[1]
        case.cache[0, 0, place] = factor * direction
        if second is not None:
            case.cache[0, 0, second] = 0.975 * factor * direction
        assert_attends(case, kv_format, tiles, programs=8)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("excess", [-40, -24.5, -20, -14, 8, 14, 16, 40, 200])
def test_all_tokens_have_other_scores_than_the_new_one(excess, tiles, kv_format):
    """`excess` is by how many powers of two they weigh more."""
    case = random_case(200, kv_format, heads=1)
    case.new[0] = 1
    case.new[1] = 0
    case.cache[0, 0, :200] = 0
    case.cache[0, 0, :200, 0] = excess * math.log(2) / SCALE
    got = assert_attends(case, kv_format, tiles)
    if excess in (-14, -20, -24.5):  # what they are of the result is not lost
        alone = case.new[2].to(DTYPES[kv_format]).double()
        difference = (expected(case)[0][0] - alone).abs().amax()
        assert 0.75 * difference < (got[0] - alone).abs().amax() < 1.25 * difference


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-6, 1e-3, 100, 1e4, 3e5])
def test_queries_of_any_size(size, kv_format):
    """Up to where fp16 would be infinite: what is multiplied is some fifth of a query."""
    case = random_case(100, kv_format)
    case.new[: case.heads] *= size / case.new[: case.heads].abs().max()
    assert_attends(case, kv_format)


@pytest.mark.parametrize("size", [4e5, 1e7, 1e30])
def test_a_query_that_is_too_large_for_fp16(size):
    """What is larger than fp16's digits can have is cut, and the same token is the largest."""
    case = random_case(100, "fp16", heads=1)
    case.new[0] = 0
    case.new[0, 7] = -size
    case.cache[0, 0, :100, 7] = 1
    case.cache[0, 0, 40, 7] = -1
    case.new[1, 7] = 1
    got = attended(case, "fp16")
    torch.testing.assert_close(got[0], case.cache[1, 0, 40].double(), rtol=STORED, atol=0)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
def test_large_values(kv_format):
    case = random_case(200, kv_format)
    case.cache[1, :, :200] *= 15000
    case.cache[1, :, :200] = case.cache[1, :, :200].clamp(-65504, 65504)
    case.cache[0, 0, :200] += case.new[0] / 2  # weights of some powers of two
    assert_attends(case, kv_format)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16"])
@pytest.mark.parametrize("what", ["query", "new key", "new value", "key", "value"])
def test_no_number_remains_none(what, kv_format):
    case = random_case(100, kv_format)
    if what in ("query", "new key", "new value"):
        case.new[{"query": 0, "new key": 3, "new value": 4}[what], 9] = math.nan
    else:
        case.cache[int(what == "value"), 0, 70, 9] = math.nan
    got = attended(case, kv_format)
    assert got[0, 9].isnan()
    if what == "query":
        assert np.isfinite(got[1:].numpy()).all()
