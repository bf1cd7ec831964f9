"""Tiny models as others publish them, Hugging Face directories and GGUF files, and reading them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("gguf")
import gguf

from mobilellm_fast.checkpoint import open_checkpoint
from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.errors import CheckpointError
from mobilellm_fast.quant import QuantizedTensor

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_directory(
    folder: Path,
    config: MobileLLMConfig,
    weights: dict[str, np.ndarray],
    *,
    dtype: str = "float32",
    pickled: bool = False,
    shards: int = 1,
    **changes,
) -> Path:
    """Write config.json and weights; `changes` are made to the configuration's JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_hf() | changes)
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    save = torch.save if pickled else save_file
    tensors = {n: torch.tensor(v).to(getattr(torch, dtype)) for n, v in weights.items()}
    if shards == 1:
        save(tensors, folder / f"{stem}{suffix}")
        return folder
    names = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save({t: tensors[t] for t, file in weight_map.items() if file == name}, folder / name)
    write_json(folder / f"{stem}{suffix}.index.json", {"weight_map": weight_map})
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.weight"
    block, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{block}.{GGUF_NAMES[rest]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's reordering of query and key rows: the two halves of a head interleaved."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    config: MobileLLMConfig,
    weights: dict[str, np.ndarray],
    *,
    matrices: str = "F32",
    tensors: dict[str, np.ndarray] | None = None,
    metadata: dict[str, object] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does.

    Args:
        matrices: type of all matrices; vectors are F32.
        tensors: further tensors, or replacements, under their GGUF names: float32, or a pair of
            type name and raw bytes (rows, bytes per row).
        metadata: further keys, or replacements; None removes a key.
    """
    fields = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (fields | (metadata or {})).items():
        add_field(writer, key, value)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    stored: dict[str, object] = {}
    for name, value in weights.items():
        name = gguf_name(name)
        short = name.split(".")[-2]
        stored[name] = permute(value, heads[short]) if short in heads else value
    for name, value in (stored | (tensors or {})).items():
        if isinstance(value, tuple):
            kind = gguf.GGMLQuantizationType[value[0]]
            writer.add_tensor(name, value[1], raw_dtype=kind)
        elif value.ndim == 1 or matrices == "F32":
            writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
        else:
            kind = gguf.GGMLQuantizationType[matrices]
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, np.ndarray):
        writer.add_array(key, value.tolist())
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut a file short, or change one to four of its bytes, more often near its beginning."""
    if rng.random() < 0.25:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        end = len(data) if rng.random() < 0.5 else min(len(data), 2000)
        changed[rng.integers(end)] = rng.integers(256)
    return bytes(changed)


def read_all(source, **arguments) -> dict[str, np.ndarray | QuantizedTensor]:
    checkpoint = open_checkpoint(source, **arguments)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def values_of(tensor: np.ndarray | QuantizedTensor) -> np.ndarray:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def error_of(source, **arguments) -> str:
    """Open and read a source that must be refused; return the one line that says why."""
    with pytest.raises(CheckpointError) as error:
        read_all(source, **arguments)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def assert_same(got: dict, want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        read = values_of(got[name])
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, values, err_msg=name)
