"""Writes the binary tokenizer table that `csrc/tokenizer/table.h` describes and reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backends import SPACE
from .backends import TABLE_MAGIC as MAGIC

VERSION = 1
ALIGNMENT = 64
NONE = 0xFFFFFFFF  # no id; an empty slot

BYTE_LEVEL, CHARACTERS, SENTENCEPIECE = range(3)
SPLIT_NONE, SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2 = range(4)
PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS = range(3)
SPECIAL, BYTE = 1, 2  # flags of a token
LEFT_STRIP, RIGHT_STRIP, NORMALIZED = 1, 2, 4  # flags of an added token
LETTER, NUMBER, BLANK, CUT_DIGIT = 1, 2, 4, 8  # classes of characters

CODE_POINTS, BLOCK = 0x110000, 128
MAX_PROBES = 1024


@dataclass
class Contents:
    """What a table holds; the C++ header says what each part means.

    Args:
        tokens: the bytes that each id decodes to.
        special: ids of control tokens, `byte_tokens` those that stand for one byte.
        lookup: ids of the tokens that a text may become, by their bytes.
        merges: (left, right, rank, id), each pair once.
        scores: by id, of `SENTENCEPIECE` only.
        byte_ids: 256 ids; NONE for bytes that are dropped.
        added: (text, id, flags).
        classes: uint8 (CODE_POINTS,) or None if words are not cut.
    """

    family: int
    vocab_size: int
    tokens: dict[int, bytes]
    lookup: dict[bytes, int]
    byte_ids: Sequence[int]
    special: frozenset[int] = frozenset()
    byte_tokens: frozenset[int] = frozenset()
    merges: list[tuple[int, int, int, int]] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    added: list[tuple[bytes, int, int]] = field(default_factory=list)
    classes: np.ndarray | None = None
    split: int = SPLIT_NONE
    cut_digits: bool = False
    whole_words: bool = False
    prepend: int = PREPEND_NEVER
    prepend_unless_space: bool = False
    decode_byte_runs: bool = False
    decode_strip_space: bool = False
    prefix: Sequence[int] = ()
    suffix: Sequence[int] = ()
    bos_id: int | None = None
    eos_ids: Sequence[int] = ()
    unknown_id: int | None = None


class Unsupported(Exception):
    """The tokenizer is not of a family that can be compiled."""


def require(condition: Any, what: str) -> None:
    """Raise `Unsupported` unless the condition holds."""
    if not condition:
        raise Unsupported(what)


def check_size(vocab_size: int, tokens: int) -> None:
    """Refuse ids so far apart that a table of all would be mostly empty."""
    require(vocab_size <= 2 * tokens + 4096, "ids with wide gaps")


def unmarked(text: str) -> bytes:
    """Return a token's text as the table has it: with spaces, not with SentencePiece's marks."""
    return text.replace(SPACE, " ").encode()


def write_table(c: Contents) -> bytes:
    """Return the table's bytes.

    Raises:
        ValueError: a hash table would have too long chains.
    """
    texts = [c.tokens.get(token_id, b"") for token_id in range(c.vocab_size)]
    flags = np.zeros(c.vocab_size, np.uint8)
    flags[list(c.special)] |= SPECIAL
    flags[list(c.byte_tokens)] |= BYTE
    scores = [c.scores.get(token_id, 0.0) for token_id in range(c.vocab_size)]
    added = sorted(c.added, key=lambda token: (token[2] & NORMALIZED, token[0]))
    blocks, classes = _blocks(c.classes)
    sections = [
        _offsets([len(text) for text in texts]),
        b"".join(texts),
        flags,
        _lookup(c.lookup),
        _merges(c.merges),
        # a minus zero would not compare as a zero does
        np.array(scores if c.family == SENTENCEPIECE else [], np.float32) + np.float32(0),
        np.array(c.byte_ids, np.uint32),
        _added(added),
        b"".join(text for text, _, _ in added),
        blocks,
        classes,
        np.array(c.prefix, np.uint32),
        np.array(c.suffix, np.uint32),
        np.array(c.eos_ids, np.uint32),
    ]
    words = [
        c.family,
        c.split,
        c.cut_digits,
        c.whole_words,
        c.prepend,
        c.prepend_unless_space,
        c.decode_byte_runs,
        c.decode_strip_space,
        c.vocab_size,
        NONE if c.bos_id is None else c.bos_id,
        NONE if c.unknown_id is None else c.unknown_id,
        max(map(len, c.lookup), default=0),
    ]
    return _join(words, [bytes(section) for section in sections])


def _join(words: list[int], sections: list[bytes]) -> bytes:
    end = _aligned(len(MAGIC) + 4 * (2 + len(words)) + 8 * len(sections))
    places = []
    for section in sections:
        places += [end, len(section)]
        end = _aligned(end + len(section))
    numbers = [VERSION, end, *map(int, words), *places]
    out = bytearray(MAGIC + struct.pack(f"<{len(numbers)}I", *numbers))
    for section in sections:
        out += bytes(_aligned(len(out)) - len(out)) + section
    return bytes(out.ljust(end, b"\0"))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.uint32)


def _added(tokens: list[tuple[bytes, int, int]]) -> np.ndarray:
    offsets = _offsets([len(text) for text, _, _ in tokens])
    rows = [
        (token_id, offset, len(text), flags)
        for (text, token_id, flags), offset in zip(tokens, offsets, strict=False)
    ]
    return np.array(rows, np.uint32).reshape(-1, 4)


def _blocks(classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the block of each 128 code points, and the different blocks."""
    if classes is None:
        return np.zeros(CODE_POINTS // BLOCK, np.uint16), np.zeros(BLOCK, np.uint8)
    numbers: dict[bytes, int] = {}
    rows = [row.tobytes() for row in classes.reshape(-1, BLOCK)]
    index = [numbers.setdefault(row, len(numbers)) for row in rows]
    return np.array(index, np.uint16), np.frombuffer(b"".join(numbers), np.uint8)


def _lookup(ids: dict[bytes, int]) -> np.ndarray:
    rows = np.array(list(ids.values()), np.uint32).reshape(-1, 1)
    return _hash_table(_hash_bytes(list(ids)), rows)


def _merges(merges: list[tuple[int, int, int, int]]) -> np.ndarray:
    rows = np.array(merges, np.uint32).reshape(-1, 4)
    left, right = rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64)
    hashes = (left << np.uint64(32) | right) * np.uint64(0x9E3779B97F4A7C15)
    return _hash_table(_finish(hashes), rows)


