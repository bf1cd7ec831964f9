"""Whole models: prefill, decode, batches, layer sharing and threads; formats in turns."""

import machine
import pytest
from energy import NOT_READABLE
from engines import DEFAULT, Engines, with_threads
from model_works import batch, decode, prefill
from timing import Probe, interleave

from mobilellm_fast.quant import FORMATS

ALL = ("int8", *(name for name in FORMATS if name != "int8"))
SOME, FEW = ("int8", "int4", "bf16"), ("int8", "int4")
BENCHMARKS = [  # model, formats, prompts, contexts
    ("125M", ALL, (16, 128, 512, 2048), (128, 512, 2048)),
    (DEFAULT, ALL, (16, 128, 512, 2048), (128, 512, 2048)),
    ("LS-125M", FEW, (128, 512), (128, 2048)),
    ("350M", SOME, (128, 512), (128, 2048)),
    ("LS-350M", FEW, (128,), (128,)),
    ("600M", FEW, (128,), (128,)),
    ("1B", FEW, (128,), (128,)),
    ("1.5B", FEW, (128,), (128,)),
]
QUICK = {("125M", 128), (DEFAULT, 128)}


def _params(place: int) -> list:
    return [
        pytest.param(
            preset,
            formats,
            lengths,
            id=f"{preset}-{lengths}",
            marks=[pytest.mark.quick] if (preset, lengths) in QUICK else [],
        )
        for preset, formats, *rest in BENCHMARKS
        for lengths in rest[place]
    ]


@pytest.fixture(scope="module")
def engines(pytestconfig, smoke):
    return Engines(pytestconfig.getoption("model"), smoke)


def _run(benchmark, works, rounds, say, **about):
    """Measure works that have facts of engines, beside what limits them at this moment.

    Prompts have a floor of operations, measured before; the rest is held to probes of the memory
    around each turn.
    """
    threads = {work.facts["threads"] for work in works.values()}
    by_memory = not any("operations" in work.facts for work in works.values())
    found = {}  # by number of threads: each work is held to what its own can do
    for work in works.values() if not by_memory else ():
        own = work.facts["threads"]
        if own not in found:
            found[own] = machine.peaks(own, work.facts["isa"])
        work.facts["floor_seconds"] = work.facts["operations"] / found[own][work.facts["peak"]]
    benchmark.extra_info |= about
    say(f"measuring {', '.join(works)}")
    if not interleave(benchmark, works, rounds, Probe(threads) if by_memory else None):
        benchmark.extra_info["energy"] = NOT_READABLE


@pytest.mark.parametrize(("preset", "formats", "context"), _params(1))
def test_decode(preset, formats, context, engines, benchmark, rounds, smoke, say):
    formats, context = (FEW, 8) if smoke else (formats, context)
    works = {f: decode(engines.get(preset, f), context, 2 if smoke else 16) for f in formats}
    title = f"{preset}, decode at context {context}"
    _run(benchmark, works, rounds, say, kind="decode", title=title, preset=preset)


@pytest.mark.parametrize(("preset", "formats", "tokens"), _params(0))
def test_prefill(preset, formats, tokens, engines, benchmark, rounds, smoke, say):
    formats, tokens = (FEW, 8) if smoke else (formats, tokens)
    works = {f: prefill(engines.get(preset, f), tokens) for f in formats}
    title = f"{preset}, prefill of {tokens}"
    _run(benchmark, works, rounds, say, kind="prefill", title=title, preset=preset)


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("preset", ["125M"])
def test_batch(preset, sequences, engines, benchmark, rounds, smoke, say):
    context, steps = (8, 2) if smoke else (128, 16)
    works = {f: batch(engines.get(preset, f), sequences, context, steps) for f in FEW}
    title = f"{preset}, decode of {sequences} sequences together at context {context}"
    _run(benchmark, works, rounds, say, kind="batch", title=title, preset=preset)


@pytest.mark.parametrize(
    ("preset", "format", "op"),
    [
        pytest.param("125M", "int8", "decode", marks=pytest.mark.quick),
        ("125M", "int4", "decode"),
        ("125M", "int8", "prefill"),
        ("350M", "int8", "decode"),
        ("350M", "int4", "decode"),
        ("350M", "int8", "prefill"),
    ],
)
def test_layer_sharing(preset, format, op, engines, benchmark, rounds, smoke, say):
    """Blocks, the same blocks each run twice, and twice as many blocks of their own."""
    count = 8 if smoke else 128
    works = {}
    for name in (preset, f"LS-{preset}", f"{preset}-unshared"):
        engine = engines.make(name, format)
        works[name] = decode(engine, count) if op == "decode" else prefill(engine, count)
    title = f"Layer sharing, {preset} {format}, {op} at {count} tokens"
    _run(benchmark, works, rounds, say, kind="sharing", title=title, preset=preset, op=op)


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("preset", ["125M", "350M"])
def test_threads(preset, op, engines, benchmark, rounds, smoke, say):
    count, works = 8 if smoke else 128, {}
    for threads in machine.thread_counts():
        engine = with_threads(engines.get(preset, "int8"), threads)
        works[f"{threads}"] = decode(engine, count) if op == "decode" else prefill(engine, count)
    title = f"{preset} int8, {op} at {count} tokens, by threads"
    _run(benchmark, works, rounds, say, kind="threads", title=title, preset=preset, op=op)
