"""What the goals say of this library alone: figures of `goals.py`."""

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import machine
import numpy as np
from cases import bind_kernel, make_args
from engines import random_image, shape
from model_works import batch, decode, prefill
from starts import start
from steadiness import Sample, bandwidths, ratios, shares
from timing import Probe, Work, take_turns

from mobilellm_fast import _C
from mobilellm_fast.engine import Engine

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
SPIN = "while True: pass"
STREAMED, AT_ONCE = 192, 8  # tokens of a stream, and in a block of them
WAIT = 1e-4  # seconds without a core that count


@dataclass(frozen=True)
class Row:
    """A goal, what it asks for, figures of the rounds that count, and a remark."""

    goal: str
    must: str
    figures: Sample
    note: str = ""


def rows(options) -> Iterator[Row]:
    """Measure everything, part by part."""
    for part in (sharing, real_model, operator, surroundings):
        yield from part(options)


def in_turns(
    works: dict[str, Callable[[], float] | Work], rounds: int, threads: set[int] = frozenset()
) -> dict[str, Work]:
    """Run works by `take_turns`, between probes of the memory with each of `threads`, if any."""
    made = {n: work if isinstance(work, Work) else Work(work) for n, work in works.items()}
    take_turns(made, rounds, Probe(set(threads)) if threads else None)
    return made


def milliseconds(work: Work) -> float:
    return 1e3 * statistics.median(work.seconds)


def sharing(options) -> Iterator[Row]:
    """Yield what a second pass over shared blocks costs, on one and on all threads."""
    engines = {}
    for name in ("125M", "LS-125M", "125M-unshared"):
        config = shape(name)
        image = random_image(config, "int8", name)
        for threads in sorted({1, options.threads}):
            engines[name, threads] = Engine(
                config, image.weights, "int8", name=name, threads=threads
            )
    for threads in sorted({1, options.threads}):
        names = ("125M", "LS-125M", "125M-unshared")
        works = {name: decode(engines[name, threads], 128) for name in names}
        base, shared, copies = in_turns(works, options.rounds, {threads}).values()
        note = f"{milliseconds(shared):.2f} ms against {milliseconds(base):.2f}"
        where = f"int8, {threads} thread(s)"
        yield Row(f"LS-125M / 125M, {where}", "<= 1.25", ratios(shared, base), note)
        yield Row(f"60 blocks of their own / 125M, {where}", "", ratios(copies, base))
        faster = ratios(copies, shared)
        yield Row(f"sharing is faster than copies by, {where}", ">= 1.5", faster)


def real_model(options) -> Iterator[Row]:
    """Yield bandwidth, contexts, prompts and batches of the default model."""
    threads = options.threads
    engines = {f: Engine.load(format=f, threads=threads) for f in ("int8", "int4")}
    eight = Engine.load(format="int8", threads=threads, kv_format="int8")
    works = {f: decode(engine, 128) for f, engine in engines.items()}
    in_turns(works, options.rounds, {threads})
    for format, must in (("int8", 0.80), ("int4", 0.72)):
        work = works[format]
        read = [rate / 1e9 for rate in bandwidths(work)]
        note = f"{min(read):.0f} to {max(read):.0f} GB/s, {1e3 / milliseconds(work):.0f} tok/s"
        yield Row(f"share of the read bandwidth, {format}", f">= {must}", shares(work), note)

    found = in_turns({n: decode(eight, n) for n in (128, 2048)}, options.rounds, {threads})
    grown = ratios(found[2048], found[128])
    yield Row("context 2048 / 128, int8 keys", "<= 1.25", grown)

    works = {
        (kv, n): prefill(engine, n)
        for kv, engine in (("int16", engines["int8"]), ("int8", eight))
        for n in (512, 2048)
    }
    works["int4", 512] = prefill(engines["int4"], 512)
    found = in_turns(works, min(options.rounds, 5))
    for kv in ("int16", "int8"):
        grown = ratios(found[kv, 2048], found[kv, 512]).times(1 / 4)
        yield Row(f"prompt of 2048 / (4 x 512), {kv} keys", "<= 1.35", grown)
    faster = ratios(found["int16", 512], found["int4", 512])
    yield Row("prompt of 512, int4 / int8", ">= 1.0", faster)

    found = in_turns({n: batch(engines["int8"], n, 128) for n in (1, 8, 32)}, 3, {threads})
    for n, must in ((8, ">= 3"), (32, "")):
        together = ratios(found[1], found[n]).times(n)
        yield Row(f"batch of {n} / batch of 1, int8", must, together)
    yield from lookup(engines["int8"], options)
    yield from around_a_step(engines["int8"], options)
    yield from tails(engines["int8"])
    yield from beside_another(engines["int8"], options)


def operator(options) -> Iterator[Row]:
    """Yield the share of the int8 peak that products reach, called from Python.

    A call rounds its inputs first; so many outputs make that 3% of it.
    """
    isa = _C.supported_isas()[0]
    works = {"peak": lambda: 1 / machine.peaks(1, isa)["int8"]}
    for activation in ("int8", "int8_g32_plain"):
        sizes = {"rows": 512, "cols": 1536, "outputs": 3072}
        args = make_args("linear", sizes, kind="int8", activation=activation)
        call = bind_kernel("linear", args, isa)[0]

        def run(call=call, operations=2 * 512 * 1536 * 3072) -> float:
            started = perf_counter()
            call()
            return (perf_counter() - started) / operations

        works[activation] = run
    found = in_turns(works, 3 * options.rounds)
    for activation, name in (("int8", "w8a8"), ("int8_g32_plain", "int8 in groups")):
        share = ratios(found["peak"], found[activation])
        yield Row(f"product of 512 rows, {name}, of the int8 peak, 1 thread", ">= 0.65", share, isa)


