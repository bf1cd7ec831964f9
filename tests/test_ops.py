"""The ops as torch operators: registration, gradients, dispatch, messages."""

import functools

import numpy as np
import pytest
import torch
from cases import CASES, LINEAR_KINDS, make_args, run_kernel
from torch.autograd import forward_ad
from torch.library import opcheck

from mobilellm_fast import _C, ops, quant, reference
from mobilellm_fast.errors import MobileLLMError

SMALL = {
    "rms_norm": {"rows": 3, "cols": 10},
    "rope": {"batch": 2, "seq": 3, "heads": 2, "head_dim": 6},
    "gqa_attention": {"batch": 1, "seq": 2, "kv_seq": 3, "heads": 2, "kv_heads": 1, "head_dim": 4},
    "swiglu": {"rows": 3, "inner": 5, "cols": 6},
}
DIFFERENTIABLE = list(SMALL)
EXAMPLES = {
    **{stem: (SMALL[stem], {}) for stem in DIFFERENTIABLE},
    "quantize_per_token": ({"rows": 3, "cols": 10}, {}),
    **{
        f"linear-{kind}-{activation}": (
            {"rows": 3, "outputs": 20, "cols": 40},
            {"kind": kind, "activation": activation},
        )
        for kind, activation in LINEAR_KINDS
    },
}


def example(name, **changes):
    sizes, options = EXAMPLES[name]
    return make_args(name.split("-")[0], sizes | changes, **options)


def op(name):
    return getattr(ops, name.split("-")[0])


def with_gradients(args, dtype=None):
    return tuple(
        a.to(dtype or a.dtype).requires_grad_()
        if isinstance(a, torch.Tensor) and a.dtype in ops.FLOATS
        else a
        for a in args
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_opcheck(name):
    registered = getattr(torch.ops.mobilellm_fast, name.split("-")[0]).default
    args = example(name)
    opcheck(registered, args)
    if name in DIFFERENTIABLE:
        opcheck(registered, with_gradients(args))
    elif name.startswith("linear"):
        opcheck(registered, (args[0].requires_grad_(), *args[1:]))


@pytest.mark.parametrize("kind", ["fp32", "bf16", *quant.QUANTIZED_KINDS])
def test_opcheck_of_tables(kind):
    _, packed, _, rows, cols, _ = make_args("linear", CASES["linear"][2], kind=kind)
    ids = torch.tensor([[0, rows - 1]])
    # Only shapes and dtypes are compared for tables that bf16 weights hold as raw 16-bit integers.
    opcheck(torch.ops.mobilellm_fast.embed.default, (ids, packed, kind, rows, cols))
    opcheck(torch.ops.mobilellm_fast.dequantize.default, (packed, kind, rows, cols))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_in_float64(name):
    args = with_gradients(example(name), torch.float64)
    assert torch.autograd.gradcheck(op(name), args)
    assert torch.autograd.gradgradcheck(op(name), args, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_behind_the_kernels(name):
    """Forward in C++, backward through the reference: as if the reference had run forward."""
    args = with_gradients(example(name))
    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    out = op(name)(*args)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(getattr(reference, name)(*args), leaves, grad)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_only_wanted_gradients_are_computed():
    x, weight, eps = example("rms_norm")
    weight.requires_grad_()
    ops.rms_norm(x, weight, eps).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_gradient_of_a_tensor_that_comes_twice():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.gqa_attention(t, t, t), (x,))


@pytest.mark.parametrize(("kind", "activation"), LINEAR_KINDS)
def test_linear_passes_gradients_straight_through(kind, activation):
    args = example(f"linear-{kind}-{activation}")
    x = args[0].requires_grad_()
    out = ops.linear(*args)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, grad)
    weight = ops.dequantize(*args[1:5]).float()
    torch.testing.assert_close(got, grad @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_float32_on_the_cpu_runs_the_kernel(name, monkeypatch):
    stem = name.split("-")[0]
    args = example(name)
    got = op(name)(*args)
    if stem != "quantize_per_token":
        assert torch.equal(got, run_kernel(stem, args))

    def fail(*args, **kwargs):
        raise AssertionError("kernel was called")

    monkeypatch.setattr(_C, stem, fail)
    with pytest.raises(AssertionError, match="kernel was called"):
        op(name)(*args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_other_dtypes_run_the_reference(name, dtype):
    args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in example(name))
    got = op(name)(*args)
    assert got.dtype == dtype
    assert torch.equal(got, getattr(reference, name)(*args))


@pytest.mark.parametrize("name", EXAMPLES)
def test_strides_do_not_matter(name):
    args = example(name)
    strided = tuple(
        a.repeat_interleave(2, dim=-1)[..., ::2] if isinstance(a, torch.Tensor) else a for a in args
    )
    want, got = op(name)(*args), op(name)(*strided)
    for a, b in zip((want,), (got,), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "quantize_per_token", "linear-int8-int8"])
