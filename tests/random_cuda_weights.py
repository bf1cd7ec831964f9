"""Random weights and KV caches on the device, for tests and measurements."""

import torch

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.cuda.cache import CudaCache
from mobilellm_fast.cuda.executor import CudaExecutor
from mobilellm_fast.cuda.weights import FLOAT_DTYPES, CudaWeights, Matrix
from mobilellm_fast.quant import GROUP


def random_cuda_weights(
    config: MobileLLMConfig,
    kind: str = "bf16",
    seed: int = 0,
    device: torch.device | str = "cuda",
) -> CudaWeights:
    """Draw weights: `bf16`, `fp32`, `int8`, or `int4` with an int8 head."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    body, ends = {"int4": ("int4_g32", "int8")}.get(kind, (kind, kind))
    std = config.initializer_range

    def draw(rows: int, cols: int) -> Matrix:
        return random_cuda_matrix(body, (blocks, rows, cols), std, generator)

    def table() -> Matrix:
        return random_cuda_matrix(ends, (config.vocab_size, hidden), std, generator)

    def norms(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device).uniform_(0.75, 1.25, generator=generator)

    embedding = table()
    return CudaWeights(
        config,
        qkv=draw(queries + 2 * keys, hidden),
        output=draw(hidden, queries),
        gate_up=draw(2 * inner, hidden),
        down=draw(hidden, inner),
        attention_norms=norms(blocks, hidden),
        ffn_norms=norms(blocks, hidden),
        final_norm=norms(hidden),
        embedding=embedding,
        head=embedding if config.tie_word_embeddings else table(),
    )


def random_cuda_matrix(
    kind: str, shape: tuple[int, ...], std: float, generator: torch.Generator
) -> Matrix:
    """Draw a matrix (..., rows, cols) of normal values, on the device of the generator."""
    *blocks, rows, cols = shape
    device = generator.device
    if kind in FLOAT_DTYPES:
        codes = torch.empty(shape, dtype=FLOAT_DTYPES[kind], device=device)
        return Matrix(kind, rows, cols, codes.normal_(0, std, generator=generator))
    groups = -(-cols // GROUP)
    width = groups * GROUP // 2 if kind == "int4_g32" else cols
    low, high, dtype = (0, 256, torch.uint8) if kind == "int4_g32" else (-127, 128, torch.int8)
    shape = (*blocks, rows, width)
    codes = torch.randint(low, high, shape, dtype=dtype, device=device, generator=generator)
    step = std * 12**0.5 / (15 if kind == "int4_g32" else 254)  # of a uniform distribution
    sizes = {"int8": (rows,), "int8_g32": (rows, groups), "int4_g32": (rows, groups, 2)}[kind]
    scales = torch.rand((*blocks, *sizes), device=device, generator=generator).add_(0.5).mul_(step)
    if kind == "int4_g32":
        scales[..., 1] = -7.5 * scales[..., 0]
    return Matrix(kind, rows, cols, codes, scales if kind == "int8" else scales.to(torch.float16))


def random_cuda_cache(executor: CudaExecutor, length: int, room: int = 8) -> CudaCache:
    """Return a cache of `length` random tokens that need not grow for `room` more."""
    cache = executor.new_cache()
    cache.reserve(length + room)
    cache.data.normal_(generator=torch.Generator(cache.data.device).manual_seed(1))
    cache.length = length
    return cache
