"""Rotary position embedding: frequencies and their tables, in the float32 steps of transformers."""

import math

import numpy as np

from .config import MobileLLMConfig


def inverse_frequencies(config: MobileLLMConfig, seq_len: int | None = None) -> np.ndarray:
    """Return the rotation per position of each pair: `rope_theta ** (-2 i / head_dim)`, scaled.

    Args:
        config: gives `rope_theta`, `head_dim` and `rope_scaling`.
        seq_len: length in tokens of the sequence; only "dynamic" scaling depends on it, and
            None there means any length up to `max_position_embeddings`.

    Returns:
        float32 (head_dim / 2,), in radians per position.

    Reference: `transformers.modeling_rope_utils`; Su et al., https://arxiv.org/abs/2104.09864
    """
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "dynamic":
        return _dynamic(config, np.array([seq_len or 0]))[0]
    plain = _plain(np.array([config.rope_theta]), config.head_dim)[0]
    if scaling["rope_type"] == "linear":
        return plain / np.float32(scaling["factor"])
    if scaling["rope_type"] == "llama3":
        return _llama3(plain, scaling)
    return plain


def cos_sin(
    config: MobileLLMConfig, positions: np.ndarray, seq_len: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines and sines that rotate queries and keys at these positions.

    Args:
        config: gives `rope_theta`, `head_dim` and `rope_scaling`.
        positions: int (n,), counted from 0.
        seq_len: for "dynamic" scaling, the length whose frequencies all positions take, as
            transformers does for a sequence fed at once. None gives each position the
            frequencies of the sequence that ends with it, as when tokens are fed one by one;
            this makes a cached key independent of how the prompt was cut into chunks.

    Returns:
        cos, sin: float32 (n, head_dim / 2).

    Numerics: the angle is a float32 product, like transformers'; its cosine is correctly rounded.
    """
    positions = np.asarray(positions)
    if seq_len is None and config.rope_scaling and config.rope_scaling["rope_type"] == "dynamic":
        frequencies = _dynamic(config, positions + 1)
    else:
        frequencies = inverse_frequencies(config, seq_len)
    angles = positions.astype(np.float32)[:, None] * frequencies
    angles = angles.astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _plain(theta: np.ndarray, head_dim: int) -> np.ndarray:
    """theta (n,) -> (n, head_dim / 2); a float64 power rounds to what torch's float32 pow gives."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = theta.astype(np.float32).astype(np.float64)[:, None]
    return np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _dynamic(config: MobileLLMConfig, seq_len: np.ndarray) -> np.ndarray:
    """NTK scaling: raise theta with each sequence length (n,) -> (n, head_dim / 2)."""
    trained, factor = config.max_position_embeddings, config.rope_scaling["factor"]
    seq_len = np.maximum(seq_len, trained).astype(np.float32)
    stretch = np.float32(factor) * seq_len / np.float32(trained) - np.float32(factor - 1)
    exponent = config.head_dim / (config.head_dim - 2)
    return _plain(config.rope_theta * stretch.astype(np.float64) ** exponent, config.head_dim)


def _llama3(plain: np.ndarray, scaling: dict) -> np.ndarray:
    """Slow the long wavelengths by `factor`, keep the short ones, blend those between."""
    factor = np.float32(scaling["factor"])
    low, high = np.float32(scaling["low_freq_factor"]), np.float32(scaling["high_freq_factor"])
    trained = scaling["original_max_position_embeddings"]
    # x / t is reciprocal(t) * x in torch; the same two roundings keep the bits equal
    wavelength = np.float32(1) / plain * np.float32(2 * math.pi)
    blend = (np.float32(1) / wavelength * np.float32(trained) - low) / (high - low)
    blended = (np.float32(1) - blend) * plain / factor + blend * plain
    scaled = np.where(wavelength > trained / low, plain / factor, blended)
    return np.where(wavelength < trained / high, plain, scaled).astype(np.float32)
