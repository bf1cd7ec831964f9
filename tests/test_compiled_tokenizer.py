"""The compiled tokenizer: the library's ids and texts for any text, and no harm from any bytes."""

import functools
import json
import pickle
import random
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import random_weights, tiny_config
from safetensors.numpy import save_file
from tokenizer_builders import (
    CONTROLS,
    CORPUS,
    PRE_TOKENIZERS,
    TEXTS,
    byte_level_metadata,
    byte_level_model,
    sentencepiece_metadata,
    sentencepiece_model,
)
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Reference

from mobilellm_fast import _C
from mobilellm_fast.checkpoint import open_path
from mobilellm_fast.checkpoint.default_model import default_model
from mobilellm_fast.engine import Engine
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.packing import pack_checkpoint
from mobilellm_fast.text_stream import Detokenizer
from mobilellm_fast.tokenizer import Tokenizer
from mobilellm_fast.tokenizer.backends import HuggingFaceBackend
from mobilellm_fast.tokenizer.compile_json import SPLITS
from mobilellm_fast.tokenizer.gguf_vocabulary import GPT2, QWEN2
from mobilellm_fast.tokenizer.table import CODE_POINTS

SPACE = "\u2581"

# --- texts ---------------------------------------------------------------------------------------

# Code points of many blocks, among them unassigned and private ones.
BLOCKS = [
    *(range(0x20, 0x7F), range(0x20, 0x7F), range(0x61, 0x7B), range(0x30, 0x3A)),
    *(range(0xA0, 0x250), range(0x2B0, 0x370), range(0x370, 0x530), range(0x530, 0x800)),
    *(range(0x900, 0xE80), range(0x1680, 0x1690), range(0x2000, 0x2070), range(0x2070, 0x2190)),
    *(range(0x2460, 0x2500), range(0x3000, 0x3100), range(0x4E00, 0x4F00), range(0xAC00, 0xAC80)),
    *(range(0xD7A0, 0xD800), range(0xE000, 0xE010), range(0xFB00, 0xFE10), range(0xFF00, 0x10000)),
    *(range(0x1D400, 0x1D800), range(0x1F300, 0x1F700), range(0x20000, 0x20010), range(0x20)),
    range(0x10FFF0, 0x110000),
]
PIECES = [
    *(" ", "  ", "\n", "\r\n", "\n\n\n", "\t", " \t ", "\x85", "\u2003\u3000", "     "),
    *("the ", " and", "ing", "Don't", "'ll", "'RE", "'\u017f", "''s", "1234567", "3.14", "x1y22"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        SPACE,
        f"{SPACE}a",
        "def f():\n    ",
        "===",
        "\U0001f44d\ufe0f",
    ),
    *CONTROLS,
]


def generated_texts(count: int, seed: int, extra=()) -> list[str]:
    rng = random.Random(seed)
    pieces = [*PIECES, *extra]

    def piece() -> str:
        if rng.random() < 0.5:
            return rng.choice(pieces)
        block = rng.choice(BLOCKS)
        return "".join(chr(rng.choice(block)) for _ in range(rng.randrange(1, 6)))

    return ["".join(piece() for _ in range(rng.randrange(1, 25))) for _ in range(count)]


def all_characters(step: int) -> str:
    """Every step-th character of Unicode, each between letters and beside blanks."""
    codes = [*range(0x30000), *range(0x30000, CODE_POINTS, 997)]
    return "".join(f"a{chr(c)}1 {chr(c)}" for c in codes[::step] if not 0xD800 <= c < 0xE000)


def check_same(library: Tokenizer, texts) -> Tokenizer:
    """Compile, compare on texts, and return the compiled tokenizer."""
    table = library.compile()
    assert table is not None
    ours = Tokenizer.deserialize(table)
    assert ours.implementation == "compiled" != library.implementation
    for name in ("vocab_size", "bos_token_id", "eos_token_ids", "special_ids"):
        assert getattr(ours, name) == getattr(library, name)
    for text in texts:
        ids = library.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, False) == library.encode(text, False), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == library.decode(ids, skip), text
    rng = random.Random(0)
    for _ in range(500):
        ids = rng.choices(range(library.vocab_size + 3), k=rng.randrange(9))
        for skip in (True, False):
            assert ours.decode(ids, skip) == library.decode(ids, skip), ids
    return ours


