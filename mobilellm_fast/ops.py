"""The ops as torch operators: `torch.ops.mobilellm_fast.<stem>`, differentiable and compilable.

Each op is one call of `register`. It has the signature, the documentation and the gradient of the
function of the same name in `reference`, argument checks, and a kernel per device; where no kernel
takes the inputs (other dtypes, other devices) the reference runs.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, quant, reference
from .errors import MobileLLMError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def register(
    reference: Callable,
    *,
    check: Callable,
    cpu: Callable | None = None,
    fake: Callable | None = None,
    differentiable: Callable | None = None,
) -> Callable:
    """Make a reference function an op.

    Args:
        reference: the specification; its name and signature become the op's.
        check: called with the arguments, raises MobileLLMError for wrong ones.
        cpu: called with contiguous CPU tensors, the floating ones float32.
        fake: computes the shape of the result; None runs the reference on fake tensors.
        differentiable: what to differentiate instead of the reference, where rounding hides the
            gradient. Backward recomputes it, so no op has a hand-written derivative.
    """
    stem = reference.__name__

    def run_reference(*args: Any) -> Any:
        return _contiguous(reference(*args))

    def run_cpu(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if cpu is None or any(t.dtype in FLOATS[1:] for t in tensors):
            return run_reference(*args)
        return cpu(*(a.detach().contiguous() if isinstance(a, Tensor) else a for a in args))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if arg is Tensor else arg for arg in ctx.args]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i].view_as(args[i])  # distinct, even if one tensor came twice
            out = (differentiable or reference)(*args)
            inputs = [args[i] for i in wanted]
            found = torch.autograd.grad(out, inputs, grads, create_graph=create_graph)
        result: list[Tensor | None] = [None] * len(args)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return tuple(result)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)))
        ctx.args = [Tensor if isinstance(arg, Tensor) else arg for arg in inputs]

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(
        f"mobilellm_fast::{stem}", run_reference, mutates_args=(), schema=schema
    )
    op.register_kernel("cpu")(run_cpu)
    op.register_fake(fake or run_reference)
    op.register_autograd(backward, setup_context=setup_context)

    @functools.wraps(reference)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return op(*args, **kwargs)

    return checked


def _contiguous(out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(out, tuple):
        return tuple(t.contiguous() for t in out)
    return out.contiguous()


# --- argument checks ---------------------------------------------------------------------------


def _expect_shape(stem: str, name: str, tensor: Tensor, shape: Iterable[int | str]) -> None:
    """Compare with a shape in which a name stands for any size and "..." for any leading axes."""
    shape = tuple(shape)
    got = tuple(tensor.shape)
    if shape[0] == "...":
        fits = len(got) >= len(shape) - 1
        tail, want = (got[len(got) - len(shape) + 1 :], shape[1:]) if fits else ((), ())
    else:
        fits, tail, want = len(got) == len(shape), got, shape
    fits = fits and all(isinstance(w, str) or w == g for w, g in zip(want, tail, strict=True))
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise MobileLLMError(f"[{stem}] {name} must have shape ({wanted}), got {got}")


def _expect_dtype(stem: str, dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = str(tensor.dtype).removeprefix("torch.")
            raise MobileLLMError(f"[{stem}] {name} must be {wanted}, got {got}")


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    _expect_dtype("rms_norm", FLOATS, x=x, weight=weight)
    _expect_shape("rms_norm", "x", x, ("...", "n"))
    _expect_shape("rms_norm", "weight", weight, x.shape[-1:])
    if not 0 <= eps < math.inf:
        raise MobileLLMError(f"[rms_norm] eps must be finite and at least 0, got {eps}")


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _expect_dtype("rope", FLOATS, x=x, cos=cos, sin=sin)
    _expect_shape("rope", "x", x, ("batch", "seq", "heads", "head_dim"))
    batch, seq, _, head_dim = x.shape
    if head_dim % 2:
        raise MobileLLMError(f"[rope] x must have an even head_dim, got {head_dim}")
    lead = (batch, seq) if cos.ndim == 3 else (seq,)
    _expect_shape("rope", "cos", cos, (*lead, head_dim // 2))
    _expect_shape("rope", "sin", sin, tuple(cos.shape))


def _check_gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    stem = "gqa_attention"
    _expect_dtype(stem, FLOATS, q=q, k=k, v=v)
    _expect_shape(stem, "q", q, ("batch", "seq", "heads", "head_dim"))
    batch, seq, heads, head_dim = q.shape
    _expect_shape(stem, "k", k, (batch, "kv_seq", "kv_heads", head_dim))
    _expect_shape(stem, "v", v, tuple(k.shape))
    kv_seq, kv_heads = k.shape[1:3]
    if kv_seq < seq:
        raise MobileLLMError(f"[{stem}] k must hold at least the {seq} tokens of q, got {kv_seq}")
    if kv_heads == 0 or heads % kv_heads:
        raise MobileLLMError(f"[{stem}] k must have a divisor of {heads} heads, got {kv_heads}")


def _check_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    _expect_dtype("swiglu", FLOATS, x=x, gate_weight=gate_weight, up_weight=up_weight)
    _expect_shape("swiglu", "x", x, ("...", "n"))
    _expect_shape("swiglu", "gate_weight", gate_weight, ("m", x.shape[-1]))
    _expect_shape("swiglu", "up_weight", up_weight, tuple(gate_weight.shape))


def _check_quantize_per_token(x: Tensor) -> None:
    _expect_dtype("quantize_per_token", (torch.float32,), x=x)
    _expect_shape("quantize_per_token", "x", x, ("...", "n"))
    if x.shape[-1] == 0:
        raise MobileLLMError("[quantize_per_token] x must have rows of at least 1, got 0")


def _check_linear(
    x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str = "float"
) -> None:
    _expect_dtype("linear", FLOATS, x=x)
    _expect_shape("linear", "x", x, ("...", cols))
    _check_packed("linear", packed, kind, rows, cols)
    if activation not in ("float", "int8", "int8_g32"):
        raise MobileLLMError(
            f"[linear] activation must be 'float', 'int8' or 'int8_g32', got {activation!r}"
        )


def _check_embed(ids: Tensor, packed: Tensor, kind: str, rows: int, cols: int) -> None:
    _expect_dtype("embed", INTEGERS, ids=ids)
    _check_packed("embed", packed, kind, rows, cols)


def _check_dequantize(packed: Tensor, kind: str, rows: int, cols: int) -> None:
    _check_packed("dequantize", packed, kind, rows, cols)


def _check_packed(stem: str, packed: Tensor, kind: str, rows: int, cols: int) -> None:
    if kind in quant.QUANTIZED_KINDS:
        tiles = -(-rows // quant.TILE_ROWS)
        shape, dtypes = (tiles * quant.tile_nbytes(kind, cols),), (torch.uint8,)
    elif kind in ("fp32", "bf16"):
        shape = (rows, cols)
        dtypes = (torch.float32,) if kind == "fp32" else (torch.uint16, torch.int16)
    else:
        kinds = ("fp32", "bf16", *quant.QUANTIZED_KINDS)
        raise MobileLLMError(f"[{stem}] kind must be one of {kinds}, got {kind!r}")
    _expect_dtype(stem, dtypes, packed=packed)
    _expect_shape(stem, "packed", packed, shape)


# --- CPU kernels -------------------------------------------------------------------------------


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _C.rms_norm(_rows(x), weight.numpy(), eps, _rows(out))
    return out


def _rope_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    batch = x.shape[0]
    cos, sin = (t.expand(batch, *t.shape[-2:]).flatten(0, 1).contiguous() for t in (cos, sin))
    _C.rope(x.flatten(0, 1).numpy(), cos.numpy(), sin.numpy(), out.flatten(0, 1).numpy())
    return out


def _gqa_attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    out = torch.empty_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for i in range(q.shape[0]):
        _C.gqa_attention(q[i].numpy(), k[i].numpy(), v[i].numpy(), scale, out[i].numpy())
    return out


def _swiglu_cpu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], gate_weight.shape[0])
    gate, up = (("fp32", *w.shape, w.numpy()) for w in (gate_weight, up_weight))
    _C.swiglu(_rows(x), gate, up, _rows(out), "float", threads=torch.get_num_threads())
    return out


def _quantize_per_token_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1])
    _C.quantize_per_token(_rows(x), _rows(codes), scales.reshape(-1).numpy())
    return codes, scales


def _linear_cpu(
    x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str = "float"
) -> Tensor:
    if (kind in quant.QUANTIZED_KINDS) != (activation != "float"):
        return reference.linear(x, packed, kind, rows, cols, activation)
    out = x.new_empty(*x.shape[:-1], rows)
    weight = (kind, rows, cols, packed.numpy())
    _C.linear(_rows(x), weight, _rows(out), activation, threads=torch.get_num_threads())
    return out


def _rows(x: Tensor) -> Any:
    """View as (rows, n), sharing memory with the tensor."""
    return x.reshape(-1, x.shape[-1]).numpy()


# --- the ops -----------------------------------------------------------------------------------


def _table_dtype(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "bf16" else torch.float32


rms_norm = register(reference.rms_norm, check=_check_rms_norm, cpu=_rms_norm_cpu)
rope = register(reference.rope, check=_check_rope, cpu=_rope_cpu)
gqa_attention = register(
    reference.gqa_attention, check=_check_gqa_attention, cpu=_gqa_attention_cpu
)
swiglu = register(reference.swiglu, check=_check_swiglu, cpu=_swiglu_cpu)
quantize_per_token = register(
    reference.quantize_per_token, check=_check_quantize_per_token, cpu=_quantize_per_token_cpu
)
dequantize = register(
    reference.dequantize,
    check=_check_dequantize,
    fake=lambda packed, kind, rows, cols: packed.new_empty(rows, cols, dtype=_table_dtype(kind)),
)
embed = register(
    reference.embed,
    check=_check_embed,
    fake=lambda ids, packed, kind, rows, cols: packed.new_empty(
        *ids.shape, cols, dtype=_table_dtype(kind)
    ),
)
linear = register(
    reference.linear,
    check=_check_linear,
    cpu=_linear_cpu,
    fake=lambda x, packed, kind, rows, cols, activation="float": x.new_empty(*x.shape[:-1], rows),
    # the rounding of activations passes gradients straight through
    differentiable=lambda x, packed, kind, rows, cols, activation="float": F.linear(
        x, dequantize(packed, kind, rows, cols).to(x.dtype)
    ),
)
