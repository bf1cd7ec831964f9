"""The ops that only GPUs have kernels for, where their references run: on a CPU."""

import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

from mobilellm_fast import ops, quant, reference, row_major
from mobilellm_fast.errors import MobileLLMError


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def i8(*shape):
    return f(*shape, dtype=torch.int8)


def stored(kind, rows, cols):
    """Weights stored row by row, and their values."""
    grid = quant.quantize(np.random.default_rng(0).normal(size=(rows, cols)).astype("f4"), kind)
    codes, scales = (torch.from_numpy(a) for a in row_major.to_row_major(grid))
    return codes, scales, torch.from_numpy(grid.dequantize())


@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("cols", [1, 31, 32, 50, 96])
def test_rows_keep_their_values(kind, cols):
    codes, scales, values = stored(kind, 5, cols)
    assert torch.equal(reference.dequantize_rows(codes, scales, cols), values)


@pytest.mark.parametrize("kind", ["float", *quant.QUANTIZED_KINDS])
def test_weight_only_linear(kind):
    x = torch.randn(2, 3, 50, dtype=torch.float64, requires_grad=True)
    if kind == "float":
        codes, scales = torch.randn(7, 50, dtype=torch.float64), None
        values = codes
    else:
        codes, scales, values = stored(kind, 7, 50)
    out = ops.weight_only_linear(x, codes, scales)
    torch.testing.assert_close(out, x @ values.double().T)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, values.double().sum(0).expand_as(x))
    opcheck(torch.ops.mobilellm_fast.weight_only_linear.default, (x, codes, scales))


