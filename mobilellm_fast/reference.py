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


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a residual, then norm the sum: `rms_norm(x + residual, weight, eps)`.

    Args:
        x, residual: (..., n) float of one dtype.
        weight: (n,) float.
        eps: as for `rms_norm`.

    Returns:
        The norm of the sum, and the sum, which is the next residual: (..., n), dtype of `x`.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


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
) -> Tensor:
    """Attend, then feed forward, each on the normed residual stream and added to it.

    `y = x + attention(rms_norm(x))`, `y + swiglu(rms_norm(y)) down^T`

    Args:
        x: (batch, seq, n) float.
        input_norm, post_norm: (n,) float.
        q_weight: (heads * head_dim, n) float.
        k_weight, v_weight: (kv_heads * head_dim, n) float.
        o_weight: (n, heads * head_dim) float.
        gate_weight, up_weight: (m, n) float.
        down_weight: (n, m) float.
        cos, sin: as for `rope`.
        head_dim: of an attention head.
        eps: as for `rms_norm`.

    Returns:
        (batch, seq, n), dtype of `x`.

    Reference: Touvron et al., https://arxiv.org/abs/2302.13971
    """
    normed = rms_norm(x, input_norm, eps)
    q, k, v = (
        _product(normed, weight).unflatten(-1, (len(weight) // head_dim, head_dim))
        for weight in (q_weight, k_weight, v_weight)
    )
    attended = gqa_attention(rope(q, cos, sin), rope(k, cos, sin), v).flatten(-2)
    middle = x + _product(attended, o_weight)
    inner = swiglu(rms_norm(middle, post_norm, eps), gate_weight, up_weight)
    return middle + _product(inner, down_weight)


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


def int8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply rounded inputs with rounded weights: `(x weight^T) x_scales weight_scales + bias`.

    Args:
        x: (..., n) int8.
        x_scales: (...) float32, one per token.
        weight: (m, n) int8.
        weight_scales: (m,) float32, one per output channel.
        bias: (m,) float, or None.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        (..., m), `dtype`.

    Numerics: sums are exact; every further step is rounded to float32, the last one to `dtype`.
    """
    total = F.linear(x.to(torch.float64), weight.to(torch.float64)).to(torch.float32)
    scaled = total * x_scales.unsqueeze(-1) * weight_scales
    return (scaled if bias is None else scaled + bias.to(torch.float32)).to(dtype)


def weight_only_linear(x: Tensor, codes: Tensor, scales: Tensor | None = None) -> Tensor:
    """Multiply by weights stored row by row: `x W^T`.

    Args:
        x: (..., cols) float.
        codes: float weights of the dtype of `x`, (rows, cols); int8 ones (rows, cols); or pairs of
            4-bit ones, (rows, groups * 16) uint8, where byte j of group g holds input 32 g + j in
            its low half and input 32 g + 16 + j in the high one.
        scales: None for float weights; of int8 ones (rows,) float32, or (rows, groups) float16 for
            groups of 32 inputs; of 4-bit ones (rows, groups, 2) float16, scale and min.

    Returns:
        (..., rows), dtype of `x`.
    """
    wide = _wide(x)
    weight = dequantize_rows(codes, scales, x.shape[-1]).to(wide.dtype)
    return F.linear(wide, weight).to(x.dtype)


def head_sample(
    x: Tensor,
    codes: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a row of the head for each hidden state, by its logit or at random.

    Args:
        x: (..., cols) float.
        codes, scales: the head's weights, as for `weight_only_linear`.
        temperature: 0 takes the largest logit (of equal ones the first); above, row i of hidden
            state t is drawn with `softmax(logits / temperature)`: it is the largest of
            `logits / temperature + gumbel(seed, t * rows + i)`.
        seed: of the noise, in 64 bits.

    Returns:
        ids: (...) int64.
        logprobs: (...) float32, the log-probability of each id at temperature 1.
    """
    wide = _wide(x)
    logits = F.linear(wide, dequantize_rows(codes, scales, x.shape[-1]).to(wide.dtype))
    scores = logits
    if temperature > 0:
        numbers = torch.arange(logits.numel(), device=x.device).view(logits.shape)
        scores = logits / temperature + gumbel(seed, numbers)
    ids = scores.argmax(-1)
    chosen = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1))
    return ids, chosen.squeeze(-1).to(torch.float32)