def test_any_number_of_leading_axes(name):
    args = example(name, rows=6)
    want = op(name)(*args)
    for lead in ((2, 3), (1, 3, 2)):
        got = op(name)(args[0].unflatten(0, lead), *args[1:])
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for a, b in pairs:
            assert torch.equal(a, b.unflatten(0, lead))
    one = op(name)(args[0][0], *args[1:])
    first = one[0] if isinstance(one, tuple) else one
    assert torch.equal(first, (want[0] if isinstance(want, tuple) else want)[0])


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "quantize_per_token", "linear-int8-int8"])
def test_no_rows(name):
    args = example(name)
    out = op(name)(args[0][:0], *args[1:])
    assert (out[0] if isinstance(out, tuple) else out).shape[0] == 0


def test_no_columns_and_no_outputs():
    empty = torch.zeros
    assert torch.equal(ops.rms_norm(empty(3, 0), empty(0), 1e-5), empty(3, 0))
    assert torch.equal(ops.swiglu(empty(3, 0), empty(5, 0), empty(5, 0)), empty(3, 5))
    assert torch.equal(ops.swiglu(empty(3, 4), empty(0, 4), empty(0, 4)), empty(3, 0))
    assert torch.equal(ops.linear(empty(3, 0), empty(4, 0), "fp32", 4, 0), empty(3, 4))
    assert torch.equal(ops.linear(empty(3, 4), empty(0, 4), "fp32", 0, 4), empty(3, 0))


@pytest.mark.parametrize("kind", ["fp32", *quant.QUANTIZED_KINDS])
@pytest.mark.parametrize("wrong", [-1, 20, 31, 32])
def test_ids_that_are_no_rows_are_refused_whatever_the_kind(kind, wrong):
    """Quantized matrices have rows of padding, and torch counts negative ids from the end."""
    packed = quant.pack(np.ones((20, 40), np.float32), kind).data
    with pytest.raises(IndexError, match="out of range"):
        ops.embed(torch.tensor([[0, wrong]]), torch.from_numpy(packed), kind, 20, 40)


def test_ops_document_themselves():
    for stem in CASES:
        function = getattr(ops, stem)
        assert function.__name__ == stem
        assert function.__doc__ == getattr(reference, stem).__doc__
        assert all(word in function.__doc__ for word in ("Args:", "Returns:"))


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


