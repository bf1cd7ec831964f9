"""Weights as the GPU's kernels read them: row-major, one tensor for each matrix of all blocks.

============  ================================================  =================================
kind          codes, after the axis of blocks                   scales
============  ================================================  =================================
``fp32``      (rows, cols) float32                              none
``bf16``      (rows, cols) bfloat16                             none
``int8``      (rows, cols) int8                                 (rows,) float32
``int8_g32``  (rows, cols) int8                                 (rows, groups) float16
``int4_g32``  (rows, groups * 16) uint8: byte j of group g has  (rows, groups, 2) float16: scale,
              input 32 g + j below and 32 g + j + 16 above      min of each group
============  ================================================  =================================

A group is 32 inputs. The tiles of `quant.py` suit a CPU's registers; a warp of a GPU reads 512
neighbouring bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import quant
from ..config import MobileLLMConfig
from ..quant import GROUP, PackedWeight
from ..row_major import stored_kind, to_row_major

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix on the device, or one of every block.

    Args:
        kind: see the module.
        rows, cols: outputs and inputs.
        codes, scales: see the module; scales is None for float kinds.
    """

    kind: str
    rows: int
    cols: int
    codes: Tensor
    scales: Tensor | None = None

    def __getitem__(self, block: int) -> Matrix:
        scales = None if self.scales is None else self.scales[block]
        return Matrix(self.kind, self.rows, self.cols, self.codes[block], scales)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantize(self) -> Tensor:
        """Return the values, float32, in the shape of `codes` with `cols` last."""
        if self.kind in FLOAT_DTYPES:
            return self.codes.float()
        if self.kind == "int8":
            return self.codes.float() * self.scales.unsqueeze(-1)
        codes = self.codes
        if self.kind == "int4_g32":
            groups = codes.unflatten(-1, (-1, GROUP // 2))
            codes = torch.cat((groups & 15, groups >> 4), -1).flatten(-2)
        groups = torch.nn.functional.pad(codes.float(), (0, -codes.shape[-1] % GROUP))
        groups = groups.unflatten(-1, (-1, GROUP))
        if self.kind == "int4_g32":
            scales, mins = self.scales.float().unsqueeze(-2).unbind(-1)  # (..., groups, 1)
            values = groups * scales + mins
        else:
            values = groups * self.scales.float().unsqueeze(-1)
        return values.flatten(-2)[..., : self.cols]

    @classmethod
    def stack(cls, parts: list[list[PackedWeight]], device: torch.device | str) -> Matrix:
        """Put matrices one below the other, for each block; all have one kind.

        Args:
            parts: the matrices of each block.
        """
        rows = sum(weight.rows for weight in parts[0])
        blocks = [[_row_major(weight) for weight in block] for block in parts]
        codes = torch.stack([torch.cat([codes for codes, _ in block]) for block in blocks])
        scales = None
        if blocks[0][0][1] is not None:
            scales = torch.stack([torch.cat([scales for _, scales in block]) for block in blocks])
            scales = scales.to(device)
        return cls(stored_kind(parts[0][0].kind), rows, parts[0][0].cols, codes.to(device), scales)


@dataclass(frozen=True, eq=False)
class CudaWeights:
    """All weights of a model; matrices and norms of blocks have an axis of blocks first."""

    config: MobileLLMConfig
    qkv: Matrix
    output: Matrix
    gate_up: Matrix  # the gate's rows, then the up's
    down: Matrix
    attention_norms: Tensor  # (blocks, hidden_size) float32
    ffn_norms: Tensor
    final_norm: Tensor  # (hidden_size,) float32
    embedding: Matrix
    head: Matrix  # the embedding, if tied

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    @property
    def nbytes(self) -> int:
        matrices = [self.qkv, self.output, self.gate_up, self.down, self.embedding]
        if self.head is not self.embedding:
            matrices.append(self.head)
        norms = (self.attention_norms, self.ffn_norms, self.final_norm)
        return sum(part.nbytes for part in (*matrices, *norms))

    @classmethod
    def from_packed(
        cls,
        config: MobileLLMConfig,
        weights: Mapping[str, PackedWeight | np.ndarray],
        device: torch.device | str = "cuda",
    ) -> CudaWeights:
        """Copy packed weights, see `Executor`, to a device.

        Matrices of one place that have different kinds in different blocks become bfloat16.
        """

        def block_name(index: int, path: str) -> str:
            return f"model.layers.{index}.{path}.weight"

        blocks = range(config.num_hidden_layers)

        def stack(*paths: str) -> Matrix:
            parts = [[weights[block_name(index, path)] for path in paths] for index in blocks]
            if len({stored_kind(weight.kind) for block in parts for weight in block}) > 1:
                parts = [
                    [quant.pack(weight.dequantize(), "bf16") for weight in block] for block in parts
                ]
            return Matrix.stack(parts, device)

        def norms(path: str) -> Tensor:
            return torch.from_numpy(
                np.stack([weights[block_name(index, path)] for index in blocks])
            ).to(device)

        embedding = Matrix.stack([[weights["model.embed_tokens.weight"]]], device)[0]
        head = embedding
        if not config.tie_word_embeddings:
            head = Matrix.stack([[weights["lm_head.weight"]]], device)[0]
        return cls(
            config,
            qkv=stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output=stack("self_attn.o_proj"),
            gate_up=stack("mlp.gate_proj", "mlp.up_proj"),
            down=stack("mlp.down_proj"),
            attention_norms=norms("input_layernorm"),
            ffn_norms=norms("post_attention_layernorm"),
            final_norm=torch.from_numpy(np.array(weights["model.norm.weight"])).to(device),
            embedding=embedding,
            head=head,
        )


def _row_major(weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Return codes and scales of one matrix."""
    if weight.kind == "fp32":
        return torch.from_numpy(weight.data), None
    if weight.kind == "bf16":
        return torch.from_numpy(weight.data).view(torch.bfloat16), None
    codes, scales = to_row_major(quant.unpack(weight))
    return torch.from_numpy(codes), torch.from_numpy(scales)
