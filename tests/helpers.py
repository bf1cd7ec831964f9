"""Tiny random models, and the same models in transformers: the oracle of the tests."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mobilellm_fast.config import MobileLLMConfig, expected_shapes
from mobilellm_fast.engine import Engine
from mobilellm_fast.executor import Executor
from mobilellm_fast.quant import PackedWeight, kind_of, pack

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_config(**changes) -> MobileLLMConfig:
    """A model of 2 blocks that computes in milliseconds but has every feature of a large one."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return MobileLLMConfig(**fields | changes)


# Shapes that divide by nothing, every GQA ratio up to 8, tied and untied, all kinds of RoPE.
# transformers wants hidden_size to be a multiple of the heads even where head_dim is given.
MODEL_CONFIGS = {
    "plain": tiny_config(),
    "one_head": tiny_config(hidden_size=34, num_attention_heads=1, num_key_value_heads=1),
    "no_gqa": tiny_config(num_key_value_heads=6),
    "gqa2": tiny_config(hidden_size=40, num_attention_heads=4, num_key_value_heads=2),
    "gqa4": tiny_config(hidden_size=64, num_attention_heads=8, num_key_value_heads=2),
    "gqa5": tiny_config(hidden_size=50, num_attention_heads=5, num_key_value_heads=1),
    "gqa6": tiny_config(hidden_size=60, num_attention_heads=6, num_key_value_heads=1),
    "gqa7": tiny_config(hidden_size=70, num_attention_heads=7, num_key_value_heads=1),
    "gqa8": tiny_config(hidden_size=64, num_attention_heads=16, num_key_value_heads=2),
    "odd_width": tiny_config(
        hidden_size=51, num_attention_heads=3, num_key_value_heads=1, head_dim=14
    ),
    "odd_inner": tiny_config(intermediate_size=83, vocab_size=101),
    "odd_everything": tiny_config(
        hidden_size=45,
        intermediate_size=121,
        vocab_size=131,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=6,
    ),
    "wide_heads": tiny_config(head_dim=32),
    "narrow_heads": tiny_config(head_dim=2),
    "untied": tiny_config(tie_word_embeddings=False),
    "untied_gqa5": tiny_config(
        hidden_size=80, num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=False
    ),
    "theta_500000": tiny_config(rope_theta=500000.0),
    "theta_odd": tiny_config(rope_theta=12345.678, head_dim=10),
    "eps": tiny_config(rms_norm_eps=1e-2),
    "rope_linear": tiny_config(rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "rope_dynamic": tiny_config(
        max_position_embeddings=24, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
    "rope_llama3": tiny_config(rope_scaling=LLAMA3_SCALING, head_dim=32),
    "deep": tiny_config(num_hidden_layers=7),
    "head_125m": tiny_config(hidden_size=192, num_attention_heads=3, num_key_value_heads=1),
}

SHARING = ("immediate", "repeat_all", "reverse")


def random_weights(config: MobileLLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights under which every part of the model matters.

    Variance is kept from layer to layer and attention is far from uniform; the usual
    initialisation (0.02) would leave a model that is almost its embedding.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif name == "model.embed_tokens.weight":
            values = rng.normal(0, 1, shape)
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            values = rng.normal(0, gain * shape[1] ** -0.5, shape)
        weights[name] = values.astype(np.float32)
    return weights


def packed_weights(
    weights: dict[str, np.ndarray], kind: str = "fp32"
) -> dict[str, np.ndarray | PackedWeight]:
    """The form in which executors and models take weights: matrices packed, norms as they are."""
    return {
        name: values if values.ndim == 1 else pack(values, kind) for name, values in weights.items()
    }


def weights_in(format: str, config: MobileLLMConfig, seed: int = 0) -> dict:
    """Random weights, matrices packed as a model of this format has them."""
    return {
        name: values if values.ndim == 1 else pack(values, kind_of(format, name, "float32"))
        for name, values in random_weights(config, seed).items()
    }


def make_executor(
    config: MobileLLMConfig, format: str = "fp32", seed: int = 0, **options
) -> Executor:
    """An `Executor` of random weights."""
    return Executor(config, weights_in(format, config, seed), format, **options)


def run(executor: Executor, ids, chunk: int | None = None) -> np.ndarray:
    """Logits of all tokens, fed `chunk` tokens at a time."""
    cache = executor.new_cache()
    chunk = chunk or len(ids)
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    logits = [executor.forward(part, cache, all_logits=True) for part in parts]
    assert cache.length == len(ids)
    return np.concatenate(logits)


def tiny_engine(format: str = "fp32", threads: int = 2, seed: int = 0, **changes) -> Engine:
    """An engine around random weights, without a tokenizer unless `changes` has one."""
    options = {name: changes.pop(name, None) for name in ("tokenizer", "chat_template")}
    config = tiny_config(**changes)
    weights = weights_in(format, config, seed)
    return Engine(config, weights, format, threads=threads, **options)


def random_ids(config: MobileLLMConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def transformers_model(config: MobileLLMConfig, weights: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """The model in transformers, float32; layer sharing is in `transformers_logits` only."""
    hf_config = transformers.LlamaConfig(**config.to_hf())
    model = LlamaForCausalLM(hf_config).eval()
    state = {name: torch.tensor(values) for name, values in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def transformers_logits(
    config: MobileLLMConfig, model: LlamaForCausalLM, ids: np.ndarray | torch.Tensor
) -> torch.Tensor:
    """Logits (batch, seq, vocab) of transformers' own layers, run without any cache."""
    ids = torch.as_tensor(ids)
    if not config.layer_sharing:
        return model(ids, use_cache=False).logits
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotation = decoder.rotary_emb(hidden, position_ids=positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]

    def run(layer, hidden):
        out = layer(
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotation
        )
        return out[0] if isinstance(out, tuple) else out

    layers = list(decoder.layers)
    if config.layer_sharing == "immediate":
        for layer in layers:
            for _ in range(config.layer_repeats):
                hidden = run(layer, hidden)
    else:
        for turn in range(config.layer_repeats):
            backwards = config.layer_sharing == "reverse" and turn % 2 == 1
            for layer in reversed(layers) if backwards else layers:
                hidden = run(layer, hidden)
    return model.lm_head(decoder.norm(hidden))


def assert_logits_close(got, want, tolerance: float = 2e-5) -> None:
    """Compare with a bound relative to the largest logit.

    The default is for float32 in another order: 4 times the largest error seen over all models.
    """
    got = np.asarray(torch.as_tensor(got).detach(), np.float64)
    want = np.asarray(torch.as_tensor(want).detach(), np.float64)
    assert got.shape == want.shape
    error, scale = np.abs(got - want).max(), np.abs(want).max()
    assert error <= tolerance * scale, f"max error {error:.3g}, largest logit {scale:.3g}"


def words_of_script(script: str) -> list[str]:
    """Run Python in a process of its own, `sys.argv[1]` the folder of the tests; what it prints."""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()
