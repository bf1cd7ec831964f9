"""The decoder as `torch.nn` modules: blocks of attention and feed-forward, run over a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .config import MobileLLMConfig
from .layers import Embedding, Linear, RMSNorm, is_plain, plain_weight
from .rope import cos_sin

TABLE_LENGTH = 4096  # positions whose rotation is kept ready: 2 MB at a head_dim of 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Decoder(nn.Module):
    """Embed, run every block of the schedule, normalise."""

    def __init__(self, config: MobileLLMConfig, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # see `MobileLLM.checkpoint_activations`
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **options)
        self.layers = nn.ModuleList(
            Block(config, **options) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        # No buffers: they would be rounded with the parameters, and empty on the meta device.
        self._tables = self._rotary_tables(min(config.context_length, TABLE_LENGTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, seq) token ids -> (batch, seq, hidden_size)."""
        seq = input_ids.shape[1]
        scaling = self.config.rope_scaling
        depends = scaling is not None and scaling["rope_type"] == "dynamic"
        fresh = depends or seq > TABLE_LENGTH
        tables = self._rotary_tables(seq) if fresh else self._tables
        cos, sin = (table[:seq].to(input_ids.device) for table in tables)  # (seq, head_dim / 2)
        hidden = self.embed_tokens(input_ids)
        for block in self.config.schedule:
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(self.layers[block], hidden, cos, sin, use_reentrant=False)
            else:
                hidden = self.layers[block](hidden, cos, sin)
        return self.norm(hidden)

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)
        device = self.norm.weight.device
        if device.type != "meta":  # else each step would wait for a copy to the GPU
            self._tables = tuple(table.to(device) for table in self._tables)
        return self

    def _rotary_tables(self, seq: int) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin(self.config, np.arange(seq), seq_len=seq)
        return torch.from_numpy(cos), torch.from_numpy(sin)


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: MobileLLMConfig, **options: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.mlp = FeedForward(config, **options)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, seq, hidden_size) -> the same shape."""
        weights = self._plain_weights()
        if weights is not None:
            sizes = self.self_attn.head_dim, self.input_layernorm.eps
            out = ops.decoder_block.by_gpu_kernel(hidden, *weights, cos, sin, *sizes)
            if out is not None:
                return out
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _plain_weights(self) -> list[Tensor] | None:
        """Return the weights in the order of `ops.decoder_block`; None if the parts must be called.

        They must if they are not what they were made as, or have hooks, or if only some of the
        weights want gradients: the operator computes those of all.
        """
        own = self.__dict__["_modules"]
        attention, mlp = own["self_attn"], own["mlp"]
        same_eps = own["input_layernorm"].eps == own["post_attention_layernorm"].eps
        if not (same_eps and is_plain(attention, Attention) and is_plain(mlp, FeedForward)):
            return None
        inner, outer = attention.__dict__["_modules"], mlp.__dict__["_modules"]
        weights = [
            plain_weight(own["input_layernorm"], RMSNorm),
            *[plain_weight(inner[name], Linear) for name in PROJECTIONS],
            plain_weight(own["post_attention_layernorm"], RMSNorm),
            *[plain_weight(outer[name], Linear) for name in ("gate_proj", "up_proj", "down_proj")],
        ]
        training = torch.is_grad_enabled()
        for weight in weights:
            if weight is None or (training and not weight.requires_grad):
                return None
        return weights


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key/value head."""

    def __init__(self, config: MobileLLMConfig, **options: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=False, **options)
        self.k_proj = Linear(config.hidden_size, keys, bias=False, **options)
        self.v_proj = Linear(config.hidden_size, keys, bias=False, **options)
        self.o_proj = Linear(queries, config.hidden_size, bias=False, **options)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, seq, hidden_size) -> the same shape; cos and sin are (seq, head_dim / 2)."""
        per_head = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, per_head)  # (batch, seq, heads, head_dim)
        k = self.k_proj(x).unflatten(-1, per_head)  # (batch, seq, kv_heads, head_dim)
        v = self.v_proj(x).unflatten(-1, per_head)
        out = ops.gqa_attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: a projection gated by another, then one back to the residual stream."""

    def __init__(self, config: MobileLLMConfig, **options: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=False, **options)
        self.up_proj = Linear(hidden, inner, bias=False, **options)
        self.down_proj = Linear(inner, hidden, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, hidden_size) -> the same shape."""
        gate, up = plain_weight(self.gate_proj, Linear), plain_weight(self.up_proj, Linear)
        if gate is not None and up is not None:
            inner = ops.swiglu.by_gpu_kernel(x, gate, up)
            if inner is not None:
                return self.down_proj(inner)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
