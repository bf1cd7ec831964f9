"""The Triton kernels of the ops against the reference in float64.

Without a GPU they run in Triton's interpreter, in float32; on one (`-m gpu`) in 16 bits. Outputs
are full of NaN before a kernel writes them, and a second run gives the same bits.
"""

import gpu_bounds
import pytest
import torch
from gpu_bounds import UNITS, assert_within
from gpu_cases import DTYPES, HEADS, KINDS, PRODUCTS, ROPE, ROWS, TOKENS, WEIGHTS, Maker
from interpreted import HAS_GPU

from mobilellm_fast import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from mobilellm_fast.kernels import (  # noqa: E402
    head_sample,
    int8_gemm,
    quantize_per_token,
    rms_norm,
    rope,
    swiglu,
    weight_only_linear,
    weight_rows,
)

pytestmark = [pytest.mark.usefixtures("poisoned"), *([pytest.mark.gpu] if HAS_GPU else [])]
EPS = 1e-5
SAMPLES = 160
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def test_fresh_tensors_are_poisoned():
    assert torch.empty(3, device=Maker(torch.float32).normal(1).device).isnan().all()
    assert torch.empty_like(Maker(torch.float32).codes(3)).eq(127).all()


def run(launcher, *args, **options):
    """Launch twice."""
    first, second = launcher(*args, **options), launcher(*args, **options)
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    for a, b in pairs:
        assert torch.equal(a, b) and not (a.is_floating_point() and a.isnan().any())
    return first


def exact(*tensors):
    return tuple(t.double().cpu() if isinstance(t, torch.Tensor) else t for t in tensors)


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), ROWS)
def test_rms_norm(rows, cols, dtype):
    make = Maker(dtype)
    x, weight = make.normal(rows, cols), make.normal(cols)
    want = reference.rms_norm(*exact(x, weight), EPS)
    got = run(rms_norm.rms_norm, x, weight, EPS)
    assert_within(got, want, gpu_bounds.rms_norm(x, want), dtype)


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), ROWS[1:])  # of one element, the gradient is 0
def test_rms_norm_backward(rows, cols, dtype, monkeypatch):
    make = Maker(dtype)
    grad, x, weight = make.normal(rows, cols), make.normal(rows, cols), make.normal(cols)
    grad64, x64, weight64 = exact(grad, x, weight)
    leaves = x64.requires_grad_(), weight64.requires_grad_()
    want = torch.autograd.grad(reference.rms_norm(*leaves, EPS), leaves, grad64)
    monkeypatch.setattr(rms_norm, "PARTS", 8)  # so that a program has several rows
    got = run(rms_norm.rms_norm_backward, grad, x, weight, EPS)
    bounds = gpu_bounds.rms_norm_backward(grad64, x64.detach(), weight64.detach(), EPS)
    for g, w, bound in zip(got, want, bounds, strict=True):
        assert_within(g, w, bound, dtype)