TILE = quant.tile_nbytes("int8", 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.rms_norm(f(2, 576), f(512), 1e-5),
            r"\[rms_norm\] weight must have shape \(576,\), got \(512,\)",
        ),
        (lambda: ops.rms_norm(f(), f(1), 1e-5), r"x must have shape \(..., n\), got \(\)"),
        (
            lambda: ops.rms_norm(f(2, 3, dtype=torch.int64), f(3), 1e-5),
            r"\[rms_norm\] x must be float32 or float64 or bfloat16 or float16, got int64",
        ),
        (lambda: ops.rms_norm(f(2, 3), f(3), -1.0), "eps must be finite and at least 0, got -1.0"),
        (lambda: ops.rms_norm(f(2, 3), f(3), float("nan")), "eps must be finite"),
        (
            lambda: ops.rope(f(2, 3, 8), f(3, 4), f(3, 4)),
            r"\[rope\] x must have shape \(batch, seq, heads, head_dim\), got \(2, 3, 8\)",
        ),
        (lambda: ops.rope(f(1, 3, 1, 7), f(3, 3), f(3, 3)), "x must have an even head_dim, got 7"),
        (
            lambda: ops.rope(f(1, 3, 1, 8), f(2, 4), f(3, 4)),
            r"cos must have shape \(3, 4\), got \(2, 4\)",
        ),
        (
            lambda: ops.rope(f(2, 3, 1, 8), f(1, 3, 4), f(1, 3, 4)),
            r"cos must have shape \(2, 3, 4\), got \(1, 3, 4\)",
        ),
        (
            lambda: ops.rope(f(1, 3, 1, 8), f(3, 4), f(4)),
            r"sin must have shape \(3, 4\), got \(4,\)",
        ),
        (
            lambda: ops.gqa_attention(f(1, 3, 4, 8), f(1, 3, 2, 6), f(1, 3, 2, 6)),
            r"\[gqa_attention\] k must have shape \(1, kv_seq, kv_heads, 8\), got \(1, 3, 2, 6\)",
        ),
        (
            lambda: ops.gqa_attention(f(1, 3, 4, 8), f(1, 3, 2, 8), f(1, 4, 2, 8)),
            r"v must have shape \(1, 3, 2, 8\), got \(1, 4, 2, 8\)",
        ),
        (
            lambda: ops.gqa_attention(f(1, 3, 4, 8), f(1, 2, 2, 8), f(1, 2, 2, 8)),
            "k must hold at least the 3 tokens of q, got 2",
        ),
        (
            lambda: ops.gqa_attention(f(1, 3, 4, 8), f(1, 3, 3, 8), f(1, 3, 3, 8)),
            "k must have a divisor of 4 heads, got 3",
        ),
        (
            lambda: ops.swiglu(f(2, 3), f(5, 4), f(5, 4)),
            r"\[swiglu\] gate_weight must have shape \(m, 3\), got \(5, 4\)",
        ),
        (
            lambda: ops.swiglu(f(2, 3), f(5, 3), f(4, 3)),
            r"up_weight must have shape \(5, 3\), got \(4, 3\)",
        ),
        (
            lambda: ops.quantize_per_token(f(2, 3, dtype=torch.bfloat16)),
            r"\[quantize_per_token\] x must be float32, got bfloat16",
        ),
        (lambda: ops.quantize_per_token(f(2, 0)), "x must have rows of at least 1, got 0"),
        (
            lambda: ops.linear(f(2, 31), f(TILE, dtype=torch.uint8), "int8", 16, 32),
            r"\[linear\] x must have shape \(..., 32\), got \(2, 31\)",
        ),
        (
            lambda: ops.linear(f(2, 32), f(TILE, dtype=torch.uint8), "int8", 17, 32),
            rf"packed must have shape \({2 * TILE},\), got \({TILE},\)",
        ),
        (
            lambda: ops.linear(f(2, 32), f(TILE), "int8", 16, 32),
            "packed must be uint8, got float32",
        ),
        (
            lambda: ops.linear(f(2, 32), f(16, 32), "fp16", 16, 32),
            r"kind must be one of \('fp32', .*\), got 'fp16'",
        ),
        (
            lambda: ops.linear(f(2, 32), f(16, 32), "fp32", 16, 32, "int4"),
            "activation must be one of float, int8, int8_g32, int8_g32_plain, got 'int4'",
        ),
        (
            lambda: ops.embed(f(2), f(16, 32), "fp32", 16, 32),
            r"\[embed\] ids must be int64 or int32, got float32",
        ),
        (
            lambda: ops.dequantize(f(15, 32), "fp32", 16, 32),
            r"\[dequantize\] packed must have shape \(16, 32\), got \(15, 32\)",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(MobileLLMError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: _C.rms_norm(f(2, 3), f(4), 1e-5, f(2, 3)), r"weight must be .* \(3\), got .*4"),
        (lambda f: _C.rms_norm(f(2, 3), f(3), 1e-5, f(2, 4)), r"out must be .* \(2, 3\), got"),
        (lambda f: _C.rms_norm(f(3, 2).T, f(3), 1e-5, f(2, 3)), "x must be C-contiguous"),
        (lambda f: _C.rms_norm(f(2, 3), f(3).astype("f8"), 1e-5, f(2, 3)), "got float64"),
        (
            lambda f: _C.rms_norm(f(2, 3), f(3), 1e-5, f(2, 3), "mmx"),
            "isa must be one of .* got mmx",
        ),
        (lambda f: _C.rope(f(1, 1, 3), f(1, 1), f(1, 1), f(1, 1, 3)), "even head_dim, got 3"),
        (
            lambda f: _C.gqa_attention(f(1, 3, 4), f(1, 2, 4), f(1, 2, 4), 1.0, f(1, 3, 4)),
            "heads of q must be a multiple of heads of k",
        ),
        (
            lambda f: _C.gqa_attention(f(2, 2, 4), f(1, 2, 4), f(1, 2, 4), 1.0, f(2, 2, 4)),
            "k must hold at least as many tokens as q",
        ),
        (
            lambda f: _C.quantize_per_token(f(2, 3), np.zeros((2, 4), np.int8), f(2)),
            r"q must have the shape of x, got \(2, 4\)",
        ),
    ],
)
def test_bindings_refuse_wrong_arguments_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(lambda *shape: np.zeros(shape, np.float32))
    assert "\n" not in str(error.value)


