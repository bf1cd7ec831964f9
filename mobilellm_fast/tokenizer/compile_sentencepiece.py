"""What the table of a SentencePiece model holds: BPE with bytes for unknown characters."""

from __future__ import annotations

from . import table
from .backends import SentencePieceBackend, parse_model
from .table import NONE, Contents, check_size, require, unmarked

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces


def sentencepiece_contents(backend: SentencePieceBackend) -> Contents:
    """Return the contents for a SentencePiece model and the tokens around it.

    Raises:
        Unsupported: it is not of this family.
    """
    proto = parse_model(backend.vocabulary())
    options = backend.options()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    require(trainer.model_type == trainer.BPE and trainer.byte_fallback, "not a BPE with bytes")
    require(not trainer.treat_whitespace_as_suffix, "spaces behind words")
    require(not normalizer.precompiled_charsmap, "a normalizer")
    require(not normalizer.remove_extra_whitespaces, "removal of spaces")
    require(normalizer.escape_whitespaces, "spaces as they are")
    kinds = {piece.type for piece in proto.pieces}
    require(kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE}, "user-defined or unused pieces")
    check_size(backend.vocab_size, len(proto.pieces) + len(options["added"]))

    tokens, lookup, scores, byte_ids = {}, {}, {}, [NONE] * 256
    for i, piece in enumerate(proto.pieces):
        scores[i] = piece.score
        tokens[i] = unmarked(piece.piece)
        if piece.type == BYTE:
            byte = int(piece.piece[1:-1], 16)
            tokens[i], byte_ids[byte] = bytes([byte]), i
        elif piece.type == NORMAL:
            if piece.piece and " " not in piece.piece:
                require(lookup.setdefault(tokens[i], i) == i, "a piece twice")
        else:  # a text becomes one of these by another way than merging
            require(len(piece.piece) > 1, "a control character")
    require(NONE not in byte_ids, "a byte without a token")
    # Lookups compare with what a token decodes to.
    added: dict[str, int] = options["added"]
    require(not set(added.values()) & set(lookup.values()), "an added token that is a piece")
    tokens |= {i: text.encode() for text, i in added.items()}
    require(all(added), "an added token without text")

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
