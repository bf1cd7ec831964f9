"""What the inputs of a model's linear layers look like on a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model import MobileLLM

SAMPLE = 512  # inputs kept of each layer, spread over the text
HEAD = "lm_head"


@dataclass
class Inputs:
    """The inputs of a layer on all passes of its block, so on those of a shared block together.

    Args:
        peak: (n,), the largest magnitude of each feature.
        moments: (n, n), the mean of `x x^T`.
        sample: (at most SAMPLE, n), some inputs.
    """

    peak: Tensor
    moments: Tensor
    sample: Tensor
    count: int = 0


@torch.no_grad()
def collect(lm: MobileLLM, ids: Tensor) -> dict[str, Inputs]:
    """Run a model and return the inputs of its linear layers.

    Layers with the same input are there once, under the first one's name: q_proj stands for k_proj
    and v_proj, gate_proj for up_proj. The head's is "lm_head", tied or not. Takes the memory of the
    moments, `4 n^2` bytes for each.

    Args:
        ids: (batch, seq) token ids; a batch at a time is run.
    """
    found: dict[str, Inputs] = {}
    handles = []
    passes = len(lm.config.schedule) // lm.config.num_hidden_layers
    keep = max(1, SAMPLE // (passes * len(ids)))

    def watch(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        if name not in found:
            n = x.shape[-1]
            found[name] = Inputs(x.new_zeros(n), x.new_zeros(n, n), x.new_empty(0, n))
        inputs = found[name]
        inputs.peak = torch.maximum(inputs.peak, x.abs().amax(0))
        inputs.moments.addmm_(x.t(), x)
        inputs.count += len(x)
        inputs.sample = torch.cat([inputs.sample, x[:: max(1, len(x) // keep)][:keep].clone()])

    for name, layer in distinct_layers(lm):
        hook = layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        handles.append(hook)
    try:
        for row in ids.split(1):
            watch(HEAD, lm.model(row))
    finally:
        for handle in handles:
            handle.remove()
    for inputs in found.values():
        inputs.moments /= inputs.count
    return found


def distinct_layers(lm: MobileLLM) -> Iterable[tuple[str, nn.Module]]:
    """The linear layers of the blocks, one of those that share an input."""
    for i, block in enumerate(lm.model.layers):
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            yield f"model.layers.{i}.{path}", block.get_submodule(path)


def input_of(name: str) -> str:
    """The name under which `collect` has the inputs of the matrix `name`."""
    layer = name.removesuffix(".weight")
    if layer == "model.embed_tokens":
        return HEAD
    for other, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        if layer.endswith(other):
            return layer.removesuffix(other) + first
    return layer