def test_bindings_do_not_write_to_read_only_arrays():
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _C.rms_norm(np.zeros((2, 3), np.float32), np.zeros(3, np.float32), 1e-5, out)


@pytest.mark.parametrize("kind", ["fp32", "bf16", *quant.QUANTIZED_KINDS])
def test_tensors_without_data_give_shapes(kind):
    x, packed, _, rows, cols, _ = make_args("linear", CASES["linear"][2], kind=kind)
    ids = torch.tensor([[0, rows - 1]])
    for stem, first, rest in (
        ("linear", (x, packed), (kind, rows, cols)),
        ("embed", (ids, packed), (kind, rows, cols)),
        ("dequantize", (packed,), (kind, rows, cols)),
    ):
        got = getattr(ops, stem)(*(t.to("meta") for t in first), *rest)
        want = getattr(ops, stem)(*first, *rest)
        assert got.is_meta and (got.shape, got.dtype) == (want.shape, want.dtype)


LINEARS = [name for name in EXAMPLES if name.startswith("linear")]


def of_first(name, dtype=None):
    """An op as a function of its first argument, and that."""
    x, *rest = with_gradients(example(name), dtype)
    rest = [a.detach() if isinstance(a, torch.Tensor) else a for a in rest]
    return lambda t: op(name)(t, *rest), x.detach()


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *LINEARS])
def test_transforms_of_functions(name):
    function, x = of_first(name)
    leaf = x.clone().requires_grad_()
    value = function(leaf).square().sum()
    (want,) = torch.autograd.grad(value, leaf)

    def loss(t):
        return function(t).square().sum()

    got, loss_value = torch.func.grad_and_value(loss)(x)
    # float32 sums in another order: some 100 roundings of values around 1
    close = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=4e-6)
    close(got, want)
    close(loss_value, value.detach())
    close(torch.func.vmap(torch.func.grad(loss))(torch.stack((x, x)))[1], want)
    jacobian = torch.func.jacrev(function)(x)
    close(torch.func.jacfwd(function)(x), jacobian)
    close(torch.func.jvp(function, (x,), (x,))[1], torch.tensordot(jacobian, x, x.ndim))
    rows = torch.func.hessian(loss)(x).flatten(x.ndim).flatten(0, -2)
    assert rows.abs().sum() > 0
    close(rows, rows.T)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *LINEARS])
def test_forward_mode_differentiation(name):
    if name in DIFFERENTIABLE:
        args = with_gradients(example(name), torch.float64)
        options = dict(check_forward_ad=True, check_backward_ad=False, fast_mode=True)
        assert torch.autograd.gradcheck(op(name), args, **options)
    function, x = of_first(name)
    along = torch.randn_like(x)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, along)))
        assert forward_ad.unpack_dual(function(x)).tangent is None
    torch.testing.assert_close(value, function(x), rtol=2e-6, atol=4e-6)
    _, want = torch.autograd.functional.jvp(function, x, along)  # by differentiating twice
    torch.testing.assert_close(tangent, want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_results_may_be_changed_in_place(name, dtype):
    function, x = of_first(name, dtype)
    leaf = x.requires_grad_()
    (want,) = torch.autograd.grad(function(leaf).sum(), leaf)
    (got,) = torch.autograd.grad(function(leaf).mul_(2).sum(), leaf)
    assert torch.equal(got, 2 * want)
