"""Host time of ops and blocks: what a call takes until it returns, while the GPU has little to do.

Few tokens at real widths, so that launches take longer than kernels. `training_step.py --host`
prints the table beside a step of so few tokens.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mobilellm_fast import MobileLLMConfig, ops
from mobilellm_fast.decoder import Block

TOKENS = 16
CALLS = 20  # at a time: they end before a queue of launches is full
REPEATS = 15

Case = tuple[Callable, tuple[Tensor, ...]]  # a function of its leaves


def cases(config: MobileLLMConfig, device: str, dtype: torch.dtype) -> dict[str, Case]:
    """Name functions that return a tensor, and their arguments that want gradients."""
    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

    x, norm, square = normal(1, TOKENS, width), normal(width), normal(width, width)
    q, k, v = (normal(1, TOKENS, n, head_dim) for n in (heads, kv_heads, kv_heads))
    gate, up = normal(inner, width), normal(inner, width)
    cos, sin = torch.randn(2, TOKENS, head_dim // 2, device=device)
    eps = config.rms_norm_eps
    found = {
        "one product (torch)": (F.linear, (x, square)),
        "a sum (torch)": (torch.add, (x, x.clone())),
        "rms_norm": (lambda x, w: ops.rms_norm(x, w, eps), (x, norm)),
        "add_rms_norm": (lambda x, y, w: ops.add_rms_norm(x, y, w, eps)[0], (x, x.clone(), norm)),
        "rope": (lambda q: ops.rope(q, cos, sin), (q,)),
        "gqa_attention": (ops.gqa_attention, (q, k, v)),
        "swiglu": (ops.swiglu, (x, gate, up)),
    }
    block = Block(config, device=device, dtype=dtype)
    parts = Block(config, device=device, dtype=dtype)
    parts.mlp.down_proj.register_forward_hook(lambda *args: None)  # no fused block has hooks
    for name, module in (("Block", block), ("Block with a hook", parts)):
        found[name] = (lambda x, *_, m=module: m(x, cos, sin), (x, *module.parameters()))
    theirs_config = LlamaConfig(**config.to_hf(), attn_implementation="sdpa")
    layer = LlamaDecoderLayer(theirs_config, 0).to(device, dtype)
    positions = torch.arange(TOKENS, device=device)[None]
    angles = LlamaRotaryEmbedding(theirs_config).to(device)(x, positions)

    def theirs(x: Tensor, *_: Tensor) -> Tensor:
        out = layer(x, position_embeddings=angles, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out

    found["transformers' layer"] = (theirs, (x, *layer.parameters()))
    return found


def measure(function: Callable, args: tuple[Tensor, ...], synchronize: Callable) -> list[float]:
    """Return the microseconds of a forward without gradients, one with them, and a backward."""
    held = any(isinstance(a, torch.nn.Parameter) for a in args)  # by a module: not to be copied
    columns: list[list[float]] = [[], [], []]
    for turn in range(REPEATS + 2):
        leaves = [
            args if held else tuple(a.detach().clone().requires_grad_() for a in args)
            for _ in range(CALLS)
        ]
        if held:
            leaves = [(args[0].detach().clone().requires_grad_(), *args[1:]) for _ in leaves]
        synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            for few in leaves:
                function(*few)
        columns[0].append(time.perf_counter() - started)
        synchronize()
        started = time.perf_counter()
        outs = [function(*few) for few in leaves]
        columns[1].append(time.perf_counter() - started)
        grads = [torch.ones_like(out) for out in outs]
        synchronize()
        started = time.perf_counter()
        torch.autograd.backward(outs, grads)
        columns[2].append(time.perf_counter() - started)
        synchronize()
        for leaf in args:
            leaf.grad = None
        if turn < 2:
            for column in columns:
                column.clear()
    return [statistics.median(column) / CALLS * 1e6 for column in columns]


def print_table(config: MobileLLMConfig, device: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Measure every case and print it at once."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    print(f"| host time, {TOKENS} tokens, us per call | without gradients | forward | backward |")
    print("|---|---|---|---|")
    found = {}
    gc.disable()
    for name, (function, args) in cases(config, device, dtype).items():
        found[name] = measure(function, args, synchronize)
        print(f"| {name} | {' | '.join(f'{us:.1f}' for us in found[name])} |", flush=True)
    gc.enable()
    return found
