"""The ops that the GPU goals name: ours, what it is compared with, and what holds ours to be right.

Every set of arguments of a rotation has its own memory, so that together they exceed the L2 cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from gpu_timing import copies
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], object]

# Norm of the error over that of the result. A bf16 result is rounded by 2^-9 at most, weights of a
# softmax and halves of SwiGLU are rounded to bf16 once more.
TOLERANCE = 2**-8


@dataclass
class OpWork:
    """An op on one size.

    Args:
        name: op and size.
        ours: our calls, one per set of arguments.
        peers: by name, a function that returns the peer's calls; it may raise.
        error: the error of our result on the first set, to be called under `poisoned`.
        pairs: goal -> "ours", and the peers of which the fastest is what it is compared with.
        facts: bytes and operations of a call.
    """

    name: str
    ours: Callable[[], list[Call]]
    peers: dict[str, Callable[[], list[Call]]]
    error: Callable[[], float]
    pairs: dict[str, tuple[str, ...]]
    facts: dict = field(default_factory=dict)


@contextmanager
def poisoned() -> Iterator[None]:
    """Let torch fill the memory of every tensor that it allocates without a value with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def distance(got: Tensor, exact: Tensor) -> float:
    """Return the norm of the error over that of the exact result; inf if anything is not finite."""
    got, exact = got.double(), exact.double()
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return float("inf")
    return float((got - exact).norm() / exact.norm())


@dataclass
class Sizes:
    """What sizes of arguments depend on: the device, its L2 cache and the type of floats."""

    device: torch.device
    l2_nbytes: int
    dry: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16  # Triton's interpreter has no bf16

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device)

    def rotation(self, make: Callable[[], tuple]) -> list[tuple]:
        first = make()
        nbytes = sum(t.nbytes for t in first)
        return [first, *(make() for _ in range(copies(nbytes, self.device, self.l2_nbytes) - 1))]


def _each(sets: list[tuple], call: Callable[..., object]) -> list[Call]:
    return [lambda args=args: call(*args) for args in sets]


