"""Tokenizers from every source, against the libraries that define them."""

import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from checkpoint_files import add_field, damaged, write_json
from tokenizer_builders import (
    CONTROLS,
    CORPUS,
    PRE_TOKENIZERS,
    TEXTS,
    byte_level_metadata,
    byte_level_model,
    metadata,
    sentencepiece_metadata,
    sentencepiece_model,
)
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Reference

pytest.importorskip("gguf")
import gguf
import sentencepiece

from mobilellm_fast.checkpoint.default_model import default_model
from mobilellm_fast.checkpoint.gguf_file import Metadata, read_gguf
from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.tokenizer import Tokenizer

# SentencePiece writes " a" as two spaces and a letter, wherever its leading space is added;
# transformers 5 merges the two.
UNINDENTED = [text for text in TEXTS if not re.search(r"(^|<s>|</s>) ", text)]


def check_same(ours: Tokenizer, encode, decode, texts=TEXTS) -> None:
    """Compare the ids of texts and the texts of these ids."""
    for text in texts:
        ids = encode(text)
        assert ours.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == decode(ids, skip), text


def check_same_as_transformers(ours: Tokenizer, theirs, texts=TEXTS) -> None:
    check_same(
        ours,
        theirs.encode,
        lambda ids, skip: theirs.decode(ids, skip_special_tokens=skip),
        texts,
    )


def write_vocabulary(path: Path, fields: Metadata) -> Path:
    """Write a GGUF file of a tokenizer alone."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add_field(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- byte-level BPE ------------------------------------------------------------------------------


@pytest.fixture(params=PRE_TOKENIZERS)
def byte_level(request) -> tuple[str, Reference]:
    """A byte-level BPE tokenizer with each pre-tokenizer."""
    tokenizer = Reference.from_str(byte_level_model())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[request.param]
    return request.param, tokenizer


def test_byte_level_gguf_equals_its_original(byte_level):
    name, original = byte_level
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(name, original))
    check_same(
        tokenizer,
        lambda text: original.encode(text).ids,
        lambda ids, skip: original.decode(ids, skip_special_tokens=skip),
    )
    assert tokenizer.vocab_size == original.get_vocab_size()
    assert tokenizer.special_ids == {original.token_to_id(token) for token in CONTROLS}
    # Cutting into words in another way would not always show in the ids of one vocabulary.
    rebuilt = Reference.from_buffer(tokenizer.serialize().partition(b"\n")[2])
    for text in TEXTS:
        assert words(rebuilt, text) == words(original, text)


def words(tokenizer: Reference, text: str) -> list[str]:
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_byte_level_gguf_equals_transformers(byte_level, tmp_path):
    name, original = byte_level
    texts = TEXTS
    if name == "smollm":  # transformers forgets to cut at digits
        texts = [text for text in TEXTS if not re.search(r"\d", text)]
    fields = byte_level_metadata(name, original)
    write_vocabulary(tmp_path / "t.gguf", fields)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    check_same_as_transformers(Tokenizer.from_gguf(fields), theirs, texts)


def test_whole_words_of_the_vocabulary(byte_level):
    """Llama 3's family takes a word that is in the vocabulary, whether or not merges lead to it."""
    name, original = byte_level
    fields = byte_level_metadata(name, original)
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "qzxkj"]
    kinds = fields["tokenizer.ggml.token_type"]
    fields["tokenizer.ggml.token_type"] = np.append(kinds, 1)
    ids = Tokenizer.from_gguf(fields).encode("qzxkj")
    assert (ids == [len(kinds)]) == (name in ("llama-bpe", "tekken"))


