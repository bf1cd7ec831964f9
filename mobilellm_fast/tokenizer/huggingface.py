"""Tokenizers of Hugging Face directories: `tokenizer.json`, or SentencePiece `tokenizer.model`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_bytes, read_json
from .backends import HuggingFaceBackend, SentencePieceBackend, load_tokenizer_json, parse_model

Found = tuple[HuggingFaceBackend | SentencePieceBackend, int | None, list[int]]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NAMED_LISTS = ("additional_special_tokens", "extra_special_tokens")


def backend_from_directory(folder: Path) -> Found | None:
    """Return backend, first-token id and end-token ids; None if there is no tokenizer file."""
    settings = read_json(folder / "special_tokens_map.json")
    settings |= read_json(folder / "tokenizer_config.json")
    for name, read in (
        ("tokenizer.json", backend_from_json),
        ("tokenizer.model", backend_from_sentencepiece),
    ):
        path = folder / name
        if path.is_file():
            added = read_json(folder / "added_tokens.json")
            data = read_bytes(path)
            try:
                return read(data, settings | {"added_tokens": added})
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
    return None


def backend_from_json(data: bytes, settings: Mapping[str, Any]) -> Found:
    """Read a `tokenizer.json` with the settings of `tokenizer_config.json`.

    What is put before and after a text is said in `tokenizer.json`; like transformers 5 we do not
    let `add_bos_token` change it.
    """
    from tokenizers import AddedToken

    tokenizer = load_tokenizer_json(data)
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text, (token_id, special) in sorted(_added_tokens(settings).items(), key=lambda i: i[1]):
        if text not in present:  # those the file has keep their own flags
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
            present.add(text)
        if tokenizer.token_to_id(text) != token_id:
            raise CheckpointError(
                f"added token {text!r} must have id {token_id}, got {tokenizer.token_to_id(text)}"
            )
    named = {text: tokenizer.token_to_id(text) for text in _named_tokens(settings)}
    special = [t for t, token_id in named.items() if token_id is not None and t not in present]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    bos, eos = _token_id(settings, "bos_token", named), _token_id(settings, "eos_token", named)
    return HuggingFaceBackend(tokenizer), bos, [] if eos is None else [eos]


def backend_from_sentencepiece(model: bytes, settings: Mapping[str, Any]) -> Found:
    """Read a SentencePiece model; where the settings are silent, those of Llama hold."""
    pieces = {piece.piece: (i, piece.type) for i, piece in enumerate(parse_model(model).pieces)}
    texts = {text: i for text, (i, kind) in pieces.items() if kind in (2, 3)}  # unknown, control
    special = set(texts.values())
    for text, (token_id, is_special) in _added_tokens(settings).items():
        texts[text] = token_id
        if is_special:
            special.add(token_id)
    for text in _named_tokens(settings):
        if text in pieces:
            texts.setdefault(text, pieces[text][0])
        if text in texts:
            special.add(texts[text])
    defaults = {"bos_token": "<s>", "eos_token": "</s>"}
    bos = _token_id(defaults | dict(settings), "bos_token", texts)
    eos = _token_id(defaults | dict(settings), "eos_token", texts)
    backend = SentencePieceBackend(
        model,
        added=texts,
        special_ids=special,
        prefix=[bos] if bos is not None and settings.get("add_bos_token", True) else [],
        suffix=[eos] if eos is not None and settings.get("add_eos_token", False) else [],
        space_after_special=bool(settings.get("legacy", False)),
    )
    return backend, bos, [] if eos is None else [eos]


def _text(token: Any) -> str | None:
    """A token is written as its text, or as an object with its text and how it is matched."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(settings: Mapping[str, Any]) -> list[str]:
    tokens = [settings.get(name) for name in NAMED]
    for name in NAMED_LISTS:
        value = settings.get(name)
        value = list(value.values()) if isinstance(value, dict) else value
        tokens += value if isinstance(value, list) else []
    return [text for text in map(_text, tokens) if text]


def _token_id(settings: Mapping[str, Any], name: str, ids: Mapping[str, int]) -> int | None:
    return ids.get(_text(settings.get(name)) or "")


def _added_tokens(settings: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Return text -> (id, whether special) of `added_tokens.json` and `added_tokens_decoder`."""
    found: dict[str, tuple[int, bool]] = {}
    try:
        for text, token_id in (settings.get("added_tokens") or {}).items():
            found[text] = (int(token_id), False)
        for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
            found[token["content"]] = (int(token_id), bool(token.get("special")))
        if min((token_id for token_id, _ in found.values()), default=0) < 0:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError("added_tokens must map each token's text to its id") from None
    return found