@by_dtype
@pytest.mark.parametrize(("rows", "cols"), ROWS[1:3])
def test_add_rms_norm(rows, cols, dtype):
    make = Maker(dtype)
    x, residual, weight = make.normal(rows, cols), make.normal(rows, cols), make.normal(cols)
    got, total = run(rms_norm.add_rms_norm, x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    want = reference.rms_norm(*exact(total, weight), EPS)
    assert_within(got, want, gpu_bounds.rms_norm(x, want), dtype)

    grads = make.normal(rows, cols), make.normal(rows, cols)
    got = run(rms_norm.add_rms_norm_backward, *grads, x, residual, weight, EPS)
    grad64, grad_total64, x64, weight64 = exact(*grads, total, weight)
    leaves = x64.requires_grad_(), weight64.requires_grad_()
    want = torch.autograd.grad(reference.rms_norm(*leaves, EPS), leaves, grad64)
    bounds = gpu_bounds.rms_norm_backward(grad64, x64.detach(), weight64.detach(), EPS)
    with_sum = want[0] + grad_total64
    assert_within(got[0], with_sum, bounds[0] + gpu_bounds.U * with_sum.abs(), dtype)
    assert_within(got[1], want[1], bounds[1], dtype)


@by_dtype
@pytest.mark.parametrize("per_batch", [False, True], ids=["shared", "per_batch"])
@pytest.mark.parametrize("sizes", ROPE, ids=str)
def test_rope(sizes, per_batch, dtype):
    make = Maker(dtype)
    batch, seq, _, head_dim = sizes
    angles = make.normal(*(batch,) * per_batch, seq, head_dim // 2, spread=3, dtype=torch.float32)
    x, cos, sin = make.normal(*sizes), angles.cos(), angles.sin()
    want = reference.rope(*exact(x, cos, sin))
    assert_within(run(rope.rope, x, cos, sin), want, gpu_bounds.rope(*exact(x, cos, sin)), dtype)
    # in place, with other heads behind those of each token
    both = torch.cat((x, x), 2)
    rope.rope_(both[:, :, : sizes[2]], cos, sin)
    assert torch.equal(both, torch.cat((rope.rope(x, cos, sin), x), 2))
    # the transpose of a rotation is the opposite rotation
    want = reference.rope(*exact(x, cos, -sin))
    got = run(rope.rope_backward, x, cos, sin)
    assert_within(got, want, gpu_bounds.rope(*exact(x, cos, sin)), dtype)


def swiglu_args(make, rows, inner, cols):
    weights = (make.normal(inner, cols, spread=2 * cols**-0.5) for _ in range(2))
    return make.normal(rows, cols), *weights


@by_dtype
@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_swiglu(sizes, dtype):
    args = swiglu_args(Maker(dtype), *sizes)
    got = run(swiglu.swiglu, *args)
    assert_within(got, reference.swiglu(*exact(*args)), gpu_bounds.swiglu(*exact(*args)), dtype)
    saved, gate, up = run(swiglu.swiglu_saving, *args)
    assert torch.equal(saved, got)
    x, *weights = exact(*args)
    for projection, weight in zip((gate, up), weights, strict=True):
        assert_within(projection, x @ weight.T, gpu_bounds.product(x, weight), dtype)


@by_dtype
@pytest.mark.parametrize("tiling", range(len(swiglu.WITH_COPY_ENGINE)))
def test_swiglu_in_every_tiling(tiling, dtype):
    args = swiglu_args(Maker(dtype), 150, 136, 72)
    got = run(swiglu.swiglu, *args, tiling=swiglu.WITH_COPY_ENGINE[tiling])
    assert_within(got, reference.swiglu(*exact(*args)), gpu_bounds.swiglu(*exact(*args)), dtype)


@by_dtype
@pytest.mark.parametrize("sizes", PRODUCTS[1:3], ids=str)
def test_swiglu_backward(sizes, dtype):
    make = Maker(dtype)
    x, *weights = swiglu_args(make, *sizes)
    grad = make.normal(*sizes[:2])
    _, gate, up = swiglu.swiglu_saving(x, *weights)
    got = run(swiglu.swiglu_backward, grad, x, *weights, gate, up)
    unit = UNITS[dtype]
    grad64, x64, gate64, up64, *weights64 = exact(grad, x, gate, up, *weights)
    projections, errors = gpu_bounds.swiglu_derivative(grad64, gate64, up64, unit)
    want_x, bound_x = 0, 0
    for d, error, weight, name in zip(projections, errors, weights64, (1, 2), strict=True):
        want_x = want_x + d @ weight
        # the first product is rounded before the second is added
        bound_x = bound_x + error @ weight.abs() + gpu_bounds.product(d, weight.T)
        bound_x = bound_x + unit * (d @ weight).abs()
        bound = error.T @ x64.abs() + gpu_bounds.product(d.T, x64.T)
        assert_within(got[name], d.T @ x64, bound, dtype)
    assert_within(got[0], want_x, bound_x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *(DTYPES if HAS_GPU else [])])
@pytest.mark.parametrize(("rows", "cols"), ROWS)
def test_quantize_per_token(rows, cols, dtype):
    make = Maker(dtype)
    x = make.normal(rows, cols) * torch.logspace(-3, 3, rows, device=make.normal(1).device)[:, None]
    x = x.to(dtype)
    x[0] = 0
    x[-1, 0] = 2.0**-120  # scale 0, since its reciprocal is not finite
    x[1, ::2] = 2.5 * x[1].abs().max() / 127  # halves
    got = run(quantize_per_token.quantize_per_token, x)
    for part, want in zip(got, reference.quantize_per_token(x.float().cpu()), strict=True):
        assert torch.equal(part.cpu(), want)


def int8_args(make, rows, outputs, cols):
    scales = (make.normal(n, dtype=torch.float32).abs() / 100 for n in (rows, outputs))
    x_scales, weight_scales = scales
    return make.codes(rows, cols), x_scales, make.codes(outputs, cols), weight_scales


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[:HAS_GPU]])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_int8_gemm(sizes, biased, dtype):
    make = Maker(torch.float32)
    args = int8_args(make, *sizes), make.normal(sizes[1]) if biased else None, dtype
    got = run(int8_gemm.int8_gemm, *args[0], *args[1:])
    on_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in (*args[0], *args[1:])]
    assert torch.equal(got.cpu(), reference.int8_gemm(*on_cpu))