def test_add_rms_norm_is_a_sum_and_a_norm():
    x, residual, weight = (torch.randn(3, 10, dtype=torch.float64) for _ in range(3))
    args = x, residual, weight[0]
    normed, total = ops.add_rms_norm(*args, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight[0], 1e-5))
    leaves = tuple(t.requires_grad_() for t in args)
    assert torch.autograd.gradcheck(lambda *a: ops.add_rms_norm(*a, 1e-5), leaves)
    opcheck(torch.ops.mobilellm_fast.add_rms_norm.default, (*leaves, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_gemm_is_the_rounded_linear(dtype):
    """With one scale per row it is what `linear` computes for the paper's scheme."""
    x = torch.randn(3, 40)
    grid = quant.quantize(np.random.default_rng(0).normal(size=(20, 40)).astype("f4"), "int8")
    packed = torch.from_numpy(quant.pack(grid).data)
    want = reference.linear(x, packed, "int8", 20, 40, "int8").to(dtype)
    codes, scales = ops.quantize_per_token(x)
    weight = (torch.from_numpy(a) for a in row_major.to_row_major(grid))
    args = (codes, scales, *weight, None, dtype)
    assert torch.equal(ops.int8_gemm(*args), want)
    biased = ops.int8_gemm(*args[:4], bias=torch.ones(20), dtype=torch.float32)
    torch.testing.assert_close(biased, ops.int8_gemm(*args[:4], dtype=torch.float32) + 1)
    bias = torch.ones(20, requires_grad=True)  # whose gradient runs the reference, by its defaults
    (grad,) = torch.autograd.grad(ops.int8_gemm(*args[:4], bias).sum(), bias)
    assert torch.equal(grad, torch.full((20,), 3.0))
    opcheck(torch.ops.mobilellm_fast.int8_gemm.default, args)


def test_head_sample_takes_the_first_of_the_largest():
    codes = torch.tensor([[0.0], [2.0], [2.0], [1.0]])
    ids, logprobs = ops.head_sample(torch.tensor([[1.0], [-1.0]]), codes)
    assert ids.tolist() == [1, 0]
    want = torch.log_softmax(torch.tensor([[0.0, 2, 2, 1], [0, -2, -2, -1]]), -1)
    torch.testing.assert_close(logprobs, want[[0, 1], ids])


def test_head_sample_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    count = 20_000
    ids, logprobs = ops.head_sample(torch.ones(count, 1), logits[:, None], 0.5, 3)
    share = (logits / 0.5).softmax(0)
    drawn = torch.bincount(ids, minlength=3)
    assert ((drawn - count * share).abs() <= 4 * (count * share * (1 - share)).sqrt()).all()
    torch.testing.assert_close(logprobs, logits.log_softmax(0)[ids])  # at temperature 1
    again, _ = ops.head_sample(torch.ones(count, 1), logits[:, None], 0.5, 3)
    assert torch.equal(ids, again)
    opcheck(torch.ops.mobilellm_fast.head_sample.default, (torch.ones(2, 1), logits[:, None], 0.5))


def test_gumbel_noise():
    # counter and key 0 of Philox 4x32-10, from the known answers of its authors
    u = (0x6627E8D5 + 0.5) / 2**32
    zero = reference.gumbel(0, torch.tensor(0))
    assert math.isclose(zero, -math.log(-math.log1p(-u)), rel_tol=1e-12)
    noise = reference.gumbel(7, torch.arange(200_000))
    mean, deviation = 0.5772156649, math.pi / math.sqrt(6)
    assert abs(noise.mean() - mean) < 4 * deviation / math.sqrt(len(noise))
    assert abs(noise.std() / deviation - 1) < 0.01
    assert not torch.equal(noise, reference.gumbel(7 + 2**32, torch.arange(200_000)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.add_rms_norm(f(2, 3), f(2, 4), f(3), 1e-5),
            r"\[add_rms_norm\] residual must have shape \(2, 3\), got \(2, 4\)",
        ),
        (
            lambda: ops.add_rms_norm(f(2, 3), f(2, 3, dtype=torch.float16), f(3), 1e-5),
            "residual must be float32, got float16",
        ),
        (lambda: ops.add_rms_norm(f(3), f(3), f(3), -1.0), r"\[add_rms_norm\] eps must be"),
        (lambda: ops.int8_gemm(f(2, 3), f(2), i8(4, 3), f(4)), "x must be int8, got float32"),
        (
            lambda: ops.int8_gemm(i8(2, 3), f(3), i8(4, 3), f(4)),
            r"\[int8_gemm\] x_scales must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: ops.int8_gemm(i8(2, 3), f(2), i8(4, 5), f(4)),
            r"weight must have shape \(m, 3\), got \(4, 5\)",
        ),
        (
            lambda: ops.int8_gemm(i8(2, 3), f(2), i8(4, 3), f(4), f(3)),
            r"bias must have shape \(4,\), got \(3,\)",
        ),
        (
            lambda: ops.int8_gemm(i8(2, 3), f(2), i8(4, 3), f(4), dtype=torch.int32),
            "dtype must be float32, bfloat16 or float16, got int32",
        ),
        (
            lambda: ops.weight_only_linear(f(2, 3), f(4, 3, dtype=torch.bfloat16)),
            r"\[weight_only_linear\] codes must be float32, got bfloat16",
        ),
        (
            lambda: ops.weight_only_linear(f(2, 33), i8(4, 33), f(4, 1, dtype=torch.float16)),
            r"scales must have shape \(4, 2\), got \(4, 1\)",
        ),
        (
            lambda: ops.weight_only_linear(f(2, 33), f(4, 17, dtype=torch.uint8), f(4, 2, 2)),
            r"codes must have shape \(rows, 32\), got \(4, 17\)",
        ),
        (
            lambda: ops.weight_only_linear(f(2, 3), i8(4, 3), f(4, dtype=torch.float16)),
            "scales must be float32, got float16",
        ),
        (lambda: ops.head_sample(f(2, 3), f(0, 3)), "codes must have at least 1 row, got 0"),
        (
            lambda: ops.head_sample(f(2, 3), f(4, 3), -0.5),
            "temperature must be finite and at least 0, got -0.5",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(MobileLLMError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
