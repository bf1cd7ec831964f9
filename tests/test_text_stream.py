"""Streaming text: whole characters, the spaces of SentencePiece, stop strings across pieces."""

import random

import pytest
from fake_engine import BOS, ByteTokenizer

from mobilellm_fast.text_stream import REPLACEMENT, Detokenizer, StopScanner, TextStream

TEXTS = [
    "plain ASCII",
    "naïve café, über straße",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family and 🇩🇪 flag",
    "mixed: a é 語 🙂 z\n\tend",
]


class ChunkTokenizer:
    """Tokens are arbitrary pieces of bytes, as in a byte-level BPE."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def cut(data, seed):
    """Cut bytes into pieces of 1 to 3 bytes."""
    choose = random.Random(seed)
    pieces = []
    while data:
        size = choose.randint(1, 3)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(10))
def test_pieces_join_to_the_text_without_broken_characters(text, seed):
    pieces = cut(text.encode(), seed)
    detokenizer = Detokenizer(ChunkTokenizer(pieces))
    shown = []
    for index in range(len(pieces)):
        shown.append(detokenizer.push(index))
        so_far = b"".join(pieces[: index + 1]).decode("utf-8", errors="ignore")
        assert "".join(shown) == so_far  # as early as possible
    assert REPLACEMENT not in "".join(shown)
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("data", [b"ab\xffcd", b"\xe2\x82", b"x\xf0\x9f\x99", b"\xff\xfe\xfd", b""])
def test_bytes_that_are_not_utf8_become_replacement_characters(data):
    detokenizer = Detokenizer(ByteTokenizer())
    text = "".join(detokenizer.push(byte) for byte in data) + detokenizer.finish()
    assert text == data.decode("utf-8", errors="replace")


def test_a_genuine_replacement_character_survives():
    detokenizer = Detokenizer(ByteTokenizer())
    data = f"a{REPLACEMENT}b{REPLACEMENT}".encode()
    assert "".join(map(detokenizer.push, data)) + detokenizer.finish() == data.decode()


def test_a_character_may_begin_in_the_prompt():
    smile = "🙂".encode()
    stream = TextStream(ByteTokenizer(), context=list(b"ok " + smile[:2]))
    text = "".join(map(stream.push, smile[2:] + b" fine")) + stream.finish()
    assert text.endswith(" fine")


@pytest.fixture(scope="module")
def sentencepiece_like():
    """The decoder of Llama tokenizers: words begin with a space, rare characters are bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", "▁Hello", "▁world", "▁", "wide", "\n"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    model = tokenizers.models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def ids_of(tokenizer, *pieces):
    ids = []
    for piece in pieces:
        bytes_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]
        known = tokenizer.token_to_id(piece)
        ids += bytes_ids if known is None else [known]
    return ids


@pytest.mark.parametrize(
    "pieces",
    [
        ["▁Hello", "▁world", "wide", "▁world"],
        ["▁", "▁Hello", "▁", "▁", "▁world"],
        ["▁Hello", "🙂", "é", "▁world", "語", "\n", "▁Hello"],
        ["🙂🙂🙂🙂🙂🙂🙂", "▁world"],
        ["▁Hello", "<s>", "▁world", "<s>", "<s>", "wide"],
    ],
)
def test_sentencepiece_keeps_its_spaces(sentencepiece_like, pieces):
    ids = ids_of(sentencepiece_like, *pieces)
    detokenizer = Detokenizer(sentencepiece_like)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == sentencepiece_like.decode(
        ids
    )
    # and as the continuation of a prompt: prompt + text reads as everything decoded at once
    for border in range(1, len(ids)):
        prompt, rest = ids[:border], ids[border:]
        whole = sentencepiece_like.decode(ids)
        head = sentencepiece_like.decode(prompt)
        detokenizer = Detokenizer(sentencepiece_like, prompt)
        text = "".join(map(detokenizer.push, rest)) + detokenizer.finish()
        if REPLACEMENT not in head and head.strip():
            assert head + text == whole


def test_special_tokens_are_invisible():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(i) for i in (104, BOS, 105)] == ["h", "", "i"]


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None)
    assert stream.push(5) + stream.finish() == ""


def scan(pieces, *stop):
    scanner = StopScanner(stop)
    shown = [scanner.push(piece) for piece in pieces]
    return shown, scanner.finish(), scanner.found


def test_the_possible_start_of_a_stop_string_is_held_back():
    assert scan(["he", "ll", "o"], "llama") == (["he", "", "llo"], "", False)
    assert scan(["a", "a", "a"], "aab") == (["", "", "a"], "aa", False)
    assert scan(["x\n", "\n"], "\n\n") == (["x", ""], "", True)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("five",), "one two three four "),
        (("e t", "two"), "on"),
        (("three four", "ee"), "one two thr"),  # "ee" is complete first
        (("e", "one"), ""),  # complete together: the one that began first
        (("nothing",), "one two three four five"),
        (("five!",), "one two three four five"),
    ],
)
def test_the_result_does_not_depend_on_how_the_text_is_cut(stop, expected):
    text = "one two three four five"
    for size in (1, 2, 3, 5, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        shown, rest, found = scan(pieces, *stop)
        assert "".join(shown) + rest == expected
        assert found == (expected != text)


def test_random_texts_stop_at_the_first_complete_match():
    choose = random.Random(0)
    for _ in range(500):
        text = "".join(choose.choices("ab", k=12))
        stops = ["".join(choose.choices("ab", k=choose.randint(1, 5))) for _ in range(2)]
        ends = [(end, end - len(s)) for s in stops for end in range(13) if text[:end].endswith(s)]
        expected = text[: min(ends)[1]] if ends else text
        shown, rest, _ = scan(cut(text, choose.random()), *stops)
        assert "".join(shown) + rest == expected


def test_stop_strings_work_on_characters_not_tokens():
    stream = TextStream(ByteTokenizer(), stop=["語"])
    assert "".join(map(stream.push, "日本語のテ".encode())) + stream.finish() == "日本"
    assert stream.stopped


def test_a_tokenizer_may_bring_its_own_detokenizer():
    """It gets the last tokens of the context; one that has none, or says so, has ours."""
    asked = []

    class Own:
        def push(self, token_id):
            return f"<{token_id}>"

        def finish(self):
            return "!"

    class WithOwn(ByteTokenizer):
        def detokenizer(self, context):
            asked.append(list(context))
            return Own()

    stream = TextStream(WithOwn(), context=list(range(40)))
    assert [stream.push(5), stream.finish()] == ["<5>", "!"]
    assert asked == [list(range(24, 40))]
    WithOwn.detokenizer = lambda self, context: None
    assert TextStream(WithOwn()).push(ord("a")) == "a"