def lookup(engine: Engine, options) -> Iterator[Row]:
    """Yield what guesses from the prompt are worth on a text that repeats itself."""

    def per_answer(guesses: int | None) -> float:
        answer = engine.generate(TEXT, max_new_tokens=96, prompt_lookup=guesses)
        return answer.timings.decode_seconds / len(answer.token_ids)

    works = {n: lambda n=n: per_answer(n) for n in (None, 8)}
    found = in_turns(works, options.rounds, {options.threads})
    faster = ratios(found[None], found[8])
    yield Row("lookup decoding of a repetition / plain, int8", ">= 1.5", faster)


def around_a_step(engine: Engine, options) -> Iterator[Row]:
    """Yield how much longer a token of `stream` takes than a step of the bare loop.

    Both advance in one loop, `AT_ONCE` tokens each in turn, after the same number of tokens: what
    the machine does within seconds hits both. A figure is the median over these blocks.
    """
    ids = list(range(1, 129))

    def per_cent(**sampling) -> float:
        cache = engine.new_cache()
        engine.forward(ids, cache)
        stream = engine.stream(ids, max_new_tokens=STREAMED, **sampling)
        next(stream)  # the prompt
        extra = []
        while True:
            bare = steps(lambda: engine.forward([17], cache))
            streamed = steps(lambda: next(stream, None))
            if streamed:
                extra.append(statistics.median(streamed) / statistics.median(bare) - 1)
            if len(streamed) < AT_ONCE:  # the answer has ended
                return 100 * statistics.median(extra)

    def steps(step: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(AT_ONCE):
            started = perf_counter()
            if step() is None:
                break
            times.append(perf_counter() - started)
        return times

    samplings = {"greedy": {}, "top_p": {"temperature": 0.8, "top_p": 0.95, "seed": 1}}
    per_cent()  # warms up
    for name, sampling in samplings.items():
        extra = Sample.of([per_cent(**sampling) for _ in range(options.rounds)])
        yield Row(f"stream() over the bare loop, {name}, per cent", "< 3", extra)


def tails(engine: Engine, steps: int = 1000) -> Iterator[Row]:
    """Yield how much longer than the median the slowest hundredth of steps takes.

    The remark says it of the steps in which no other program had a core that a thread of ours
    wanted, too.
    """
    times, waits = [], []
    while len(times) < steps:
        cache = engine.new_cache()
        engine.forward(list(range(1, 129)), cache)
        for token in range(250):
            before = waited_for_cores()
            started = perf_counter()
            engine.forward([token + 1], cache)
            times.append(perf_counter() - started)
            waits.append(waited_for_cores() - before)
    median = statistics.median(times)
    ratio = float(np.quantile(times, 0.99)) / median
    alone = [time for time, wait in zip(times, waits, strict=True) if wait < WAIT]
    note = f"largest {max(times) / median:.2f}"
    if len(alone) < steps:
        late = float(np.quantile(alone, 0.99)) / median
        note += f"; {late:.2f} without the {steps - len(alone)} steps that waited for a core"
    yield Row(f"p99 / median of {steps} steps, int8", "<= 1.5", Sample.of([ratio]), note)


def waited_for_cores() -> float:
    """Return the seconds that threads of this process were ready to run and had no core (Linux)."""
    tasks = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[1]) for task in tasks) / 1e9


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_another(engine: Engine, options) -> Iterator[Row]:
    """Yield the part of the quiet throughput that is left beside a process that never rests."""
    work, left = decode(engine, 128, 48), []
    for _ in range(min(options.rounds, 5)):
        quiet = work.run()
        with busy_process():
            left.append(quiet / throughput_step(engine))
    yield Row("throughput beside a busy process / quiet, int8", ">= 0.45", Sample.of(left))


def throughput_step(engine: Engine, steps: int = 96) -> float:
    """Return the mean seconds of a step: what a throughput is made of."""
    cache = engine.new_cache()
    engine.forward(list(range(1, 129)), cache)
    started = perf_counter()
    for token in range(steps):
        engine.forward([token + 1], cache)
    return (perf_counter() - started) / steps


def surroundings(options) -> Iterator[Row]:
    """Yield what starting takes, in processes of their own, and the memory of a running model."""
    loads, firsts = [], []
    for round in range(options.rounds + 1):
        found = start("ours", "default", "--format", "int8", "--threads", str(options.threads))
        started = perf_counter()
        command = [sys.executable, "-m", "mobilellm_fast", "generate", "The capital of France is"]
        command += ["--max-new-tokens", "1", "--format", "int8"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if round:
            loads.append(1e3 * found["load"])
            firsts.append(perf_counter() - started)
    yield Row("warm load, ms", "<= 30", Sample.of(loads))
    firsts = Sample.of(firsts)
    yield Row("`mobilellm-fast generate`, start to end of one token, s", "<= 0.6", firsts)
    script = Path(__file__).resolve().parent / "resident.py"
    done = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    note = f"{found['resident'] / 1e6:.1f} MB for {found['needed'] / 1e6:.1f}"
    ratio = Sample.of([found["resident"] / found["needed"]])
    yield Row("resident memory, int8 + 2048 int8 keys / their bytes", "<= 1.1", ratio, note)
