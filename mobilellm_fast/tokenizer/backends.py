"""What does the work, behind one interface: two libraries, and a compiled table."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import CheckpointError, MobileLLMError
from ..files import brief

TABLE_MAGIC = b"MLFTOKEN"  # begins a compiled table
SPACE = "\u2581"  # how SentencePiece writes a space


class Backend(Protocol):
    """What `Tokenizer` needs; `vocabulary` and `options` are what `load` takes back."""

    name: str
    vocab_size: int
    special_ids: frozenset[int]

    @classmethod
    def load(cls, vocabulary: bytes, **options: Any) -> "Backend": ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def vocabulary(self) -> bytes: ...

    def options(self) -> dict[str, Any]: ...


class HuggingFaceBackend:
    """A tokenizer of the `tokenizers` library, as `tokenizer.json` describes it.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prefix: ids put before a text, and `suffix` those put after it, beside what the
            tokenizer's own post-processor adds.
    """

    name = "tokenizers"

    def __init__(self, tokenizer, prefix: Iterable[int] = (), suffix: Iterable[int] = ()) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._prefix, self._suffix = list(prefix), list(suffix)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def load(cls, vocabulary: bytes, **options: Any) -> "HuggingFaceBackend":
        return cls(load_tokenizer_json(vocabulary), **options)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def vocabulary(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def options(self) -> dict[str, Any]:
        return {"prefix": self._prefix, "suffix": self._suffix}

    def settings(self, bos_token_id: int | None, eos_token_ids: Iterable[int]) -> dict[str, Any]:
        """Return the `tokenizer_config.json` of this tokenizer."""
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        ends = [*eos_token_ids, None]
        for name, token_id in (("bos_token", bos_token_id), ("eos_token", ends[0])):
            if token_id is not None:
                settings[name] = self._tokenizer.id_to_token(token_id)
        return settings


def load_tokenizer_json(data: bytes):
    """Read a `tokenizer.json` into a `tokenizers.Tokenizer`."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"not a readable tokenizer.json ({brief(error)})") from None


class SentencePieceBackend:
    """A SentencePiece model, and around it the special tokens, as in Hugging Face's Llama.

    Args:
        model: a serialized `ModelProto`.
        added: further tokens, text to id; each is found in a text before SentencePiece sees it.
        special_ids: the control tokens, those of the model included.
        prefix: ids put before a text, and `suffix` those put after it.
        space_after_special: whether text that follows a special token gets SentencePiece's
            leading space too (`legacy` in `tokenizer_config.json`), or only the text's beginning.
    """

    name = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        *,
        added: Mapping[str, int],
        special_ids: Iterable[int],
        prefix: Iterable[int] = (),
        suffix: Iterable[int] = (),
        space_after_special: bool = False,
    ) -> None:
        self._model = model
        self._added = dict(added)
        self.special_ids = frozenset(special_ids)
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._space_after_special = space_after_special

        proto = parse_model(model)
        self._adds_space = proto.normalizer_spec.add_dummy_prefix
        self._processor = self._bare_processor = _processor(proto)
        if self._adds_space and not space_after_special:
            proto.normalizer_spec.add_dummy_prefix = False
            self._bare_processor = _processor(proto)

        self.vocab_size = 1 + max([len(proto.pieces) - 1, *self._added.values()])
        self._bytes = {i: _piece_bytes(piece) for i, piece in enumerate(proto.pieces)}
        self._bytes |= {token_id: text.encode() for text, token_id in self._added.items()}
        # The longest first: where one token begins another, the longer one is meant.
        texts = sorted(self._added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    @classmethod
    def load(cls, vocabulary: bytes, **options: Any) -> "SentencePieceBackend":
        return cls(vocabulary, **options)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        # Splitting at a group leaves the tokens at the odd places, the text between at the even.
        for i, part in enumerate(self._split.split(text) if self._split else [text]):
            if i % 2:
                ids.append(self._added[part])
            elif part:
                processor = self._processor if i == 0 else self._bare_processor
                ids += processor.encode(part, out_type=int)
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else ()
        shown = b"".join(self._bytes.get(i, b"") for i in ids if i not in skipped)
        text = shown.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._adds_space else text

    def vocabulary(self) -> bytes:
        return self._model

    def options(self) -> dict[str, Any]:
        return {
            "added": self._added,
            "special_ids": sorted(self.special_ids),
            "prefix": self._prefix,
            "suffix": self._suffix,
            "space_after_special": self._space_after_special,
        }


def parse_model(model: bytes):
    """Read a serialized SentencePiece model into a `ModelProto`."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError:
        raise CheckpointError("not a readable SentencePiece model") from None
    if not all(isinstance(piece.piece, str) for piece in proto.pieces):
        raise CheckpointError("not a usable SentencePiece model (a piece is not UTF-8)")
    return proto


def _processor(proto):
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (RuntimeError, ValueError) as error:  # a ValueError where its message is not UTF-8
        raise CheckpointError(f"not a usable SentencePiece model ({brief(error)})") from None


def _piece_bytes(piece) -> bytes:
    if piece.type == piece.BYTE:  # written "<0x0A>", which the library has checked
        return bytes([int(piece.piece[1:-1], 16)])
    return piece.piece.replace(SPACE, " ").encode()


class CompiledBackend:
    """A tokenizer that was compiled into a table, see `compiled.py`. No library is imported.

    Args:
        table: its bytes, read where they lie: they must not change.

    Raises:
        ValueError: the bytes are no such table.
    """

    name = "compiled"

    def __init__(self, table) -> None:
        from .._C import Tokenizer

        self._table = table
        self._tokenizer = Tokenizer(table)
        self.vocab_size: int = self._tokenizer.vocab_size
        self.special_ids = frozenset(self._tokenizer.special_ids)
        self.bos_token_id: int | None = self._tokenizer.bos_id
        self.eos_token_ids: tuple[int, ...] = tuple(self._tokenizer.eos_ids)

    @classmethod
    def load(cls, vocabulary: bytes, **options: Any) -> "CompiledBackend":
        return cls(vocabulary, **options)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens)
        except ValueError as error:  # too long
            raise MobileLLMError(f"[encode] {error}") from None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens)

    def detokenizer(self, context: Sequence[int]):
        """Return what `text_stream.Detokenizer` is, in C++."""
        from .._C import Detokenizer

        return Detokenizer(self._tokenizer, list(context))

    def vocabulary(self) -> bytes:
        return bytes(self._table)

    def options(self) -> dict[str, Any]:
        return {}

    def __reduce__(self):
        return CompiledBackend, (self.vocabulary(),)


BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (HuggingFaceBackend, SentencePieceBackend)
}
