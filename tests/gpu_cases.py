"""Sizes of the GPU ops for tests, and random arguments: few, since each is compiled anew."""

from collections.abc import Sequence

import torch
from interpreted import DEVICE, HAS_GPU
from torch import Tensor

from mobilellm_fast import quant, row_major

# What the kernels compute in; the interpreter knows no 16-bit arithmetic.
DTYPES = [torch.bfloat16, torch.float16] if HAS_GPU else [torch.float32]
KINDS = ("float", *row_major.KINDS)

ROWS = [(3, 1), (2, 45), (5, 576), (3, 1600), (20, 17)]
ROPE = [(2, 5, 3, 6), (1, 7, 9, 64), (2, 3, 25, 80)]  # batch, seq, heads, head_dim
# rows, outputs, cols; those with odd cols take pointers instead of descriptors
PRODUCTS = [(1, 1, 1), (3, 17, 33), (17, 80, 576), (70, 130, 200)]
TOKENS = [1, 2, 17, 70]
WEIGHTS = [(1, 7), (20, 576), (70, 96), (9, 1600)]  # outputs, cols
HEADS = [(1, 5, 33), (1, 50, 96), (3, 300, 96), (19, 130, 64)]  # tokens, vocab, cols
if HAS_GPU:
    ROWS.append((2048, 1152))
    PRODUCTS += [(2048, 1536, 576), (1000, 1152, 1280)]
    WEIGHTS.append((4096, 1152))
    HEADS += [(1, 49152, 576), (33, 32000, 960)]


class Maker:
    """Random tensors of one dtype, on the device under test."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, spread: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * spread
        return values.to(DEVICE, dtype or self.dtype)

    def codes(self, *shape: int) -> Tensor:
        values = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
        return values.to(DEVICE)

    def weights(self, kind: str, rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
        """Return codes and scales."""
        values = self.normal(rows, cols, spread=cols**-0.5)
        if kind == "float":
            return values, None
        grid = quant.quantize(values.float().cpu().numpy(), kind)
        return tuple(torch.from_numpy(a).to(DEVICE) for a in row_major.to_row_major(grid))


def decode_inputs(
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    lengths: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k_cache, v_cache and lengths; the caches hold NaN behind the lengths."""
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    q = torch.randn(batch, heads, head_dim, generator=generator).to(dtype)
    shape = (batch, kv_heads, capacity, head_dim)
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    for cache in caches:
        for i, length in enumerate(lengths):
            cache[i, :, length:] = float("nan")
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return tuple(t.to(DEVICE) for t in (q, *caches, lengths))