# --- tokenizers ----------------------------------------------------------------------------------


def from_reference(tokenizer: Reference, tmp_path, **settings) -> Tokenizer:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_tokenizer_json(tmp_path / "tokenizer.json", settings)


def byte_level(name: str) -> Reference:
    tokenizer = Reference.from_str(byte_level_model())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    return tokenizer


def character_model() -> Reference:
    """A `tokenizer.json` as converters make it of a SentencePiece model."""
    fields = sentencepiece_metadata()
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens[259:]:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += sorted(splits, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Reference(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace(tokenizer: Reference, scheme: str) -> Reference:
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


@functools.cache
def table_of(family: str) -> bytes:
    source = {
        "bytes": lambda: byte_level_metadata("llama-bpe", byte_level("llama-bpe")),
        "sentencepiece": sentencepiece_metadata,
    }[family]
    table = Tokenizer.from_gguf(source()).compile()
    assert table is not None
    return table


# --- the same ids and texts ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name != "tekken"])
@pytest.mark.parametrize("source", ["gguf", "json"])
def test_byte_level(tmp_path, name, source):
    original = byte_level(name)
    if source == "gguf":
        library = Tokenizer.from_gguf(byte_level_metadata(name, original, add_bos_token=True))
    else:
        original.post_processor = processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(
                    single="<|im_start|> $A <|im_end|>",
                    special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
                ),
            ]
        )
        library = from_reference(original, tmp_path, eos_token="<|im_end|>")
    texts = [*TEXTS, *generated_texts(700, 1), CORPUS[:30_000], all_characters(7)]
    check_same(library, texts)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe"])
def test_words_are_cut_as_the_library_cuts(name):
    """With a vocabulary of words, a wrong cut would show where the ids of bytes do not."""
    original = byte_level(name)
    words = {w for t in TEXTS for w, _ in original.pre_tokenizer.pre_tokenize_str(t)}
    fields = json.loads(original.to_str())
    vocab = fields["model"]["vocab"]
    for word in sorted(words - set(vocab)):
        vocab[word] = len(vocab)
    fields["model"]["ignore_merges"] = True
    library = Reference.from_str(json.dumps(fields))
    check_same(Tokenizer(HuggingFaceBackend(library)), [*TEXTS, *generated_texts(500, 2)])


def test_added_tokens_that_strip_and_overlap(tmp_path):
    original = byte_level("gpt-2")
    original.add_tokens(
        [
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<both>", lstrip=True, rstrip=True, normalized=False, special=True),
            AddedToken("<b", normalized=False),
            AddedToken("<both>>", normalized=True),
            AddedToken("\u00e9\u4e00", normalized=True),
            AddedToken("im_", normalized=True),
        ]
    )
    extra = ["<left>", "<right>", "<both>", "<b", "<both>>", "\u00e9\u4e00", "im_"]
    check_same(from_reference(original, tmp_path), [*extra, *generated_texts(1500, 3, extra * 3)])


def test_missing_bytes_are_dropped(tmp_path):
    fields = json.loads(byte_level("smollm").to_str())
    vocab = fields["model"]["vocab"]
    fields["model"]["vocab"] = {t: i for t, i in vocab.items() if t not in ("\u00c3", "Z", "0")}
    fields["model"]["merges"] = [
        (a, b) for a, b in fields["model"]["merges"] if not set("\u00c3Z0") & set(a + b)
    ]
    kept = {t for t in fields["model"]["vocab"] if not set("\u00c3Z0") & set(t) or t in CONTROLS}
    fields["model"]["vocab"] = {t: i for t, i in vocab.items() if t in kept}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    library = Tokenizer.from_tokenizer_json(tmp_path / "tokenizer.json")
    check_same(library, [*TEXTS, *generated_texts(300, 4)])


