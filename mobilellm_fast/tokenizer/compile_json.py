"""What the table of a `tokenizer.json` holds: byte-level BPE, or characters with byte fallback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from . import table
from .backends import SPACE, Backend
from .character_classes import character_classes
from .gguf_vocabulary import DIGIT, GPT2, LLAMA3, QWEN2
from .table import NONE, Contents, check_size, require, unmarked

SPLITS = {GPT2: table.SPLIT_GPT2, LLAMA3: table.SPLIT_LLAMA3, QWEN2: table.SPLIT_QWEN2}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def json_contents(backend: Backend) -> Contents:
    """Return the contents for a tokenizer of the `tokenizers` library.

    Raises:
        Unsupported: it is not of these families.
    """
    fields = json.loads(backend.vocabulary())
    model = fields["model"]
    require(model["type"] == "BPE" and not model["dropout"], "not a BPE")
    require(not model["continuing_subword_prefix"], "a subword prefix")
    require(not model["end_of_word_suffix"], "a word suffix")
    vocab: dict[str, int] = model["vocab"]
    require(len(set(vocab.values())) == len(vocab), "an id twice")
    check_size(backend.vocab_size, len(vocab) + len(fields["added_tokens"]))
    contents = (_characters if model["byte_fallback"] else _byte_level)(fields, backend)

    before, after = _around(fields["post_processor"])
    options = backend.options()
    contents.prefix = [*options["prefix"], *before]
    contents.suffix = [*after, *options["suffix"]]
    contents.special = backend.special_ids
    contents.merges = _merges(model["merges"], vocab)
    contents.unknown_id = vocab.get(model["unk_token"])
    return contents


def _merges(pairs: list, vocab: dict[str, int]) -> list[tuple[int, int, int, int]]:
    # Of a pair that comes twice the library keeps the last.
    ranked = {(a, b): rank for rank, (a, b) in enumerate(pairs)}
    return [(vocab[a], vocab[b], rank, vocab[a + b]) for (a, b), rank in ranked.items()]


def _byte_level(fields: dict, backend: Backend) -> Contents:
    model = fields["model"]
    vocab: dict[str, int] = model["vocab"]
    require(fields["normalizer"] is None, "a normalizer")
    require((fields["decoder"] or {}).get("type") == "ByteLevel", "another decoder")
    split, digits = _word_split(fields["pre_tokenizer"])
    byte_of = _byte_alphabet()

    def spelled(text: str) -> bytes | None:
        """The bytes that a token's visible characters stand for; None if some stand for none."""
        try:
            return bytes([byte_of[c] for c in text])
        except KeyError:
            return None

    ids = {byte: vocab.get(character, NONE) for character, byte in byte_of.items()}
    require(model["unk_token"] is None or NONE not in ids.values(), "unknown bytes")
    spellings = {token_id: (text, spelled(text)) for text, token_id in vocab.items()}
    tokens = {i: text.encode() if data is None else data for i, (text, data) in spellings.items()}
    for token in fields["added_tokens"]:
        data = spelled(token["content"])
        tokens[token["id"]] = token["content"].encode() if data is None else data
    return Contents(
        family=table.BYTE_LEVEL,
        vocab_size=backend.vocab_size,
        tokens=tokens,
        lookup={data: i for i, (_, data) in spellings.items() if data and tokens[i] == data},
        byte_ids=[ids[byte] for byte in range(256)],
        added=_added(fields["added_tokens"], lambda text: text),
        classes=character_classes(digits),
        split=split,
        cut_digits=digits is not None,
        whole_words=model["ignore_merges"],
    )