@pytest.mark.parametrize("tiling", range(len(int8_gemm.WITH_COPY_ENGINE)))
def test_int8_gemm_in_every_tiling(tiling):
    args = int8_args(Maker(torch.float32), 150, 264, 144)
    tiling = int8_gemm.WITH_COPY_ENGINE[tiling]
    got = run(int8_gemm.int8_gemm, *args, dtype=torch.float16, tiling=tiling)
    want = reference.int8_gemm(*(t.cpu() for t in args), dtype=torch.float16)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "sizes", "dtype"),
    [
        *((tokens, sizes, DTYPES[0]) for sizes in WEIGHTS for tokens in TOKENS),
        *((tokens, WEIGHTS[2], dtype) for dtype in DTYPES[1:] for tokens in TOKENS),
    ],
    ids=str,
)
def test_weight_only_linear(sizes, tokens, kind, dtype):
    make = Maker(dtype)
    x, (codes, scales) = make.normal(tokens, sizes[1]), make.weights(kind, *sizes)
    got = run(weight_only_linear.weight_only_linear, x, codes, scales)
    weight = stored_weight(codes, scales, sizes[1])
    x64 = x.double().cpu()
    bound = gpu_bounds.product(x64, weight) + stored_error(kind, tokens, x64, weight, dtype)
    assert_within(got, x64 @ weight.T, bound, dtype)


def test_rows_too_long_for_a_vector(monkeypatch):
    make = Maker(DTYPES[0])
    x, codes = make.normal(1, 96), make.normal(20, 96, spread=0.1)
    monkeypatch.setattr(weight_rows, "LONGEST", 0)
    got = run(weight_only_linear.weight_only_linear, x, codes)
    x64, weight = exact(x, codes)
    assert_within(got, x64 @ weight.T, gpu_bounds.product(x64, weight), DTYPES[0])
    ids, _ = run(head_sample.head_sample, x, codes)
    assert ids.item() == (x64 @ weight.T).argmax()


def stored_weight(codes, scales, cols):
    scales = None if scales is None else scales.cpu()
    return reference.dequantize_rows(codes.cpu(), scales, cols).double()


def stored_error(kind, tokens, x, weight, dtype):
    """Weights of groups are rounded to the dtype of x, but for one token; in float32 thrice."""
    unit = UNITS[dtype] if tokens > 1 and kind.endswith("g32") else 0
    return (unit + 3 * gpu_bounds.U) * (x.abs() @ weight.abs().T)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["float", "int4_g32"])
@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_head_sample(sizes, kind, temperature, monkeypatch):
    tokens, vocab, cols = sizes
    dtype = DTYPES[0]
    if vocab < 1000:
        monkeypatch.setattr(head_sample, "BLOCK", 2)  # so that shares are joined in several steps
    make = Maker(dtype)
    x, (codes, scales) = make.normal(tokens, cols, spread=3), make.weights(kind, vocab, cols)
    ids, logprobs = run(head_sample.head_sample, x, codes, temperature, 5, scales)
    weight, x64 = stored_weight(codes, scales, cols), x.double().cpu()
    logits = x64 @ weight.T
    bound = gpu_bounds.product(x64, weight) + stored_error(kind, tokens, x64, weight, dtype)
    scores, slack = logits, bound
    if temperature:
        noise = reference.gumbel(5, torch.arange(tokens * vocab).view(tokens, vocab))
        scores = logits / temperature + noise
        slack = bound / temperature + gpu_bounds.gumbel(noise) + 2 * gpu_bounds.U * scores.abs()
    assert ids.dtype == torch.int64
    chosen = ids.cpu().unsqueeze(-1)
    lost = scores.amax(-1, keepdim=True) - scores.gather(-1, chosen)
    assert (lost <= 2 * slack.amax(-1, keepdim=True)).all()
    want = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
    far = 2 * bound.amax(-1) + (16 + want.abs()) * gpu_bounds.U + 1e-6 * (vocab > 1000)
    assert ((logprobs.cpu() - want).abs() <= far).all()
    assert far.max() < (0.1 if kind == "float" else 1.0)


