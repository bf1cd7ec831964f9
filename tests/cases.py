"""The table of cases: for each op stem, sizes and how to make its arguments from them.

Tests check every case of `CASES`; benchmarks check and time those of whole models, `model_cases`.
Argument order is the op's.
"""

from collections.abc import Callable

import numpy as np
import torch

from mobilellm_fast import _C, quant
from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.rope import cos_sin

WIDTHS = (576, 960, 1152, 1280, 1600)  # hidden sizes of MobileLLM-125M ... 1.5B
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33)  # every remainder of a register tile, and two chunks

CASES: dict[str, list[dict]] = {
    "rms_norm": [
        *({"rows": 3, "cols": cols} for cols in (1, 2, 15, 16, 17, 31, 45, *WIDTHS)),
        *({"rows": rows, "cols": 576} for rows in ROWS),
    ],
    "rope": [
        *(
            {"batch": 2, "seq": 5, "heads": 3, "head_dim": dim}
            for dim in (2, 6, 14, 30, 32, 34, 64, 80, 128)
        ),
        {"batch": 1, "seq": 1, "heads": 25, "head_dim": 64},
        {"batch": 1, "seq": 300, "heads": 9, "head_dim": 64},
    ],
    "gqa_attention": [
        *(
            {"batch": 2, "seq": 9, "kv_seq": 9, "heads": heads, "kv_heads": 2, "head_dim": 64}
            for heads in (2, 4, 6, 8, 10, 12, 14, 16)
        ),
        *(
            {"batch": 1, "seq": 7, "kv_seq": 20, "heads": 3, "kv_heads": 1, "head_dim": dim}
            for dim in (2, 6, 14, 30, 34, 80, 128)
        ),
        # around one and two pages of 128 tokens, whole and continued
        *(
            {"batch": 1, "seq": seq, "kv_seq": kv_seq, "heads": 9, "kv_heads": 3, "head_dim": 64}
            for kv_seq in (1, 15, 17, 127, 128, 129, 257)
            for seq in {1, kv_seq}
        ),
    ],
    "swiglu": [
        *(
            {"rows": 3, "inner": inner, "cols": cols}
            for inner, cols in ((1, 1), (17, 33), (31, 45), (1536, 576), (2560, 960))
        ),
        *({"rows": rows, "inner": 80, "cols": 576} for rows in ROWS),
    ],
    "quantize_per_token": [
        *({"rows": 3, "cols": cols} for cols in (1, 2, 15, 16, 17, 31, 45, *WIDTHS)),
        *({"rows": rows, "cols": 576} for rows in ROWS),
    ],
    "linear": [
        *(
            {"rows": 3, "outputs": outputs, "cols": cols}
            for outputs, cols in (
                *((1, 1), (15, 31), (16, 32), (17, 33), (45, 63), (49, 96)),
                *((576, 576), (192, 576), (1536, 576), (576, 1536), (320, 960), (960, 2560)),
                *((384, 1152), (1280, 1280), (320, 1600), (80, 4352)),
            )
        ),
        *({"rows": rows, "outputs": 40, "cols": 576} for rows in ROWS),
    ],
}

# Weight kinds of `linear`, each with what its inputs may be rounded to.
LINEAR_KINDS = [
    ("fp32", "float"),
    ("bf16", "float"),
    *((kind, activation) for kind in quant.QUANTIZED_KINDS for activation in ("int8_g32", "int8")),
    *((kind, "int8_g32_plain") for kind in ("int8", "int8_g32")),
]


DECODE, PREFILL = 1, 128  # rows of a decode step, and of a chunk of a prompt


def model_cases(config: MobileLLMConfig) -> dict[str, list[dict]]:
    """List, per op stem, the sizes that a model of this shape runs it with.

    The head sees one row only: a prompt needs the logits of its last token.
    """
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    projections = ((heads * dim, hidden), (kv_heads * dim, hidden), (hidden, inner))
    attention = ((1, 128), (1, 512), (1, 2048), (PREFILL, PREFILL), (PREFILL, 512))
    by_row = [{"rows": rows, "cols": hidden} for rows in (DECODE, PREFILL)]
    return {
        "rms_norm": by_row,
        "quantize_per_token": by_row,
        "rope": [
            {"batch": 1, "seq": rows, "heads": heads, "head_dim": dim} for rows in (DECODE, PREFILL)
        ],
        "gqa_attention": [
            dict(batch=1, seq=seq, kv_seq=kv_seq, heads=heads, kv_heads=kv_heads, head_dim=dim)
            for seq, kv_seq in attention
        ],
        "swiglu": [{"rows": rows, "inner": inner, "cols": hidden} for rows in (DECODE, PREFILL)],
        "linear": [
            *(
                {"rows": rows, "outputs": outputs, "cols": cols}
                for outputs, cols in projections
                for rows in (DECODE, PREFILL)
            ),
            {"rows": DECODE, "outputs": config.vocab_size, "cols": hidden},
        ],
    }


def each_case(*stems: str) -> list[tuple[str, dict]]:
    """List (stem, sizes) of the given stems, or of all."""
    return [(stem, sizes) for stem in stems or CASES for sizes in CASES[stem]]


