"""How everything is timed: in turns, A B A B, a figure per turn, medians of ratios of one round."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from energy import Meter

ROUND_SECONDS = 5e-3  # a turn of a short operation repeats it for so long
SLOW_SECONDS = 0.5  # of what takes longer, fewer rounds are enough


@dataclass
class Work:
    """Something to measure.

    Args:
        run: does it once and returns the seconds it took; a model's work times itself.
        facts: what a reader needs beside the seconds, saved as it is.
    """

    run: Callable[[], float]
    facts: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)  # of a turn, where they can be read


def interleave(benchmark, works: dict[str, Work], rounds: int) -> bool:
    """Measure works in turns, so that a machine that drifts does so under all of them.

    A first round only warms up. The seconds of each work, per round, are saved with the run, in
    `extra_info["series"]`; what pytest-benchmark itself shows and compares are those of the first.

    Args:
        benchmark: the fixture of pytest-benchmark.
        works: by name; ratios are to the first.
        rounds: how many to count; fewer if a round takes long.

    Returns:
        Whether energy could be read.
    """
    meter = Meter()

    def round() -> None:
        for work in works.values():
            before = meter.joules() if meter.readable else []
            work.seconds.append(work.run())
            if meter.readable:
                work.joules.append(meter.since(before))

    gc.collect()
    started = perf_counter()
    round()
    slow = (perf_counter() - started) / len(works) > SLOW_SECONDS
    for work in works.values():
        work.seconds.clear()
        work.joules.clear()
    gc.disable()
    try:
        benchmark.pedantic(round, rounds=min(rounds, 3) if slow else rounds)
    finally:
        gc.enable()
    publish(benchmark, works)
    return meter.readable


def publish(benchmark, works: dict[str, Work]) -> None:
    """Save the seconds of works and what belongs to them; pytest-benchmark shows the first."""
    benchmark.extra_info["series"] = {
        name: {"seconds": work.seconds, "joules": work.joules} | work.facts
        for name, work in works.items()
    }
    if benchmark.stats is not None:  # None: --benchmark-disable
        measured = (work.seconds for work in works.values() if work.seconds)
        benchmark.stats.stats.data = list(next(measured))


def repeated(call: Callable[[], object], seconds: float = ROUND_SECONDS) -> Callable[[], float]:
    """Make `run` of a short operation: as many calls as fill a turn, and the seconds of one."""
    call()
    started = perf_counter()
    call()
    once = max(perf_counter() - started, 1e-7)
    count = max(1, round(seconds / once))

    def run() -> float:
        started = perf_counter()
        for _ in range(count):
            call()
        return (perf_counter() - started) / count

    return run


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratios(seconds: list[float], reference: list[float]) -> list[float]:
    """How many times as long as the reference each round took."""
    return [own / ref for own, ref in zip(seconds, reference, strict=False)]
