"""Runs as pytest-benchmark saved them, and the figures in them."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from steadiness import Sample, ratios, shares

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
    probes: list = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.facts.get("tokens", 1) / self.median

    @property
    def share(self) -> float | None:
        """The part of the machine's limit that it reached, None where there is no such limit."""
        if self.probes and self.facts.get("nbytes"):
            return shares(self).median
        floor = self.facts.get("floor_seconds")
        return None if floor is None else floor / self.median

    @property
    def joules_per_token(self) -> float | None:
        tokens = self.facts.get("tokens_per_run")
        return statistics.median(self.joules) / tokens if self.joules and tokens else None

    def ratios(self, reference: "Series") -> Sample:
        """How many times as long as the reference it took, in each round that can be compared."""
        return ratios(self, reference)


@dataclass
class Benchmark:
    """One test: works that were measured in turns; the first that has figures is the reference.

    `apart`: the spread between runs of the ratios that these do not agree on, by work.
    """

    kind: str
    title: str
    about: dict
    series: dict[str, Series]
    apart: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> Series:
        measured = (series for series in self.series.values() if series.seconds)
        return next(measured, next(iter(self.series.values())))

    def reference(self, series: Series) -> Series:
        """Return what a work's ratio is to: the first, in the paper's table that of its engine."""
        if self.kind == "paper":
            own = series.facts["engine"]
            return next(s for s in self.series.values() if s.facts["engine"] == own)
        return self.first

    def ratios(self, name: str) -> Sample | None:
        """A work's time in that of its reference, None if missing or that itself."""
        series = self.series.get(name)
        if series is None or (reference := self.reference(series)) is series:
            return None
        return series.ratios(reference) or None

    def ratio(self, name: str) -> float | None:
        """The median of `ratios`; 1 of the reference."""
        sample = self.ratios(name)
        return sample.median if sample else (1.0 if name == self.first.name else None)


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
                key: Series(
                    key,
                    facts.pop("seconds"),
                    facts.pop("joules", []),
                    probes=facts.pop("probes", []),
                    facts=facts,
                )
                for key, facts in about.pop("series", {}).items()
            }
            if series:
                kind, title = about.pop("kind"), about.pop("title")
                run.benchmarks.append(Benchmark(kind, title, about, series))
        return run

    def of(self, kind: str) -> list[Benchmark]:
        return [benchmark for benchmark in self.benchmarks if benchmark.kind == kind]

    def mark(self, found: list["Agreement"]) -> None:
        """Note which ratios other runs do not agree on."""
        apart = {(row.title, row.name): row.spread for row in found if row.apart}
        for benchmark in self.benchmarks:
            names = (n for n in benchmark.series if (benchmark.title, n) in apart)
            benchmark.apart = {name: apart[benchmark.title, name] for name in names}

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


@dataclass(frozen=True)
class Agreement:
    """One ratio in several runs: a sample of each, in their order."""

    title: str
    name: str
    samples: list[Sample]

    @property
    def spread(self) -> float:
        """The largest median over the smallest, less one."""
        medians = [sample.median for sample in self.samples]
        return max(medians) / min(medians) - 1

    @property
    def apart(self) -> bool:
        return self.spread > DIFFERENT


def agreement(runs: list[Run]) -> list[Agreement]:
    """Compare all ratios that runs have in common; the widest spread first."""
    found = []
    for benchmark in runs[0].benchmarks:
        same = [[b for b in run.benchmarks if b.title == benchmark.title] for run in runs]
        if not all(same):
            continue
        for name in benchmark.series:
            samples = [each[0].ratios(name) for each in same]
            if all(samples):
                found.append(Agreement(benchmark.title, name, samples))
    return sorted(found, key=lambda row: -row.spread)