def case_id(value) -> str | None:
    """Name a case for pytest: `cols=576-rows=3`."""
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def make_args(stem: str, sizes: dict, seed: int = 0, **options) -> tuple:
    """Return random float32 arguments of an op.

    Args:
        stem: name of the op.
        sizes: one entry of `CASES[stem]`.
        options: for `linear` and `swiglu`, the weights' `kind` and the `activation`.
    """
    return _MAKERS[stem](np.random.default_rng(seed), **sizes, **options)


def run_kernel(stem: str, args: tuple, isa: str = "") -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Call the C++ kernel of an op, its outputs prefilled with NaN (codes: with 99).

    Args:
        stem: name of the op.
        args: from `make_args`.
        isa: name of a kernel table; the best if empty.

    Returns:
        The output, or the outputs of an op with several.
    """
    call, out = bind_kernel(stem, args, isa)
    call()
    return out


def bind_kernel(
    stem: str, args: tuple, isa: str = "", threads: int = 1
) -> tuple[Callable[[], None], torch.Tensor | tuple[torch.Tensor, ...]]:
    """Prepare a call of the C++ kernel of an op; arguments as for `run_kernel`.

    Returns:
        A function that computes, and the output or outputs that it writes to.
    """
    if stem == "quantize_per_token":
        (x,) = args
        codes, scales = np.full(x.shape, 99, np.int8), np.full(len(x), np.nan, np.float32)
        outputs = (torch.from_numpy(codes), torch.from_numpy(scales))
        return lambda: _C.quantize_per_token(x.numpy(), codes, scales, isa), outputs
    x = args[0].numpy()
    if stem == "rms_norm":
        weight, eps = args[1].numpy(), args[2]
        out = np.full(x.shape, np.nan, np.float32)

        def call():
            _C.rms_norm(x, weight, eps, out, isa)
    elif stem == "rope":
        cos, sin = args[1].numpy(), args[2].numpy()
        out = np.full(x.shape, np.nan, np.float32)

        def call():
            for one, result in zip(x, out, strict=True):
                _C.rope(one, cos, sin, result, isa)
    elif stem == "gqa_attention":
        k, v = args[1].numpy(), args[2].numpy()
        scale = args[3] or x.shape[-1] ** -0.5
        out = np.full(x.shape, np.nan, np.float32)

        def call():
            for i, result in enumerate(out):
                _C.gqa_attention(x[i], k[i], v[i], scale, result, isa)
    elif stem == "swiglu":
        _, gate, up, kind, activation = (*args, "fp32", "float")[:5]
        rows, cols = (len(gate), x.shape[1]) if len(args) == 3 else args[5:]
        out = np.full((len(x), rows), np.nan, np.float32)
        gate, up = ((kind, rows, cols, w.numpy()) for w in (gate, up))

        def call():
            _C.swiglu(x, gate, up, out, activation, isa, threads)
    elif stem == "linear":
        _, packed, kind, rows, cols, activation = args
        out = np.full((len(x), rows), np.nan, np.float32)
        weight = (kind, rows, cols, packed.numpy())

        def call():
            _C.linear(x, weight, out, activation, isa, threads)

    return call, torch.from_numpy(out)


def _normal(rng: np.random.Generator, *shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, spread, shape).astype(np.float32))


def _rms_norm(rng, rows, cols):
    return _normal(rng, rows, cols), _normal(rng, cols), 1e-5


def _rope(rng, batch, seq, heads, head_dim):
    config = MobileLLMConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=1
    )
    cos, sin = (torch.from_numpy(t) for t in cos_sin(config, np.arange(seq)))
    return _normal(rng, batch, seq, heads, head_dim), cos, sin


def _gqa_attention(rng, batch, seq, kv_seq, heads, kv_heads, head_dim):
    # twice the usual spread of scores: some weights near 1, most near 0
    q = _normal(rng, batch, seq, heads, head_dim, spread=2.0)
    k, v = (_normal(rng, batch, kv_seq, kv_heads, head_dim) for _ in range(2))
    return q, k, v, None


def _swiglu(rng, rows, inner, cols, kind="fp32", activation="float"):
    gate, up = (_normal(rng, inner, cols, spread=2 * cols**-0.5) for _ in range(2))
    x = _normal(rng, rows, cols)
    if kind == "fp32":
        return x, gate, up
    # the kernel of the engine; the torch operator takes float32 weights only
    gate, up = (torch.from_numpy(quant.pack(w.numpy(), kind).data) for w in (gate, up))
    return x, gate, up, kind, activation, inner, cols


def _quantize_per_token(rng, rows, cols):
    return (_normal(rng, rows, cols) * torch.logspace(-6, 6, rows).unsqueeze(-1),)


def _linear(rng, rows, outputs, cols, kind="fp32", activation="float"):
    weight = quant.pack(_normal(rng, outputs, cols, spread=cols**-0.5).numpy(), kind)
    packed = torch.from_numpy(weight.data)
    return _normal(rng, rows, cols), packed, kind, outputs, cols, activation


_MAKERS: dict[str, Callable[..., tuple]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "gqa_attention": _gqa_attention,
    "swiglu": _swiglu,
    "quantize_per_token": _quantize_per_token,
    "linear": _linear,
}