def _word_split(pre_tokenizer: dict | None) -> tuple[int, str | None]:
    """Return how words are cut, and what cuts digits out before."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    require(all(steps) and steps[-1]["type"] == "ByteLevel", "another pre-tokenizer")
    *cuts, last = steps
    require(not last["add_prefix_space"], "a space before each text")
    known: list[Any] = [_cut(step) for step in cuts] + [GPT2] * last["use_regex"]
    digits = None
    if known and known[0] in ("Digits", DIGIT):
        digits = "Digits" if known.pop(0) == "Digits" else "regex"
    require(len(known) == 1 and known[0] in SPLITS, "an unknown regular expression")
    return SPLITS[known[0]], digits


def _cut(step: dict) -> str | None:
    if step == {"type": "Digits", "individual_digits": True}:
        return "Digits"
    plain = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return step["pattern"].get("Regex") if plain else None


def _byte_alphabet() -> dict[str, int]:
    """The visible characters by which GPT-2 writes bytes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def _characters(fields: dict, backend: Backend) -> Contents:
    model = fields["model"]
    vocab: dict[str, int] = model["vocab"]
    require(not model["ignore_merges"], "whole words among characters")
    prepend, unless_space = _space_rule(fields["normalizer"], fields["pre_tokenizer"])
    strips = _strips_space(fields["decoder"])

    normalize = _marked if prepend == table.PREPEND_NEVER else lambda t: SPACE + _marked(t)
    added = {  # such as are found in normalized text are also decoded to it
        token["id"]: normalize(token["content"]) if token["normalized"] else token["content"]
        for token in fields["added_tokens"]
    }
    texts = {i: text for text, i in vocab.items()} | added
    bytes_of = {i: int(m[1], 16) for i, text in texts.items() if (m := BYTE_TOKEN.fullmatch(text))}
    byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
    require(None not in byte_ids, "a byte without a token")

    normalized = any(token["normalized"] for token in fields["added_tokens"])
    require(not normalized or fields["pre_tokenizer"] is None, "a space after added tokens")
    return Contents(
        family=table.CHARACTERS,
        vocab_size=backend.vocab_size,
        tokens={
            i: bytes([bytes_of[i]]) if i in bytes_of else unmarked(text)
            for i, text in texts.items()
        },
        byte_tokens=frozenset(bytes_of),
        lookup={
            unmarked(text): i
            for text, i in vocab.items()
            if text and " " not in text and not BYTE_TOKEN.fullmatch(text) and added.get(i) is None
        },
        byte_ids=byte_ids,
        added=_added(fields["added_tokens"], lambda text: unmarked(normalize(text)).decode()),
        prepend=prepend,
        prepend_unless_space=unless_space,
        decode_byte_runs=True,
        decode_strip_space=strips,
    )


def _marked(text: str) -> str:
    return text.replace(" ", SPACE)


def _space_rule(normalizer: dict | None, pre_tokenizer: dict | None) -> tuple[int, bool]:
    """Return when a space is put before a text, and whether only where there is none."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre_tokenizer is None:
        steps = (normalizer or {}).get("normalizers", [normalizer])
        rules = {1: ([replace], table.PREPEND_NEVER), 2: ([prepend, replace], table.PREPEND_ALWAYS)}
        expected, rule = rules.get(len(steps), (None, 0))
        require(steps == expected, "another normalizer")
        return rule, False
    require(normalizer is None, "another normalizer")
    schemes = {
        "never": table.PREPEND_NEVER,
        "first": table.PREPEND_FIRST,
        "always": table.PREPEND_ALWAYS,
    }
    scheme = schemes.get(pre_tokenizer.get("prepend_scheme"))
    expected = {"type": "Metaspace", "replacement": SPACE, "split": False}
    rest = {key: value for key, value in pre_tokenizer.items() if key != "prepend_scheme"}
    require(rest == expected and scheme is not None, "another pre-tokenizer")
    return scheme, True


def _strips_space(decoder: dict | None) -> bool:
    """Return whether the decoder takes the first space away."""
    steps = (decoder or {}).get("decoders", [])
    fixed = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    require(steps in (fixed, [*fixed, strip]), "another decoder")
    return len(steps) == 4


def _added(tokens: Iterable[dict], normalize) -> list[tuple[bytes, int, int]]:
    found = []
    tokens = list(tokens)
    for token in tokens:
        text = token["content"]
        require(text and not token["single_word"], "an added token that must be a word")
        strips = token["lstrip"] or token["rstrip"]
        flags = table.LEFT_STRIP * token["lstrip"] | table.RIGHT_STRIP * token["rstrip"]
        if token["normalized"]:
            require(not strips or normalize(text) == text, "stripping of normalized text")
            text = normalize(text)
            flags |= table.NORMALIZED
        found.append((text.encode(), token["id"], flags))
    texts = [(text, flags & table.NORMALIZED) for text, _, flags in found]
    require(len(set(texts)) == len(texts), "an added token twice")
    # Where tokens begin with white space and others swallow it, the library finds both at once.
    swallows = any(flags & table.RIGHT_STRIP for _, _, flags in found)
    require(
        not swallows or not any(token["content"][0].isspace() for token in tokens),
        "added tokens that overlap",
    )
    return found


def _around(processor: dict | None) -> tuple[list[int], list[int]]:
    """Return the ids that a post-processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    if processor is None:
        return before, after
    for step in processor.get("processors", [processor]):
        if step["type"] == "ByteLevel":  # changes offsets alone
            continue
        require(step["type"] == "TemplateProcessing", "another post-processor")
        single: list[int] = []
        place = None
        for piece in step["single"]:
            if "Sequence" in piece:
                require(place is None, "a text twice")
                place = len(single)
            else:
                single += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        require(place is not None, "a template without a text")
        before, after = [*single[:place], *before], [*after, *single[place:]]
    return before, after
