"""Sampling: each filter against transformers' own, the draws against the distribution."""

import numpy as np
import pytest

from mobilellm_fast import _C
from mobilellm_fast import sampling as s
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.sampling import Sampler, Sampling, candidates, logprob

VOCAB = 2000


def random_logits(seed, spread=3.0):
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * spread


def warped(warper, logits, ids=()):
    """Return logits as float64 (vocab,) after one of transformers' logits processors."""
    torch = pytest.importorskip("torch")
    ids = torch.tensor([list(ids)], dtype=torch.long)
    return warper(ids, torch.from_numpy(np.array(logits))[None].double())[0].numpy()


def weights_of(logits):
    return np.exp(logits - logits.max())


def kept(warper, logits):
    return np.isfinite(warped(warper, logits))


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.1, 3.0, 10.0])
class TestFiltersAgreeWithTransformers:
    @pytest.mark.parametrize("k", [1, 2, 50, VOCAB, VOCAB + 7])
    def test_top_k(self, hf, seed, spread, k):
        logits = random_logits(seed, spread)
        mask = s.top_k_mask(logits, k)
        assert mask.sum() == min(k, VOCAB)
        np.testing.assert_array_equal(mask, kept(hf.TopKLogitsWarper(k), logits))

    @pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
    def test_top_p(self, hf, seed, spread, p):
        logits = random_logits(seed, spread).astype(np.float64)
        mask = s.top_p_mask(logits, weights_of(logits), p)
        np.testing.assert_array_equal(mask, kept(hf.TopPLogitsWarper(p), logits))

    @pytest.mark.parametrize("p", [0.0, 1e-4, 0.05, 0.5, 1.0])
    def test_min_p(self, hf, seed, spread, p):
        logits = random_logits(seed, spread)
        ids, _ = candidates(logits, Sampling(temperature=1.0, min_p=p))
        np.testing.assert_array_equal(ids, np.flatnonzero(kept(hf.MinPLogitsWarper(p), logits)))

    @pytest.mark.parametrize("penalty", [0.8, 1.3])
    def test_repetition_penalty(self, hf, seed, spread, penalty):
        logits = random_logits(seed, spread)
        ids = [5, 9, 5, VOCAB - 1]
        seen = np.zeros(VOCAB, bool)
        seen[ids] = True
        expected = warped(hf.RepetitionPenaltyLogitsProcessor(penalty), logits, ids)
        np.testing.assert_allclose(s.penalise(logits, seen, penalty), expected, rtol=1e-6)

    def test_all_in_order(self, hf, seed, spread):
        """The order matters: each filter sees what the one before it left."""
        logits = random_logits(seed, spread)
        options = Sampling(temperature=0.7, top_k=40, top_p=0.8, min_p=0.05)
        expected = warped(hf.TemperatureLogitsWarper(0.7), logits)
        expected = warped(hf.TopKLogitsWarper(40), expected)
        expected = warped(hf.TopPLogitsWarper(0.8), expected)
        expected = warped(hf.MinPLogitsWarper(0.05), expected)
        weights = np.exp(expected - expected.max())
        ids, ours = candidates(logits, options)
        np.testing.assert_array_equal(ids, np.flatnonzero(weights))
        np.testing.assert_allclose(ours / ours.sum(), (weights / weights.sum())[ids], rtol=1e-9)


def test_top_p_is_the_smallest_set_that_reaches_p():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for p, expected in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.95, 4)):
        expected = range(4) if expected == 4 else expected
        assert list(np.flatnonzero(s.top_p_mask(logits, weights_of(logits), p))) == list(expected)
    # 0.5 and 0.25 are exact in binary: reaching p exactly is enough
    exact = np.log2([0.25, 0.5, 0.25]) * np.log(2)
    assert list(np.flatnonzero(s.top_p_mask(exact, weights_of(exact), 0.5))) == [1]


def test_top_p_prefers_the_first_of_equals():
    levels = np.random.default_rng(0).integers(3, size=VOCAB).astype(np.float64)
    top = np.flatnonzero(levels == 2)
    weights = weights_of(levels)
    half = weights[top].sum() / weights.sum() / 2
    kept = np.flatnonzero(s.top_p_mask(levels, weights, half))
    assert 0.49 < len(kept) / len(top) < 0.51
    np.testing.assert_array_equal(kept, top[: len(kept)])


def test_greedy_takes_the_first_of_equals_and_leaves_logits_alone():
    logits = np.array([1, 7, 7, 3], np.float32)
    logits.flags.writeable = False
    assert Sampler(Sampling(repetition_penalty=1.1), [3], 4).choose(logits)[0] == 1


def test_repetition_penalty_counts_prompt_and_answer():
    logits = np.array([4.0, 3.9, 3.8, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0], 4)
    assert [sampler.choose(logits)[0] for _ in range(4)] == [1, 2, 0, 0]


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [], 4)
    counts = np.bincount([sampler.choose(logits)[0] for _ in range(20_000)], minlength=4)
    # 4 standard deviations of a binomial count
    bound = 4 * np.sqrt(20_000 * np.exp(logits) * (1 - np.exp(logits)))
    assert (np.abs(counts - 20_000 * np.exp(logits)) < bound).all()


