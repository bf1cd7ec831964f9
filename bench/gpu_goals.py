"""What the GPU side must reach, as ratios within one run, and how a measured ratio is judged."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A ratio to reach; where it is measured for several cases, the worst of them counts.

    Args:
        text: what is compared, for a reader.
        must, stretch: the least ratio, and the one hoped for.
        share: the ratio is a share of a limit, shown in percent.
    """

    text: str
    must: float
    stretch: float
    share: bool = False

    def format(self, ratio: float) -> str:
        return f"{ratio:.0%}" if self.share else f"{ratio:.2f}×"

    def verdict(self, ratios: Iterable[float]) -> str:
        """Say what the worst of some ratios reached: "stretch", "must", or "below"."""
        worst = min(ratios)
        return "stretch" if worst >= self.stretch else "must" if worst >= self.must else "below"


# In the order in which they are measured: what matters most first, what compiles longest last.
GOALS = {
    "graphed": Goal("125M decode vs hand-graphed cuBLAS + SDPA", 2, 3.5),
    "persistent": Goal("one kernel for many tokens vs own programmatic-launch tier, 125M", 1.25, 2),
    "bandwidth-1B": Goal("1B decode, share of copy bandwidth", 0.78, 0.87, share=True),
    "bandwidth-1.5B": Goal("1.5B decode, share of copy bandwidth", 0.78, 0.87, share=True),
    "int8": Goal("1.5B int8 vs own bf16", 1.6, 1.85),
    "int4": Goal("1.5B int4 vs own bf16", 2.2, 3),
    "sharing-350M": Goal("350M blocks run twice vs twice as many blocks", 1.1, 1.25),
    "sharing-600M": Goal("600M blocks run twice vs twice as many blocks", 1.3, 1.5),
    "decode-attention": Goal("decode attention 1k to 4k vs graphed SDPA enable_gqa", 1.2, 2),
    "prefill-attention": Goal("prefill attention, head 64, GQA, 2k vs best SDPA backend", 0.8, 1),
    "w8a8-bf16": Goal("W8A8 GEMM, M >= 1k, d >= 1152 vs cuBLAS bf16", 1.15, 1.4),
    "w8a8-int": Goal("W8A8 GEMM, M >= 1k, d >= 1152 vs torch._int_mm + scale", 1.1, 1.3),
    "head": Goal("head GEMV + argmax vs cuBLAS + argmax", 1.3, 1.8),
    "swiglu-liger": Goal("SwiGLU block, M >= 2k vs Liger-Kernel", 1.1, 1.2),
    "swiglu-compile": Goal("SwiGLU block, M >= 2k vs torch.compile", 1, 1.1),
    "eager": Goal("125M decode vs transformers eager", 50, 90),
    "gpt-fast": Goal("125M decode vs gpt-fast-style compile of the full step", 2, 4),
    "hf-compile": Goal("125M decode vs transformers StaticCache + torch.compile", 4, 8),
}