def linear(
    x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str = "float"
) -> Tensor:
    """Multiply by a packed weight matrix: `x W^T`, with `x` rounded as asked.

    Args:
        x: (..., cols) float.
        packed: the data of a `quant.PackedWeight`: flat uint8 tiles, or (rows, cols) float32, or
            the bits of (rows, cols) bfloat16 as a 16-bit integer.
        kind: one of `quant.KINDS`, see there.
        rows, cols: output and input features.
        activation: "float" leaves `x` as it is; the others round it to 8-bit codes, symmetrically:
            "int8" with one scale per row, "int8_g32" with one per group of 32 inputs, and to 16
            bits in groups with one large and many small inputs, see `round_activations`;
            "int8_g32_plain" to 8 bits in all of them.

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

    Raises:
        IndexError: an id is out of range (on a CPU).
    """
    if kind in ("fp32", "bf16"):
        return F.embedding(ids, dequantize(packed, kind, rows, cols))
    if not ids.numel():
        return packed.new_zeros(*ids.shape, cols, dtype=torch.float32)
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError(f"index out of range: ids must be in [0, {rows})")
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


def dequantize_rows(codes: Tensor, scales: Tensor | None, cols: int) -> Tensor:
    """Return the values (rows, cols) of weights stored as `weight_only_linear` takes them."""
    if scales is None:
        return codes
    scales = scales.to(torch.float32)
    if scales.ndim == 1:
        return codes * scales.unsqueeze(-1)
    if codes.dtype == torch.uint8:
        pairs = codes.unflatten(-1, (-1, GROUP // 2))
        values = torch.cat((pairs & 15, pairs >> 4), -1) * scales[..., :1] + scales[..., 1:]
    else:
        groups = F.pad(codes, (0, -cols % GROUP)).unflatten(-1, (-1, GROUP))
        values = groups * scales.unsqueeze(-1)
    return values.flatten(-2)[..., :cols]


def gumbel(seed: int, numbers: Tensor) -> Tensor:
    """Return the Gumbel noise of a seed with these numbers (int64), in their shape, float64.

    Numerics: 32 bits of Philox 4x32 with 10 rounds make u; noise is -log(-log(1 - u)).

    Reference: Salmon et al., https://doi.org/10.1145/2063384.2063405
    """
    low, high = numbers & 0xFFFFFFFF, numbers >> 32 & 0xFFFFFFFF
    counter = [low, high, torch.zeros_like(low), torch.zeros_like(low)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        # products of 32 bits: 64 bits of them are right even where int64 overflows
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 & 0xFFFFFFFF ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 & 0xFFFFFFFF ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    u = (counter[0].to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def round_activations(x: Tensor, activation: str) -> Tensor:
    """Return x (..., n) float32 as its codes see it: (..., n) float64.

    "int8" takes one scale per row, "int8_g32" one per group of 32. There, if the squares of all
    codes sum up to no more than 1.75 times the largest one, what the codes leave is rounded to
    another 8 bits: the largest input has left too little of the first 8 to the others.
    "int8_g32_plain" leaves that out.
    """
    if activation == "int8":
        codes, scales = round_rows(x)
        return codes.to(torch.float64) * scales.unsqueeze(-1)
    cols = x.shape[-1]
    groups = F.pad(x, (0, -cols % GROUP)).unflatten(-1, (-1, GROUP))
    codes, scales = round_rows(groups)
    energy = codes.square().sum(-1, keepdim=True)
    wide = (energy <= 7 * 127**2 // 4) & (activation == "int8_g32")
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


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(_wide(x), _wide(weight)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
