"""Several prompts at once: each answer is the one it gets alone."""

import numpy as np
import pytest
import torch
from fake_engine import VOCAB, FakeEngine
from helpers import SHARING, tiny_engine

from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.generate import generate


def answers(batch):
    return [(a.text, a.token_ids, a.logprobs, a.finish_reason, a.prompt_token_ids) for a in batch]


def one_by_one(engine, prompts, seed=None, **options):
    """A batch by definition."""
    return [
        generate(engine, prompt, seed=None if seed is None else seed + i, **options)
        for i, prompt in enumerate(prompts)
    ]


def ragged_prompts(engine, count):
    rng = np.random.default_rng(count)
    vocab = engine.config.vocab_size
    return [rng.integers(0, vocab, rng.integers(1, 60)).tolist() for _ in range(count)]


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("sharing", [False, *SHARING])
def test_tokens_and_logprobs_equal_those_of_single_calls(format, sharing):
    engine = tiny_engine(format, layer_sharing=sharing)
    for count in (1, 2, 7):
        prompts = ragged_prompts(engine, count)
        options = {"max_new_tokens": 20}
        assert answers(generate(engine, prompts, **options)) == answers(
            one_by_one(engine, prompts, **options)
        )


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_a_list_of_arrays_is_a_batch_and_a_list_of_numbers_a_prompt(kind):
    engine = tiny_engine()
    prompts = ragged_prompts(engine, 3)
    want = answers(generate(engine, prompts, max_new_tokens=5))
    assert answers(generate(engine, [kind(p) for p in prompts], max_new_tokens=5)) == want
    alone = generate(engine, [kind(i) for i in prompts[0]], max_new_tokens=5)
    assert answers([alone]) == want[:1]


@pytest.mark.parametrize("count", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}])
def test_batches_of_any_size(count, options):
    engine = tiny_engine("int8", threads=1, eos_token_id=[3, 50, 70])  # answers end at odd times
    prompts = ragged_prompts(engine, count)
    options = {"max_new_tokens": 30, "repetition_penalty": 1.1} | options
    got = generate(engine, prompts, **options)
    assert answers(got) == answers(one_by_one(engine, prompts, **options))
    if count > 10:
        assert {answer.finish_reason for answer in got} == {"stop", "length"}


def test_equal_prompts_draw_differently_and_repeat():
    engine = tiny_engine(eos_token_id=None)

    def draw():
        return generate(engine, [[1, 2]] * 4, temperature=1.0, seed=7, max_new_tokens=20)

    first = draw()
    assert answers(first) == answers(draw())
    assert len({tuple(answer.token_ids) for answer in first}) == 4


def test_ended_answers_leave_the_batch():
    engine = FakeEngine(context=30)
    prompts = [[1] * n for n in (29, 20, 25, 3)]
    got = generate(engine, prompts, max_new_tokens=12)
    assert [len(answer.token_ids) for answer in got] == [1, 10, 5, 12]
    assert [a.finish_reason for a in got] == ["context", "context", "context", "length"]
    assert engine.batches == [4, *[3] * 4, *[2] * 5, *[1] * 2]
    assert [answer.timings.decode_tokens for answer in got] == [0, 9, 4, 11]
    seconds = [answer.timings.decode_seconds for answer in got]
    assert 0 <= seconds[0] < seconds[2] < seconds[1] < seconds[3]


def test_texts_and_stop_strings():
    engine = FakeEngine()
    prompts = ["Hello", "a", "some longer text"]
    alone = one_by_one(engine, prompts, max_new_tokens=40)
    assert answers(generate(engine, prompts, max_new_tokens=40)) == answers(alone)
    stop = alone[1].text[3:5]
    got = generate(engine, prompts, max_new_tokens=40, stop=stop)
    assert got[1].finish_reason == "stop"
    assert answers(got) == answers(one_by_one(engine, prompts, max_new_tokens=40, stop=stop))
    assert answers(generate(engine, ("Hello", [1, 2]))) == answers(
        one_by_one(engine, ["Hello", [1, 2]])
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompt must not be empty"),
        (["a"] * 65, "prompts must be a list of 1 to 64, got 65"),
        (["a", ""], "prompts[1] must not be empty"),
        (["a", []], "prompts[1] must not be empty"),
        (["a", 5], "prompts[1] must be a string or a flat sequence of token ids, got 5"),
        ([None, "a"], "prompts[0] must be a string or a flat sequence of token ids, got None"),
        ([[1], [1.5]], "prompts[1] must be a string or a flat sequence of token ids, got [1.5]"),
        ([[1], [2, VOCAB]], f"prompts[1] token ids must be in 0..{VOCAB - 1}, got {VOCAB}"),
        (["a", "b", "x" * 600], "prompts[2] must be shorter than the context of 512 tokens"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    engine = FakeEngine()
    with pytest.raises(MobileLLMError) as caught:
        generate(engine, prompts)
    assert str(caught.value).startswith("[generate] " + message)
    assert engine.calls == []
