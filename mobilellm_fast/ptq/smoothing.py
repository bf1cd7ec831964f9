"""Moves what makes inputs hard to round into weights, at no cost when the model runs.

A feature whose values are far larger than the others' leaves these few of the 8 bits of a token.
Where two layers meet, the feature can be made smaller in the first and its column larger in the
second, and the model is the same function:

    norm -> q, k, v      norm -> gate, up      norm -> head (untied)
    v -> o               up -> down

A shared block is scaled once for all its passes, which the statistics cover.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .statistics import HEAD, Inputs

if TYPE_CHECKING:
    from ..model import MobileLLM

STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # 0 leaves it all to the activations
LEAST = 1e-5  # of a peak: a feature that is always zero must not be divided by


@torch.no_grad()
def smooth_(lm: MobileLLM, inputs: dict[str, Inputs]) -> dict[str, float]:
    """Scale features in place, each place by the strength with the least error of its layers.

    The scale of feature j is `peak_j^s / w_j^(1 - s)`, w_j the largest weight of its column.

    Args:
        inputs: of `collect`, for this model.

    Returns:
        The strength s chosen for each layer of `inputs`.

    Reference: Xiao et al., https://arxiv.org/abs/2211.10438, with the strength searched
    """
    chosen = {}
    for i, block in enumerate(lm.model.layers):
        attention, mlp, name = block.self_attn, block.mlp, f"model.layers.{i}"
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        kv_heads = lm.config.num_key_value_heads
        for path, followers, before, shape in (
            ("self_attn.q_proj", (q, k, v), block.input_layernorm, None),
            ("self_attn.o_proj", (attention.o_proj,), v, (kv_heads, -1, lm.config.head_dim)),
            ("mlp.gate_proj", (mlp.gate_proj, mlp.up_proj), block.post_attention_layernorm, None),
            ("mlp.down_proj", (mlp.down_proj,), mlp.up_proj, None),
        ):
            key = f"{name}.{path}"
            chosen[key] = _smooth_place(inputs[key], followers, before, shape)
    if not lm.config.tie_word_embeddings:
        chosen[HEAD] = _smooth_place(inputs[HEAD], (lm.lm_head,), lm.model.norm, None)
    return chosen


def _smooth_place(
    inputs: Inputs,
    followers: tuple[nn.Module, ...],
    before: nn.Module,
    heads: tuple[int, int, int] | None,
) -> float:
    """Scale one place; `heads` are (KV heads, queries per KV head, head_dim) behind v."""
    weights = [layer.weight.data for layer in followers]
    x = inputs.sample
    wanted = [x @ w.t() for w in weights]
    best = (float("inf"), 0.0, None)
    for strength in STRENGTHS:
        scale = _scale(inputs.peak, weights, strength, heads)
        rounded = _round_rows(x / scale)
        error = sum(
            ((rounded @ _round_rows(w * scale).t() - y).square().mean() / y.square().mean()).item()
            for w, y in zip(weights, wanted, strict=True)
        )
        best = min(best, (error, strength, scale), key=lambda entry: entry[0])
    _, strength, scale = best
    if strength:
        for weight in weights:
            weight *= scale
        # queries of a group read the same value: one scale for all of them
        own = scale if heads is None else scale.view(heads)[:, 0].flatten()
        target = before.weight.data
        target /= own if target.ndim == 1 else own[:, None]
    return strength


def _scale(
    peak: Tensor, weights: list[Tensor], strength: float, heads: tuple[int, int, int] | None
) -> Tensor:
    if not strength:
        return torch.ones_like(peak)
    widest = torch.cat(weights).abs().amax(0)
    if heads is not None:
        peak, widest = (
            t.view(heads).amax(1, keepdim=True).expand(t.view(heads).shape).flatten()
            for t in (peak, widest)
        )
    scale = peak.clamp(min=LEAST) ** strength / widest.clamp(min=LEAST) ** (1 - strength)
    return scale / scale.log().mean().exp()


def _round_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale
