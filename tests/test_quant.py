"""Weight formats: rounding, packing, and their declared sizes."""

import numpy as np
import pytest

from mobilellm_fast import _C, quant
from mobilellm_fast.errors import MobileLLMError

SHAPES = [(1, 1), (16, 32), (17, 33), (5, 100), (100, 576), (4100, 40)]


def random_matrix(rows, cols, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)


@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_undoes_pack(kind, shape):
    tensor = quant.quantize(random_matrix(*shape), kind)
    packed = quant.pack(tensor)
    assert packed.data.ctypes.data % quant.ALIGNMENT == 0
    tiles = -(-shape[0] // quant.TILE_ROWS)
    assert packed.nbytes == tiles * quant.tile_nbytes(kind, shape[1])
    again = quant.unpack(packed)
    assert np.array_equal(again.codes, tensor.codes)
    assert np.array_equal(again.scales, tensor.scales)
    assert tensor.mins is None or np.array_equal(again.mins, tensor.mins)
    assert np.array_equal(packed.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 576, 1536, 4352])
def test_tile_size_agrees_with_cpp(kind, cols):
    assert quant.tile_nbytes(kind, cols) == _C.tile_nbytes(kind, cols)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_error_is_half_a_step(shape):
    weight = random_matrix(*shape)
    tensor = quant.quantize(weight, "int8")
    assert np.abs(tensor.codes).max() <= 127
    error = np.abs(tensor.dequantize() - weight)
    assert (error <= tensor.scales[:, None] * 0.5001).all()
    # Groups: half a step, plus what float16 scales and mins lose at the ends of the range.
    for kind, levels in (("int8_g32", 127), ("int4_g32", 15)):
        tensor = quant.quantize(weight, kind)
        step = np.repeat(tensor.scales.astype(np.float32), 32, axis=1)[:, : shape[1]]
        bound = step * (0.5001 + levels * 2**-11) + np.abs(weight).max() * 2**-11
        assert (np.abs(tensor.dequantize() - weight) <= bound).all()
    # On the symmetric grid the end that is not the largest value may be cut off by up to a step.
    tensor = quant.quantize(weight, "int4_sym_g32")
    step = np.repeat(np.abs(tensor.scales.astype(np.float32)), 32, axis=1)[:, : shape[1]]
    bound = step * (0.5001 + (tensor.codes == 15) * 0.5 + 15 * 2**-11)
    assert (np.abs(tensor.dequantize() - weight) <= bound).all()


def test_zero_rows_and_groups_stay_zero():
    weight = random_matrix(3, 64)
    weight[1] = 0
    weight[2, :32] = 0
    for kind in quant.QUANTIZED_KINDS:
        values = quant.quantize(weight, kind).dequantize()
        assert not values[1].any()
        assert not values[2, :32].any() or kind == "int8"


def test_bits_per_weight():
    nbytes = {
        kind: quant.pack(random_matrix(576, 1536), kind).nbytes
        for kind in ("fp32", "bf16", *quant.QUANTIZED_KINDS)
    }
    bits = {kind: 8 * size / (576 * 1536) for kind, size in nbytes.items()}
    assert bits["fp32"] == 32
    assert bits["bf16"] == 16
    assert bits["int8"] == 8 + 32 / 1536
    assert bits["int8_g32"] == 8.5
    assert bits["int4_g32"] == 5
    assert bits["int4_sym_g32"] == 4.5


def test_requantizing_goes_through_values():
    tensor = quant.quantize(random_matrix(20, 64), "int8_g32")
    assert np.array_equal(
        quant.pack(tensor, "int8").data, quant.pack(tensor.dequantize(), "int8").data
    )
    assert np.array_equal(quant.pack(tensor, "fp32").data, tensor.dequantize())


def test_bf16_rounds_to_nearest_even():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    got = quant.to_bf16(values)
    finite = np.isfinite(values)
    assert np.array_equal(got[finite], want[finite])
    assert np.isnan(quant.from_bf16(got[np.isnan(values)])).all()


@pytest.mark.parametrize(
    ("format", "name", "dtype", "kind"),
    [
        ("fp32", "model.layers.0.mlp.up_proj.weight", "int4", "fp32"),
        ("bf16", "lm_head.weight", "float32", "bf16"),
        ("int8", "model.layers.0.mlp.up_proj.weight", "float32", "int8"),
        ("int8", "model.layers.0.mlp.up_proj.weight", "int4", "int8"),
        ("int8", "model.embed_tokens.weight", "int8", "int8_g32"),
        ("w8a8", "model.embed_tokens.weight", "int8", "int8"),
        ("int4", "model.layers.0.mlp.up_proj.weight", "float32", "int4_g32"),
        ("int4", "model.layers.0.mlp.up_proj.weight", "int8", "int8_g32"),
        ("int4", "model.embed_tokens.weight", "float32", "int8"),
        ("int4", "lm_head.weight", "int4", "int4_g32"),
        ("int4_all", "model.embed_tokens.weight", "int8", "int4_g32"),
        ("int4_all", "lm_head.weight", "float32", "int4_g32"),
        ("int4_all", "lm_head.weight", "int4_sym", "int4_sym_g32"),
        ("int4", "model.layers.0.mlp.up_proj.weight", "int4_sym", "int4_sym_g32"),
        ("int8", "model.layers.0.mlp.up_proj.weight", "int4_sym", "int8"),
    ],
)
def test_kind_of(format, name, dtype, kind):
    assert quant.kind_of(format, name, dtype) == kind


def test_refuses_what_has_no_grid():
    with pytest.raises(MobileLLMError, match="weight must be finite"):
        quant.quantize(np.array([[1, np.nan]], np.float32), "int8")
    with pytest.raises(MobileLLMError, match="kind must be one of"):
        quant.quantize(random_matrix(1, 1), "int3")
    with pytest.raises(MobileLLMError, match="exceeds the float16 scales"):
        quant.quantize(np.array([[1e30, -1e30]], np.float32), "int4_g32")
