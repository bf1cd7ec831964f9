"""What the ops demand of their arguments: functions named and called as the ops."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import quant
from .errors import MobileLLMError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def _expect_shape(stem: str, name: str, tensor: Tensor, shape: Iterable[int | str]) -> None:
    """Compare with a shape in which a name stands for any size and "..." for any leading axes."""
    shape = tuple(shape)
    got = tuple(tensor.shape)
    if shape[:1] == ("...",):
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


def _expect_eps(stem: str, eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise MobileLLMError(f"[{stem}] eps must be finite and at least 0, got {eps}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    _expect_dtype("rms_norm", FLOATS, x=x, weight=weight)
    _expect_shape("rms_norm", "x", x, ("...", "n"))
    _expect_shape("rms_norm", "weight", weight, x.shape[-1:])
    _expect_eps("rms_norm", eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _expect_dtype("add_rms_norm", FLOATS, x=x, weight=weight)
    _expect_dtype("add_rms_norm", (x.dtype,), residual=residual)
    _expect_shape("add_rms_norm", "x", x, ("...", "n"))
    _expect_shape("add_rms_norm", "residual", residual, tuple(x.shape))
    _expect_shape("add_rms_norm", "weight", weight, x.shape[-1:])
    _expect_eps("add_rms_norm", eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _expect_dtype("rope", FLOATS, x=x, cos=cos, sin=sin)
    _expect_shape("rope", "x", x, ("batch", "seq", "heads", "head_dim"))
    batch, seq, _, head_dim = x.shape
    if head_dim % 2:
        raise MobileLLMError(f"[rope] x must have an even head_dim, got {head_dim}")
    lead = (batch, seq) if cos.ndim == 3 else (seq,)
    _expect_shape("rope", "cos", cos, (*lead, head_dim // 2))
    _expect_shape("rope", "sin", sin, tuple(cos.shape))


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
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


def gqa_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> None:
    stem = "gqa_decode"
    _expect_dtype(stem, FLOATS, q=q)
    _expect_dtype(stem, (q.dtype,), k_cache=k_cache, v_cache=v_cache)
    _expect_dtype(stem, (torch.int32,), lengths=lengths)
    _expect_shape(stem, "q", q, ("batch", "heads", "head_dim"))
    batch, heads, head_dim = q.shape
    _expect_shape(stem, "k_cache", k_cache, (batch, "kv_heads", "capacity", head_dim))
    _expect_shape(stem, "v_cache", v_cache, tuple(k_cache.shape))
    _expect_shape(stem, "lengths", lengths, (batch,))
    kv_heads, capacity = k_cache.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise MobileLLMError(
            f"[{stem}] k_cache must have a divisor of {heads} heads, got {kv_heads}"
        )
    if capacity == 0:
        raise MobileLLMError(f"[{stem}] k_cache must have a capacity of at least 1, got 0")


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    _expect_dtype("swiglu", FLOATS, x=x, gate_weight=gate_weight, up_weight=up_weight)
    _expect_shape("swiglu", "x", x, ("...", "n"))
    _expect_shape("swiglu", "gate_weight", gate_weight, ("m", x.shape[-1]))
    _expect_shape("swiglu", "up_weight", up_weight, tuple(gate_weight.shape))


def decoder_block(
    x: Tensor,
    input_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    post_norm: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
) -> None:
    stem = "decoder_block"
    norms = dict(input_norm=input_norm, post_norm=post_norm)
    matrices = dict(q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, o_weight=o_weight)
    matrices |= dict(gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    _expect_dtype(stem, FLOATS, x=x, **norms, **matrices, cos=cos, sin=sin)
    _expect_shape(stem, "x", x, ("batch", "seq", "n"))
    batch, seq, width = x.shape
    for name, norm in norms.items():
        _expect_shape(stem, name, norm, (width,))
    if head_dim < 2 or head_dim % 2:
        raise MobileLLMError(f"[{stem}] head_dim must be even and at least 2, got {head_dim}")
    _expect_shape(stem, "q_weight", q_weight, ("heads * head_dim", width))
    _expect_shape(stem, "k_weight", k_weight, ("kv_heads * head_dim", width))
    queries, keys = len(q_weight), len(k_weight)
    if keys == 0 or keys % head_dim or queries % keys:
        raise MobileLLMError(
            f"[{stem}] k_weight must have rows for heads of {head_dim} that divide the "
            f"{queries} of q_weight, got {keys}"
        )
    _expect_shape(stem, "v_weight", v_weight, (keys, width))
    _expect_shape(stem, "o_weight", o_weight, (width, queries))
    _expect_shape(stem, "gate_weight", gate_weight, ("m", width))
    _expect_shape(stem, "up_weight", up_weight, tuple(gate_weight.shape))
    _expect_shape(stem, "down_weight", down_weight, (width, len(gate_weight)))
    lead = (batch, seq) if cos.ndim == 3 else (seq,)
    _expect_shape(stem, "cos", cos, (*lead, head_dim // 2))
    _expect_shape(stem, "sin", sin, tuple(cos.shape))
    _expect_eps(stem, eps)


def quantize_per_token(x: Tensor) -> None:
    _expect_dtype("quantize_per_token", (torch.float32,), x=x)
    _expect_shape("quantize_per_token", "x", x, ("...", "n"))
    if x.shape[-1] == 0:
        raise MobileLLMError("[quantize_per_token] x must have rows of at least 1, got 0")


def linear(
    x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str = "float"
) -> None:
    _expect_dtype("linear", FLOATS, x=x)
    _expect_shape("linear", "x", x, ("...", cols))
    _check_packed("linear", packed, kind, rows, cols)
    known = ("float", "int8", "int8_g32", "int8_g32_plain")
    if activation not in known:
        raise MobileLLMError(
            f"[linear] activation must be one of {', '.join(known)}, got {activation!r}"
        )


def embed(ids: Tensor, packed: Tensor, kind: str, rows: int, cols: int) -> None:
    _expect_dtype("embed", INTEGERS, ids=ids)
    _check_packed("embed", packed, kind, rows, cols)


def dequantize(packed: Tensor, kind: str, rows: int, cols: int) -> None:
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


def int8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    stem = "int8_gemm"
    _expect_dtype(stem, (torch.int8,), x=x, weight=weight)
    _expect_dtype(stem, (torch.float32,), x_scales=x_scales, weight_scales=weight_scales)
    _expect_shape(stem, "x", x, ("...", "n"))
    _expect_shape(stem, "x_scales", x_scales, tuple(x.shape[:-1]))
    _expect_shape(stem, "weight", weight, ("m", x.shape[-1]))
    _expect_shape(stem, "weight_scales", weight_scales, weight.shape[:1])
    if bias is not None:
        _expect_dtype(stem, FLOATS, bias=bias)
        _expect_shape(stem, "bias", bias, weight.shape[:1])
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = str(dtype).removeprefix("torch.")
        raise MobileLLMError(f"[{stem}] dtype must be float32, bfloat16 or float16, got {got}")


def weight_only_linear(x: Tensor, codes: Tensor, scales: Tensor | None = None) -> None:
    _check_rows("weight_only_linear", x, codes, scales)


def head_sample(
    x: Tensor,
    codes: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    scales: Tensor | None = None,
) -> None:
    _check_rows("head_sample", x, codes, scales)
    if not 0 <= temperature < math.inf:
        raise MobileLLMError(
            f"[head_sample] temperature must be finite and at least 0, got {temperature}"
        )
    if len(codes) == 0:
        raise MobileLLMError("[head_sample] codes must have at least 1 row, got 0")


def _check_rows(stem: str, x: Tensor, codes: Tensor, scales: Tensor | None) -> None:
    """Check weights that are stored row by row."""
    _expect_dtype(stem, FLOATS, x=x)
    _expect_shape(stem, "x", x, ("...", "cols"))
    cols = x.shape[-1]
    groups = -(-cols // quant.GROUP)
    if scales is None:
        _expect_dtype(stem, (x.dtype,), codes=codes)
        _expect_shape(stem, "codes", codes, ("rows", cols))
        return
    _expect_dtype(stem, (torch.int8, torch.uint8), codes=codes)
    if codes.dtype == torch.uint8:
        _expect_shape(stem, "codes", codes, ("rows", groups * quant.GROUP // 2))
        shape, dtype = (len(codes), groups, 2), torch.float16
    else:
        _expect_shape(stem, "codes", codes, ("rows", cols))
        by_row = scales.ndim == 1
        shape = (len(codes),) if by_row else (len(codes), groups)
        dtype = torch.float32 if by_row else torch.float16
    _expect_dtype(stem, (dtype,), scales=scales)
    _expect_shape(stem, "scales", scales, shape)
