"""Compiles a tokenizer of a library into a table that C++ reads, and proves that nothing changed.

Supported are byte-level BPE cut into words as by GPT-2, Llama 3 or Qwen 2, and SentencePiece's BPE
with bytes for unknown characters, as a `tokenizer.json` or as a model file. For everything else,
and wherever a probe differs, there is no table, and the library does the work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from . import table
from .backends import SPACE, Backend, CompiledBackend, SentencePieceBackend, parse_model
from .character_classes import character_classes
from .gguf_vocabulary import DIGIT, GPT2, LLAMA3, QWEN2
from .probes import probe_ids, probe_texts
from .table import NONE, Contents, write_table

SPLITS = {GPT2: table.SPLIT_GPT2, LLAMA3: table.SPLIT_LLAMA3, QWEN2: table.SPLIT_QWEN2}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of SentencePiece's pieces


class Unsupported(Exception):
    """The tokenizer is not of a family that can be compiled."""


def compile_backend(
    backend: Backend, bos_token_id: int | None, eos_token_ids: Sequence[int]
) -> bytes | None:
    """Return the table of a tokenizer, or None if it must stay with its library.

    Args:
        backend: any but a compiled one.
        bos_token_id, eos_token_ids: to be kept with it.
    """
    try:
        compile_ = _sentencepiece if isinstance(backend, SentencePieceBackend) else _json
        contents = compile_(backend)
        contents.bos_id, contents.eos_ids = bos_token_id, eos_token_ids
        ids = [i for i in (bos_token_id, *eos_token_ids) if i is not None]
        _require(min(ids, default=0) >= 0 and max(ids, default=0) < 1 << 31, "an id out of range")
        compiled = CompiledBackend(write_table(contents))
    except (Unsupported, AttributeError, LookupError, TypeError, ValueError):
        return None  # unknown, or written in a way that was not expected
    return compiled.vocabulary() if _is_same(compiled, backend, contents) else None


def _is_same(compiled: CompiledBackend, library: Backend, contents: Contents) -> bool:
    """Compare both on texts and ids, among them every id of the vocabulary."""
    if (compiled.vocab_size, compiled.special_ids) != (library.vocab_size, library.special_ids):
        return False
    added = [text.decode("utf-8", "replace") for text, _, _ in contents.added]
    texts = probe_texts(added)
    marked = sorted(contents.byte_tokens | contents.special)
    sequences = list(probe_ids(compiled.vocab_size, marked))
    for text in texts:
        ids = library.encode(text, False)
        if compiled.encode(text, False) != ids:
            return False
        sequences.append(ids)
    alone = [([token_id], False) for token_id in range(compiled.vocab_size)]
    together = [(ids, skip) for ids in sequences for skip in (True, False)]
    return all(
        compiled.encode(text, True) == library.encode(text, True) for text in texts[:40]
    ) and all(
        compiled.decode(ids, skip) == library.decode(ids, skip) for ids, skip in alone + together
    )


def _require(condition: Any, what: str) -> None:
    if not condition:
        raise Unsupported(what)


def _check_size(vocab_size: int, tokens: int) -> None:
    _require(vocab_size <= 2 * tokens + 4096, "ids with wide gaps")


# --- tokenizer.json ------------------------------------------------------------------------------


def _json(backend: Backend) -> Contents:
    fields = json.loads(backend.vocabulary())
    model = fields["model"]
    _require(model["type"] == "BPE" and not model["dropout"], "not a BPE")
    _require(not model["continuing_subword_prefix"], "a subword prefix")
    _require(not model["end_of_word_suffix"], "a word suffix")
    vocab: dict[str, int] = model["vocab"]
    _require(len(set(vocab.values())) == len(vocab), "an id twice")
    _check_size(backend.vocab_size, len(vocab) + len(fields["added_tokens"]))
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
    _require(fields["normalizer"] is None, "a normalizer")
    _require((fields["decoder"] or {}).get("type") == "ByteLevel", "another decoder")
    split, digits = _word_split(fields["pre_tokenizer"])
    byte_of = _byte_alphabet()

    def spelled(text: str) -> bytes | None:
        """The bytes that a token's visible characters stand for; None if some stand for none."""
        try:
            return bytes([byte_of[c] for c in text])
        except KeyError:
            return None

    ids = {byte: vocab.get(character, NONE) for character, byte in byte_of.items()}
    _require(model["unk_token"] is None or NONE not in ids.values(), "unknown bytes")
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
    _require(all(steps) and steps[-1]["type"] == "ByteLevel", "another pre-tokenizer")
    *cuts, last = steps
    _require(not last["add_prefix_space"], "a space before each text")
    known: list[Any] = [_cut(step) for step in cuts] + [GPT2] * last["use_regex"]
    digits = None
    if known and known[0] in ("Digits", DIGIT):
        digits = "Digits" if known.pop(0) == "Digits" else "regex"
    _require(len(known) == 1 and known[0] in SPLITS, "an unknown regular expression")
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
    _require(not model["ignore_merges"], "whole words among characters")
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
    _require(None not in byte_ids, "a byte without a token")

    normalized = any(token["normalized"] for token in fields["added_tokens"])
    _require(not normalized or fields["pre_tokenizer"] is None, "a space after added tokens")
    return Contents(
        family=table.CHARACTERS,
        vocab_size=backend.vocab_size,
        tokens={
            i: bytes([bytes_of[i]]) if i in bytes_of else _unmarked(text)
            for i, text in texts.items()
        },
        byte_tokens=frozenset(bytes_of),
        lookup={
            _unmarked(text): i
            for text, i in vocab.items()
            if text and " " not in text and not BYTE_TOKEN.fullmatch(text) and added.get(i) is None
        },
        byte_ids=byte_ids,
        added=_added(fields["added_tokens"], lambda text: _unmarked(normalize(text)).decode()),
        prepend=prepend,
        prepend_unless_space=unless_space,
        decode_byte_runs=True,
        decode_strip_space=strips,
    )