@pytest.mark.parametrize("begins", [False, True])
def test_tokenizer_json_equals_transformers(byte_level, tmp_path, begins):
    original = Reference.from_str(byte_level[1].to_str())
    if begins:
        first = ("<|im_start|>", original.token_to_id("<|im_start|>"))
        original.post_processor = processors.TemplateProcessing(
            single=f"{first[0]} $A", special_tokens=[first]
        )
    original.save(str(tmp_path / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "normalized": False}
    settings = {"bos_token": "<|im_start|>", "eos_token": eos, "add_bos_token": not begins}
    write_json(tmp_path / "tokenizer_config.json", settings)
    ours = Tokenizer.from_directory(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    check_same_as_transformers(ours, theirs)
    assert (ours.encode("")[:1] == [theirs.bos_token_id]) == begins
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)


def test_byte_level_first_token_by_default(byte_level):
    name, original = byte_level
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(name, original, add_bos_token=True))
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("hi", add_special_tokens=False) == original.encode("hi").ids
    fields = byte_level_metadata(name, original)
    del fields["tokenizer.ggml.add_bos_token"]  # then it depends on the model's family
    begins = Tokenizer.from_gguf(fields).encode("hi")[0] == tokenizer.bos_token_id
    assert begins == (name in ("llama-bpe", "tekken"))


def test_user_defined_tokens_are_kept_whole_and_shown(byte_level):
    name, original = byte_level
    fields = byte_level_metadata(name, original)
    kinds = fields["tokenizer.ggml.token_type"].copy()
    index = fields["tokenizer.ggml.tokens"].index("<|im_end|>")
    kinds[index] = 4
    tokenizer = Tokenizer.from_gguf(Metadata(fields | {"tokenizer.ggml.token_type": kinds}))
    assert tokenizer.encode("a<|im_end|>")[-1] == index
    assert tokenizer.decode([index]) == "<|im_end|>"


def test_added_tokens_of_the_configuration(tmp_path, byte_level):
    _, original = byte_level
    original.save(str(tmp_path / "tokenizer.json"))
    size = original.get_vocab_size()
    entry = {"content": "<extra>", "special": True}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(size): entry}})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("<extra>") == [size]
    assert size in tokenizer.special_ids
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"12345": entry}})
    with pytest.raises(CheckpointError, match="<extra>.*12345"):
        Tokenizer.from_directory(tmp_path)


def test_tokens_keep_the_flags_of_tokenizer_json(tmp_path, byte_level):
    _, original = byte_level
    original.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": original.token_to_id("<|im_end|>")})
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a"


# --- SentencePiece -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_equals_the_library(kind):
    model = sentencepiece_model(kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_sentencepiece(model)
    for text in TEXTS:
        if "<s>" in text:
            continue  # the library does not know special tokens in a text
        ids = processor.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode([1, *ids]) == processor.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == 700


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"add_bos_token": False, "legacy": True},
    ],
)
def test_sentencepiece_directory_equals_transformers(tmp_path, settings):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "tokenizer_config.json", settings)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    check_same_as_transformers(Tokenizer.from_directory(tmp_path), theirs, UNINDENTED)


def test_sentencepiece_added_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "added_tokens.json", {"<plain>": 700})
    decoder = {"701": {"content": "<plain>longer", "special": True}}
    settings = {"added_tokens_decoder": decoder, "eos_token": "<plain>longer"}
    write_json(tmp_path / "tokenizer_config.json", settings)
    tokenizer = Tokenizer.from_directory(tmp_path, eos_token_ids=[2])
    assert tokenizer.encode("<plain><plain>longer") == [1, 700, 701]
    assert tokenizer.decode([700, 701]) == "<plain>"
    assert tokenizer.decode([700, 701], skip_special_tokens=False) == "<plain><plain>longer"
    assert tokenizer.eos_token_ids == (701, 2)
    assert tokenizer.vocab_size == 702


