"""The torch model over the GPU engine's memory."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .layers import embedded
from .weights import FLOAT_DTYPES, CudaWeights, Matrix


class CudaLinear(nn.Module):
    """A linear layer with quantized weights, in the memory that the GPU's kernels read.

    Gradients reach its input, not its weights. Its input is not rounded.
    """

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.kind, self.rows, self.cols = matrix.kind, matrix.rows, matrix.cols
        self.register_buffer("codes", matrix.codes, persistent=False)
        self.register_buffer("scales", matrix.scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        return ops.weight_only_linear(x, self.codes, self.scales)

    def extra_repr(self) -> str:
        return f"{self.cols}, {self.rows}, {self.kind}"


class CudaEmbedding(CudaLinear):
    """An embedding with quantized rows, which may serve as the output head too."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids -> (..., cols) float32."""
        matrix = Matrix(self.kind, self.rows, self.cols, self.codes, self.scales)
        return embedded(matrix, ids.flatten()).unflatten(0, ids.shape)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        return super().forward(hidden)


def install(model: nn.Module, weights: CudaWeights) -> None:
    """Put weights into a model without copying them; layers of quantized ones are replaced."""
    config = weights.config
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    places = {
        "self_attn.q_proj": (weights.qkv, 0, queries),
        "self_attn.k_proj": (weights.qkv, queries, keys),
        "self_attn.v_proj": (weights.qkv, queries + keys, keys),
        "self_attn.o_proj": (weights.output, 0, config.hidden_size),
        "mlp.gate_proj": (weights.gate_up, 0, inner),
        "mlp.up_proj": (weights.gate_up, inner, inner),
        "mlp.down_proj": (weights.down, 0, config.hidden_size),
    }
    for block, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight = nn.Parameter(weights.attention_norms[block])
        layer.post_attention_layernorm.weight = nn.Parameter(weights.ffn_norms[block])
        for path, (stack, first, rows) in places.items():
            matrix = stack[block]
            part = slice(first, first + rows)
            scales = None if matrix.scales is None else matrix.scales[part]
            _set(layer, path, Matrix(matrix.kind, rows, matrix.cols, matrix.codes[part], scales))
    model.model.norm.weight = nn.Parameter(weights.final_norm)
    _set(model.model, "embed_tokens", weights.embedding)
    if not config.tie_word_embeddings:
        _set(model, "lm_head", weights.head)


def _set(parent: nn.Module, path: str, matrix: Matrix) -> None:
    layer = parent.get_submodule(path)
    if matrix.kind in FLOAT_DTYPES:
        layer.weight = nn.Parameter(matrix.codes)
        return
    quantized = CudaEmbedding(matrix) if isinstance(layer, nn.Embedding) else CudaLinear(matrix)
    outer, _, name = path.rpartition(".")
    setattr(parent.get_submodule(outer), name, quantized)
