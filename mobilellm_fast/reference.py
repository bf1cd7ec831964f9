"""Every op in plain PyTorch: the specification that kernels are tested against.

Sums and transcendental functions run in float32 (in float64 where an input is float64) and are
rounded once to the dtype of the result, so the same code gives the truth in float64 and shows what
float32 rounding costs. Nothing here is fast, and nothing checks its arguments: `ops` does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quant
from .quant import GROUP, TILE_ROWS, PackedWeight, tile_nbytes

# Rows that stay below this count as zeros when rounded: the reciprocal of a scale must be finite.
TINY = 2.0**-100


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square: `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: (..., n) float.
        weight: (n,) float.
        eps: added to the mean square.

    Returns:
        (..., n), dtype of `x`.

    Reference: Zhang and Sennrich, https://arxiv.org/abs/1910.07467
    """
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (x[i], x[i + head_dim / 2]) of every head by its position's angle.

    Args:
        x: (batch, seq, heads, head_dim) float.
        cos, sin: (seq, head_dim / 2) or (batch, seq, head_dim / 2), see `mobilellm_fast.rope`.

    Returns:
        (batch, seq, heads, head_dim), dtype of `x`.

    Reference: Su et al., https://arxiv.org/abs/2104.09864, in the half-split order of Llama
    """
    first, second = _wide(x).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # broadcast over heads
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attend causally, query heads sharing key/value heads: `softmax(q k^T scale + mask) v`.

    Query i is the (kv_seq - seq + i)-th token: it sees the keys up to and including its own.
    Query head h reads key/value head `h // (heads / kv_heads)`.

    Args:
        q: (batch, seq, heads, head_dim) float.
        k, v: (batch, kv_seq, kv_heads, head_dim) float, kv_seq >= seq.
        scale: factor of the scores; None means `head_dim ** -0.5`.

    Returns:
        (batch, seq, heads, head_dim), dtype of `q`.

    Reference: Ainslie et al., https://arxiv.org/abs/2305.13245
    """
    batch, seq, heads, head_dim = q.shape
    kv_seq, kv_heads = k.shape[1:3]
    grouped = _wide(q).reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bskgd,btkd->bkgst", grouped, _wide(k))
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    visible = torch.ones(seq, kv_seq, dtype=torch.bool, device=q.device).tril(kv_seq - seq)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = torch.einsum("bkgst,btkd->bskgd", weights, _wide(v))
    return out.reshape(q.shape).to(q.dtype)


