"""The model in plain PyTorch with a static KV cache, as a careful user writes it by hand.

Two peers are made of it: the step captured in a CUDA graph, and the step compiled as gpt-fast does.
In float32 it is the reference of the gates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from mobilellm_fast.config import MobileLLMConfig, expected_shapes
from mobilellm_fast.rope import cos_sin

Weights = dict[str, Tensor]


def random_weights(
    config: MobileLLMConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Weights:
    """Make weights under which every part of the model matters, by name; the same in every process.

    Variance is kept from layer to layer; logits have a standard deviation of about 2.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            values *= 2 * config.hidden_size**-0.5
        else:
            values *= shape[1] ** -0.5
        weights[name] = values.to(dtype)
    return weights


def random_ids(config: MobileLLMConfig, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (count,), generator=generator).tolist()


class Block(torch.nn.Module):
    """The weights of one block, projections of the same input fused."""

    def __init__(self, weights: Weights, index: int) -> None:
        super().__init__()

        def get(*names: str) -> Parameter:
            parts = [weights[f"model.layers.{index}.{name}.weight"] for name in names]
            return Parameter(torch.cat(parts) if len(parts) > 1 else parts[0], requires_grad=False)

        self.attention_norm, self.ffn_norm = get("input_layernorm"), get("post_attention_layernorm")
        self.qkv = get("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out, self.down = get("self_attn.o_proj"), get("mlp.down_proj")
        self.gate_up = get("mlp.gate_proj", "mlp.up_proj")


class Slot(torch.nn.Module):
    """Keys and values of one position of the schedule."""

    def __init__(self, *size: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", like.new_zeros(size))
        self.register_buffer("values", like.new_zeros(size))


class PlainModel(torch.nn.Module):
    """A Llama over the whole schedule, with fused projections and one KV cache of fixed size.

    All of it are parameters and buffers: what a compiler takes for fixed places in memory.

    Args:
        config: the architecture, layer sharing included.
        weights: by name of `expected_shapes(config)`, on the device and of the type to compute in.
        capacity: tokens of the cache.
        batch: sequences of the cache.
    """

    def __init__(
        self, config: MobileLLMConfig, weights: Weights, capacity: int, batch: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        embedding = weights["model.embed_tokens.weight"]
        self.device, self.dtype = embedding.device, embedding.dtype
        self.embedding = Parameter(embedding, requires_grad=False)
        self.final_norm = Parameter(weights["model.norm.weight"], requires_grad=False)
        head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.head = Parameter(head, requires_grad=False)
        blocks = range(config.num_hidden_layers)
        self.blocks = torch.nn.ModuleList(Block(weights, index) for index in blocks)
        rotary = cos_sin(config, torch.arange(capacity).numpy())
        cos, sin = (torch.as_tensor(part).to(self.device) for part in rotary)
        # (capacity, 1, head_dim)
        self.register_buffer("cos", torch.cat((cos, cos), -1).to(self.dtype)[:, None])
        self.register_buffer("sin", torch.cat((-sin, sin), -1).to(self.dtype)[:, None])
        size = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.cache = torch.nn.ModuleList(Slot(*size, like=embedding) for _ in config.schedule)
        self.register_buffer("places", torch.arange(capacity, device=self.device))

    def forward(self, ids: Tensor, positions: Tensor, visible: int | None = None) -> Tensor:
        """Append tokens to the cache and return the logits of each, (batch, tokens, vocabulary).

        Args:
            ids: (batch, tokens) int64.
            positions: (tokens,) int64, places in the cache.
            visible: attend to the first so many places without a mask; None masks by position.
        """
        hidden = F.embedding(ids, self.embedding)
        cos, sin = self.cos[positions], self.sin[positions]
        mask = None if visible else self.places[None] <= positions[:, None]
        for index, slot in zip(self.config.schedule, self.cache, strict=True):
            block = self.blocks[index]
            qkv = F.linear(self._norm(hidden, block.attention_norm), block.qkv)
            mixed = self._attend(qkv, slot, positions, cos, sin, visible, mask)
            hidden = hidden + F.linear(mixed, block.out)
            normed = self._norm(hidden, block.ffn_norm)
            gate, up = F.linear(normed, block.gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, block.down)
        return F.linear(self._norm(hidden, self.final_norm), self.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attend(self, qkv, slot, positions, cos, sin, visible, mask) -> Tensor:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch, tokens = qkv.shape[:2]
        qkv = qkv.view(batch, tokens, heads + 2 * kv_heads, config.head_dim)
        rotated, value = qkv.split((heads + kv_heads, kv_heads), 2)
        rotated = rotated * cos + rotated.roll(config.head_dim // 2, -1) * sin
        query, key = rotated.split((heads, kv_heads), 2)
        slot.keys.index_copy_(2, positions, key.transpose(1, 2))
        slot.values.index_copy_(2, positions, value.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            slot.keys[:, :, :visible],
            slot.values[:, :, :visible],
            attn_mask=mask,
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).reshape(batch, tokens, heads * config.head_dim)

    def prefill(self, ids: list[list[int]]) -> Tensor:
        """Fill the cache from its start; returns the logits after each sequence."""
        tokens = torch.tensor(ids, device=self.device)
        positions = torch.arange(tokens.shape[1], device=self.device)
        return self.forward(tokens, positions)[:, -1]

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits of every token of a sequence, float32 (tokens, vocabulary)."""
        tokens = torch.tensor([ids], device=self.device)
        return self.forward(tokens, self.places[: len(ids)])[0].float()


class Step:
    """One greedy step of a `PlainModel`, over tensors that keep their place: token and position."""

    def __init__(self, model: PlainModel, batch: int = 1, visible: int | None = None) -> None:
        self.model, self.visible = model, visible
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)

    def run(self) -> None:
        """Read the token, write the next one in its place, and move on."""
        logits = self.model.forward(self.token, self.position, self.visible)
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)
