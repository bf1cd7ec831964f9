import numpy as np
import pytest
import torch
import transformers
from helpers import LLAMA3_SCALING, tiny_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mobilellm_fast.rope import cos_sin, inverse_frequencies

LENGTHS = (1, 24, 100)  # below, at and above the trained length

CONFIGS = {
    f"{kind}_{head_dim}_{theta:g}": tiny_config(
        head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=24
    )
    for kind, scaling in {
        "default": None,
        "linear": {"rope_type": "linear", "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "factor": 6.0},
        "llama3": LLAMA3_SCALING,
    }.items()
    for head_dim, theta in ((64, 1e4), (80, 5e5), (14, 12345.678), (128, 1e4))
}


def theirs(config):
    return LlamaRotaryEmbedding(transformers.LlamaConfig(**config.to_hf()))


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_transformers(name, seq):
    config = CONFIGS[name]
    rotary = theirs(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(seq)[None])
    frequencies = inverse_frequencies(config, seq)
    assert frequencies.dtype == np.float32
    # pow may differ by 1 ulp, and "dynamic" takes a power of a power
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=5e-7)
    half = config.head_dim // 2
    tables = cos_sin(config, np.arange(seq), seq_len=seq)
    for got, want in zip(tables, (cos, sin), strict=True):
        assert got.shape == (seq, half)
        assert got.dtype == np.float32
        # an angle of up to `seq` radians carries its relative error
        np.testing.assert_allclose(got, want[0, :, :half].numpy(), rtol=0, atol=5e-7 * seq)


def test_plain_frequencies_match_bit_for_bit():
    """The frequencies of every MobileLLM."""
    config = tiny_config(head_dim=64)
    expected = theirs(config).inv_freq.numpy()
    np.testing.assert_array_equal(inverse_frequencies(config), expected)


def test_tables_do_not_depend_on_where_a_chunk_starts():
    for config in CONFIGS.values():
        whole = cos_sin(config, np.arange(60))
        part = cos_sin(config, np.arange(17, 60))
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(a[17:], b)


def test_dynamic_scaling_token_by_token():
    """Without a length, each position takes the frequencies of the sequence it ends."""
    config = CONFIGS["dynamic_64_10000"]
    cos, sin = cos_sin(config, np.arange(40))
    for position in (0, 23, 24, 39):
        one = cos_sin(config, np.array([position]), seq_len=position + 1)
        np.testing.assert_array_equal(cos[position], one[0][0])
        np.testing.assert_array_equal(sin[position], one[1][0])
    late = inverse_frequencies(config, 40)
    assert (late[1:] < inverse_frequencies(config)[1:]).all()
    np.testing.assert_array_equal(inverse_frequencies(config, 10), inverse_frequencies(config))
