"""The reference ops against independent formulas: torch's own, loops over scalars, properties."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import LINEAR_KINDS, case_id, each_case, make_args
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mobilellm_fast import _C, quant, reference

torch.manual_seed(0)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 7, 576])
def test_rms_norm_is_torch_s(n):
    x, weight = doubles(2, 3, n), doubles(n)
    want = F.rms_norm(x, (n,), weight, 1e-5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), want, rtol=1e-13, atol=1e-13)


def test_rms_norm_of_zeros_is_zero():
    assert (reference.rms_norm(torch.zeros(2, 5), torch.ones(5), 1e-5) == 0).all()


def test_rope_is_that_of_transformers():
    x = doubles(2, 5, 3, 14)
    angles = doubles(5, 7)
    cos, sin = angles.cos(), angles.sin()
    both = (torch.cat((t, t), dim=-1)[None] for t in (cos, sin))
    want, _ = apply_rotary_pos_emb(x, x, *both, unsqueeze_dim=2)
    got = reference.rope(x, cos, sin)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    per_batch = reference.rope(x, cos.expand(2, 5, 7), sin.expand(2, 5, 7))
    assert torch.equal(per_batch, got)


def test_rope_turns_position_differences_into_angles():
    """The product of a rotated query and key depends on how far apart they are, nothing else."""
    q, k = doubles(1, 1, 1, 8), doubles(1, 1, 1, 8)
    frequencies = doubles(4)

    def at(x, position):
        angles = (position * frequencies)[None]
        return reference.rope(x, angles.cos(), angles.sin())

    near = (at(q, 5) * at(k, 2)).sum()
    far = (at(q, 105) * at(k, 102)).sum()
    torch.testing.assert_close(near, far, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_gqa_attention_is_torch_s(heads, kv_heads):
    q, k, v = doubles(2, 6, heads, 10), doubles(2, 6, kv_heads, 10), doubles(2, 6, kv_heads, 10)
    repeated = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    want = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, *repeated)), is_causal=True
    ).transpose(1, 2)
    got = reference.gqa_attention(q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # the last queries alone see the same keys
    tail = reference.gqa_attention(q[:, 4:], k, v)
    torch.testing.assert_close(tail, want[:, 4:], rtol=1e-12, atol=1e-12)


def test_gqa_attention_does_not_see_the_future():
    q, k, v = doubles(1, 6, 2, 4), doubles(1, 6, 1, 4), doubles(1, 6, 1, 4)
    before = reference.gqa_attention(q, k, v)
    k[:, 3:], v[:, 3:] = 1e6, -1e6
    assert torch.equal(reference.gqa_attention(q, k, v)[:, :3], before[:, :3])


def test_gqa_attention_scale():
    q, k, v = doubles(1, 4, 2, 4), doubles(1, 4, 1, 4), doubles(1, 4, 1, 4)
    got = reference.gqa_attention(q, k, v, 0.25)
    torch.testing.assert_close(got, reference.gqa_attention(q * 0.5, k, v), rtol=1e-12, atol=1e-12)


def test_swiglu_of_scalars():
    for x, gate, up in [(1.0, 2.0, 3.0), (-4.0, 1.5, 0.5), (0.0, 1.0, 1.0), (50.0, -3.0, 1.0)]:
        got = reference.swiglu(*(torch.tensor([[t]], dtype=torch.float64) for t in (x, gate, up)))
        want = x * gate / (1 + math.exp(-x * gate)) * x * up
        assert got.item() == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize(("stem", "sizes"), each_case("quantize_per_token"), ids=case_id)
def test_quantize_per_token_rounds_to_nearest(stem, sizes):
    (x,) = make_args(stem, sizes)
    codes, scales = reference.quantize_per_token(x)
    assert codes.dtype == torch.int8
    assert (codes.abs().amax(-1) == 127).all()
    error = (x.double() - codes.double() * scales.double()[:, None]).abs()
    # half a step, and the float32 rounding of the quotient
    assert (error <= (0.5 + 127 * 2**-23) * scales.double()[:, None]).all()


def test_quantize_per_token_by_hand():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    codes, scales = reference.quantize_per_token(x)
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert scales.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("kind", "activation"), LINEAR_KINDS)
def test_linear_multiplies_what_it_says(kind, activation):
    x, packed, *rest = make_args(
        "linear", {"rows": 4, "outputs": 37, "cols": 70}, kind=kind, activation=activation
    )
    weight = quant.PackedWeight(kind, 37, 70, packed.numpy()).dequantize()
    rounded = x.double()
    if activation != "float":
        for part in x.split(70 if activation == "int8" else 32, dim=-1):
            step = part.abs().amax(-1, keepdim=True).double() / 127
            at = part.storage_offset()
            codes = (part.double() / step).round()
            if activation == "int8_g32":  # wide groups
                low = ((part.double() / step - codes) * 254).round() / 254
                wide = codes.square().sum(-1, keepdim=True) <= 1.75 * 127**2
                codes = torch.where(wide, codes + low, codes)
            rounded[:, at : at + part.shape[1]] = codes * step
    want = rounded.numpy() @ weight.astype(np.float64).T
    got = reference.linear(x, packed, *rest).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-7 * np.abs(want).max())
    exact = reference.linear(x.double(), packed, kind, 37, 70).numpy()
    plain = x.double().numpy() @ weight.astype(np.float64).T
    np.testing.assert_allclose(exact, plain, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["fp32", "bf16", *quant.QUANTIZED_KINDS])
def test_embed_takes_rows(kind):
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    weight = quant.pack(values, kind)
    ids = torch.tensor([[49, 0, 17], [17, 48, 16]])
    got = reference.embed(ids, torch.from_numpy(weight.data), kind, 50, 40)
    assert got.shape == (2, 3, 40)
    np.testing.assert_array_equal(got.float().numpy(), weight.dequantize()[ids.numpy()])


@pytest.mark.parametrize("stem", ["rms_norm", "rope", "gqa_attention", "swiglu"])
def test_low_precision_is_rounded_once(stem):
    """bf16 inputs are computed in float32: the result is the rounded float32 result."""
    _, sizes = each_case(stem)[1]
    args = make_args(stem, sizes)
    low = tuple(a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args)
    wide = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in low)
    function = getattr(reference, stem)
    assert torch.equal(function(*low), function(*wide).bfloat16())


def test_every_weight_kind_has_the_size_that_the_kernels_expect():
    for kind in quant.QUANTIZED_KINDS:
        for cols in (1, 31, 32, 33, 576, 4352):
            assert quant.tile_nbytes(kind, cols) == _C.tile_nbytes(kind, cols)
