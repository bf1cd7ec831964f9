"""Time the attention kernels with other tiles than the chosen ones, beside torch's, on a GPU.

    python bench/sweep_attention.py [--only prefill|decode] [--json FILE]

This is how the constants of `kernels/gqa_attention.py` and `kernels/gqa_decode.py` are chosen. Each
candidate is checked against the reference before it is timed. A time is that of one launch within a
CUDA graph of many, on inputs that take turns so that decode reads more than the L2 holds.
"""

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mobilellm_fast import reference
from mobilellm_fast.kernels import gqa_attention, gqa_decode
from mobilellm_fast.kernels.gqa_attention import Tile
from mobilellm_fast.kernels.gqa_decode import Cut

# heads, key/value heads, batch, tokens
PREFILL = [(9, 3, 4, 2048), (25, 5, 4, 2048), (9, 3, 1, 2048), (9, 3, 1, 512)]
DECODE = [(9, 3, 1, 1024), (9, 3, 1, 2048), (9, 3, 1, 4096), (25, 5, 1, 2048), (25, 5, 8, 4096)]
FORWARD_TILES = [
    *(Tile(128, 64, 8, stages, tma) for stages in (3, 4) for tma in (False, True)),
    *(Tile(64, 128, 4, 2, tma) for tma in (False, True)),
    *(Tile(64, 64, 4, 3, tma) for tma in (False, True)),
]
SPECIALIZED_TILES = [Tile(rows, 128, 8, 2, True, True) for rows in (128, 192)]
CUTS = [
    Cut(64, 32, 4, 3),
    Cut(64, 32, 8, 3),
    Cut(64, 32, 2, 3),
    Cut(64, 64, 4, 3),
    Cut(64, 16, 4, 4),
    Cut(32, 32, 2, 4),
    Cut(128, 32, 4, 2),
]


def time_us(launches: list[Callable[[], object]], rounds: int = 7) -> float:
    """Return the median time of one of the launches, captured one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(launches))
    return statistics.median(times)


def attempt(launches: list[Callable[[], object]]) -> float:
    try:
        return time_us(launches)
    except Exception as error:  # of a tile that does not fit, of a backend that does not take this
        print("   ", type(error).__name__, str(error).strip().splitlines()[0][:100])
        torch.cuda.synchronize()
        return float("nan")


def warm(calls: list[Callable[[], object]]) -> None:
    """Compile side by side."""

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            return  # `attempt` says why

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, calls))
    torch.cuda.synchronize()


def sweep_prefill(heads: int, kv_heads: int, batch: int, seq: int) -> dict[str, float]:
    def rows(count: int) -> torch.Tensor:
        return torch.randn(batch, seq, count, 64, device="cuda", dtype=torch.bfloat16)

    sets = [(rows(heads), rows(kv_heads), rows(kv_heads)) for _ in range(4)]
    want = reference.gqa_attention(*(t[:1] for t in sets[0]))
    warm([lambda tile=tile: gqa_attention.forward(*sets[0], 0.125, tile) for tile in FORWARD_TILES])
    tiles = [*FORWARD_TILES, *(SPECIALIZED_TILES if specialized_works() else [])]
    flops = 4 * batch * heads * 64 * seq * (seq + 1) / 2
    found = {}

    def note(name: str, launches: list[Callable[[], object]]) -> None:
        found[name] = attempt(launches)
        print(
            f"  {found[name]:8.2f} us {flops / found[name] / 1e6:6.1f} TFLOPS  {name}", flush=True
        )

    print(f"prefill {heads}/{kv_heads} heads, batch {batch}, {seq} tokens")
    for tile in tiles:
        try:
            out = gqa_attention.forward(*sets[0], 0.125, tile)[0]
        except Exception as error:
            print("   ", tuple(tile), type(error).__name__, str(error)[:100])
            continue
        torch.testing.assert_close(out[:1], want, rtol=0.02, atol=0.02)
        calls = [
            lambda s=s, tile=tile: gqa_attention.forward(*s, 0.125, tile)
            for s in itertools.islice(itertools.cycle(sets), 16)
        ]
        note(f"{tuple(tile)}", calls)
    first = [tuple(t.transpose(1, 2).contiguous() for t in s) for s in sets]
    whole = [(q, *(t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))) for q, k, v in first]
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for backend, (name, gqa, inputs) in itertools.product(
        backends, (("grouped", True, first), ("repeated", False, whole))
    ):
        with sdpa_kernel(backend):
            calls = [
                lambda s=s, gqa=gqa: F.scaled_dot_product_attention(
                    *s, is_causal=True, enable_gqa=gqa
                )
                for s in itertools.islice(itertools.cycle(inputs), 16)
            ]
            note(f"{backend.name} {name}", calls)
    return found


@functools.cache
def specialized_works() -> bool:
    """Try the kernel whose warps wait for each other, in a process that can be ended."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--try-specialized"],
            timeout=90, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print("  specialized: hangs")
        return False
    print("  specialized:", done.stdout.strip() or "fails: " + done.stderr.strip()[-600:])
    return done.returncode == 0


