"""Prompt lookup: drafts, and answers that do not change."""

import numpy as np
import pytest
from fake_engine import VOCAB, FakeEngine
from helpers import random_ids, tiny_engine
from test_session import answer

from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.generate import generate, stream
from mobilellm_fast.prompt_lookup import PromptLookup


@pytest.mark.parametrize(
    ("text", "ngram", "count", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], 2, 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 3, 3, [3, 4, 1]),  # 3 did not come before, 2 did
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 3, 1, [9]),  # the longer match wins
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, 1, [8]),  # the later match wins
        ([1, 2, 3, 2], 2, 3, []),
        ([1, 2, 3, 2], 1, 3, [3, 2, 3]),  # goes on in the guess itself
        ([5, 5], 1, 4, [5, 5, 5, 5]),
        ([5, 5, 5], 2, 4, [5, 5, 5, 5]),
        ([1, 2, 1, 2], 2, 0, []),
        ([1], 3, 4, []),
        ([], 1, 4, []),
    ],
)
def test_drafts_are_what_followed_before(text, ngram, count, draft):
    assert PromptLookup(text, ngram).draft(count) == draft


def loop_engine(format="fp32", **changes):
    """Small models fall into loops by themselves, which is what drafts need."""
    return tiny_engine(format, vocab_size=13, eos_token_id=None, **changes)


@pytest.mark.parametrize("format", ["fp32", "int8", "w8a8", "int4"])
@pytest.mark.parametrize("sharing", [False, "immediate"])
def test_answers_are_those_of_plain_greedy(format, sharing):
    engine = loop_engine(format, layer_sharing=sharing)
    accepted = 0
    for seed in range(4):
        prompt = random_ids(engine.config, 3 + 40 * seed, seed=seed).tolist()
        want = generate(engine, prompt, max_new_tokens=70)
        for count, ngram in ((1, 1), (2, 3), (4, 2), (8, 3), (20, 1), (20, 5)):
            got = generate(
                engine, prompt, max_new_tokens=70, prompt_lookup=count, prompt_lookup_ngram=ngram
            )
            assert answer(got) == answer(want)
            t = got.timings
            assert t.decode_tokens == want.timings.decode_tokens == 69
            assert 0 <= t.accepted_tokens <= t.draft_tokens
            accepted += t.accepted_tokens
    assert accepted > 100


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 11, 12])
def test_limits_are_exact(limit):
    engine = loop_engine(max_position_embeddings=32)
    prompt = [1, 2, 3] * 5
    for options in ({"max_new_tokens": limit}, {"max_new_tokens": 100}):
        want = generate(engine, prompt, **options)
        got = generate(engine, prompt, prompt_lookup=7, prompt_lookup_ngram=1, **options)
        assert answer(got) == answer(want)
        assert got.timings.decode_tokens == want.timings.decode_tokens


def test_stop_tokens_in_a_draft_end_the_answer():
    for eos in range(13):
        engine = tiny_engine(vocab_size=13, eos_token_id=eos)
        prompt = [*range(13), *range(13)]
        want = generate(engine, prompt, max_new_tokens=60)
        got = generate(engine, prompt, max_new_tokens=60, prompt_lookup=5, prompt_lookup_ngram=1)
        assert answer(got) == answer(want)


def test_stop_strings_and_penalties():
    engine = FakeEngine()
    for options in ({"repetition_penalty": 1.3}, {"stop": "x"}, {"stop": "abc"}):
        want = generate(engine, "abcabcabcab", max_new_tokens=50, **options)
        options |= {"prompt_lookup": 3, "prompt_lookup_ngram": 1}
        got = generate(engine, "abcabcabcab", max_new_tokens=50, **options)
        assert answer(got) == answer(want)
        assert got.timings.draft_tokens > 0
    engine = loop_engine()
    want = generate(engine, [1, 2], max_new_tokens=60, repetition_penalty=1.05)
    got = generate(engine, [1, 2], max_new_tokens=60, repetition_penalty=1.05, prompt_lookup=4)
    assert answer(got) == answer(want)


def test_a_right_guess_saves_a_step():
    engine = loop_engine()
    calls = []
    forward = engine.forward
    engine.forward = lambda ids, *rest, **more: (
        calls.append(len(ids)) or forward(ids, *rest, **more)
    )
    got = generate(engine, [1, 2, 3], max_new_tokens=100, prompt_lookup=6)
    assert got.timings.accepted_tokens > 20
    assert len(calls) == 100 - got.timings.accepted_tokens
    assert sum(calls[1:]) == len(calls) - 1 + got.timings.draft_tokens


def test_sessions_and_streams_left_in_a_draft():
    engine = loop_engine()
    session = engine.session()
    rng = np.random.default_rng(0)
    prompt = [1, 2, 3]
    for _ in range(8):
        tokens = session.stream(prompt, prompt_lookup=5, max_new_tokens=30)
        for _ in range(rng.integers(1, 30)):
            next(tokens)
        prompt = [*prompt, *tokens.generation.token_ids, int(rng.integers(13))][-90:]
        want = generate(engine, prompt, max_new_tokens=12)
        assert answer(session.generate(prompt, prompt_lookup=5, max_new_tokens=12)) == answer(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup": 0}, "prompt_lookup must be an integer >= 1, got 0"),
        ({"prompt_lookup": 1.5}, "prompt_lookup must be an integer >= 1, got 1.5"),
        ({"prompt_lookup_ngram": 0}, "prompt_lookup_ngram must be an integer >= 1, got 0"),
        ({"prompt_lookup": 3, "temperature": 0.7}, "prompt_lookup needs temperature 0, got 0.7"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MobileLLMError, match=r"\[generate\] " + message):
        stream(FakeEngine(), [VOCAB - 1], **options)


def test_lists_of_prompts_are_refused():
    with pytest.raises(MobileLLMError, match="prompt_lookup takes one prompt, not a list"):
        generate(FakeEngine(), ["a", "b"], prompt_lookup=3)