@triton.jit
def _noise(out, seed, first, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out + place, head_sample.gumbel(seed, first + place))


@pytest.mark.parametrize("first", [0, 2**40], ids=["low", "high"])
def test_gumbel(first):
    out = Maker(torch.float32).normal(1 << 16)
    _noise[(1,)](out, 7, first, COUNT=1 << 16)
    want = reference.gumbel(7, first + torch.arange(1 << 16))
    assert ((out.cpu() - want).abs() <= gpu_bounds.gumbel(want)).all()


def test_products_wait_for_what_they_read():
    """Each scales by what the one before wrote, though it may be set up before that one ends."""
    ones = torch.ones_like(Maker(torch.float32).codes(70, 64))
    halves = torch.full((1,), 2 / 64, device=ones.device)
    for _ in range(20 if HAS_GPU else 1):
        scales = torch.ones(70, device=ones.device)
        for _ in range(20):
            scales = int8_gemm.int8_gemm(ones, scales, ones[:1], halves, dtype=torch.float32)[:, 0]
        assert (scales == 2.0**20).all()


def test_head_sample_draws_from_the_softmax():
    make = Maker(DTYPES[0])
    x = torch.ones_like(make.normal(1, 1)).expand(SAMPLES, 1).contiguous()
    codes = torch.tensor([[0.0], [1.0], [2.0]]).to(x)
    ids, _ = head_sample.head_sample(x, codes, 0.5, 11)
    share = torch.tensor([0.0, 2.0, 4.0]).softmax(0)
    counts = torch.bincount(ids.cpu(), minlength=3)
    assert ((counts - SAMPLES * share).abs() <= 4 * (SAMPLES * share * (1 - share)).sqrt()).all()


def test_seeds_differ():
    make = Maker(DTYPES[0])
    x, codes = make.normal(8, 32), make.normal(100, 32)
    one, other, same = (head_sample.head_sample(x, codes, 2.0, s)[0] for s in (1, 2**40 + 1, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows(rows):
    make = Maker(DTYPES[0])
    x = make.normal(rows, 32)
    assert rms_norm.rms_norm(x, make.normal(32), EPS).shape == (rows, 32)
    assert swiglu.swiglu(x, make.normal(5, 32), make.normal(5, 32)).shape == (rows, 5)
    assert weight_only_linear.weight_only_linear(x, make.normal(5, 32)).shape == (rows, 5)
    assert head_sample.head_sample(x, make.normal(5, 32))[0].shape == (rows,)
    gate = make.normal(rows, 5)
    weights = make.normal(5, 32), make.normal(5, 32)
    grads = swiglu.swiglu_backward(gate, x, *weights, gate, gate)
    assert grads[1].shape == (5, 32)


def test_any_number_of_leading_axes():
    make = Maker(DTYPES[0])
    x, weights = make.normal(6, 32), (make.normal(5, 32), make.normal(5, 32))
    out, gate, up = swiglu.swiglu_saving(x, *weights)
    grads = swiglu.swiglu_backward(out, x, *weights, gate, up)
    cube = [t.view(1, 2, 3, -1) for t in (out, x, gate, up)]
    assert torch.equal(swiglu.swiglu(cube[1], *weights), cube[0])
    shaped = swiglu.swiglu_backward(*cube[:2], *weights, *cube[2:])
    assert all(torch.equal(a.view_as(b), b) for a, b in zip(shaped, grads, strict=True))
    one = swiglu.swiglu_backward(out[0], x[0], *weights, gate[0], up[0])
    assert one[0].shape == (32,)
    ids, _ = head_sample.head_sample(x.view(2, 3, 32), weights[0])
    assert torch.equal(ids.flatten(), head_sample.head_sample(x, weights[0])[0])
