"""The decoding loop and scoring over a fake engine: what is computed, shown, counted, refused."""

import dataclasses
import math
import time

import numpy as np
import pytest
from fake_engine import BOS, EOS, VOCAB, ByteTokenizer, FakeEngine

from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.generate import chat, generate, score, stream, stream_chat


def plain_greedy(engine, ids, count):
    """The whole history anew at each step: no cache, no stream."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(engine.logits(ids).argmax()))
    return ids[-count:]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_greedy_is_the_argmax_at_each_step():
    engine = FakeEngine()
    ids = engine.tokenizer.encode("Hello")
    out = generate(engine, "Hello", max_new_tokens=40)
    assert out.prompt_token_ids == ids == [BOS, *b"Hello"]
    assert out.token_ids == plain_greedy(engine, ids, 40)
    assert out.finish_reason == "length"
    assert out.text == str(out) == engine.tokenizer.decode(out.token_ids)
    assert engine.calls == [6] + [1] * 39  # the last token is not fed back


@pytest.mark.parametrize(
    "prompt", ["Hello", [BOS, *b"Hello"], np.array([BOS, *b"Hello"], np.int32)]
)
def test_a_prompt_is_text_or_ids(prompt):
    assert generate(FakeEngine(), prompt, max_new_tokens=5).token_ids == plain_greedy(
        FakeEngine(), [BOS, *b"Hello"], 5
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 3, "seed": 1}])
def test_logprobs_are_of_the_raw_distribution(options):
    engine = FakeEngine()
    out = generate(engine, "x", max_new_tokens=20, repetition_penalty=1.5, **options)
    ids = [*out.prompt_token_ids]
    for token_id, logprob in zip(out.token_ids, out.logprobs, strict=True):
        assert logprob == pytest.approx(log_softmax(engine.logits(ids))[token_id], abs=1e-5)
        ids.append(token_id)


def test_seeded_sampling_repeats_exactly():
    def sample(seed):
        return generate(FakeEngine(), "x", max_new_tokens=30, temperature=1.5, seed=seed)

    assert sample(1).token_ids == sample(1).token_ids
    assert sample(1).logprobs == sample(1).logprobs
    assert sample(1).token_ids != sample(2).token_ids


def test_stream_and_generate_agree():
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 4}
    out = generate(FakeEngine(), "x", **options)
    tokens = list(stream(FakeEngine(), "x", **options))
    assert [t.token_id for t in tokens] == out.token_ids
    assert [t.logprob for t in tokens] == out.logprobs
    assert "".join(t.text for t in tokens) == out.text


def test_text_comes_while_tokens_are_computed():
    engine = FakeEngine(script=b"abc")
    tokens = stream(engine, "x")
    assert engine.calls == []
    assert next(tokens).text == "a"
    assert engine.calls == [2]
    assert tokens.generation.text == "a"
    assert tokens.generation.finish_reason is None
    assert "".join(t.text for t in tokens) == "bc"
    assert tokens.generation.finish_reason == "stop"
    assert list(tokens) == []


def test_characters_come_whole():
    tokens = list(stream(FakeEngine(script="naïve 🙂!".encode()), "x"))
    assert "".join(t.text for t in tokens) == "naïve 🙂!"
    assert [t.text for t in tokens][-5:] == ["", "", "", "🙂", "!"]
    assert not any("\N{REPLACEMENT CHARACTER}" in t.text for t in tokens)


def test_end_of_text_is_not_part_of_the_answer():
    out = generate(FakeEngine(script=b"done"), "x")
    assert (out.text, out.token_ids, out.finish_reason) == ("done", list(b"done"), "stop")
    assert len(out.logprobs) == 4


def test_end_of_text_at_once_is_an_empty_answer():
    out = generate(FakeEngine(script=b""), "x")
    assert (out.text, out.token_ids, out.finish_reason) == ("", [], "stop")


def test_the_configuration_and_the_tokenizer_name_end_tokens():
    for configured in (None, 5, (5, 6)):
        engine = FakeEngine(script=b"ab")
        engine.config = dataclasses.replace(engine.config, eos_token_id=configured)
        assert generate(engine, "x").text == "ab"
    engine = FakeEngine(script=b"abc")
    engine.config = dataclasses.replace(engine.config, eos_token_id=(7, ord("c")))
    assert generate(engine, "x").text == "ab"


@pytest.mark.parametrize("stop", ["\n\n", ["never", "\n\n"], ("\n\nthree", "\n\n")])
def test_the_text_ends_before_a_stop_string(stop):
    out = generate(FakeEngine(script=b"one\ntwo\n\nthree"), "x", stop=stop)
    assert out.text == "one\ntwo"
    assert out.finish_reason == "stop"
    assert bytes(out.token_ids) == b"one\ntwo\n\n"  # with the tokens that spelled it


def test_text_held_back_for_a_stop_string_comes_in_the_end():
    tokens = list(stream(FakeEngine(script=b"a STO"), "x", stop="STOP"))
    assert [t.text for t in tokens] == ["a", " ", "", "", "", "STO"]
    assert tokens[-1].token_id is None  # the model ended without another token
    tokens = list(stream(FakeEngine(script=b"a STOP"), "x", stop="STOP", max_new_tokens=5))
    assert [t.text for t in tokens] == ["a", " ", "", "", "STO"]


def test_an_unfinished_character_comes_in_the_end():
    out = generate(FakeEngine(script="é".encode()[:1]), "x")
    assert out.text == "\N{REPLACEMENT CHARACTER}"


def test_the_context_limit_is_a_finish_reason():
    out = generate(FakeEngine(context=10), "abcd", max_new_tokens=100)
    assert out.finish_reason == "context"
    assert len(out.prompt_token_ids) + len(out.token_ids) == 10
    assert generate(FakeEngine(context=10), "abcd", max_new_tokens=5).finish_reason == "length"
    assert len(generate(FakeEngine(context=10), "abcdefgh").token_ids) == 1


def test_timings_count_steps_and_leave_the_caller_out():
    tokens = stream(FakeEngine(), "abc", max_new_tokens=4)
    for _ in tokens:
        time.sleep(0.05)
    t = tokens.generation.timings
    assert (t.prefill_tokens, t.decode_tokens) == (4, 3)
    assert 0 < t.prefill_seconds + t.decode_seconds < 0.1
    assert t.prefill_tokens_per_s == 4 / t.prefill_seconds
    assert t.decode_tokens_per_s == 3 / t.decode_seconds
    unused = stream(FakeEngine(), "abc").generation.timings
    assert unused.prefill_tokens_per_s == unused.decode_tokens_per_s == 0


def test_an_interrupted_stream_keeps_what_came():
    tokens = stream(FakeEngine(script=b"abcdef", interrupt_at=3), "x")
    with pytest.raises(KeyboardInterrupt):
        list(tokens)
    assert tokens.generation.text == "abc"
    assert tokens.generation.finish_reason is None


def test_without_a_tokenizer_ids_go_in_and_come_out():
    out = generate(FakeEngine(tokenizer=False), [1, 2, 3], max_new_tokens=8)
    assert out.text == ""
    assert out.token_ids == plain_greedy(FakeEngine(), [1, 2, 3], 8)


def test_chat_uses_the_template_once_with_its_special_tokens():
    engine = FakeEngine(script=b"Hi!")
    out = chat(engine, [{"role": "user", "content": "Hello"}])
    assert out.text == "Hi!"
    assert engine.tokenizer.decode(out.prompt_token_ids, skip_special_tokens=False) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert out.prompt_token_ids[0] == 258  # one token, and no <s> before it
    tokens = stream_chat(FakeEngine(script=b"Hi!"), [{"role": "user", "content": "Hello"}])
    assert "".join(t.text for t in tokens) == "Hi!"


def test_an_answer_begins_with_a_word_and_a_continuation_with_its_space():
    class WordTokenizer(ByteTokenizer):
        """Like SentencePiece: the space before the first word of a text is not text."""

        def decode(self, ids, skip_special_tokens=True):
            return super().decode(ids, skip_special_tokens).removeprefix(" ")

    engine = FakeEngine(script=b" Hi you")
    engine.tokenizer = WordTokenizer()
    assert generate(engine, "x").text == " Hi you"
    assert chat(engine, [{"role": "user", "content": "x"}]).text == "Hi you"


def test_template_sees_the_spelling_of_special_tokens():
    engine = FakeEngine(template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    out = chat(engine, [{"role": "user", "content": "q"}], max_new_tokens=1)
    assert out.prompt_token_ids == [BOS, ord("q"), EOS]


class TestScore:
    def test_each_token_but_the_first_is_scored(self):
        engine = FakeEngine()
        text = "scores " * 40  # longer than one chunk
        result = score(engine, text)
        ids = engine.tokenizer.encode(text)
        expected = [log_softmax(engine.logits(ids[:i]))[ids[i]] for i in range(1, len(ids))]
        assert result.token_ids == ids
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)
        assert result.nll == pytest.approx(-np.mean(expected), abs=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.nll))
        assert max(engine.calls) <= 128  # memory stays bounded

    def test_text_as_long_as_the_context_fits(self):
        ids = list(range(20))
        assert len(score(FakeEngine(context=20), ids).logprobs) == 19
        with pytest.raises(MobileLLMError, match="context of 20 tokens .* got 21"):
            score(FakeEngine(context=20), [*ids, 1])

    @pytest.mark.parametrize("window", [2, 3, 7, 16])
    @pytest.mark.parametrize("first", [BOS, 1])
    def test_windows_score_every_token_once(self, window, first):
        engine = FakeEngine(context=16)
        ids = [first, *np.random.default_rng(0).integers(200, size=49).tolist()]
        result = score(engine, ids, window=window)
        expected = []
        for i in range(1, len(ids)):
            start = (i - 1) // (window - 1) * (window - 1)
            history = [BOS if first == BOS else ids[start], *ids[start + 1 : i]]
            expected.append(log_softmax(engine.logits(history))[ids[i]])
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)

    def test_a_window_of_the_whole_text_changes_nothing(self):
        assert score(FakeEngine(), "abc", window=4) == score(FakeEngine(), "abc")

    @pytest.mark.parametrize(
        ("text", "window", "message"),
        [
            ("", None, "must not be empty"),
            ([], None, "must not be empty"),
            ([5], None, "at least 2 tokens, got 1"),
            ("ab", 1, "window must be an integer >= 2"),
            ("ab", 513, "window must be at most the context, 512, got 513"),
            ([1, VOCAB], None, f"0..{VOCAB - 1}, got {VOCAB} at position 1"),
        ],
    )
    def test_bad_arguments(self, text, window, message):
        engine = FakeEngine()
        with pytest.raises(MobileLLMError) as caught:
            score(engine, text, window=window)
        assert str(caught.value).startswith("[score] ")
        assert message in str(caught.value)
        assert engine.calls == []


BAD_PROMPTS = [
    ("", "must not be empty"),
    ([], "must not be empty"),
    (np.zeros(0, np.int64), "must not be empty"),
    ([1, -1], "got -1 at position 1"),
    ([VOCAB], f"must be in 0..{VOCAB - 1}, got {VOCAB} at position 0"),
    ([1.0, 2.0], "flat sequence of token ids"),
    ([True, False], "flat sequence of token ids"),
    ([[1, 2], [3, 4]], "flat sequence of token ids"),
    ([[1, 2], [3]], "flat sequence of token ids"),
    ([2**80], "flat sequence of token ids"),
    (["a", "b"], "flat sequence of token ids"),
    (None, "flat sequence of token ids"),
    (7, "flat sequence of token ids"),
    (b"bytes", "flat sequence of token ids"),
    ("x" * 511, "shorter than the context of 512 tokens, got 512 tokens"),
    ([1] * 600, "shorter than the context of 512 tokens, got 600 tokens"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts_are_refused_before_any_work(prompt, message):
    engine = FakeEngine()
    with pytest.raises(MobileLLMError) as caught:
        stream(engine, prompt)
    assert message in str(caught.value)
    assert "prompt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -1}, "temperature must be a finite number >= 0, got -1"),
        ({"stop": ""}, "stop must be a non-empty string"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    engine = FakeEngine()
    for start in (generate, stream):
        with pytest.raises(MobileLLMError, match="^.generate. " + message):
            start(engine, "x", **options)
    for start in (chat, stream_chat):
        with pytest.raises(MobileLLMError, match=message):
            start(engine, [{"role": "user", "content": "x"}], **options)
    assert engine.calls == []


def test_an_unknown_option_is_a_type_error_that_names_the_known_ones():
    message = r"\[generate\] options must be among .*temperature, .*got 'temprature'"
    with pytest.raises(TypeError, match=message):
        stream(FakeEngine(), "x", temprature=1)


def test_what_needs_a_tokenizer_or_template_says_so():
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(MobileLLMError, match="no tokenizer"):
        stream(FakeEngine(tokenizer=False), "text")
    with pytest.raises(MobileLLMError, match="stop needs a tokenizer"):
        stream(FakeEngine(tokenizer=False), [1], stop="x")
    with pytest.raises(MobileLLMError, match="no tokenizer"):
        chat(FakeEngine(tokenizer=False), messages)
    with pytest.raises(MobileLLMError, match="no chat template"):
        chat(FakeEngine(template=None), messages)


def test_a_chat_that_fills_the_context_is_refused():
    with pytest.raises(MobileLLMError, match="messages must be shorter than the context of 32"):
        chat(FakeEngine(context=32), [{"role": "user", "content": "x" * 40}])