def test_a_seed_repeats_and_another_differs():
    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], VOCAB)
        return [sampler.choose(random_logits(step))[0] for step in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def draw(logits, sampling, uniform, isa=""):
    """Return the token that a number in [0, 1) chooses."""
    sampler = _C.Sampler(
        vocab=logits.size,
        temperature=sampling.temperature,
        top_k=min(sampling.top_k or 0, logits.size),
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        min_p=sampling.min_p or 0.0,
        draw=lambda: [uniform],
        isa=isa,
    )
    return sampler.choose(logits)[0]


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 1000, 49152])
def test_draws_are_those_of_the_specification(isa, spread, size):
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal(size) * spread).astype(np.float32)
    logits[rng.integers(0, size, size // 5)] = logits[0]  # ties
    logits[rng.integers(0, size, size // 7)] = -np.inf
    logits[size // 2] = 1.0
    for _ in range(60 if size < 40000 else 12):
        filters = {
            "temperature": float(rng.choice([1e-40, 0.3, 0.8, 1.0, 5.0])),
            "top_k": rng.choice([None, 1, 3, 40, 900, 10**6]),
            "top_p": rng.choice([None, 1e-9, 0.3, 0.95, 0.999999, 1.0]),
            "min_p": rng.choice([None, 0.0, 0.05, 0.9, 1.0]),
        }
        sampling, uniform = Sampling(**filters), rng.random()
        token_ids, weights = candidates(logits, sampling)
        probabilities = weights / weights.sum()
        cumulative = probabilities.cumsum()
        got = draw(logits, sampling, uniform, isa)
        # the same token, unless the number lies within rounding of the step between two
        place = token_ids.tolist().index(got)
        below = cumulative[place - 1] if place else 0.0
        assert probabilities[place] > 0
        assert below - 1e-5 <= 1 - uniform <= cumulative[place] + 1e-5


@pytest.mark.parametrize("options", [{}, {"top_k": 300}, {"top_k": 900, "min_p": 1.0}])
@pytest.mark.parametrize("p", [None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("size", [1000, 3000])
@pytest.mark.parametrize("alike", ["equal", "at 1e300"])
def test_of_tokens_that_weigh_the_same_exactly_the_specified_are_kept(alike, size, p, options):
    """At 1e300 all weights are 1, too, but the larger logit is still the likelier."""
    logits = random_logits(1)[np.arange(size) % VOCAB] * (alike != "equal")
    sampling = Sampling(temperature=1.0 if alike == "equal" else 1e300, top_p=p, **options)
    token_ids, _ = candidates(logits, sampling)
    of_top_k = size if alike == "equal" else options.get("top_k", size)
    assert p is None or len(token_ids) == np.ceil(p * (logits >= np.sort(logits)[-of_top_k]).sum())
    for place in np.linspace(0, len(token_ids) - 1, 60).astype(int):
        uniform = 1 - (place + 0.5) / len(token_ids)
        assert s.draw(logits, sampling, uniform) == token_ids[place]
        assert draw(logits, sampling, uniform) == token_ids[place]


def test_draws_at_the_ends_of_the_range():
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    logits = np.concatenate([np.full(70, -np.inf, np.float32), logits, np.full(99, -np.inf)])
    logits = logits.astype(np.float32)
    for options in ({}, {"top_k": 4}, {"top_p": 0.9999}, {"min_p": 0.01}):
        sampling = Sampling(temperature=1.0, **options)
        assert draw(logits, sampling, 0.0) == 73
        assert draw(logits, sampling, np.nextafter(1.0, 0.0)) == 70
        assert draw(logits, sampling, 0.55) == 72


def test_impossible_tokens_are_never_drawn():
    logits = np.full(100, -np.inf, np.float32)
    logits[[0, 50, 99]] = 0
    logits[[0, 99]] = -1e4  # exp underflows to zero
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [], 100)
    assert {sampler.choose(logits)[0] for _ in range(200)} == {50}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300, 10**200])
def test_extreme_temperatures_neither_warn_nor_fail(temperature, recwarn):
    sampler = Sampler(Sampling(temperature=temperature, top_k=5, top_p=0.9, seed=1), [], VOCAB)
    token_id = sampler.choose(random_logits(1))[0]
    assert temperature > 1 or token_id == random_logits(1).argmax()
    assert not recwarn


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.nan])
def test_broken_logits_are_an_error(options, bad):
    for place in (0, 17, VOCAB - 1):
        logits = random_logits(0)
        logits[place] = bad
        for isa in _C.supported_isas():
            assert np.isnan(_C.Sampler(vocab=VOCAB, isa=isa).choose(logits)[1])
            assert np.isnan(_C.logprob(logits, 3, isa))
        with pytest.raises(MobileLLMError, match="must be finite"):
            Sampler(Sampling(**options), [], VOCAB).choose(logits)
    with pytest.raises(MobileLLMError, match="must be finite"):
        Sampler(Sampling(**options), [], VOCAB).choose(np.full(VOCAB, -np.inf, np.float32))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}])
