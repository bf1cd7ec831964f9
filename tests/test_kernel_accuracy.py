"""Every C++ kernel on every case, against the reference, within a derived bound.

`test_kernels` has what is particular to one kernel: saturation, tails, memory, messages.
"""

import numpy as np
import pytest
import torch
from bounds import assert_right
from cases import LINEAR_KINDS, case_id, each_case, make_args, run_kernel

from mobilellm_fast import _C, quant

ISAS = pytest.mark.parametrize("isa", _C.supported_isas())


@ISAS
@pytest.mark.parametrize(
    ("stem", "sizes"), each_case("rms_norm", "rope", "gqa_attention", "swiglu"), ids=case_id
)
def test_float_kernels(stem, sizes, isa):
    args = make_args(stem, sizes)
    assert_right(stem, args, run_kernel(stem, args, isa))


@ISAS
@pytest.mark.parametrize(("kind", "activation"), LINEAR_KINDS)
@pytest.mark.parametrize(("stem", "sizes"), each_case("linear"), ids=case_id)
def test_linear(stem, sizes, kind, activation, isa):
    args = make_args(stem, sizes, kind=kind, activation=activation)
    assert_right(stem, args, run_kernel(stem, args, isa))


@ISAS
@pytest.mark.parametrize(("stem", "sizes"), each_case("quantize_per_token"), ids=case_id)
def test_quantize_per_token(stem, sizes, isa):
    args = make_args(stem, sizes)
    assert_right(stem, args, run_kernel(stem, args, isa))


@ISAS
@pytest.mark.parametrize(("kind", "activation"), LINEAR_KINDS)
@pytest.mark.parametrize("rows", [1, 9])
def test_swiglu_of_packed_weights(rows, kind, activation, isa):
    sizes = {"rows": rows, "inner": 80, "cols": 576}
    args = make_args("swiglu", sizes, kind=kind, activation=activation)
    assert_right("swiglu", args, run_kernel("swiglu", args, isa))


@ISAS
def test_quantize_per_token_at_its_limits(isa):
    rows = [
        [0.0] * 40,  # no scale
        [-0.0] * 40,
        [127.0, -127.0] * 20,
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0, 126.5] * 5,  # ties go to even
        [3.4028235e38, -3.4028235e38] * 20,
        [1e-38, -1e-38] * 20,  # 127 / 1e-38 overflows
        [1e-45, 0.0] * 20,  # smallest subnormal
        [2.0**-100, 2.0**-107] * 20,
        [1e30] + [1e-30] * 39,
    ]
    args = (torch.tensor(rows),)
    assert_right("quantize_per_token", args, run_kernel("quantize_per_token", args, isa))


@ISAS
@pytest.mark.parametrize("activation", ["int8_g32", "int8"])
@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("cols", [32, 45, 1536, 4352])
def test_linear_saturates_nowhere(cols, kind, activation, isa):
    """Every product and every sum at its largest, with either sign."""
    signs = np.array([[1, 1], [1, -1], [-1, -1]])
    codes = np.zeros((6, cols), np.uint8 if kind in quant.INT4_KINDS else np.int8)
    top, bottom = (15, 0) if kind in quant.INT4_KINDS else (127, -127)
    codes[:3, ::2] = np.where(signs[:, :1] > 0, top, bottom)
    codes[:3, 1::2] = np.where(signs[:, 1:] > 0, top, bottom)
    codes[3:] = top - codes[:3] + bottom
    groups = -(-cols // 32)
    if kind == "int8":
        tensor = quant.QuantizedTensor(kind, codes, np.ones(6, np.float32))
    else:
        ones = np.ones((6, groups), np.float16)
        tensor = quant.QuantizedTensor(kind, codes, ones, -8 * ones if kind == "int4_g32" else None)
    x = np.full((4, cols), 127, np.float32)  # so the scale is 1
    x[1] *= -1
    x[2, ::2] *= -1
    x[3, 1:] = 0
    packed = torch.from_numpy(quant.pack(tensor).data)
    args = (torch.from_numpy(x), packed, kind, 6, cols, activation)
    exact = x.astype(np.float64) @ tensor.dequantize().astype(np.float64).T
    got = run_kernel("linear", args, isa).numpy()
    sizes = np.abs(x).astype(np.float64) @ (np.abs(codes.astype(np.float64)) + 8).T
    terms = 3 if (kind, activation) == ("int8", "int8") else 2 * groups + 3
    assert (np.abs(got - exact) <= terms * 2.0**-24 * sizes).all()


@ISAS
@pytest.mark.parametrize("stem", ["rms_norm", "rope", "gqa_attention", "swiglu"])
def test_every_isa_gives_the_same_bits(stem, isa):
    for _, sizes in each_case(stem):
        args = make_args(stem, sizes, seed=1)
        assert torch.equal(run_kernel(stem, args, isa), run_kernel(stem, args, "scalar")), sizes
