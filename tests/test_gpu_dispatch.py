"""The ops reach the Triton kernels, forward and backward, in the caller's hands and compiled."""

import pytest
import torch
from gpu_cases import DTYPES, Maker
from interpreted import HAS_GPU
from torch.library import opcheck

pytest.importorskip("triton")
from mobilellm_fast.kernels import (
    head_sample,
    int8_gemm,
    quantize_per_token,
    rms_norm,
    rope,
    swiglu,
    weight_only_linear,
)

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DTYPE = DTYPES[0]


def arguments(stem):
    make = Maker(DTYPE)
    angles = make.normal(3, 4, dtype=torch.float32)
    x, residual, weight = make.normal(5, 40), make.normal(5, 40), make.normal(40)
    matrices = make.normal(24, 40), make.normal(24, 40)
    scales = [make.normal(n, dtype=torch.float32).abs() for n in (5, 24)]
    return {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, residual, weight, 1e-5),
        "rope": (make.normal(2, 3, 2, 8), angles.cos(), angles.sin()),
        "swiglu": (x, *matrices),
        "quantize_per_token": (x.float(),),
        "int8_gemm": (make.codes(5, 40), scales[0], make.codes(24, 40), scales[1], None, DTYPE),
        "weight_only_linear": (x, *make.weights("int4_g32", 24, 40)),
        "head_sample": (x, matrices[0], 0.5, 3, None),
    }[stem]


LAUNCHERS = {
    "rms_norm": rms_norm.rms_norm,
    "add_rms_norm": rms_norm.add_rms_norm,
    "rope": rope.rope,
    "swiglu": swiglu.swiglu,
    "quantize_per_token": quantize_per_token.quantize_per_token,
    "int8_gemm": int8_gemm.int8_gemm,
    "weight_only_linear": weight_only_linear.weight_only_linear,
    "head_sample": head_sample.head_sample,
}
# how many of the arguments have gradients of kernels
DIFFERENTIABLE = {"rms_norm": 2, "add_rms_norm": 3, "rope": 1, "swiglu": 3}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("stem", LAUNCHERS)
def test_an_op_is_its_kernel(stem, ops_on_gpu):
    args = arguments(stem)
    got, want = getattr(ops_on_gpu[0], stem)(*args), LAUNCHERS[stem](*args)
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        assert torch.equal(a, b)


def backward_of(stem, args, grads):
    """What the launchers give as gradients of the arguments."""
    if stem == "rms_norm":
        return rms_norm.rms_norm_backward(*grads, *args)
    if stem == "add_rms_norm":
        total, weight = rms_norm.add_rms_norm_backward(*grads, *args)
        return total, total, weight
    if stem == "rope":
        return (rope.rope_backward(*grads, *args[1:]),)
    return swiglu.swiglu_backward(*grads, *args, *swiglu.swiglu_saving(*args)[1:])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("stem", DIFFERENTIABLE)
def test_a_gradient_is_its_kernel(stem, compiled, ops_on_gpu):
    args = arguments(stem)
    leaves = [t.requires_grad_() for t in args[: DIFFERENTIABLE[stem]]]
    op = getattr(ops_on_gpu[0], stem)
    if compiled:
        op = torch.compile(op, backend="aot_eager", fullgraph=True)
    out = as_tuple(op(*args))
    grads = [torch.randn_like(o) for o in out]
    got = torch.autograd.grad(out, leaves, grads)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    for a, b in zip(got, backward_of(stem, plain, grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stem", LAUNCHERS)
def test_opcheck(stem, ops_on_gpu):
    operator = getattr(torch.ops.mobilellm_fast, stem + ops_on_gpu[1]).default
    args = arguments(stem)
    for t in args[: DIFFERENTIABLE.get(stem, 0)]:
        t.requires_grad_()
    opcheck(
        operator, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
