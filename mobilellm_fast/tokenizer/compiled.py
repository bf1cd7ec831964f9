"""Compiles a tokenizer of a library into a table that C++ reads, and proves that nothing changed.

Supported are byte-level BPE cut into words as by GPT-2, Llama 3 or Qwen 2, and SentencePiece's BPE
with bytes for unknown characters, as a `tokenizer.json` or as a model file. For everything else,
and wherever a probe differs, there is no table, and the library does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from .backends import Backend, CompiledBackend, SentencePieceBackend
from .compile_json import json_contents
from .compile_sentencepiece import sentencepiece_contents
from .probes import probe_ids, probe_texts
from .table import Contents, Unsupported, require, write_table


def compile_backend(
    backend: Backend, bos_token_id: int | None, eos_token_ids: Sequence[int]
) -> bytes | None:
    """Return the table of a tokenizer, or None if it must stay with its library.

    Args:
        backend: any but a compiled one.
        bos_token_id, eos_token_ids: to be kept with it.
    """
    try:
        compile_ = (
            sentencepiece_contents if isinstance(backend, SentencePieceBackend) else json_contents
        )
        contents = compile_(backend)
        contents.bos_id, contents.eos_ids = bos_token_id, eos_token_ids
        ids = [i for i in (bos_token_id, *eos_token_ids) if i is not None]
        require(min(ids, default=0) >= 0 and max(ids, default=0) < 1 << 31, "an id out of range")
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
    if any(compiled.encode(t, True) != library.encode(t, True) for t in texts[:40]):
        return False
    together = ((ids, skip) for ids in sequences for skip in (True, False))
    alone = (([token_id], False) for token_id in range(compiled.vocab_size))
    return all(
        compiled.decode(ids, skip) == library.decode(ids, skip)
        for ids, skip in chain(together, alone)
    )
