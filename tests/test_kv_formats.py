"""The formats of the KV cache: accuracy, extremes, bits, sizes, errors."""

import math

import numpy as np
import pytest
from helpers import MODEL_CONFIGS, make_executor, random_ids, run, tiny_config

from mobilellm_fast import _C
from mobilellm_fast.engine import Engine
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.executor import KV_FORMATS

U = 2.0**-24  # unit roundoff of float32
PAGE = 128
CODED = ("int8", "int16")
ISAS = _C.supported_isas()

each_isa = pytest.mark.parametrize("isa", ISAS)
each_format = pytest.mark.parametrize("kv_format", KV_FORMATS)
each_coded_format = pytest.mark.parametrize("kv_format", CODED)

# (rows, tokens, heads, kv_heads, head_dim): tails of head_dim, of tiles of 16 tokens and of pages,
# every remainder of a block of queries
CASES = [
    *((5, 20, 3, 1, dim) for dim in (2, 6, 8, 14, 34, 40, 64, 80, 128)),
    *((1, tokens, 9, 3, 64) for tokens in (1, 15, 17, 127, 128, 129, 257)),
    *((3, 40, heads, 1, 16) for heads in range(1, 18)),
    (200, 200, 3, 1, 40),
]


def attention(q, k, v, kv_format, isa="", scale=None):
    out = np.full(q.shape, np.nan, np.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _C.gqa_attention(q, k, v, scale, out, isa, kv_format)
    return out


def inputs(rows, tokens, heads, kv_heads, dim, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def word_limit(terms):
    """The largest code of two factors, so that so many products of them fit int32."""
    return min(32767, math.isqrt((2**31 - 1) // terms))


def limits(kv_format, dim):
    """Largest codes of keys and queries, of values, and of weights of tokens."""
    if kv_format == "int8":
        return 127, 127, 127 * 256
    return word_limit(dim), word_limit(PAGE), word_limit(PAGE)


def rounded(x, limit=127):
    """Codes (float64) and scales (float64, last axis 1) of keys, values or queries."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    zero = largest < 2.0**-100
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(zero, 0, np.float32(limit) / largest).astype(np.float32)
    scales = np.where(zero, 0, largest / np.float32(limit))
    return np.rint(x * inverse).astype(float), scales.astype(float)


def expected(q, k, v, kv_format):
    """Attention over codes in float64, and how far the kernel may be from it."""
    rows, heads, dim = q.shape
    tokens, kv_heads = k.shape[:2]
    key_code, value_code, weight_code = limits(kv_format, dim)
    q_codes, q_scales = rounded(q, key_code)
    q = q_codes * q_scales
    (k_codes, k_scales), (v_codes, v_scales) = (
        [np.repeat(part, heads // kv_heads, axis=1) for part in rounded(x, limit)]
        for x, limit in ((k, key_code), (v, value_code))
    )
    keys, values, scale = k_codes * k_scales, v_codes * v_scales, dim**-0.5
    hidden = ~np.tri(rows, tokens, tokens - rows, dtype=bool)[None]
    scores = np.einsum("shd,thd->hst", q, keys) * scale
    # The sum of codes is exact; three scales and log2(e) are multiplied, each with a rounding, and
    # the largest is subtracted.
    error = 8 * U * np.abs(scores)
    scores, error = np.where(hidden, -np.inf, scores), np.where(hidden, 0, error)
    distance = np.where(hidden, 0, scores.max(axis=-1, keepdims=True) - scores)
    weights = np.exp(-distance) * ~hidden
    weights /= weights.sum(axis=-1, keepdims=True)
    error = 2 * error.max(axis=-1, keepdims=True) + U * distance.max(axis=-1, keepdims=True)
    pages = -(-tokens // PAGE)
    # e^x (3), sums over tokens, merges, products with scales, the division
    relative = np.expm1(error) + (min(tokens, PAGE) / 16 + 8 * pages + 16) * U
    bound = np.einsum("hst,thd->shd", weights * relative, np.abs(values))
    # In each page, weights times scales are rounded to half a code of the largest.
    for first in range(0, tokens, PAGE):
        part = slice(first, first + PAGE)
        heaviest = (weights[..., part] * v_scales[part, :, 0].T[:, None]).max(axis=-1)
        heaviest *= np.exp(error[..., 0])
        seen = np.einsum("hst,thd->shd", ~hidden[..., part] * 1.0, np.abs(v_codes[part]))
        bound += 0.5 / weight_code * (1 + 8 * U) * heaviest.T[..., None] * seen
    return np.einsum("hst,thd->shd", weights, values), bound


@each_isa
@each_coded_format
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_codes_give_attention_over_what_they_stand_for(sizes, kv_format, isa):
    q, k, v = inputs(*sizes)
    want, bound = expected(q, k, v, kv_format)
    error = np.abs(attention(q, k, v, kv_format, isa) - want)
    assert (error <= bound).all(), f"error is {(error / bound).max():.2f} times its bound"
    # weights have 15 and 12 bits; with all errors the same way, of up to 128 of them
    assert bound.max() < (4e-3 if kv_format == "int8" else 3e-2) * np.abs(want).max()


@each_coded_format
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_codes_are_near_floats(sizes, kv_format):
    """Codes are within half a scale of what they stand for."""
    q, k, v = inputs(*sizes)
    key_code, value_code, weight_code = limits(kv_format, q.shape[-1])
    k_half, v_half, q_half = (
        np.abs(x).max() / limit / 2 for x, limit in ((k, key_code), (v, value_code), (q, key_code))
    )
    # all scores change by at most this; a weight changes through its own and through the sum
    keys = np.abs(k).sum(axis=-1).max()
    change = (np.abs(q).sum(axis=-1).max() * k_half + keys * q_half) * q.shape[-1] ** -0.5
    want = attention(q, k, v, "fp32")
    # weights of up to a page of tokens are rounded, too
    weights = min(len(k), PAGE) / weight_code * np.abs(v).max() / 2
    bound = np.expm1(2 * change) * np.abs(v).max() + v_half + weights + 1e-5
    assert np.abs(attention(q, k, v, kv_format) - want).max() <= bound


def test_int16_is_as_near_to_floats_as_fp16():
    """Over many tokens of like weight, on average: the rest of a model rounds to 8 bits."""
    q, k, v = inputs(200, 200, 9, 3, 64)
    want = attention(q, k, v, "fp32")
    errors = {
        kv_format: np.abs(attention(q, k, v, kv_format) - want).mean() for kv_format in KV_FORMATS
    }
    assert errors["int16"] < 2 * errors["fp16"] < errors["int8"] / 4


@each_isa
@each_format
def test_every_isa_gives_the_same_bits(kv_format, isa):
    for sizes in CASES:
        arrays = inputs(*sizes, seed=1)
        want = attention(*arrays, kv_format, "scalar")
        assert np.array_equal(attention(*arrays, kv_format, isa), want), sizes


@each_isa
@each_format
def test_weights_of_the_softmax(kv_format, isa):
    """One-hot values show each weight: e^x from 1 down to where float32 ends."""
    x = -np.linspace(0, 86, 128).astype(np.float16).astype(np.float32)
    k = np.zeros((128, 1, 128), np.float32)
    k[:, 0, 0] = x
    q = np.zeros((1, 1, 128), np.float32)
    q[0, 0, 0] = 1
    v = np.eye(128, dtype=np.float32)[:, None]
    got = attention(q, k, v, kv_format, isa, scale=1.0)[0, 0].astype(float)
    x = x.astype(float)
    key_code, _, weight_code = limits(kv_format, 128)
    if kv_format in CODED:  # the query is its only input's scale times the largest code
        x = key_code * (np.float32(1) / np.float32(key_code)) * x
    want = np.exp(x)
    want /= want.sum()
    # e^x, sum, division; x times log2(e) and scales, whose roundings e^x multiplies by x
    bound = (16 + 5 * np.abs(x)) * U * want
    if kv_format in CODED:
        bound += 0.51 / weight_code * want.max()
    assert (np.abs(got - want) <= bound + 1e-37).all()


@each_isa
@each_coded_format
def test_codes_at_their_limits(kv_format, isa):
    dim = 40
    q, k, v = inputs(1, 9, 2, 1, dim)
    largest = np.float32(3e38)
    k[0], v[0] = 0, 0
    k[1], v[1] = -0.0, 1e-45  # a denormal's scale would be 0
    k[2, 0, ::2], k[2, 0, 1::2] = 1, -1  # all codes at their ends, those of a query, too
    v[3, 0, ::2], v[3, 0, 1::2] = 127, -127
    k[4], v[4] = 1e-38, 1e-38
    v[5, 0, 7] = 1e4  # leaves little for the others
    got = attention(q, k, v, kv_format, isa)
    want, bound = expected(q, k, v, kv_format)
    assert (np.abs(got - want) <= bound).all()
    # close to the largest float, with queries so small that scores stay finite
    v[6], k[6] = largest, largest
    tiny = (q * 1e-38).astype(np.float32)
    got = attention(tiny, k, v, kv_format, isa)
    assert np.isfinite(got).all()
    assert np.array_equal(got, attention(tiny, k, v, kv_format, "scalar"))
    zero = np.zeros_like(q)
    got = attention(zero, k[:6], v[:6], kv_format, isa)
    want, bound = expected(zero, k[:6], v[:6], kv_format)
    assert (np.abs(got - want) <= bound).all()


@each_isa
@each_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_not_finite_is_nan_where_it_is_seen(where, bad, kv_format, isa):
    for at in (3, 20, 130, 139):
        q, k, v = inputs(140, 140, 3, 1, 24)
        want = attention(q, k, v, kv_format, isa)
        {"key": k, "value": v, "query": q}[where][at, 0, 5] = bad
        got = attention(q, k, v, kv_format, isa)
        if where == "query":
            assert np.isnan(got[at, 0]).all()
            got[at, 0] = want[at, 0]
            assert np.array_equal(got, want)
        else:
            assert np.array_equal(got[:at], want[:at])
            assert np.isnan(got[at:]).all()


@each_isa
@each_format
def test_keys_that_are_not_finite_are_not_lost(kv_format, isa):
    """A score of NaN must not be clamped away with the small weights."""
    q, k, v = inputs(1, 40, 3, 1, 24)
    for at in range(0, 40, 7):
        bad = k.copy()
        bad[at, 0, 3] = np.nan
        assert np.isnan(attention(q, bad, v, kv_format, isa)).all()


@each_coded_format
def test_a_forgotten_token_leaves_nothing_behind(kv_format):
    """Truncation leaves codes and scales in the page; no later token may see them."""
    executor = make_executor(tiny_config(), kv_format=kv_format)
    ids = random_ids(executor.config, 60)
    cache = executor.new_cache()
    executor.forward(ids, cache)
    cache.truncate(37)
    again = executor.forward(ids[37:45], cache, all_logits=True)
    assert np.array_equal(again, run(executor, ids)[37:45])


@each_format
@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_bits_do_not_depend_on_threads_chunks_or_table(kv_format, format, head_dim):
    config = tiny_config(max_position_embeddings=512, head_dim=head_dim)
    ids = random_ids(config, 300)

    def executor(**options):
        return make_executor(config, format, kv_format=kv_format, **options)

    want = run(executor(threads=1, isa=ISAS[0]), ids)
    assert np.isfinite(want).all()
    for isa in ISAS[1:]:
        assert np.array_equal(run(executor(threads=2, isa=isa), ids), want)
    for threads in (3, 5):
        assert np.array_equal(run(executor(threads=threads), ids), want)
    two = executor(threads=2)
    for chunk in (1, 7, 128, 129):
        assert np.array_equal(run(two, ids, chunk), want)


@each_coded_format
@pytest.mark.parametrize("name", ["odd_everything", "gqa5", "gqa7", "gqa8", "narrow_heads"])
def test_odd_sizes_agree_between_tables_and_splits(name, kv_format):
    config = MODEL_CONFIGS[name]
    ids = random_ids(config, 140)
    want = run(make_executor(config, "int8", threads=1, kv_format=kv_format), ids)
    for isa in ISAS:
        for threads, chunk in ((2, 1), (5, 7)):
            executor = make_executor(config, "int8", threads=threads, isa=isa, kv_format=kv_format)
            assert np.array_equal(run(executor, ids, chunk), want)


@each_format
def test_a_long_context_split_over_threads(kv_format):
    """17 pages: steps behind a prompt of 2100 tokens equal one pass, for every thread count."""
    config = tiny_config(max_position_embeddings=4096, head_dim=64)
    ids = random_ids(config, 2110)
    want = None
    for threads in (1, 2, 5, 7):
        executor = make_executor(config, "int8", threads=threads, kv_format=kv_format)
        whole = executor.forward(ids, executor.new_cache())
        cache = executor.new_cache()
        executor.forward(ids[:2100], cache)
        steps = [executor.forward([token], cache) for token in ids[2100:]]
        assert np.array_equal(steps[-1], whole)
        want = steps if want is None else want
        assert np.array_equal(steps, want)


def test_codes_are_close_to_floats_in_a_model():
    config = tiny_config(head_dim=64)
    ids = random_ids(config, 200)
    exact, fp16, int16, int8 = (
        run(make_executor(config, kv_format=kv_format), ids)
        for kv_format in ("fp32", "fp16", "int16", "int8")
    )
    largest = np.abs(exact).max()
    assert 0 < np.abs(fp16 - exact).max() < 5e-3 * largest
    assert 0 < np.abs(int16 - exact).max() < 5e-3 * largest
    assert np.abs(fp16 - exact).max() < np.abs(int8 - exact).max() < 0.1 * largest


def test_sizes():
    config = tiny_config(head_dim=24)  # 2 positions x 2 KV heads, values padded to 32
    heads = 2 * 2
    want = {
        "fp32": heads * PAGE * (24 + 32) * 4,
        "fp16": heads * PAGE * (24 + 32) * 2,
        "int16": heads * PAGE * (2 * (24 + 32) + 4 + 4),
        "int8": heads * PAGE * (24 + 32 + 4 + 4),
    }
    for kv_format in KV_FORMATS:
        executor = make_executor(config, kv_format=kv_format)
        assert executor.kv_format == kv_format
        cache = executor.new_cache()
        assert cache.nbytes == 0
        executor.forward([1], cache)
        assert cache.nbytes == want[kv_format]
        executor.forward([1] * PAGE, cache)
        assert cache.nbytes == 2 * want[kv_format]


def test_a_page_is_there_before_it_is_wanted():
    """Its memory is touched by the last 32 steps of the page before, and not shared with copies."""
    executor = make_executor(tiny_config())
    cache, page = executor.new_cache(), executor.new_cache().page_nbytes
    ids = random_ids(tiny_config(), PAGE + 2)
    for length, token in enumerate(ids[:PAGE], start=1):
        executor.forward([token], cache)
        assert cache.nbytes == page * (1 if length <= PAGE - 32 else 2)
        if length == PAGE - 16:
            other = cache.copy()
            assert other.nbytes == page
    executor.forward(ids[PAGE - 16 : PAGE], other)
    for token in ids[PAGE:]:
        wanted = executor.forward([token], cache)
        assert np.array_equal(executor.forward([token], other), wanted)
    assert cache.nbytes == other.nbytes == 2 * page
    assert np.array_equal(executor.forward(ids, executor.new_cache()), wanted)


def test_defaults():
    for format, kv_format in (("fp32", "fp32"), ("bf16", "fp32"), ("int8", "int16")):
        assert make_executor(tiny_config(), format).kv_format == kv_format


def test_errors():
    message = r"\[load\] kv_format must be one of fp16, fp32, int16, int8, got 'fp8'"
    with pytest.raises(MobileLLMError, match=message):
        make_executor(tiny_config(), kv_format="fp8")
    with pytest.raises(MobileLLMError, match=message):
        Engine.load("/there/is/no/such/model", kv_format="fp8")  # before the source is looked for
    q, k, v = inputs(1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="kv_format must be fp16, fp32, int16 or int8, got fp8"):
        attention(q, k, v, "fp8")
    one, other = (make_executor(tiny_config(), kv_format=name) for name in ("fp16", "int8"))
    with pytest.raises(ValueError, match="cache was made by another model"):
        one.forward([1], other.new_cache())