def test_a_penalty_that_overflows_is_an_error(options):
    logits = random_logits(0)
    logits[17] = 1e30
    with pytest.raises(MobileLLMError, match="must be finite"):
        Sampler(Sampling(repetition_penalty=1e-10, **options), [17], VOCAB).choose(logits)


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_the_likeliest_is_the_first_of_the_largest(isa):
    rng = np.random.default_rng(1)
    for size in (1, 5, 64, 65, 1000, 49152):
        for levels in (1, 3, 1000):
            logits = rng.integers(0, levels, size).astype(np.float32)
            assert _C.Sampler(vocab=size, isa=isa).choose(logits)[0] == logits.argmax()


def test_a_choice_comes_with_its_raw_logprob():
    logits = random_logits(3)
    for options in ({}, {"temperature": 0.7, "top_k": 3, "seed": 1}, {"repetition_penalty": 2.0}):
        sampler = Sampler(Sampling(**options), [int(logits.argmax())], VOCAB)
        token_id, token_logprob = sampler.choose(logits)
        assert token_logprob == logprob(logits, token_id)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_logprob_is_the_log_softmax(spread):
    logits = np.random.default_rng(5).standard_normal(49152).astype(np.float32) * spread
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    for token_id in (0, 100, int(logits.argmax()), int(logits.argmin())):
        # the float32 difference from the maximum is rounded once
        bound = 1e-6 + 2.0**-24 * abs(exact[token_id])
        assert abs(logprob(logits, token_id) - exact[token_id]) <= bound


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, ">= 0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", float("inf"), "finite"),
        ("temperature", 10**400, "finite"),
        ("temperature", True, "number"),
        ("temperature", "hot", "number"),
        ("temperature", None, "number"),
        ("top_k", 0, "integer >= 1"),
        ("top_k", 2.0, "integer"),
        ("top_k", True, "integer"),
        ("top_p", 0, "> 0"),
        ("top_p", 1.1, "<= 1"),
        ("min_p", -0.1, ">= 0"),
        ("min_p", 1.5, "<= 1"),
        ("min_p", float("nan"), "finite"),
        ("repetition_penalty", 0, "> 0"),
        ("seed", -1, "integer >= 0"),
        ("seed", 1.5, "integer"),
    ],
)
def test_bad_values_are_named(name, value, expected):
    with pytest.raises(MobileLLMError) as caught:
        Sampling(**{name: value})
    message = str(caught.value)
    assert name in message
    assert expected in message
    assert "\n" not in message
    assert len(message) < 200


def test_numpy_numbers_are_numbers():
    options = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(4))
    assert (options.temperature, options.top_k, options.seed) == (0.5, 3, 4)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 1e30])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}])
def test_penalised_choices_are_those_of_the_specification(penalty, options):
    """The same bits: token and logprob, over an answer that repeats itself."""
    penalised = Sampler(Sampling(repetition_penalty=penalty, **options), [3, 9, 3], VOCAB)
    plain = Sampler(Sampling(**options), [], VOCAB)
    seen = np.zeros(VOCAB, bool)
    seen[[3, 9]] = True
    for step in range(80):
        logits = random_logits(step % 7)
        token_id, token_logprob = penalised.choose(logits)
        assert token_id == plain.choose(s.penalise(logits, seen, penalty))[0]
        assert token_logprob == logprob(logits, token_id)
        seen[token_id] = True


def test_a_seed_draws_what_numpy_does():
    """Answers of a seed stay the same, from block to block of random numbers."""
    logits = np.zeros(1000, np.float32)  # all weights exactly 1
    sampler = Sampler(Sampling(temperature=1.0, seed=11), [], 1000)
    uniforms = np.random.Generator(np.random.PCG64(11)).random(200)
    expected = np.ceil(1000 * (1 - uniforms)).astype(int) - 1
    assert [sampler.choose(logits)[0] for _ in range(200)] == expected.tolist()


def test_wrong_arguments_of_the_kernel_are_errors():
    logits = np.zeros(10, np.float32)
    for wrong in (
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1.1, "seen": [10]},
        {"seen": [-1]},
        {"vocab": 0},
    ):
        with pytest.raises(ValueError, match="out of range"):
            _C.Sampler(**{"vocab": 10} | wrong)
    for drawn in ([1.0], [np.nan], [-0.1], []):
        sampler = _C.Sampler(vocab=10, temperature=1.0, draw=lambda drawn=drawn: drawn)
        for _ in range(2):
            with pytest.raises(ValueError, match="must give numbers"):
                sampler.choose(logits)
    with pytest.raises(ValueError, match="logits must be"):
        _C.Sampler(vocab=9).choose(logits)
