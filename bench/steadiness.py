"""Which rounds can be compared, where a machine's memory changes its speed within seconds.

A turn that memory limits has a probe right before it and one right after it: what the memory read,
in bytes/s, for each number of threads in play. Where the probes around the turns of a round differ
by more than `SAME`, its turns had different machines: the round says nothing of their ratio. The
share of the bandwidth that a turn reached is of the *larger* of its two probes: the smaller one
would flatter it whenever the memory was slow just while it was probed, and by more than `SAME`
neither can be off. Turns without probes (what arithmetic limits) are all comparable.

Whatever has `seconds`, `probes` and `facts` can be asked: a `timing.Work` or what was saved of it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

SAME = 1.25  # probes whose largest is at most so many times the smallest are of one machine

Reading = dict[str, float]  # bytes/s by number of threads, a key of JSON


@dataclass(frozen=True)
class Sample:
    """Figures of the rounds that can be compared, out of `rounds`; of all where none could be."""

    values: list[float]
    rounds: int
    steady: bool = True

    @classmethod
    def of(cls, values: Sequence[float], kept: list[int] | None = None) -> "Sample":
        """Take the values of rounds, of which `kept` can be compared; None means all."""
        if kept is None:
            return cls(list(values), len(values))
        steady = bool(kept) or not values
        return cls([values[i] for i in kept] or list(values), len(values), steady)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """The largest over the smallest, less one."""
        return max(self.values) / min(self.values) - 1

    def __bool__(self) -> bool:
        return bool(self.values)

    def times(self, factor: float) -> "Sample":
        """The same of figures that are so many times as large."""
        return replace(self, values=[factor * value for value in self.values])

    @property
    def note(self) -> str:
        """Say that rounds were left out, or that none could be; empty where all count."""
        if not self.steady:
            return f"memory unsteady in all {self.rounds} rounds"
        return f"{len(self.values)} of {self.rounds} rounds" if self.discarded else ""

    @property
    def discarded(self) -> int:
        """How many rounds do not count."""
        return self.rounds - len(self.values) if self.steady else self.rounds


def comparable(*works: Any) -> list[int]:
    """Return the rounds in which all probes around the turns of these works are of one machine."""
    rounds = range(min(len(work.seconds) for work in works))
    return [i for i in rounds if _same([r for w in works if w.probes for r in w.probes[i]])]


def _same(readings: list[Reading]) -> bool:
    """Tell whether readings, of each number of threads, are within `SAME`."""
    by_threads: dict[str, list[float]] = {}
    for reading in readings:
        for threads, rate in reading.items():
            by_threads.setdefault(threads, []).append(rate)
    return all(max(rates) <= SAME * min(rates) for rates in by_threads.values())


def ratios(own: Any, reference: Any) -> Sample:
    """How many times as long as the reference a work took, in each comparable round."""
    pairs = zip(own.seconds, reference.seconds, strict=False)
    return Sample.of([a / b for a, b in pairs], comparable(own, reference))


def bandwidths(work: Any) -> list[float]:
    """Return the bandwidth that each turn is held to, in bytes/s: the larger of its two probes."""
    threads = str(work.facts["threads"])
    return [max(reading[threads] for reading in both) for both in work.probes]


def shares(work: Any) -> Sample:
    """Which part of what its own probes allow a work with `nbytes` reached, in each steady round.

    A floor that arithmetic sets (`compute_seconds` of the facts) counts where it is the longer one.
    """
    nbytes, least = work.facts["nbytes"], work.facts.get("compute_seconds", 0.0)
    turns = zip(work.seconds, bandwidths(work), strict=True)
    values = [max(nbytes / rate, least) / seconds for seconds, rate in turns]
    return Sample.of(values, comparable(work))