def _marked(text: str) -> str:
    return text.replace(" ", SPACE)


def _unmarked(text: str) -> bytes:
    """A token as the table has it: with spaces, which a normalized text has none of."""
    return text.replace(SPACE, " ").encode()


def _space_rule(normalizer: dict | None, pre_tokenizer: dict | None) -> tuple[int, bool]:
    """Return when a space is put before a text, and whether only where there is none."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if pre_tokenizer is None:
        steps = (normalizer or {}).get("normalizers", [normalizer])
        rules = {1: ([replace], table.PREPEND_NEVER), 2: ([prepend, replace], table.PREPEND_ALWAYS)}
        expected, rule = rules.get(len(steps), (None, 0))
        _require(steps == expected, "another normalizer")
        return rule, False
    _require(normalizer is None, "another normalizer")
    schemes = {
        "never": table.PREPEND_NEVER,
        "first": table.PREPEND_FIRST,
        "always": table.PREPEND_ALWAYS,
    }
    scheme = schemes.get(pre_tokenizer.get("prepend_scheme"))
    expected = {"type": "Metaspace", "replacement": SPACE, "split": False}
    rest = {key: value for key, value in pre_tokenizer.items() if key != "prepend_scheme"}
    _require(rest == expected and scheme is not None, "another pre-tokenizer")
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
    _require(steps in (fixed, [*fixed, strip]), "another decoder")
    return len(steps) == 4


def _added(tokens: Iterable[dict], normalize) -> list[tuple[bytes, int, int]]:
    found = []
    tokens = list(tokens)
    for token in tokens:
        text = token["content"]
        _require(text and not token["single_word"], "an added token that must be a word")
        strips = token["lstrip"] or token["rstrip"]
        flags = table.LEFT_STRIP * token["lstrip"] | table.RIGHT_STRIP * token["rstrip"]
        if token["normalized"]:
            _require(not strips or normalize(text) == text, "stripping of normalized text")
            text = normalize(text)
            flags |= table.NORMALIZED
        found.append((text.encode(), token["id"], flags))
    texts = [(text, flags & table.NORMALIZED) for text, _, flags in found]
    _require(len(set(texts)) == len(texts), "an added token twice")
    # Where tokens begin with white space and others swallow it, the library finds both at once.
    swallows = any(flags & table.RIGHT_STRIP for _, _, flags in found)
    _require(
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
        _require(step["type"] == "TemplateProcessing", "another post-processor")
        single: list[int] = []
        place = None
        for piece in step["single"]:
            if "Sequence" in piece:
                _require(place is None, "a text twice")
                place = len(single)
            else:
                single += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        _require(place is not None, "a template without a text")
        before, after = [*single[:place], *before], [*after, *single[place:]]
    return before, after


# --- SentencePiece -------------------------------------------------------------------------------


def _sentencepiece(backend: SentencePieceBackend) -> Contents:
    proto = parse_model(backend.vocabulary())
    options = backend.options()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    _require(trainer.model_type == trainer.BPE and trainer.byte_fallback, "not a BPE with bytes")
    _require(not trainer.treat_whitespace_as_suffix, "spaces behind words")
    _require(not normalizer.precompiled_charsmap, "a normalizer")
    _require(not normalizer.remove_extra_whitespaces, "removal of spaces")
    _require(normalizer.escape_whitespaces, "spaces as they are")
    kinds = {piece.type for piece in proto.pieces}
    _require(kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE}, "user-defined or unused pieces")
    _check_size(backend.vocab_size, len(proto.pieces) + len(options["added"]))

    tokens, lookup, scores, byte_ids = {}, {}, {}, [NONE] * 256
    for i, piece in enumerate(proto.pieces):
        scores[i] = piece.score
        tokens[i] = _unmarked(piece.piece)
        if piece.type == BYTE:
            byte = int(piece.piece[1:-1], 16)
            tokens[i], byte_ids[byte] = bytes([byte]), i
        elif piece.type == NORMAL:
            if piece.piece and " " not in piece.piece:
                _require(lookup.setdefault(tokens[i], i) == i, "a piece twice")
        else:  # a text becomes one of these by another way than merging
            _require(len(piece.piece) > 1, "a control character")
    _require(NONE not in byte_ids, "a byte without a token")
    # Lookups compare with what a token decodes to.
    added: dict[str, int] = options["added"]
    _require(not set(added.values()) & set(lookup.values()), "an added token that is a piece")
    tokens |= {i: text.encode() for text, i in added.items()}
    _require(all(added), "an added token without text")

    prepend = table.PREPEND_NEVER
    if normalizer.add_dummy_prefix:
        after_special = options["space_after_special"]
        prepend = table.PREPEND_ALWAYS if after_special else table.PREPEND_FIRST
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
    return Contents(
        family=table.SENTENCEPIECE,
        vocab_size=backend.vocab_size,
        tokens=tokens,
        lookup=lookup,
        byte_ids=byte_ids,
        byte_tokens=frozenset(byte_ids),
        special=backend.special_ids,
        scores=scores,
        added=[(text.encode(), i, 0) for text, i in added.items()],
        prepend=prepend,
        decode_strip_space=normalizer.add_dummy_prefix,
        prefix=options["prefix"],
        suffix=options["suffix"],
        unknown_id=unknown,
    )
