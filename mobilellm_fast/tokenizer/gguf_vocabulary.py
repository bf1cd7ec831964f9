"""Rebuilds a tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

import numpy as np

from ..errors import CheckpointError
from ..files import brief
from .backends import HuggingFaceBackend, SentencePieceBackend

# token_type; SentencePiece numbers its pieces' types alike
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
)
DIGIT = r"\p{N}"

# How a text is cut into words before merging: by each expression in turn, for these values of
# tokenizer.ggml.pre.
SPLITS = {
    name: splits
    for splits, names in (
        ((GPT2,), "default gpt-2 mpt olmo phi-2 trillion"),
        ((DIGIT, GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
        ((LLAMA3,), "llama3 llama-v3 llama-bpe falcon3 pixtral dbrx smaug-bpe"),
        ((QWEN2,), "qwen2 stablelm2 deepseek-r1-qwen"),
        ((TEKKEN,), "tekken"),
    )
    for name in names.split()
}
# These take a word that is in the vocabulary as it is, and begin a text with the first token.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}


def backend_from_metadata(metadata) -> tuple[HuggingFaceBackend | SentencePieceBackend, int | None]:
    """Return backend and first-token id.

    Args:
        metadata: a `checkpoint.gguf_file.Metadata`.
    """
    kind = metadata.typed("tokenizer.ggml.model", str)
    if kind not in KINDS:
        raise CheckpointError(
            f"tokenizer.ggml.model must be one of {', '.join(KINDS)}, got {brief(kind)}"
        )
    backend = KINDS[kind](metadata, _tokens(metadata), _token_types(metadata))
    return backend, metadata.typed("tokenizer.ggml.bos_token_id", int)


def end_token_ids(metadata) -> tuple[int, ...]:
    """Return the ids that end a text (eos), a turn (eot) or a message (eom), as far as given."""
    ids = [metadata.typed(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _tokens(metadata) -> list[str]:
    tokens = metadata.typed("tokenizer.ggml.tokens", list)
    if not tokens:
        raise CheckpointError("tokenizer.ggml.tokens is missing or empty")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds a token twice")
    return tokens


def _token_types(metadata) -> list[int]:
    count = len(metadata["tokenizer.ggml.tokens"])
    return _numbers(metadata, "tokenizer.ggml.token_type", [NORMAL] * count)


def _numbers(metadata, key: str, default: list | None = None) -> list:
    """Return one number per token."""
    values = metadata.typed(key, np.ndarray)
    if values is None and default is not None:
        return default
    count = len(metadata["tokenizer.ggml.tokens"])
    if values is None or len(values) != count:
        got = "none" if values is None else len(values)
        raise CheckpointError(f"{key} must have a number for each of {count} tokens, got {got}")
    if not np.isfinite(values).all():
        raise CheckpointError(f"{key} must be finite, got NaN or infinity")
    return values.tolist()


def _added_ids(metadata, add_bos: bool) -> tuple[list[int], list[int]]:
    """Return the ids to put before and after a text; `add_bos` is what holds if nothing is said."""
    bos = metadata.typed("tokenizer.ggml.bos_token_id", int)
    eos = metadata.typed("tokenizer.ggml.eos_token_id", int)
    count = len(metadata["tokenizer.ggml.tokens"])
    for token_id in (bos, eos):
        if token_id is not None and not 0 <= token_id < count:
            raise CheckpointError(f"special token id {token_id} is not one of {count} tokens")
    add_bos = metadata.typed("tokenizer.ggml.add_bos_token", bool, add_bos)
    add_eos = metadata.typed("tokenizer.ggml.add_eos_token", bool, False)
    return (
        [bos] if add_bos and bos is not None else [],
        [eos] if add_eos and eos is not None else [],
    )


def _byte_level(metadata, tokens: list[str], types: list[int]) -> HuggingFaceBackend:
    """Byte-level BPE, as GPT-2 brought it up: merges over bytes written as visible characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    name = metadata.typed("tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre = {brief(name)} is not supported")
    merges = metadata.typed("tokenizer.ggml.merges", list)
    if merges is None:
        raise CheckpointError("tokenizer.ggml.merges is missing")
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=name in WHOLE_WORDS,
        )
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"tokenizer.ggml.merges: {brief(error)}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for add, kind in (
        (tokenizer.add_special_tokens, CONTROL),
        (tokenizer.add_tokens, USER_DEFINED),
    ):
        texts = [token for token, type_ in zip(tokens, types, strict=True) if type_ == kind]
        add([AddedToken(text, special=kind == CONTROL, normalized=False) for text in texts if text])
    prefix, suffix = _added_ids(metadata, add_bos=name in WHOLE_WORDS)
    return HuggingFaceBackend(tokenizer, prefix, suffix)


def _sentencepiece(metadata, tokens: list[str], types: list[int]) -> SentencePieceBackend:
    """SentencePiece BPE as in the first Llama: the metadata is its model file, spread out."""
    from sentencepiece import sentencepiece_model_pb2

    if metadata.get("tokenizer.ggml.precompiled_charsmap") is not None:
        raise CheckpointError("tokenizer.ggml.precompiled_charsmap is not supported")
    scores = _numbers(metadata, "tokenizer.ggml.scores")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        for token, score, kind in zip(tokens, scores, types, strict=True):
            proto.pieces.add(piece=token, score=score, type=kind)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"tokenizer.ggml.token_type or scores: {brief(error)}") from None
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = any(piece.type == piece.BYTE for piece in proto.pieces)
    if UNKNOWN in types:
        proto.trainer_spec.unk_piece = tokens[types.index(UNKNOWN)]
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.typed("tokenizer.ggml.add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = metadata.typed(
        "tokenizer.ggml.remove_extra_whitespaces", bool, False
    )
    special = [i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)]
    prefix, suffix = _added_ids(metadata, add_bos=True)
    return SentencePieceBackend(
        proto.SerializeToString(),
        added={tokens[i]: i for i in special if tokens[i]},
        special_ids=special,
        prefix=prefix,
        suffix=suffix,
    )


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
