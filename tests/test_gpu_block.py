"""A whole block of the decoder as one operator, against its parts."""

import pytest
import torch
from gpu_cases import Maker
from helpers import tiny_config
from interpreted import HAS_GPU
from torch.library import opcheck

pytest.importorskip("triton")
from mobilellm_fast import decoder, ops, reference
from mobilellm_fast.errors import MobileLLMError

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
HALF = torch.bfloat16 if HAS_GPU else torch.float16  # bfloat16 is not interpreted
BATCH, SEQ, WIDTH, INNER, HEAD_DIM = 2, 5, 48, 40, 16
WEIGHTS = 9


def arguments(dtype=HALF, heads=3, kv_heads=1):
    make = Maker(dtype)
    angles = make.normal(SEQ, HEAD_DIM // 2, dtype=torch.float32)

    def matrix(rows, cols):
        return make.normal(rows, cols, spread=cols**-0.5)

    keys = kv_heads * HEAD_DIM, WIDTH
    attention = [matrix(heads * HEAD_DIM, WIDTH), matrix(*keys), matrix(*keys)]
    return (
        make.normal(BATCH, SEQ, WIDTH),
        *(1 + make.normal(WIDTH, spread=0.1), *attention, matrix(WIDTH, heads * HEAD_DIM)),
        *(1 + make.normal(WIDTH, spread=0.1), matrix(INNER, WIDTH), matrix(INNER, WIDTH)),
        *(matrix(WIDTH, INNER), angles.cos(), angles.sin(), HEAD_DIM, 1e-5),
    )


def gradients(function, args, grad):
    leaves = [t.detach().requires_grad_() for t in args[: 1 + WEIGHTS]]
    out = function(*leaves, *args[1 + WEIGHTS :])
    return out, torch.autograd.grad(out, leaves, grad.to(out.dtype))


def parts(ops, x, input_norm, q, k, v, o, post_norm, gate, up, down, cos, sin, head_dim, eps):
    """The same by the operators of the parts, as the modules call them."""
    normed = ops.rms_norm(x, input_norm, eps)
    q, k, v = ((normed @ w.T).unflatten(-1, (-1, head_dim)) for w in (q, k, v))
    attended = ops.gqa_attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v)
    x = x + attended.flatten(-2) @ o.T
    return x + ops.swiglu(ops.rms_norm(x, post_norm, eps), gate, up) @ down.T


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_as_near_to_float64_as_its_parts(compiled, ops_on_gpu):
    args = arguments()
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    grad = torch.randn_like(exact[0])
    want, wanted = gradients(reference.decoder_block, exact, grad)
    near, nearby = gradients(lambda *a: parts(ops_on_gpu[0], *a), args, grad)
    op = ops_on_gpu[0].decoder_block
    if compiled:
        op = torch.compile(op, backend="aot_eager", fullgraph=True)
    got, found = gradients(op, args, grad)
    for a, b, exactly in zip((got, *found), (near, *nearby), (want, *wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        distance, plainly = ((t.double() - exactly).norm() for t in (a, b))
        assert 0 < distance <= 2 * plainly  # both are sums of chance roundings


def test_inference_computes_the_same_and_saves_nothing(ops_on_gpu):
    args = arguments()
    out, _ = gradients(ops_on_gpu[0].decoder_block, args, torch.ones_like(args[0]))
    assert torch.equal(ops_on_gpu[0].decoder_block(*args), out)


def test_its_result_may_be_changed_in_place(ops_on_gpu):
    """As that of the sum which the parts end with."""
    args = arguments()
    want = gradients(ops_on_gpu[0].decoder_block, args, torch.ones_like(args[0]))[1]
    doubled = gradients(
        lambda *a: ops_on_gpu[0].decoder_block(*a).mul_(2), args, torch.ones_like(args[0])
    )[1]
    torch.testing.assert_close(doubled, tuple(2 * g for g in want), rtol=0.01, atol=0.01)


def test_opcheck(ops_on_gpu):
    args = arguments()
    for t in args[: 1 + WEIGHTS]:
        t.requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    names = torch.ops.mobilellm_fast
    opcheck(getattr(names, f"decoder_block{ops_on_gpu[1]}").default, args, test_utils=tests)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    saving = getattr(names, f"decoder_block{ops_on_gpu[1]}_saving").default
    opcheck(saving, plain, test_utils=tests)
    backward = getattr(names, f"decoder_block{ops_on_gpu[1]}_backward").default
    opcheck(backward, (plain[0], *plain, *saving(*plain)[1:]), test_utils=tests)


def test_gradients_in_float64():
    args = arguments(torch.float64, heads=2)
    args = tuple(
        t.detach().double().cpu().requires_grad_(i <= WEIGHTS) if isinstance(t, torch.Tensor) else t
        for i, t in enumerate(args)
    )
    assert torch.autograd.gradcheck(ops.decoder_block, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(ops.decoder_block, args, fast_mode=True)


def changed(**changes):
    names = "x input_norm q_weight k_weight v_weight o_weight post_norm gate_weight up_weight"
    names = (*names.split(), "down_weight", "cos", "sin", "head_dim", "eps")
    return tuple((dict(zip(names, arguments(), strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, WIDTH)}, r"x must have shape \(batch, seq, n\), got \(3, 48\)"),
        ({"post_norm": torch.zeros(7)}, r"post_norm must have shape \(48,\), got \(7,\)"),
        ({"head_dim": 7}, "head_dim must be even and at least 2, got 7"),
        (
            {"k_weight": torch.zeros(32, WIDTH)},
            "k_weight must have rows .* divide the 48 .* got 32",
        ),
        (
            {"v_weight": torch.zeros(32, WIDTH)},
            r"v_weight must have shape \(16, 48\), got \(32, 48\)",
        ),
        ({"o_weight": torch.zeros(48, 16)}, r"o_weight must have shape \(48, 48\), got \(48, 16\)"),
        ({"down_weight": torch.zeros(40, 48)}, r"down_weight must have shape \(48, 40\)"),
        ({"sin": torch.zeros(5, 7)}, r"sin must have shape \(5, 8\), got \(5, 7\)"),
        ({"eps": -1.0}, "eps must be finite and at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(changes, message):
    with pytest.raises(MobileLLMError, match=rf"\[decoder_block\] {message}") as error:
        ops.decoder_block(*changed(**changes))
    assert "\n" not in str(error.value)


def plain_block(ops_on_gpu, monkeypatch):
    """A block that one operator computes, and what to call it with."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=WIDTH, head_dim=HEAD_DIM)
    hidden, *_, cos, sin, _, _ = arguments()
    block = decoder.Block(config)
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.1)
    block.to(hidden.device, HALF)
    monkeypatch.setattr(decoder, "ops", ops_on_gpu[0])
    assert block._plain_weights() is not None
    return block, (hidden.requires_grad_(), cos, sin)


def test_blocks_that_are_not_plain_call_their_parts(ops_on_gpu, monkeypatch):
    block, _ = plain_block(ops_on_gpu, monkeypatch)
    block.mlp.up_proj.weight.requires_grad_(False)
    assert block._plain_weights() is None
    with torch.no_grad():
        assert block._plain_weights() is not None
    block.mlp.up_proj.weight.requires_grad_()
    handle = block.self_attn.q_proj.register_forward_hook(lambda *args: None)
    assert block._plain_weights() is None
    handle.remove()
    block.mlp.forward = lambda x: x
    assert block._plain_weights() is None
    del block.mlp.forward
    block.self_attn.o_proj = torch.nn.Linear(4, 4)
    assert block._plain_weights() is None


ALL_MODULES = torch.nn.modules.module


@pytest.mark.parametrize(
    "register",
    [
        ALL_MODULES.register_module_forward_hook,
        ALL_MODULES.register_module_forward_pre_hook,
        ALL_MODULES.register_module_full_backward_hook,
        ALL_MODULES.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_see_the_parts(register, ops_on_gpu, monkeypatch):
    block, args = plain_block(ops_on_gpu, monkeypatch)
    seen = set()
    handle = register(lambda module, *rest: seen.add(module))
    try:
        block(*args).sum().backward()
    finally:
        handle.remove()
    assert seen >= {block, block.mlp, block.self_attn, *block.mlp.children()}


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_biases_count(name, ops_on_gpu, monkeypatch):
    block, args = plain_block(ops_on_gpu, monkeypatch)
    without = block(*args)
    layer = block.get_submodule(name)
    layer.bias = torch.nn.Parameter(torch.ones_like(layer.weight[:, 0]))
    out = block(*args)
    assert (out - without).abs().max() > 0.01
    out.sum().backward()
    assert layer.bias.grad.abs().max() > 0


def test_hooks_may_change_a_result_in_place(ops_on_gpu, monkeypatch):
    block, args = plain_block(ops_on_gpu, monkeypatch)
    want = block(*args) + 1
    block.register_forward_hook(lambda module, args, out: out.add_(1))
    assert block._plain_weights() is not None
    got = block(*args)
    got.sum().backward()
    assert torch.equal(got, want)