@pytest.mark.parametrize(
    "settings",
    [{}, {"legacy": True}, {"add_bos_token": False, "add_eos_token": True}],
)
def test_sentencepiece(tmp_path, settings):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<plain>": 700, "<plain>longer": 701}))
    library = Tokenizer.from_directory(tmp_path)
    extra = ["<plain>", "<plain>longer"]
    texts = [*TEXTS, *generated_texts(1200, 5, extra), CORPUS[:30_000], all_characters(11)]
    check_same(library, texts)


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_gguf(adds_space):
    library = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=adds_space))
    check_same(library, [*TEXTS, *generated_texts(500, 6), CORPUS[:30_000]])


@pytest.mark.parametrize("space", ["prepend", "never", "first", "always", "none"])
def test_characters_with_byte_fallback(tmp_path, space):
    tokenizer = character_model()
    if space == "never":
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    elif space != "prepend":
        metaspace(tokenizer, "never" if space == "none" else space)
    library = from_reference(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>")
    texts = [*TEXTS, *generated_texts(700, 7), CORPUS[:30_000], all_characters(23)]
    check_same(library, texts)


def test_characters_with_normalized_added_tokens(tmp_path):
    """Such a token is looked for as the normalizer writes it: with the space before it."""
    tokenizer = character_model()
    tokenizer.add_tokens([AddedToken("<x y>", normalized=True)])
    tokenizer.add_tokens([AddedToken("<q>", normalized=False, lstrip=True, rstrip=True)])
    extra = ["<x y>", " <x y>", "<q>", "<x"]
    check_same(from_reference(tokenizer, tmp_path), [*extra, *generated_texts(700, 8, extra * 3)])


@pytest.mark.model
def test_default_model():
    library = open_path(default_model()).tokenizer
    check_same(library, [*TEXTS, *generated_texts(3000, 9), CORPUS[:100_000], all_characters(3)])


# --- pieces of text ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
def test_stream_equals_python(family):
    tokenizer = Tokenizer.deserialize(table_of(family))
    core = _C.Tokenizer(table_of(family))
    rng = random.Random(0)
    texts = generated_texts(150, 11)
    sequences = [tokenizer.encode(text) for text in texts]
    sequences += [rng.choices(range(tokenizer.vocab_size), k=30) for _ in range(150)]
    for ids in sequences:
        for context in ([], [1], tokenizer.encode("a word"), ids[:5]):
            python, cpp = Detokenizer(tokenizer, context), _C.Detokenizer(core, context)
            for token_id in ids:
                assert cpp.push(token_id) == python.push(token_id), ids
            assert cpp.finish() == python.finish()


@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
def test_bytes_ids_and_counts(family):
    core = _C.Tokenizer(table_of(family))
    for text in TEXTS:
        assert core.count(text, True) == len(core.encode(text, True))
    for token_id in range(core.vocab_size):
        data = core.bytes_of(token_id)
        found = core.id_of(data)
        assert found is None or core.bytes_of(found) == data
    assert core.bytes_of(-1) == core.bytes_of(core.vocab_size) == b""
    assert core.id_of(b"no such token") is None
    if family == "bytes":
        assert core.bytes_of(core.id_of(b" the")) == b" the"
    assert core.decode([-1, 2**31 - 1], True) == ""


def test_broken_bytes_decode_as_in_python():
    """Every way for bytes not to be UTF-8."""
    core = _C.Tokenizer(table_of("bytes"))
    ids = [core.id_of(bytes([byte])) for byte in range(256)]
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF, 0xE0, 0xE1]
    edges += [0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    rng = random.Random(0)
    cases = [[a, b, c] for a in edges for b in edges for c in edges]
    cases += [rng.choices(edges, k=8) for _ in range(5000)]
    for case in cases:
        data = bytes(case)
        assert core.decode([ids[byte] for byte in data], True) == data.decode("utf-8", "replace")


def test_pickle_and_serialization():
    tokenizer = Tokenizer.deserialize(table_of("bytes"))
    assert tokenizer.serialize() == tokenizer.compile() == table_of("bytes")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("Hello") == tokenizer.encode("Hello")
    with pytest.raises(MobileLLMError, match="lone surrogate at 2"):
        tokenizer.encode("ab\ud800")


# --- long texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
@pytest.mark.parametrize(
    "unit", ["a", "the", " ", "\n", "<", "<|im_start|", "7", "\U0001f600", "'"]
)
def test_long_texts_take_linear_time(family, unit):
    core = _C.Tokenizer(table_of(family))

    def seconds(nbytes: int) -> float:
        text = unit * (nbytes // len(unit.encode()))
        best = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            core.encode(text, True)
            best = min(best, time.perf_counter() - started)
        return best

    short, long = seconds(1 << 16), seconds(1 << 20)
    # 16 times as much; a quadratic part would make it 256 times. The rest is for busy machines.
    assert long < 80 * short + 0.2
    text = unit * 2000
    library = Tokenizer.from_gguf(
        sentencepiece_metadata()
        if family == "sentencepiece"
        else byte_level_metadata("llama-bpe", byte_level("llama-bpe"))
    )
    assert core.encode(text, True) == library.encode(text)


# --- what is not compiled ------------------------------------------------------------------------


def unsupported() -> dict[str, Reference]:
    """Tokenizers that differ in one thing from a supported one."""
    found = {
        "tekken": byte_level("tekken"),
        "normalizer": byte_level("gpt-2"),
        "space": byte_level("gpt-2"),
        "decoder": byte_level("gpt-2"),
        "word": byte_level("gpt-2"),
        "grouped digits": byte_level("gpt-2"),
        "template": byte_level("gpt-2"),
        "words": metaspace(character_model(), "first"),
        "wordlevel": Reference(models.WordLevel({"a": 0, "?": 1}, "?")),
        "unigram": Reference(models.Unigram([("a", 0.0), ("b", -1.0)], 0)),
        "pieces": character_model(),
    }
    found["normalizer"].normalizer = normalizers.NFC()
    found["space"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found["decoder"].decoder = decoders.Fuse()
    found["word"].add_tokens([AddedToken("word", single_word=True)])
    found["grouped digits"].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]
    )
    found["template"].post_processor = processors.BertProcessing(("a", 1), ("b", 2))
    found["words"].pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    found["pieces"].pre_tokenizer = pre_tokenizers.Whitespace()
    return found


@pytest.mark.parametrize("name", unsupported())
def test_unsupported_tokenizers_stay_with_the_library(tmp_path, name):
    library = from_reference(unsupported()[name], tmp_path)
    assert library.compile() is None


@pytest.mark.parametrize(
    "changes",
    [
        dict(remove_extra_whitespaces=True),
        dict(token_type=np.array([2, 3, 3] + [6] * 256 + [4] + [1] * 440)),
        dict(token_type=np.array([2, 3, 3] + [1] * 697)),
    ],
)
def test_unsupported_sentencepiece(changes):
    assert Tokenizer.from_gguf(sentencepiece_metadata(**changes)).compile() is None
    unigram = Tokenizer.from_sentencepiece(sentencepiece_model("unigram"))
    assert unigram.compile() is None


def test_huge_ids_are_not_compiled(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 10**15}))
    assert Tokenizer.from_directory(tmp_path).compile() is None


