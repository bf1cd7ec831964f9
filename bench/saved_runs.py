"""Runs as pytest-benchmark saved them, and the figures in them."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

# Everything that a full run has, in the order of a report.
KINDS = {
    "op": "Ops",
    "decode": "Decode",
    "prefill": "Prefill",
    "batch": "Batches",
    "sharing": "Layer sharing",
    "threads": "Threads",
    "start": "Starts",
    "paper": "Table 7 of the MobileLLM paper",
    "peers": "Other engines",
    "quality": "Quality",
}
DIFFERENT = 0.10  # two runs that differ in a ratio by more do not agree on it


@dataclass
class Series:
    """What was measured of one work: seconds per round, and the facts saved beside them."""

    name: str
    seconds: list[float]
    joules: list[float]
    facts: dict

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.facts.get("tokens", 1) / self.median

    @property
    def share(self) -> float | None:
        """The part of the machine's limit that it reached, None where there is no such limit."""
        floor = self.facts.get("floor_seconds")
        return None if floor is None else floor / self.median

    @property
    def joules_per_token(self) -> float | None:
        tokens = self.facts.get("tokens_per_run")
        return statistics.median(self.joules) / tokens if self.joules and tokens else None

    def ratios(self, reference: "Series") -> list[float]:
        """How many times as long as the reference it took, in each round."""
        pairs = zip(self.seconds, reference.seconds, strict=False)
        return [own / ref for own, ref in pairs]


@dataclass
class Benchmark:
    """One test: works that were measured in turns; the first that has figures is the reference."""

    kind: str
    title: str
    about: dict
    series: dict[str, Series]

    @property
    def first(self) -> Series:
        measured = (series for series in self.series.values() if series.seconds)
        return next(measured, next(iter(self.series.values())))

    def ratio(self, name: str) -> float | None:
        """The median, over the rounds, of a work's time in that of the first; None if missing."""
        ratios = self.series[name].ratios(self.first) if name in self.series else []
        return statistics.median(ratios) if ratios else None


@dataclass
class Run:
    """One saved run.

    Raises:
        ValueError: the file is not one of ours.
    """

    path: Path
    date: str = ""
    commit: str = ""
    machine: dict = field(default_factory=dict)
    benchmarks: list[Benchmark] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Run":
        try:
            raw = json.loads(path.read_text())
            machine = raw["machine_info"]["bench"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a run of pytest bench/ ({error!r})") from None
        commit = raw.get("commit_info", {})
        name = str(commit.get("id", ""))[:10] + (" with changes" if commit.get("dirty") else "")
        run = cls(path, raw["datetime"][:16].replace("T", " "), name, machine)
        for entry in raw["benchmarks"]:
            about = dict(entry["extra_info"])
            series = {
                key: Series(key, facts.pop("seconds"), facts.pop("joules", []), facts)
                for key, facts in about.pop("series", {}).items()
            }
            if series:
                kind, title = about.pop("kind"), about.pop("title")
                run.benchmarks.append(Benchmark(kind, title, about, series))
        return run

    def of(self, kind: str) -> list[Benchmark]:
        return [benchmark for benchmark in self.benchmarks if benchmark.kind == kind]

    @property
    def missing(self) -> list[str]:
        """Name what a full run has and this one has not."""
        absent = [title for kind, title in KINDS.items() if not self.of(kind)]
        faults = {
            f"{series.name}: {fault}"
            for benchmark in self.benchmarks
            for series in benchmark.series.values()
            if (fault := series.facts.get("fault"))
        }
        return absent + sorted(faults)

    @property
    def stamp(self) -> str:
        """Say where a figure comes from: machine, date, versions, command."""
        machine, versions = self.machine, self.machine["versions"]
        software = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
        smoke = " A smoke run: its figures mean nothing." if machine.get("smoke") else ""
        return (
            f"{machine['processor']}, {machine['cpus']} CPUs, {machine['isas'][0]}, "
            f"{machine['system']}; {self.date} UTC; commit {self.commit or 'unknown'}; {software}; "
            f"`{machine['command']}`.{smoke}"
        )


def agreement(runs: list[Run]) -> list[tuple[str, str, list[float], float]]:
    """Compare the ratios of runs.

    Returns:
        title, work, its ratio in each run, and the spread: largest / smallest - 1; the widest
        first. Only what all runs have.
    """
    found = []
    for benchmark in runs[0].benchmarks:
        same = [[b for b in run.benchmarks if b.title == benchmark.title] for run in runs]
        if not all(same):
            continue
        for name in list(benchmark.series)[1:]:
            ratios = [each[0].ratio(name) for each in same]
            if all(ratios):
                spread = max(ratios) / min(ratios) - 1
                found.append((benchmark.title, name, ratios, spread))
    return sorted(found, key=lambda row: -row[3])
