"""Which models the GPU benchmark runs, and where."""

from dataclasses import replace

import torch

from mobilellm_fast.config import MobileLLMConfig

CONTEXT = 4096  # of every model: more than the published 2048, so that decoding can follow 2048


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def shape(preset: str, dry: bool) -> MobileLLMConfig:
    """Return a preset such as "125M", "125M-shared" (each block runs twice) or "125M-unshared".

    The last has twice as many blocks, each its own: the same work as the shared one.

    Args:
        preset: the name.
        dry: shrink everything, so that a CPU runs it in milliseconds.
    """
    size, _, kind = preset.partition("-")
    config = MobileLLMConfig.preset(f"MobileLLM-{size}")
    if dry:
        config = replace(
            config,
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
        )
    if kind == "shared":
        config = replace(config, layer_sharing="immediate")
    elif kind == "unshared":
        config = replace(config, num_hidden_layers=2 * config.num_hidden_layers)
    return replace(config, max_position_embeddings=CONTEXT, eos_token_id=None)


def nbytes_per_token(config: MobileLLMConfig, kind: str, context: int) -> int:
    """Count the bytes that a decode step must read at least: weights, head and keys and values.

    Blocks that run several times count once; one row of the embedding counts as nothing. int8 has
    one float32 scale per output, which does not count; int4 has a scale and a minimum of 16 bits
    per 32 inputs, and an int8 head. Keys and values have 16 bits.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    width, kv_width = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    block = (2 * width + 2 * kv_width + 3 * inner) * hidden
    bits, head_bits = {"bf16": (16, 16), "int8": (8, 8), "int4": (5, 8)}[kind]
    weights = config.num_hidden_layers * block * bits + config.vocab_size * hidden * head_bits
    return weights // 8 + len(config.schedule) * 2 * kv_width * context * 2