def test_a_difference_is_noticed(monkeypatch):
    """Without this, a compiled tokenizer that differs would be used."""
    fields = byte_level_metadata("gpt-2", byte_level("gpt-2"))
    assert Tokenizer.from_gguf(fields).compile() is not None
    monkeypatch.setitem(SPLITS, GPT2, SPLITS[QWEN2])
    assert Tokenizer.from_gguf(fields).compile() is None


# --- damage --------------------------------------------------------------------------------------

NBYTES = slice(12, 16)  # where the table states its length


def try_out(data: bytes) -> bool:
    """Use a damaged table as far as it goes; return whether it was taken."""
    try:
        core = _C.Tokenizer(data)
    except ValueError as error:
        assert str(error).startswith("tokenizer table: ")
        return False
    for text in (
        "",
        "Hello <s><|im_start|> 123\n\n 'll \u00e9\u4e00\U0001f600 <plain>  x",
        "ab" * 99,
    ):
        ids = core.encode(text, True)
        core.decode(ids, True).encode()
    core.decode(list(range(-1, core.vocab_size, 1 + core.vocab_size // 500)), False).encode()
    core.id_of(b"a")
    assert core.eos_ids is not None and core.special_ids is not None
    return True


@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
def test_every_truncation_is_refused(family):
    table = table_of(family)
    for size in range(len(table)):
        with pytest.raises(ValueError, match="tokenizer table"):
            _C.Tokenizer(table[:size])
    for size in range(0, len(table), 61):  # and with a length that agrees
        data = bytearray(table[:size])
        if size >= NBYTES.stop:
            data[NBYTES] = struct.pack("<I", size)
        try_out(bytes(data))


@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
def test_damaged_tables(family):
    table, rng = table_of(family), random.Random(0)
    header = 200
    taken = 0
    for _ in range(3000):
        data = bytearray(table)
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(header if rng.random() < 0.3 else len(data))
            data[place] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
        taken += try_out(bytes(data))
    assert 200 < taken < 3000
    for place in range(0, header, 4):
        for value in (0, 1, 2, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(table)):
            data = bytearray(table)
            data[place : place + 4] = struct.pack("<I", value)
            try_out(bytes(data))


def test_deserialize_refuses_damage():
    for data in (table_of("bytes")[:-1], b"MLFTOKEN", b"MLFTOKEN" + bytes(500)):
        with pytest.raises(MobileLLMError, match="not a serialized tokenizer"):
            Tokenizer.deserialize(data)


# --- in a packed image ---------------------------------------------------------------------------


def write_model(folder, tokenizer: Reference):
    config = tiny_config(vocab_size=tokenizer.get_vocab_size() + 5)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(random_weights(config, 0), folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("name", "kind"), [("smollm", "compiled"), ("tekken", "tokenizers")])
def test_packed_image(tmp_path, name, kind):
    packed = pack_checkpoint(write_model(tmp_path, byte_level(name)))
    packed.save(tmp_path / "model.mlf")
    engine = Engine.load(tmp_path / "model.mlf")
    assert engine.tokenizer.implementation == kind
    original = Engine(packed.config, packed.weights, packed.format, tokenizer=packed.tokenizer)
    for text in ("Hello", "def f(x):\n", "<|im_start|>user\n\u00e9"):
        options = dict(max_new_tokens=8, temperature=1.5, seed=3)
        got, expected = engine.generate(text, **options), original.generate(text, **options)
        assert (got.token_ids, got.text) == (expected.token_ids, expected.text)
    for attribute in ("bos_token_id", "eos_token_ids", "special_ids", "vocab_size"):
        assert getattr(engine.tokenizer, attribute) == getattr(packed.tokenizer, attribute)


def test_a_packed_image_needs_no_library(tmp_path):
    pack_checkpoint(write_model(tmp_path, byte_level("smollm"))).save(tmp_path / "model.mlf")
    code = (
        "import sys\n"
        "sys.modules.update(tokenizers=None, sentencepiece=None)  # importing one fails\n"
        "from mobilellm_fast import Engine\n"
        "engine = Engine.load(sys.argv[1])\n"
        "assert engine.generate('Hello', max_new_tokens=3).token_ids\n"
        "print(*{'jinja2', 'rich', 'gguf', 'huggingface_hub', 'urllib.request', 'zipfile'}\n"
        "      & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.mlf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
