"""Our GPU executors as the benchmark drives them, and what stands in for them on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from gpu_plain import PlainModel, Weights
from gpu_timing import synchronize
from torch import Tensor

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.quant import GROUP

TIERS = ("graph", "pdl", "persistent", "ring")
STAND_IN_TOKENS = 128  # of the caches of what stands in for ours


def executor(
    config: MobileLLMConfig,
    weights: Weights,
    kind: str = "bf16",
    tier: str = "auto",
    dry: bool = False,
):
    """Make an executor, or on a CPU the stand-in.

    Args:
        config: the architecture.
        weights: bf16, by name of `expected_shapes(config)`.
        kind: what they are stored as, "bf16", "int8" or "int4" (with an int8 head).
        tier: one of `TIERS`, or "auto".

    Raises:
        RuntimeError: it is not of the tier that was asked for.
    """
    if dry:
        return StandIn(config, weights)
    from mobilellm_fast.cuda.executor import CudaExecutor

    made = CudaExecutor(config, cuda_weights(config, weights, kind), tier=tier)
    if tier not in ("auto", made.tier):
        raise RuntimeError(f"asked for tier {tier!r}, got {made.tier!r}")
    return made


def cuda_weights(config: MobileLLMConfig, weights: Weights, kind: str):
    """Store weights as the executors read them; quantized here on the device, as they are drawn."""
    from mobilellm_fast.cuda.weights import CudaWeights

    def block(index: int, *paths: str) -> Tensor:
        names = (f"model.layers.{index}.{path}.weight" for path in paths)
        return torch.cat([weights[name] for name in names])

    def stack(*paths: str):
        blocks = range(config.num_hidden_layers)
        return matrix(torch.stack([block(index, *paths) for index in blocks]), body)

    def norms(path: str) -> Tensor:
        blocks = range(config.num_hidden_layers)
        return torch.stack([block(index, path) for index in blocks]).float()

    body, ends = {"int4": ("int4_g32", "int8")}.get(kind, (kind, kind))
    embedding = matrix(weights["model.embed_tokens.weight"], ends)
    tied = config.tie_word_embeddings
    return CudaWeights(
        config,
        qkv=stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=stack("self_attn.o_proj"),
        gate_up=stack("mlp.gate_proj", "mlp.up_proj"),
        down=stack("mlp.down_proj"),
        attention_norms=norms("input_layernorm"),
        ffn_norms=norms("post_attention_layernorm"),
        final_norm=weights["model.norm.weight"].float(),
        embedding=embedding,
        head=embedding if tied else matrix(weights["lm_head.weight"], ends),
    )


def matrix(values: Tensor, kind: str):
    """Store a matrix, or one of every block: (..., rows, cols) bf16."""
    from mobilellm_fast.cuda.weights import Matrix

    size = values.shape[-2:]
    if kind == "bf16":
        return Matrix(kind, *size, values.contiguous())
    if kind == "int8":
        scales = values.abs().amax(-1).float() / 127
        codes = (values / scales[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return Matrix(kind, *size, codes, scales)
    groups = values.float().unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scales = torch.stack(((high - low) / 15, low), -1).half()
    steps = (groups - scales[..., 1:].float()) / scales[..., :1].float()
    codes = steps.round_().clamp_(0, 15).to(torch.uint8)
    halves = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
    return Matrix(kind, *size, halves.flatten(-2), scales)


def plain_weights(executor, weights: Weights) -> Weights:
    """Return the values that an executor has of `weights`, float32, by name."""
    if isinstance(executor, StandIn) or executor.weights.qkv.kind == "bf16":
        return {name: weight.float() for name, weight in weights.items()}
    config, stored = executor.config, executor.weights
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    found = {name: weight.float() for name, weight in weights.items() if weight.ndim == 1}
    found["model.embed_tokens.weight"] = stored.embedding.dequantize()
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = stored.head.dequantize()
    for index in range(config.num_hidden_layers):
        queries, keys, values = stored.qkv[index].dequantize().split((width, kv_width, kv_width))
        gate, up = stored.gate_up[index].dequantize().chunk(2)
        block = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": values}
        block |= {"self_attn.o_proj": stored.output[index].dequantize(), "mlp.gate_proj": gate}
        block |= {"mlp.up_proj": up, "mlp.down_proj": stored.down[index].dequantize()}
        found |= {f"model.layers.{index}.{name}.weight": part for name, part in block.items()}
    return found


class Ours:
    """An executor with prompts in its caches, timed like a peer of `gpu_peers`."""

    def __init__(self, executor, ids: list[list[int]]) -> None:
        self.executor, self.context = executor, len(ids[0])
        self.caches = [executor.new_cache() for _ in ids]
        logits = [executor.forward(i, c) for i, c in zip(ids, self.caches, strict=True)]
        self.following = [int(np.asarray(row)[-1].argmax()) for row in logits]
        self.device = executor.weights.device

    def decode(self, count: int) -> tuple[float, list[int]]:
        """Run greedy steps after the prompts; returns seconds, and the ids of the first one."""
        for cache in self.caches:
            cache.truncate(self.context)
        synchronize(self.device)
        started = perf_counter()
        if len(self.caches) == 1:
            found, _ = self.executor.decode(self.caches[0], self.following[0], count)
        else:
            found = self.executor.decode_batch(self.caches, self.following, count)[0].tolist()
        synchronize(self.device)
        taken = perf_counter() - started
        if len(found) != count:
            raise RuntimeError(f"asked for {count} tokens, got {len(found)}")
        return taken, found


class StandIn:
    """Has the interface of a GPU executor and runs on a CPU; slow, and only to try things out."""

    tier = "stand-in"

    def __init__(self, config: MobileLLMConfig, weights: Weights) -> None:
        self.config, self.weights = config, StandInWeights(weights)

    def new_cache(self) -> "StandInCache":
        return StandInCache(PlainModel(self.config, self.weights.by_name, STAND_IN_TOKENS))

    def forward(self, token_ids: Sequence[int], cache, all_logits: bool = False) -> np.ndarray:
        model, end = cache.model, cache.length + len(token_ids)
        tokens = torch.tensor([list(token_ids)])
        logits = model.forward(tokens, model.places[cache.length : end])[0].float().numpy()
        cache.length = end
        return logits if all_logits else logits[-1:]

    def decode(self, cache, token_id: int, count: int) -> tuple[list[int], list[float]]:
        found = []
        for _ in range(count):
            token_id = int(self.forward([token_id], cache)[-1].argmax())
            found.append(token_id)
        return found, [0.0] * count

    def decode_batch(self, caches, token_ids: Sequence[int], count: int) -> np.ndarray:
        pairs = zip(caches, token_ids, strict=True)
        return np.array([self.decode(cache, token_id, count)[0] for cache, token_id in pairs])


@dataclass
class StandInWeights:
    by_name: Weights

    @property
    def device(self) -> torch.device:
        return self.by_name["model.norm.weight"].device


class StandInCache:
    def __init__(self, model: PlainModel) -> None:
        self.model, self.length = model, 0

    def truncate(self, tokens: int) -> None:
        self.length = tokens