def gqa_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attend with one new token per sequence to its KV cache: `softmax(q k^T scale) v`.

    Args:
        q: (batch, heads, head_dim) float.
        k_cache, v_cache: (batch, kv_heads, capacity, head_dim) float, dtype of `q`.
        lengths: (batch,) int32, tokens of each sequence; those beyond capacity count as capacity.
            What the cache holds behind them does not matter. No tokens give zeros.
        scale: factor of the scores; None means `head_dim ** -0.5`.

    Returns:
        (batch, heads, head_dim), dtype of `q`.

    Reference: Ainslie et al., https://arxiv.org/abs/2305.13245
    """
    batch, heads, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    visible = torch.arange(capacity, device=q.device) < lengths[:, None]  # (batch, capacity)
    k, v = (
        _wide(t).masked_fill(~visible[:, None, :, None], 0.0)  # 0 * NaN is not 0
        for t in (k_cache, v_cache)
    )
    grouped = _wide(q).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bkgd,bktd->bkgt", grouped, k)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    empty = (lengths <= 0)[:, None]
    weights = scores.masked_fill(~(visible | empty)[:, None, None], float("-inf")).softmax(-1)
    out = torch.einsum("bkgt,bktd->bkgd", weights, v)
    return out.reshape(q.shape).to(q.dtype)


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Gate one projection with another: `silu(x gate^T) * (x up^T)`, `silu(t) = t / (1 + e^-t)`.

    Args:
        x: (..., n) float.
        gate_weight, up_weight: (m, n) float.

    Returns:
        (..., m), dtype of `x`.

    Reference: Shazeer, https://arxiv.org/abs/2002.05202
    """
    gate = F.linear(_wide(x), _wide(gate_weight))
    up = F.linear(_wide(x), _wide(up_weight))
    return (F.silu(gate) * up).to(x.dtype)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 on its own scale: `code = round(x / scale)`, halves to even.

    Args:
        x: (..., n) float32.

    Returns:
        codes: (..., n) int8 in [-127, 127].
        scales: (...) float32, `max|x| / 127`; 0 where `max|x|` is below `TINY`.
    """
    codes, scales = round_rows(x)
    return codes.to(torch.int8), scales


def linear(
    x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str = "float"
) -> Tensor:
    """Multiply by a packed weight matrix: `x W^T`, with `x` rounded as asked.

    Args:
        x: (..., cols) float.
        packed: the data of a `quant.PackedWeight`: flat uint8 tiles, or (rows, cols) float32, or
            the bits of (rows, cols) bfloat16 as a 16-bit integer.
        kind: "fp32", "bf16", "int8", "int8_g32" or "int4_g32", see `mobilellm_fast.quant`.
        rows, cols: output and input features.
        activation: "float" leaves `x` as it is; the others round it to 8-bit codes, symmetrically:
            "int8" with one scale per row, "int8_g32" with one per group of 32 inputs, and to 16
            bits in groups with one large and many small inputs, see `round_activations`.

    Returns:
        (..., rows), dtype of `x`.

    Numerics: products and sums in float64, in which those of integers are exact.
    """
    if activation == "float":
        weight = dequantize(packed, kind, rows, cols)
        return F.linear(x.to(torch.float64), weight.to(torch.float64)).to(x.dtype)
    rounded = x.to(torch.float32)
    if kind != "int8":
        weight = dequantize(packed, kind, rows, cols).to(torch.float64)
        return F.linear(round_activations(rounded, activation), weight).to(x.dtype)
    weight = quant.unpack(PackedWeight(kind, rows, cols, packed.cpu().numpy()))
    codes, scales = (
        torch.from_numpy(array).to(x.device) for array in (weight.codes, weight.scales)
    )
    codes = codes.to(torch.float64)
    if activation == "int8":  # an exact integer, scaled in float32
        row_codes, row_scales = round_rows(rounded)
        total = F.linear(row_codes.to(torch.float64), codes).to(torch.float32)
        return (total * row_scales.unsqueeze(-1) * scales).to(x.dtype)
    return (F.linear(round_activations(rounded, activation), codes) * scales).to(x.dtype)


def embed(ids: Tensor, packed: Tensor, kind: str, rows: int, cols: int) -> Tensor:
    """Look rows of a packed matrix up.

    Args:
        ids: (...) int64 in [0, rows).
        packed, kind, rows, cols: as for `linear`.

    Returns:
        (..., cols) float32, or bfloat16 for kind "bf16".
    """
    if kind in ("fp32", "bf16"):
        return F.embedding(ids, dequantize(packed, kind, rows, cols))
    # only the tiles that hold the wanted rows are unpacked
    tiles, place = torch.unique(ids // TILE_ROWS, return_inverse=True)
    wanted = packed.view(-1, tile_nbytes(kind, cols))[tiles]
    table = dequantize(wanted.flatten(), kind, len(tiles) * TILE_ROWS, cols)
    return F.embedding(place * TILE_ROWS + ids % TILE_ROWS, table)


def dequantize(packed: Tensor, kind: str, rows: int, cols: int) -> Tensor:
    """Return the values of a packed matrix: (rows, cols) float32, or bfloat16 for kind "bf16"."""
    if kind == "fp32":
        return packed.clone()
    if kind == "bf16":
        return packed.view(torch.bfloat16).clone()
    weight = PackedWeight(kind, rows, cols, packed.cpu().numpy())
    return torch.from_numpy(weight.dequantize()).to(packed.device)


def round_activations(x: Tensor, activation: str) -> Tensor:
    """Return x (..., n) float32 as its codes see it: (..., n) float64.

    "int8" takes one scale per row, "int8_g32" one per group of 32. There, if the squares of all
    codes sum up to no more than 1.75 times the largest one, what the codes leave is rounded to
    another 8 bits: the largest input has left too little of the first 8 to the others.
    """
    if activation == "int8":
        codes, scales = round_rows(x)
        return codes.to(torch.float64) * scales.unsqueeze(-1)
    cols = x.shape[-1]
    groups = F.pad(x, (0, -cols % GROUP)).unflatten(-1, (-1, GROUP))
    codes, scales = round_rows(groups)
    wide = codes.square().sum(-1, keepdim=True) <= 7 * 127**2 // 4
    rest = groups * _inverse_scale(groups.abs().amax(-1)).unsqueeze(-1) - codes
    low = torch.where(wide, torch.round(rest * 254), 0)
    scales, low_scales = scales.unsqueeze(-1), (scales * torch.tensor(1 / 254)).unsqueeze(-1)
    values = codes.to(torch.float64) * scales + low.to(torch.float64) * low_scales
    return values.flatten(-2)[..., :cols]


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x (..., n) to integers in [-127, 127].

    Returns:
        codes (..., n), whole numbers in the dtype of `x`, and scales (...); x is about
        `codes * scales`.
    """
    peak = x.abs().amax(-1)
    codes = torch.round(x * _inverse_scale(peak).unsqueeze(-1))
    return codes, torch.where(peak >= TINY, peak / 127, 0)


def _inverse_scale(peak: Tensor) -> Tensor:
    # not `127 / peak`, which torch computes as a reciprocal and a product, rounding twice
    return torch.where(peak >= TINY, torch.full_like(peak, 127) / peak, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
