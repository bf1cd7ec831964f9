"""Time swiglu, int8_gemm and head_sample with other tiles than the chosen ones, on a GPU.

    python bench/sweep_ops.py [--only swiglu|int8_gemm|head] [--json FILE]

This is how the tilings of `kernels/` and their speeds are chosen. Each candidate is checked before
it is timed, and timed as in `sweep_attention`.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import astuple

import torch
import torch.nn.functional as F
from sweep_attention import attempt, warm

from mobilellm_fast.kernels import head_sample as head_kernels
from mobilellm_fast.kernels import int8_gemm as int8_kernels
from mobilellm_fast.kernels import swiglu as swiglu_kernels
from mobilellm_fast.kernels.tiles import Tiling, choose, processors
from mobilellm_fast.kernels.weight_rows import VectorShape

# tokens, outputs, inputs
SWIGLU = [(2048, 1536, 576), (8192, 1536, 576), (8192, 4352, 1600)]
INT8 = [(1024, 1152, 1152), (1024, 3072, 1152), (4096, 1600, 4352), (4096, 4352, 1600)]
HEADS = [(49152, 576), (32000, 576), (32000, 1600)]
SWIGLU_TILINGS = [
    *swiglu_kernels.WITH_COPY_ENGINE[:2],
    Tiling(128, 128, 64, 8, 3, 1, 1),
    Tiling(128, 64, 64, 4, 3, 2, 1),
]
INT8_TILINGS = [
    *int8_kernels.WITH_COPY_ENGINE[:4],
    Tiling(128, 64, 128, 4, 3, 2, 1),
]
SHAPES = [(8, 2, 8), (16, 4, 4), (16, 4, 5), (32, 8, 2)]


def sweep(
    name: str,
    sets: list[tuple],
    candidates: dict[str, Callable],
    peers: dict[str, Callable],
    check: Callable[[Callable], bool],
    unit: tuple[float, str],
) -> dict[str, float]:
    """Time calls on sets of inputs that take turns; print times, and `unit[0]` per microsecond."""
    print(name, flush=True)
    if not name.startswith("head"):  # whose shapes are not arguments
        warm([lambda call=call: call(*sets[0]) for call in candidates.values()])
    found = {}
    for label, call in (candidates | peers).items():
        try:
            right = label in peers or check(call)
        except Exception as error:
            print("   ", label, type(error).__name__, str(error).strip().splitlines()[0][:100])
            continue
        calls = [
            lambda s=s, call=call: call(*s) for s in itertools.islice(itertools.cycle(sets), 24)
        ]
        found[label] = attempt(calls)
        rate = f"{unit[0] / found[label]:7.1f} {unit[1]}"
        print(f"  {found[label]:8.2f} us {rate}  {label}{'' if right else '  WRONG'}", flush=True)
    return found


def label(tiling: Tiling, chosen: Tiling) -> str:
    sizes = (tiling.rows, tiling.outputs, tiling.inputs, tiling.warps, tiling.stages)
    return f"{(*sizes, tiling.programs)}{' chosen' if tiling == chosen else ''}"


def random(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * spread


def sweep_swiglu(rows: int, inner: int, cols: int) -> dict[str, float]:
    sets = [
        (random(rows, cols), random(inner, cols, spread=0.05), random(inner, cols, spread=0.05))
        for _ in range(4)
    ]
    chosen = choose(swiglu_kernels.WITH_COPY_ENGINE, rows, inner, processors(sets[0][0].device))

    def plain(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    want = plain(*sets[0])
    return sweep(
        f"swiglu {rows} x {cols} -> {inner}",
        sets,
        {
            label(t, chosen): lambda *args, t=t: swiglu_kernels.swiglu(*args, tiling=t)
            for t in SWIGLU_TILINGS
        },
        {
            "two products of cuBLAS alone": lambda x, g, u: (F.linear(x, g), F.linear(x, u)),
            "compiled": torch.compile(plain, dynamic=False),
        },
        lambda call: torch.allclose(call(*sets[0]), want, rtol=0.03, atol=0.03),
        (4e-6 * rows * inner * cols, "TFLOPS"),
    )


def sweep_int8(rows: int, outputs: int, cols: int) -> dict[str, float]:
    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)

    def scales(count: int) -> torch.Tensor:
        return torch.rand(count, device="cuda") * 1e-3

    sets = [
        (codes(rows, cols), scales(rows), codes(outputs, cols), scales(outputs)) for _ in range(4)
    ]
    chosen = choose(int8_kernels.WITH_COPY_ENGINE, rows, outputs, processors(sets[0][0].device))

    def plain(x, x_scales, weight, weight_scales):
        return (torch._int_mm(x, weight.T) * x_scales[:, None] * weight_scales).bfloat16()

    want = plain(*sets[0])
    wide = [(random(rows, cols), random(outputs, cols)) for _ in range(4)]
    found = sweep(
        f"int8_gemm {rows} x {cols} -> {outputs}",
        sets,
        {
            label(t, chosen): lambda *args, t=t: int8_kernels.int8_gemm(*args, tiling=t)
            for t in INT8_TILINGS
        },
        {"_int_mm, compiled scales": torch.compile(plain, dynamic=False)},
        lambda call: torch.equal(call(*sets[0]), want),
        (2e-6 * rows * outputs * cols, "TOPS"),
    )
    peer = {"cuBLAS bf16": F.linear}
    return found | sweep("  beside", wide, {}, peer, bool, (2e-6 * rows * outputs * cols, "TFLOPS"))


def sweep_head(vocab: int, cols: int) -> dict[str, float]:
    count = max(2, (120 << 20) // (vocab * cols * 2))
    sets = [(random(1, cols), random(vocab, cols, spread=0.05)) for _ in range(count)]
    logits = F.linear(sets[0][0].float(), sets[0][1].float())
    chosen = head_kernels.vector_shape(sets[0][1], "float", cols)
    shapes = [VectorShape(rows, chosen.groups, warps, programs) for rows, warps, programs in SHAPES]
    return sweep(
        f"head {cols} -> {vocab}, {count} heads in turn",
        sets,
        {
            "as chosen": head_kernels.head_sample,
            **{
                f"rows, groups, warps, programs {astuple(s)}{' chosen' * (s == chosen)}": (
                    lambda x, weight, s=s: head_kernels.head_sample(x, weight, shape=s)
                )
                for s in dict.fromkeys([chosen, *shapes])
            },
        },
        {"cuBLAS, argmax": lambda x, weight: F.linear(x, weight).argmax(-1)},
        lambda call: bool(logits.max() - logits[0, call(*sets[0])[0]] < 1e-2),
        (2e-3 * vocab * cols, "GB/s"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("swiglu", "int8_gemm", "head"))
    parser.add_argument("--json", help="also write the times, in microseconds, to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    found = {}
    for kind, sizes, measure in (
        ("head", HEADS, sweep_head),
        ("int8_gemm", INT8, sweep_int8),
        ("swiglu", SWIGLU, sweep_swiglu),
    ):
        if options.only in (None, kind):
            for size in sizes:
                found[f"{kind} {size}"] = measure(*size)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