def _compiled(sets: list[tuple], call: Callable[..., object]) -> list[Call]:
    torch._dynamo.reset()
    return _each(sets, torch.compile(call, dynamic=False))


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def prefill_attention(sizes: Sizes, heads: int, kv_heads: int, batch: int, seq: int) -> OpWork:
    """Causal attention of a whole prompt; ours has heads after tokens, SDPA heads before them."""
    from mobilellm_fast import reference
    from mobilellm_fast.kernels import gqa_attention

    def make() -> tuple[Tensor, ...]:
        return tuple(sizes.random(batch, seq, n, 64) for n in (heads, kv_heads, kv_heads))

    sets = sizes.rotation(make)
    turned = [tuple(t.transpose(1, 2).contiguous() for t in args) for args in sets]

    def with_backend(backend: SDPBackend) -> list[Call]:
        grouped = backend != SDPBackend.EFFICIENT_ATTENTION  # which knows no groups of heads
        own = (
            turned
            if grouped
            else [
                (q, *(t.repeat_interleave(heads // kv_heads, 1) for t in (k, v)))
                for q, k, v in turned
            ]
        )

        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        return _each(own, call)

    def default() -> list[Call]:
        def call(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return _each(turned, call)

    def attend(q, k, v):
        return gqa_attention.forward(q, k, v, 64**-0.5)[0]

    peers = {name: lambda b=b: with_backend(b) for name, b in BACKENDS.items()}
    peers["default"] = default
    pairs = seq * (seq + 1) // 2
    return OpWork(
        f"prefill attention {heads}/{kv_heads} heads, batch {batch}, {seq} tokens",
        lambda: _each(sets, attend),
        peers,
        lambda: distance(attend(*sets[0]), reference.gqa_attention(*(t.float() for t in sets[0]))),
        {"prefill-attention": ("ours", *peers)},
        {"operations": 4 * batch * heads * pairs * 64},
    )


def decode_attention(sizes: Sizes, heads: int, kv_heads: int, batch: int, tokens: int) -> OpWork:
    """Attention of one token per sequence to a cache."""
    from mobilellm_fast import reference
    from mobilellm_fast.kernels.gqa_decode import gqa_decode

    def make() -> tuple[Tensor, ...]:
        keys = (sizes.random(batch, kv_heads, tokens, 64) for _ in range(2))
        return (sizes.random(batch, heads, 64), *keys)

    sets = sizes.rotation(make)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=sizes.device)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    def with_backend(backend: SDPBackend) -> list[Call]:
        def call(*args):
            with sdpa_kernel(backend):
                return sdpa(*args)

        return _each(sets, call)

    def attend(q, k, v):
        return gqa_decode(q, k, v, lengths)

    def error() -> float:
        q, k, v = (t.float() for t in sets[0])
        turned = (t.transpose(1, 2) for t in (k, v))
        return distance(attend(*sets[0]), reference.gqa_attention(q[:, None], *turned)[:, 0])

    peers = {"default": lambda: _each(sets, sdpa)}
    peers |= {
        name: lambda b=b: with_backend(b)
        for name, b in BACKENDS.items()
        if b != SDPBackend.EFFICIENT_ATTENTION
    }
    return OpWork(
        f"decode attention {heads}/{kv_heads} heads, batch {batch}, {tokens} tokens",
        lambda: _each(sets, attend),
        peers,
        error,
        {"decode-attention": ("ours", *peers)},
        {"nbytes": 2 * batch * kv_heads * tokens * 64 * sets[0][1].element_size()},
    )


def swiglu_block(sizes: Sizes, rows: int, cols: int, inner: int) -> OpWork:
    """The whole feed-forward block of a prompt: gate, up, SiLU and product, down."""
    from mobilellm_fast import reference
    from mobilellm_fast.kernels.swiglu import swiglu

    def make() -> tuple[Tensor, ...]:
        x = sizes.random(rows, cols)
        gate, up = (sizes.random(inner, cols, scale=cols**-0.5) for _ in range(2))
        return x, gate, up, sizes.random(cols, inner, scale=inner**-0.5)

    sets = sizes.rotation(make)

    def block(x, gate, up, down):
        return F.linear(swiglu(x, gate, up), down)

    def plain(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def compiled_fused() -> list[Call]:
        """With gate and up as one product, as a careful user writes it."""

        def fused(x, gate_up, down):
            gate, up = F.linear(x, gate_up).chunk(2, -1)
            return F.linear(F.silu(gate) * up, down)

        return _compiled([(x, torch.cat((gate, up)), down) for x, gate, up, down in sets], fused)

    def liger() -> list[Call]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def call(x, gate, up, down):
            mixed = LigerSiLUMulFunction.apply(F.linear(x, gate), F.linear(x, up))
            return F.linear(mixed, down)

        return _each(sets, call)

    def error() -> float:
        x, gate, up, down = (t.float() for t in sets[0])
        return distance(block(*sets[0]), F.linear(reference.swiglu(x, gate, up), down))

    return OpWork(
        f"SwiGLU block {rows} x {cols} -> {inner}",
        lambda: _each(sets, block),
        {
            "liger": liger,
            "eager": lambda: _each(sets, plain),
            "compile": lambda: _compiled(sets, plain),
            "compile, one product": compiled_fused,
        },
        error,
        {
            "swiglu-liger": ("ours", "liger"),
            "swiglu-compile": ("ours", "compile", "compile, one product"),
        },
        {"operations": 6 * rows * cols * inner},
    )


def int8_gemm(sizes: Sizes, rows: int, cols: int, outputs: int) -> OpWork:
    """W8A8 product of quantized activations and weights, against bf16 and against torch's int8."""
    from mobilellm_fast.kernels.int8_gemm import int8_gemm as gemm

    def make() -> tuple[Tensor, ...]:
        scales = (torch.rand(n, device=sizes.device) * 1e-2 + 1e-3 for n in (rows, outputs))
        x_scales, w_scales = scales
        return sizes.codes(rows, cols), x_scales, sizes.codes(outputs, cols), w_scales

    sets = sizes.rotation(make)
    wide = [(sizes.random(rows, cols), sizes.random(outputs, cols)) for _ in sets]

    def ours(codes, x_scales, weight, w_scales):
        return gemm(codes, x_scales, weight, w_scales, dtype=sizes.dtype)

    def plain(codes, x_scales, weight, w_scales):
        products = torch._int_mm(codes, weight.t())
        return (products * x_scales[:, None] * w_scales).to(sizes.dtype)

    def error() -> float:
        codes, x_scales, weight, w_scales = sets[0]
        exact = codes.double() @ weight.double().t() * x_scales.double()[:, None] * w_scales
        return distance(ours(*sets[0]), exact)

    return OpWork(
        f"W8A8 GEMM {rows} x {cols} -> {outputs}",
        lambda: _each(sets, ours),
        {
            "cuBLAS bf16": lambda: _each(wide, F.linear),
            "_int_mm, eager scale": lambda: _each(sets, plain),
            "_int_mm, compiled scale": lambda: _compiled(sets, plain),
        },
        error,
        {
            "w8a8-bf16": ("ours", "cuBLAS bf16"),
            "w8a8-int": ("ours", "_int_mm, eager scale", "_int_mm, compiled scale"),
        },
        {"operations": 2 * rows * cols * outputs},
    )


def head(sizes: Sizes, cols: int, vocab: int) -> OpWork:
    """The output head of a decode step and the choice of the likeliest token."""
    from mobilellm_fast.kernels.head_sample import head_sample

    def make() -> tuple[Tensor, ...]:
        return sizes.random(1, cols), sizes.random(vocab, cols, scale=cols**-0.5)

    sets = sizes.rotation(make)

    def ours(x, weight):
        return head_sample(x, weight)

    def plain(x, weight):
        return F.linear(x, weight).argmax(-1)

    def error() -> float:
        """How far below the best logit ours is, of the largest."""
        x, weight = sets[0]
        logits = F.linear(x.double(), weight.double())[0]
        chosen = int(ours(x, weight)[0])
        return float((logits.max() - logits[chosen]) / logits.abs().max())

    return OpWork(
        f"head {cols} -> {vocab} and argmax",
        lambda: _each(sets, ours),
        {"cuBLAS, argmax": lambda: _each(sets, plain)},
        error,
        {"head": ("ours", "cuBLAS, argmax")},
        {"nbytes": sets[0][1].nbytes},
    )


# What each op is measured for, by the first words of its names in `op_works`.
GOALS_OF = {
    "decode-attention": ("decode-attention",),
    "prefill-attention": ("prefill-attention",),
    "w8a8": ("w8a8-bf16", "w8a8-int"),
    "head": ("head",),
    "swiglu": ("swiglu-liger", "swiglu-compile"),
}


def goals_of(name: str) -> tuple[str, ...]:
    return next(goals for stem, goals in GOALS_OF.items() if name.startswith(stem))


def op_works(dry: bool) -> dict[str, Callable[[Sizes], OpWork]]:
    """List the ops and sizes that the goals are about; names are ids of tests."""
    if dry:
        return {
            "decode-attention": lambda s: decode_attention(s, 6, 2, 1, 40),
            "prefill-attention": lambda s: prefill_attention(s, 6, 2, 1, 40),
            "w8a8": lambda s: int8_gemm(s, 20, 32, 48),
            "head": lambda s: head(s, 48, 97),
            "swiglu": lambda s: swiglu_block(s, 20, 48, 80),
        }
    return {
        "decode-attention-1k": lambda s: decode_attention(s, 9, 3, 1, 1024),
        "decode-attention-2k": lambda s: decode_attention(s, 9, 3, 1, 2048),
        "decode-attention-4k": lambda s: decode_attention(s, 9, 3, 1, 4096),
        "decode-attention-4k-batch8": lambda s: decode_attention(s, 25, 5, 8, 4096),
        "prefill-attention-125M": lambda s: prefill_attention(s, 9, 3, 4, 2048),
        "prefill-attention-1.5B": lambda s: prefill_attention(s, 25, 5, 4, 2048),
        "w8a8-600M": lambda s: int8_gemm(s, 1024, 1152, 3072),
        "w8a8-1.5B": lambda s: int8_gemm(s, 4096, 1600, 4352),
        "w8a8-1.5B-down": lambda s: int8_gemm(s, 4096, 4352, 1600),
        "head-125M": lambda s: head(s, 576, 32000),
        "head-1.5B": lambda s: head(s, 1600, 32000),
        "swiglu-125M": lambda s: swiglu_block(s, 2048, 576, 1536),
        "swiglu-1.5B": lambda s: swiglu_block(s, 8192, 1600, 4352),
    }
