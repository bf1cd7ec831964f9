"""The model in plain PyTorch with a static KV cache, as a careful user writes it by hand.

Two peers are made of it: the step captured in a CUDA graph, and the step compiled as gpt-fast does.
In float32 it is the reference of the gates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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


class PlainModel:
    """A Llama over the whole schedule, with fused projections and one KV cache of fixed size.

    Args:
        config: the architecture, layer sharing included.
        weights: by name of `expected_shapes(config)`, on the device and of the type to compute in.
        capacity: tokens of the cache.
        batch: sequences of the cache.
    """

    def __init__(
        self, config: MobileLLMConfig, weights: Weights, capacity: int, batch: int = 1
    ) -> None:
        self.config = config
        embedding = weights["model.embed_tokens.weight"]
        self.device, self.dtype = embedding.device, embedding.dtype
        self.embedding, self.final_norm = embedding, weights["model.norm.weight"]
        self.head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.blocks = [self._block(weights, i) for i in range(config.num_hidden_layers)]
        rotary = cos_sin(config, torch.arange(capacity).numpy())
        cos, sin = (torch.as_tensor(part).to(self.device) for part in rotary)
        self.cos = torch.cat((cos, cos), -1).to(self.dtype)[:, None]  # (capacity, 1, head_dim)
        self.sin = torch.cat((-sin, sin), -1).to(self.dtype)[:, None]
        size = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.cache = [
            tuple(torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2))
            for _ in config.schedule
        ]
        self.slots = torch.arange(capacity, device=self.device)

    @staticmethod
    def _block(weights: Weights, index: int) -> tuple[Tensor, ...]:
        def get(name: str) -> Tensor:
            return weights[f"model.layers.{index}.{name}.weight"]

        return (
            get("input_layernorm"),
            torch.cat([get(f"self_attn.{name}_proj") for name in "qkv"]),
            get("self_attn.o_proj"),
            get("post_attention_layernorm"),
            torch.cat([get(f"mlp.{name}_proj") for name in ("gate", "up")]),
            get("mlp.down_proj"),
        )

    def forward(self, ids: Tensor, positions: Tensor, visible: int | None = None) -> Tensor:
        """Append tokens to the cache and return the logits of each, (batch, tokens, vocabulary).

        Args:
            ids: (batch, tokens) int64.
            positions: (tokens,) int64, places in the cache.
            visible: attend to the first so many places without a mask; None masks by position.
        """
        hidden = F.embedding(ids, self.embedding)
        cos, sin = self.cos[positions], self.sin[positions]
        mask = None if visible else self.slots[None] <= positions[:, None]
        for index, (keys, values) in zip(self.config.schedule, self.cache, strict=True):
            norm, qkv, out, ffn_norm, gate_up, down = self.blocks[index]
            normed = self._norm(hidden, norm)
            mixed = self._attend(
                F.linear(normed, qkv), keys, values, positions, cos, sin, visible, mask
            )
            hidden = hidden + F.linear(mixed, out)
            gate, up = F.linear(self._norm(hidden, ffn_norm), gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        return F.linear(self._norm(hidden, self.final_norm), self.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attend(self, qkv, keys, values, positions, cos, sin, visible, mask) -> Tensor:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch, tokens = qkv.shape[:2]
        qkv = qkv.view(batch, tokens, heads + 2 * kv_heads, config.head_dim)
        rotated, value = qkv.split((heads + kv_heads, kv_heads), 2)
        rotated = rotated * cos + rotated.roll(config.head_dim // 2, -1) * sin
        query, key = rotated.split((heads, kv_heads), 2)
        keys.index_copy_(2, positions, key.transpose(1, 2))
        values.index_copy_(2, positions, value.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys[:, :, :visible],
            values[:, :, :visible],
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
        return self.forward(tokens, self.slots[: len(ids)])[0].float()


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