def _hash_bytes(texts: list[bytes]) -> np.ndarray:
    """Hash each text, byte by byte, all texts at once."""
    lengths = np.array([len(text) for text in texts], np.int64)
    data = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint64)
    starts = np.cumsum(lengths) - lengths
    hashes = np.full(len(texts), 0xCBF29CE484222325, np.uint64)
    remaining = np.arange(len(texts))
    at = 0
    while len(remaining := remaining[lengths[remaining] > at]):
        mixed = hashes[remaining] ^ data[starts[remaining] + at]
        hashes[remaining] = mixed * np.uint64(0x100000001B3)
        at += 1
    return _finish(hashes)


def _finish(hashes: np.ndarray) -> np.ndarray:
    return hashes ^ (hashes >> np.uint64(32))


def _hash_table(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Place rows by their hashes; those whose slot is taken go on to the next."""
    size = 1
    while 4 * len(rows) > 3 * size or len(rows) == size:
        size *= 2
    table = np.full((size, rows.shape[1]), NONE, np.uint32)
    free = np.ones(size, bool)
    pending = np.arange(len(rows))
    slots = (hashes & np.uint64(size - 1)).astype(np.int64)
    for _ in range(MAX_PROBES):
        if not len(pending):
            return table
        open_ = pending[free[slots[pending]]]
        taken, first = np.unique(slots[open_], return_index=True)
        table[taken] = rows[open_[first]]
        free[taken] = False
        placed = np.zeros(len(rows), bool)
        placed[open_[first]] = True
        pending = pending[~placed[pending]]
        slots[pending] = (slots[pending] + 1) & (size - 1)
    raise ValueError("the hash table has too long chains")
