"""How everything is timed: in turns, A B A B, a figure per turn, medians of ratios of one round."""

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from energy import Meter
from steadiness import Reading, comparable

ROUND_SECONDS = 5e-3  # a turn of a short operation repeats it for so long
SLOW_SECONDS, FEW = 0.5, 3  # of models that take longer, so many rounds are enough
FRESH_SECONDS = 0.03  # a probe as old as that is taken anew: a turn of a model is longer
MORE_SECONDS = 20  # at most, for rounds that replace unsteady ones


@dataclass
class Work:
    """Something to measure.

    Args:
        run: does it once and returns the seconds it took; a model's work times itself. None where
            it cannot: then it is asked no more, and has no figures.
        facts: what a reader needs beside the seconds, saved as it is.
        probes: per turn, readings of the memory right before and right after it, see `steadiness`.
    """

    run: Callable[[], float | None]
    facts: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)  # of a turn, where they can be read
    probes: list[tuple[Reading, Reading]] = field(default_factory=list)

    def forget(self) -> None:
        """Have no figures."""
        for figures in (self.seconds, self.joules, self.probes):
            figures.clear()


class Probe:
    """Reads the memory's bandwidth, unless it just did.

    Args:
        threads: numbers of threads to read with.
        read: how, from a number of threads to bytes/s; None is `machine.read_rate`.
    """

    def __init__(self, threads: set[int], read: Callable[[int], float] | None = None) -> None:
        if read is None:
            import machine  # needs the extension; reports of saved runs do not

            read = lambda count: machine.read_rate("memory", count)  # noqa: E731
        self._threads, self._read = sorted(threads), read
        self._last, self._taken = {}, -math.inf

    def __call__(self) -> Reading:
        if perf_counter() - self._taken > FRESH_SECONDS:
            self._last = {str(count): self._read(count) for count in self._threads}
            self._taken = perf_counter()
        return self._last


def take_turns(
    works: dict[str, Work],
    rounds: int,
    probe: Probe | None = None,
    tell: Callable[[int, str], None] = lambda round, name: None,
    meter: Meter | None = None,
    slow: float = math.inf,
) -> None:
    """Run works in turns, so that a machine that drifts does so under all of them.

    A first round only warms up. With a probe, rounds are added, at most as many again and for
    `MORE_SECONDS`, until the ratio of each work to the first has more than half of `rounds` that
    can be compared.

    Args:
        works: by name; their `seconds` (and `probes`, `joules`) have a figure per round after it.
        tell: is called before each turn with its round, 0 for the first, and its name.
        slow: of turns that take longer on average, in seconds, `FEW` rounds are enough.
    """
    running = dict(works)
    count, busy = 0, 0.0

    def round() -> None:
        nonlocal count, busy
        for name, work in list(running.items()):
            tell(count, name)
            joules = meter.joules() if meter else []
            before = probe() if probe else None
            started = perf_counter()
            seconds = work.run()
            busy += perf_counter() - started
            if seconds is None:
                work.forget()
                del running[name]
                continue
            work.seconds.append(seconds)
            if meter:
                work.joules.append(meter.since(joules))
            if probe:
                work.probes.append((before, probe()))
        count += 1

    def enough() -> bool:
        measured = list(running.values())
        return all(2 * len(comparable(work, measured[0])) > rounds for work in measured)

    gc.collect()
    round()
    if busy > slow * len(works):
        rounds = min(rounds, FEW)
    for work in works.values():
        work.forget()
    gc.disable()
    try:
        for _ in range(rounds):
            round()
        started = perf_counter()
        for _ in range(rounds if probe else 0):
            if enough() or perf_counter() - started > MORE_SECONDS:
                break
            round()
    finally:
        gc.enable()


def interleave(
    benchmark,
    works: dict[str, Work],
    rounds: int,
    probe: Probe | None = None,
    slow: float = SLOW_SECONDS,
) -> bool:
    """Measure works by `take_turns` and save the figures with the run.

    They are in `extra_info["series"]`; what pytest-benchmark itself shows and compares are those of
    the first.

    Args:
        benchmark: the fixture of pytest-benchmark.
        works: by name; ratios are to the first.
        rounds: how many to count.
        probe: of the memory, where it limits them.
        slow: see `take_turns`.

    Returns:
        Whether energy could be read.
    """
    meter = Meter()
    benchmark.pedantic(lambda: None)
    take_turns(works, rounds, probe, meter=meter if meter.readable else None, slow=slow)
    publish(benchmark, works)
    return meter.readable


def publish(benchmark, works: dict[str, Work]) -> None:
    """Save the seconds of works and what belongs to them; pytest-benchmark shows the first."""
    benchmark.extra_info["series"] = {
        name: {"seconds": work.seconds, "joules": work.joules, "probes": work.probes} | work.facts
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
