"""Opens `.gguf` files of the "llama" architecture as llama.cpp's converter writes them."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MobileLLMConfig
from ..errors import CheckpointError, MobileLLMError
from ..files import brief
from ..quant import QuantizedTensor
from ..rope import inverse_frequencies
from ..tokenizer import Tokenizer, end_token_ids
from .checkpoint import Checkpoint, StoredTensor
from .gguf_blocks import can_decode, read_gguf_tensor, stored_dtype
from .gguf_file import GGUFFile, Metadata, read_gguf

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"  # how llama.cpp stores "llama3" scaling
IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # rotary frequencies in old files
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Metadata `llama.<key>` that does not change the computation, or is read below.
KNOWN_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
# Any other key is refused unless it has the value that leaves the computation as it is.
NEUTRAL = {
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1,
    "rope.scaling.attn_factor": 1,
}


def open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """Open a GGUF file.

    Raises:
        CheckpointError: the file is damaged, or says something that is not implemented.
    """
    file = read_gguf(path)
    metadata = file.metadata
    try:
        config = _config(file)
        parts = {
            "tensors": _tensors(file, config),
            "tokenizer": _tokenizer(metadata),
            "chat_template": metadata.typed("tokenizer.chat_template", str),
        }
    except MobileLLMError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(name=name or path.stem, path=path, config=config, **parts)


def _tokenizer(metadata: Metadata) -> Tokenizer | None:
    kind = metadata.typed("tokenizer.ggml.model", str, "none")
    return None if kind in ("none", "no_vocab") else Tokenizer.from_gguf(metadata)


def _config(file: GGUFFile) -> MobileLLMConfig:
    metadata = file.metadata
    architecture = metadata.typed("general.architecture", str)
    if architecture != ARCHITECTURE:
        got = brief(architecture)
        raise CheckpointError(f"general.architecture must be {ARCHITECTURE!r}, got {got}")
    if metadata.typed("split.count", int, 0) > 1:
        raise CheckpointError("split.count: a model split over several files is not supported")
    _refuse_unsupported(metadata)

    def integer(key: str, default: int | None = None) -> int:
        value = metadata.typed(f"llama.{key}", int, default)
        if value is None or value < 1:
            raise CheckpointError(f"llama.{key} must be a positive integer, got {value}")
        return value

    def same(key: str, value: int, what: str) -> int:
        if integer(key, value) != value:
            raise CheckpointError(f"llama.{key} must equal {what} ({value}), got {integer(key)}")
        return value

    end_ids = end_token_ids(metadata)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("tensor token_embd.weight is missing")
    heads, hidden_size = integer("attention.head_count"), integer("embedding_length")
    head_dim = integer("attention.key_length", hidden_size // heads)
    same("attention.value_length", head_dim, "the head size")
    same("rope.dimension_count", head_dim, "the head size")
    config = MobileLLMConfig(
        vocab_size=same("vocab_size", embedding.shape[0], "the rows of token_embd.weight"),
        hidden_size=hidden_size,
        intermediate_size=integer("feed_forward_length"),
        num_hidden_layers=integer("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=integer("context_length"),
        rms_norm_eps=metadata.typed("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=metadata.typed("llama.rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(metadata),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=metadata.typed("tokenizer.ggml.bos_token_id", int),
        eos_token_id=end_ids if len(end_ids) > 1 else next(iter(end_ids), None),
    )
    return _llama3(file, config) if ROPE_FACTORS in file.tensors else config


def _refuse_unsupported(metadata: Metadata) -> None:
    for key, value in metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != ARCHITECTURE or name in KNOWN_KEYS:
            continue
        if name not in NEUTRAL or metadata.typed(key, float) != NEUTRAL[name]:
            raise CheckpointError(f"{key} = {brief(value)} is not supported")


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    # Old files state a linear scale and no type.
    factor = metadata.typed("llama.rope.scale_linear", float, 1.0)
    factor = metadata.typed("llama.rope.scaling.factor", float, factor)
    default = "none" if factor in (0, 1) else "linear"
    kind = metadata.typed("llama.rope.scaling.type", str, default)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"llama.rope.scaling.type = {brief(kind)} is not supported")
    return {"rope_type": "linear", "factor": factor} if kind == "linear" else None


def _llama3(file: GGUFFile, config: MobileLLMConfig) -> MobileLLMConfig:
    """Recognise "llama3" scaling by the divisors of the rotary frequencies that it results in."""
    tensor = file.tensors[ROPE_FACTORS]
    divisors = read_gguf_tensor(file.path, tensor)
    plain = inverse_frequencies(config)
    if config.rope_scaling or tensor.type != "F32" or divisors.shape != plain.shape:
        raise CheckpointError(f"{ROPE_FACTORS} has an unsupported form")
    # The file does not say how they came about; these are the values of every published model.
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = replace(config, rope_scaling=scaling)
    if not np.allclose(plain / inverse_frequencies(scaled), divisors, rtol=1e-5, atol=0):
        raise CheckpointError(f"{ROPE_FACTORS} does not hold the divisors of 'llama3' scaling")
    return scaled


def _tensors(file: GGUFFile, config: MobileLLMConfig) -> dict[str, StoredTensor]:
    tensors = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS or IGNORED.fullmatch(name):
            continue
        if not can_decode(tensor.type):
            raise CheckpointError(f"tensor {name} is of type {tensor.type}, which holds no weights")
        read = partial(read_gguf_tensor, file.path, tensor)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        short = name.removesuffix(".weight").rpartition(".")[2]
        if short in heads:
            read = partial(_unpermuted, read, heads[short])
        tensors[_hugging_face_name(name)] = StoredTensor(tensor.shape, stored_dtype(tensor), read)
    return tensors


def _hugging_face_name(name: str) -> str:
    """Translate a tensor's name; one we do not know stays as it is, and is refused under it."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.weight", name)
    if not match or match[2] not in NAMES:
        return name
    block, translated = match[1], NAMES[match[2]]
    in_block = match[2].startswith(("attn_", "ffn_"))
    if in_block != (block is not None):
        return name
    return f"model.layers.{block}.{translated}.weight" if in_block else f"{translated}.weight"


def _unpermuted(read, heads: int) -> np.ndarray | QuantizedTensor:
    """Undo llama.cpp's reordering of query and key rows.

    Its rotation pairs neighbours (0, 1), Hugging Face's pairs halves (0, head_dim / 2), so the
    converter wrote row 0 of the first half, row 0 of the second, row 1 of the first, ...
    """
    value = read()
    rows = value.shape[0]
    index = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return value.take_rows(index) if isinstance(value, QuantizedTensor) else value[index]
