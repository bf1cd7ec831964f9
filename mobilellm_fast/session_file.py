"""A session as a file.

    magic "MLFSESSN" | version, header length, checksum | header (JSON) | token ids | pages

The header has what the model was, the conversation, and the sizes and checksums of the rest. Pages
are those of the KV cache as they lie in memory. Nothing in the file is trusted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _C
from .chat_template import plain_messages
from .context import Context
from .errors import CheckpointError, MobileLLMError
from .files import brief, read_bytes, whole_file
from .interface import StoredEngine

MAGIC = b"MLFSESSN"
VERSION = 1  # of the header and of the layout of pages in csrc/kv_cache.h; others are refused
PREFIX = struct.Struct("<8sIIQ")  # magic, version, header bytes, header checksum


def save(
    path: Path, engine: StoredEngine, context: Context, messages: Sequence[Mapping[str, Any]]
) -> None:
    """Write a session; see `Session.save`."""
    tokens = np.asarray(context.token_ids, "<i4").tobytes()
    pages = context.cache.pages()
    header = json.dumps(
        {
            "model": identity(engine, context.cache),
            "messages": [dict(message) for message in messages],
            "tokens": len(context.token_ids),
            "tokens_checksum": _C.checksum(tokens),
            "page_checksums": [_C.checksum(page) for page in pages],
        }
    ).encode()
    try:
        with whole_file(path) as file:
            file.write(PREFIX.pack(MAGIC, VERSION, len(header), _C.checksum(header)))
            file.write(header)
            file.write(tokens)
            for page in pages:
                file.write(page)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({brief(error)})") from None


def restore(path: Path, engine: StoredEngine) -> tuple[Context, list[dict[str, Any]]]:
    """Read a session: the tokens with their cache, and the conversation.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is of another model.
    """
    data = memoryview(read_bytes(path))
    try:
        return _parse(data, engine)
    except MobileLLMError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({brief(error)})") from None


def identity(engine: StoredEngine, cache: Any) -> dict[str, Any]:
    """Return what must agree for a cache to be of use: architecture, weights, formats."""
    sums = [
        _C.checksum(weight if isinstance(weight, np.ndarray) else weight.data)
        for weight in engine.weights.values()
    ]
    # pages of a GPU's cache have as many bytes as a CPU's, in another order
    layout = {"page_layout": cache.layout} if hasattr(cache, "layout") else {}
    return layout | {
        **json.loads(json.dumps(engine.config.to_hf())),
        "format": engine.format,
        "kv_format": cache.format,
        "page_nbytes": cache.page_nbytes,
        "weights_checksum": f"{_C.checksum(np.asarray(sums, np.uint64)):016x}",
    }


def _parse(data: memoryview, engine: StoredEngine) -> tuple[Context, list[dict[str, Any]]]:
    if bytes(data[: len(MAGIC)]) != MAGIC:
        got = bytes(data[: len(MAGIC)])
        raise MobileLLMError(f"a session must begin with {MAGIC!r}, got {got!r}")
    if len(data) < PREFIX.size:
        raise MobileLLMError(f"must have at least {PREFIX.size} bytes, got {len(data)}")
    _, version, header_nbytes, header_checksum = PREFIX.unpack(data[: PREFIX.size])
    if version != VERSION:
        raise MobileLLMError(f"must have session version {VERSION}, got {version}")
    start = PREFIX.size + header_nbytes
    header = data[PREFIX.size : start]
    if len(header) != header_nbytes:
        raise MobileLLMError(f"must have at least {start} bytes, got {len(data)}")
    _check_sum("header", header, header_checksum)
    fields = json.loads(bytes(header))

    cache = engine.new_cache()
    _check_identity(fields["model"], identity(engine, cache))
    count, sums = fields["tokens"], fields["page_checksums"]
    tokens_end = start + 4 * count
    end = tokens_end + len(sums) * cache.page_nbytes
    if len(data) != end:
        raise MobileLLMError(f"must have {end} bytes, got {len(data)}")
    _check_sum("tokens", data[start:tokens_end], fields["tokens_checksum"])
    tokens = np.frombuffer(data[start:tokens_end], "<i4")
    if count and not 0 <= tokens.min() <= tokens.max() < engine.config.vocab_size:
        raise MobileLLMError(f"tokens must be in 0..{engine.config.vocab_size - 1}")
    if count > engine.config.context_length:
        limit = engine.config.context_length
        raise MobileLLMError(f"must have at most {limit} tokens, got {count}")
    pages = [data[at : at + cache.page_nbytes] for at in range(tokens_end, end, cache.page_nbytes)]
    for index, (page, page_sum) in enumerate(zip(pages, sums, strict=True)):
        _check_sum(f"page {index}", page, page_sum)
    try:
        cache.restore(count, pages)
    except ValueError as error:
        raise MobileLLMError(str(error)) from None
    return Context(engine, cache, tokens.tolist()), _messages(fields["messages"])


def _check_sum(what: str, data: memoryview, expected: int) -> None:
    got = _C.checksum(data)
    if got != expected:
        raise MobileLLMError(
            f"the {what} must have checksum {expected:016x}, got {got:016x}: the file is damaged"
        )


def _check_identity(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            raise MobileLLMError(
                f"must be a session of this model, with {name} {brief(ours.get(name))}, "
                f"got {brief(saved.get(name))}"
            )


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise MobileLLMError("messages must be a list of objects")
    return plain_messages(value) if value else []