@pytest.mark.parametrize("token_id", [-1, 10**15])
def test_added_tokens_of_impossible_ids(tmp_path, token_id):
    """A huge id costs no memory; the model it comes with will refuse it."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "added_tokens.json", {"<a>": token_id})
    if token_id < 0:
        with pytest.raises(CheckpointError, match="added_tokens"):
            Tokenizer.from_directory(tmp_path)
    else:
        assert Tokenizer.from_directory(tmp_path).vocab_size == token_id + 1


def test_sentencepiece_gguf_equals_its_original():
    original = Tokenizer.from_sentencepiece(sentencepiece_model())
    check_same(Tokenizer.from_gguf(sentencepiece_metadata()), original.encode, original.decode)
    bare = Tokenizer.from_gguf(sentencepiece_metadata(add_bos_token=False, add_eos_token=True))
    assert bare.encode("hi") == [*original.encode("hi", add_special_tokens=False), 2]
    unspaced = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert unspaced.encode(" hi") == original.encode("hi")
    assert unspaced.decode(unspaced.encode(" hi")) == " hi"


def test_sentencepiece_gguf_equals_transformers(tmp_path):
    fields = sentencepiece_metadata()
    write_vocabulary(tmp_path / "t.gguf", fields)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    # Its older releases (the last for Python 3.10 among them) leave an empty text without BOS.
    texts = [text for text in UNINDENTED if text or theirs("").input_ids]
    check_same_as_transformers(Tokenizer.from_gguf(fields), theirs, texts)


def test_sentencepiece_decodes_broken_characters():
    tokenizer = Tokenizer.from_sentencepiece(sentencepiece_model())
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert tokenizer.decode(ids) == "😀"
    assert set(tokenizer.decode(ids[:-1])) == {"\ufffd"}


# --- the default model ---------------------------------------------------------------------------


@pytest.mark.model
def test_default_model_equals_its_published_tokenizer():
    """SmolLM2's tokenizer.json cuts at every digit of any script, then as GPT-2 does."""
    fields = read_gguf(default_model()).metadata
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    original = Reference(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    original.pre_tokenizer = PRE_TOKENIZERS["smollm"]
    original.decoder = decoders.ByteLevel()
    original.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:17]])
    check_same(
        Tokenizer.from_gguf(fields),
        lambda text: original.encode(text).ids,
        lambda ids, skip: original.decode(ids, skip_special_tokens=skip),
        [*TEXTS, "½ ² ³ ٣٤ Ⅷ", CORPUS[:20_000]],
    )


@pytest.mark.model
def test_default_model_equals_transformers():
    path = default_model()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_gguf(read_gguf(path).metadata)
    check_same_as_transformers(ours, theirs, [*TEXTS, CORPUS[:20_000]])
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))


# --- both ----------------------------------------------------------------------------------------


@pytest.fixture(params=["bytes", "sentencepiece"])
def any_tokenizer(request) -> Tokenizer:
    if request.param == "sentencepiece":
        return Tokenizer.from_gguf(sentencepiece_metadata(eot_token_id=5))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>", "hi"]
    kinds = np.array([1] * 256 + [3, 1])
    return Tokenizer.from_gguf(
        metadata(
            model="gpt2",
            tokens=tokens,
            token_type=kinds,
            merges=["h i"],
            bos_token_id=256,
            add_bos_token=True,
        )
    )


def test_serialization(any_tokenizer):
    copy = Tokenizer.deserialize(any_tokenizer.serialize())
    check_same(copy, any_tokenizer.encode, any_tokenizer.decode)
    for name in ("vocab_size", "bos_token_id", "eos_token_ids", "special_ids"):
        assert getattr(copy, name) == getattr(any_tokenizer, name)
    for data in (b"", b"{}", b"not json\nabc", any_tokenizer.serialize()[:-100]):
        with pytest.raises(MobileLLMError):
            Tokenizer.deserialize(data)


def test_ids_beyond_the_vocabulary_have_no_text(any_tokenizer):
    ids = any_tokenizer.encode("hi")
    assert any_tokenizer.decode([*ids, any_tokenizer.vocab_size, 10**9]) == "hi"
    assert any_tokenizer.decode(np.array(ids)) == "hi"