def try_specialized() -> None:
    """Compare the specialized kernel with the reference where tiles are whole and where not."""
    for tile in SPECIALIZED_TILES:
        for seq, kv_seq, heads, kv_heads in ((1, 1, 3, 1), (129, 300, 15, 5), (384, 384, 4, 4)):
            q, k, v = (
                torch.randn(2, *shape, 64, device="cuda", dtype=torch.bfloat16)
                for shape in ((seq, heads), (kv_seq, kv_heads), (kv_seq, kv_heads))
            )
            out, lse = gqa_attention.forward(q, k, v, 0.125, tile)
            want, want_lse = gqa_attention.forward(q, k, v, 0.125)
            torch.testing.assert_close(out, reference.gqa_attention(q, k, v), rtol=0.02, atol=0.02)
            torch.testing.assert_close(out, want, rtol=0.02, atol=0.01)
            torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    print("works")


def sweep_decode(heads: int, kv_heads: int, batch: int, tokens: int) -> dict[str, float]:
    def cache() -> torch.Tensor:
        shape = (batch, kv_heads, tokens, 64)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    count = min(200, max(4, (80 << 20) // (2 * batch * kv_heads * tokens * 128)))
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, heads, 64, device="cuda", dtype=torch.bfloat16)
    sets = [(q, cache(), cache()) for _ in range(count)]
    want = reference.gqa_decode(*sets[0], lengths)
    gqa_decode.gqa_decode(*sets[0], lengths, cut=CUTS[0])  # sets counters aside
    warm([lambda cut=cut: gqa_decode.gqa_decode(*sets[0], lengths, cut=cut) for cut in CUTS])
    gigabytes = 2 * batch * kv_heads * tokens * 128 / 1e9
    found = {}

    def note(name: str, launches: list[Callable[[], object]]) -> None:
        found[name] = attempt(launches)
        print(
            f"  {found[name]:8.2f} us {gigabytes / found[name] * 1e6:6.0f} GB/s  {name}", flush=True
        )

    print(f"decode {heads}/{kv_heads} heads, batch {batch}, {tokens} tokens, {count} caches")
    for cut, last in [*((cut, True) for cut in CUTS), (CUTS[0], False)]:
        try:
            out = gqa_decode.gqa_decode(*sets[0], lengths, cut=cut, merge_last=last)
        except Exception as error:
            print("   ", tuple(cut), type(error).__name__, str(error)[:100])
            continue
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
        calls = [
            lambda s=s, cut=cut, last=last: gqa_decode.gqa_decode(
                *s, lengths, cut=cut, merge_last=last
            )
            for s in sets
        ]
        note(f"{tuple(cut)} {'' if last else 'two launches'}", calls)
    gqa_decode.gqa_decode(*sets[0], lengths)  # loads it, before a graph is captured
    note("as chosen", [lambda s=s: gqa_decode.gqa_decode(*s, lengths) for s in sets])
    note("SDPA", [lambda s=s: sdpa_decode(*s) for s in sets])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        note("SDPA of cuDNN", [lambda s=s: sdpa_decode(*s) for s in sets])
    return found


def sdpa_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("prefill", "decode"))
    parser.add_argument("--json", help="also write the times, in microseconds, to this file")
    parser.add_argument("--try-specialized", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.try_specialized:
        return try_specialized()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    found = {}
    for kind, sizes, sweep in (
        ("decode", DECODE, sweep_decode),
        ("prefill", PREFILL, sweep_prefill),
    ):
        if options.only in (None, kind):
            for size in sizes:
                found[f"{kind} {size}"] = sweep(*size)
    for kind in ("prefill", "decode"):
        sweeps = [times for name, times in found.items() if name.startswith(kind)]
        names = set.intersection(*(set(times) for times in sweeps)) if sweeps else ()
        means = {n: statistics.geometric_mean(times[n] for times in sweeps) for n in names}
        for name in sorted(means, key=means.get)[:3]:
            print(f"{kind}, geometric mean: {means[name]:.2f} us  {name}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
