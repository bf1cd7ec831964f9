"""Text to token ids and back, whatever form the model's tokenizer comes in."""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MobileLLMError
from ..files import brief, read_bytes
from .backends import BACKENDS, TABLE_MAGIC, Backend, CompiledBackend, HuggingFaceBackend
from .gguf_vocabulary import backend_from_metadata, end_token_ids
from .huggingface import backend_from_directory, backend_from_json, backend_from_sentencepiece

__all__ = ["OWN_FILE", "Tokenizer", "end_token_ids"]

OWN_FILE = "tokenizer.mlf"  # of a tokenizer that is none of the `tokenizers` library
UNKNOWN = "unknown"  # whether there is a table


class Tokenizer:
    """Turn text into token ids and back.

    Attributes:
        vocab_size: one more than the largest id.
        bos_token_id: id of the token that begins a text, or None.
        eos_token_ids: ids of the tokens that end a text or an answer; may be empty.
        special_ids: ids of the control tokens, which `decode` leaves out by default.
    """

    def __init__(
        self,
        backend: Backend,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.vocab_size: int = backend.vocab_size
        self.special_ids: frozenset[int] = backend.special_ids
        self._table: bytes | str | None = UNKNOWN

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        The text of a special token, such as "<|im_start|>", becomes that token.

        Args:
            text: any valid Unicode.
            add_special_tokens: whether to add what the model expects around a text; for most
                models its first token, for some nothing.

        Raises:
            MobileLLMError: `text` is not a string, or has lone surrogates.
        """
        if not isinstance(text, str):
            raise MobileLLMError(f"[encode] text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MobileLLMError(
                f"[encode] text must be valid Unicode, got a lone surrogate at {error.start}"
            ) from None
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Ids beyond the vocabulary, which a model with padded rows can produce, have no text.

        Raises:
            MobileLLMError: an id is not an integer, or is negative.
        """
        if not isinstance(ids, Iterable):
            raise MobileLLMError(f"[decode] ids must be integers from 0, got {ids!r}")
        known = []
        for token_id in ids:
            try:
                index = operator.index(token_id)
            except TypeError:
                index = -1
            if index < 0:
                raise MobileLLMError(f"[decode] ids must be integers from 0, got {token_id!r}")
            if index < self.vocab_size:
                known.append(index)
        return self._backend.decode(known, skip_special_tokens)

    def detokenizer(self, context: Sequence[int] = ()):
        """Return `text_stream.Detokenizer`'s twin in C++, or None where a library decodes.

        Args:
            context: tokens that the text continues.
        """
        make = getattr(self._backend, "detokenizer", None)
        return make(context) if make else None

    @classmethod
    def from_directory(
        cls, folder: str | Path, eos_token_ids: Iterable[int] = ()
    ) -> "Tokenizer | None":
        """Read the tokenizer of a Hugging Face directory, or return None if it has none.

        Args:
            folder: has `tokenizer.json` or `tokenizer.model`, and maybe `tokenizer_config.json`; or
                the file of ours that `save` writes.
            eos_token_ids: further ids that end a text, from the model's configuration.

        Raises:
            CheckpointError: a file is damaged or asks for what is not supported.
        """
        own = Path(folder) / OWN_FILE
        if own.is_file():
            try:
                return cls.deserialize(read_bytes(own))
            except MobileLLMError as error:
                raise CheckpointError(f"{own}: {error}") from None
        found = backend_from_directory(Path(folder))
        if found is None:
            return None
        backend, bos, eos = found
        return cls(backend, bos, (*eos, *eos_token_ids))

    def save(self, folder: Path) -> None:
        """Write the tokenizer for `from_directory`.

        One of the `tokenizers` library becomes the files of transformers; any other, a file of ours
        that only `from_directory` reads.

        Raises:
            OSError: a file cannot be written.
        """
        backend = self._backend
        if isinstance(backend, HuggingFaceBackend) and not any(backend.options().values()):
            (folder / "tokenizer.json").write_bytes(backend.vocabulary())
            settings = backend.settings(self.bos_token_id, self.eos_token_ids)
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        else:
            (folder / OWN_FILE).write_bytes(self.serialize())

    @classmethod
    def from_tokenizer_json(
        cls, path: str | Path, settings: Mapping[str, Any] | None = None
    ) -> "Tokenizer":
        """Read a `tokenizer.json`; `settings` is the content of `tokenizer_config.json`."""
        backend, bos, eos = backend_from_json(read_bytes(Path(path)), settings or {})
        return cls(backend, bos, eos)

    @classmethod
    def from_sentencepiece(
        cls, model: str | Path | bytes, settings: Mapping[str, Any] | None = None
    ) -> "Tokenizer":
        """Read a SentencePiece model, its path or its bytes; `settings` as above."""
        data = model if isinstance(model, bytes) else read_bytes(Path(model))
        backend, bos, eos = backend_from_sentencepiece(data, settings or {})
        return cls(backend, bos, eos)

    @classmethod
    def from_gguf(cls, metadata) -> "Tokenizer":
        """Rebuild the tokenizer that a GGUF file's `tokenizer.ggml.*` metadata describes.

        Raises:
            CheckpointError: a needed key is missing or wrong, or its kind is not supported.
        """
        backend, bos = backend_from_metadata(metadata)
        return cls(backend, bos, end_token_ids(metadata))

    @property
    def implementation(self) -> str:
        """What does the work: "compiled", or the library "tokenizers" or "sentencepiece"."""
        return self._backend.name

    def compile(self) -> bytes | None:
        """Return the tokenizer as a table that needs no library, for `deserialize`.

        The table gave the library's ids and texts for all of many probes. None if the tokenizer
        is not of a family that can be compiled, or if anything differed. The work is done once.
        """
        if isinstance(self._backend, CompiledBackend):
            return self._backend.vocabulary()
        if self._table is UNKNOWN:
            from .compiled import compile_backend

            self._table = compile_backend(self._backend, self.bos_token_id, self.eos_token_ids)
        return self._table

    def serialize(self) -> bytes:
        """Return the tokenizer as bytes: a table, or one line of JSON, then the vocabulary."""
        if isinstance(self._backend, CompiledBackend):
            return self._backend.vocabulary()
        head = {
            "backend": self._backend.name,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
            "options": self._backend.options(),
        }
        return json.dumps(head).encode() + b"\n" + self._backend.vocabulary()

    @classmethod
    def deserialize(cls, data) -> "Tokenizer":
        """Undo `serialize` or `compile`.

        Args:
            data: the bytes; those of a table are read where they lie, and must not change.

        Raises:
            MobileLLMError: the bytes are neither.
        """
        try:
            if bytes(data[: len(TABLE_MAGIC)]) == TABLE_MAGIC:
                compiled = CompiledBackend(data)
                return cls(compiled, compiled.bos_token_id, compiled.eos_token_ids)
            head, _, vocabulary = bytes(data).partition(b"\n")
            fields = json.loads(head)
            backend = BACKENDS[fields["backend"]].load(vocabulary, **fields["options"])
            return cls(backend, fields["bos_token_id"], fields["eos_token_ids"])
        except (ValueError, KeyError, TypeError) as error:
            text = f"[tokenizer] not a serialized tokenizer ({brief(error)})"
            raise MobileLLMError(text) from None