@pytest.mark.parametrize("ids", [[-1], [1.5], ["1"], [None], None, 7])
def test_wrong_ids(any_tokenizer, ids):
    with pytest.raises(MobileLLMError, match="ids must be integers from 0"):
        any_tokenizer.decode(ids)


@pytest.mark.parametrize("text", [None, b"bytes", 7, ["list"]])
def test_wrong_text(any_tokenizer, text):
    with pytest.raises(MobileLLMError, match="text must be a str"):
        any_tokenizer.encode(text)


def test_lone_surrogate(any_tokenizer):
    with pytest.raises(MobileLLMError, match="lone surrogate at 2"):
        any_tokenizer.encode("ab\ud800")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="bert"), "tokenizer.ggml.model must be one of gpt2, llama, got 'bert'"),
        (dict(model=7), "tokenizer.ggml.model must be of type str, got 7"),
        (dict(tokens=[]), "tokens is missing"),
        (dict(tokens="abc"), "tokens must be of type list"),
        (dict(tokens=["a", "b", "a"]), "holds a token twice"),
        (dict(scores=np.zeros(3, np.float32)), "scores must have a number for each"),
        (dict(scores=np.full(700, np.nan, np.float32)), "scores must be finite"),
        (dict(token_type=np.full(700, 99)), "token_type or scores"),
        (dict(token_type=[1, 2]), "token_type must be of type ndarray"),
        (dict(token_type=np.full(700, 6)), "byte piece <unk> is invalid"),
        (dict(bos_token_id=700), "special token id 700"),
        (dict(bos_token_id="one"), "bos_token_id must be of type int"),
        (dict(add_bos_token=1), "add_bos_token must be of type bool"),
        (dict(precompiled_charsmap=np.zeros(4)), "precompiled_charsmap is not supported"),
    ],
)
def test_refused_metadata(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_gguf(sentencepiece_metadata(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pre="gpt-17"), "tokenizer.ggml.pre = 'gpt-17' is not supported"),
        (dict(), "tokenizer.ggml.merges is missing"),
        (dict(merges=["a b", "abc"]), "merges"),
        (dict(merges=["a zzz"]), "merges"),
    ],
)
def test_refused_byte_level_metadata(changes, message):
    tokens = ["a", "b", "ab"]
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_gguf(metadata(model="gpt2", tokens=tokens, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b"\x0a\x03abc"])
def test_refused_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as error:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": 7, "bos_token": 7, "eos_token": ["</s>"]},
        {"extra_special_tokens": {"a": "<s>"}, "unk_token": {}, "add_bos_token": None},
    ],
)
def test_settings_of_no_meaning_are_passed_over(tmp_path, settings):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert Tokenizer.from_directory(tmp_path).decode([1], False) == "<s>"


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"added_tokens_decoder": {"x": {}}}', "[" * 10**5]
)
def test_refused_settings(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(error.value)


def test_random_damage(tmp_path):
    """Whatever happens to a SentencePiece model, it is refused in one line or it works."""
    model, rng = sentencepiece_model(), np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        try:
            tokenizer = Tokenizer.from_sentencepiece(damaged(model, rng))
            tokenizer.decode(tokenizer.encode("Hello <s> 123\n😀"))
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 100 < refused < 500


def test_no_tokenizer(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None


def test_single_files(tmp_path):
    for name, read in (("a", Tokenizer.from_tokenizer_json), ("b", Tokenizer.from_sentencepiece)):
        with pytest.raises(CheckpointError, match=f"{name}: not readable"):
            read(tmp_path / name)
    (tmp_path / "a").write_text(byte_level_model())
    settings = {"eos_token": "<|im_end|>"}
    tokenizer = Tokenizer.from_tokenizer_json(tmp_path / "a", settings)
    assert tokenizer.eos_token_ids == tuple(tokenizer.encode("<|im_end|>"))
    (tmp_path / "b").write_bytes(sentencepiece_model())
    assert Tokenizer.from_sentencepiece(str(tmp_path / "b"), settings).encode("<s>") == [1, 1]
