"""The results of a GPU run: a file that is complete after every measurement, and a table."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

import torch
from gpu_goals import GOALS
from machine import command
from timing import Work, ratios

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "torchao", "numpy")
L2_NBYTES = 64 << 20  # where torch does not say
LOST = "the GPU was lost"  # to an earlier measurement: how the fault of what could not run begins
ROOT = Path(__file__).resolve().parents[1]


def facts(device: torch.device) -> dict:
    """Describe the device and the software."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {"device": "CPU (dry)", "versions": versions, "commit": _commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_nbytes": properties.total_memory,
            "l2_nbytes": getattr(properties, "L2_cache_size", L2_NBYTES),
        }
    return found


def _commit() -> str:
    """Name the commit: as the environment says for a copied tree, else from git."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10")
    return os.environ.get("MLF_COMMIT") or _output(*command) or "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else ""


@dataclass
class Results:
    """Everything that a run found; written whenever something is added.

    A second run on the same device and day goes into the same file: it replaces what it measured
    again and keeps the rest. Ratios are within one measurement, so that is no loss; each has its
    own time, commit and limits.

    Args:
        folder: where the file goes.
        device: what is measured.
        dry: nothing of it means anything.
    """

    folder: Path
    device: torch.device
    dry: bool
    started: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        self.about = facts(self.device)
        name = re.sub(r"[^a-z0-9]+", "-", self.about["device"].lower()).strip("-")
        now = datetime.now(timezone.utc)
        self.path = self.folder / f"{name}-{now:%Y-%m-%d}.json"
        self.data = {"gates": {}, "measurements": {}, "notes": {}}
        if self.path.exists():
            self.data |= json.loads(self.path.read_text())
        self.data |= self.about | {
            "date": now.isoformat(timespec="seconds"),
            "command": command("pytest"),
            "dry": self.dry,
        }

    def gate(self, name: str, found: dict) -> None:
        """Add what a gate found; `red` lists what is wrong."""
        self.data["measurements"].pop(name, None)  # that it began
        self.data["gates"][name] = self._stamp() | found
        self._write()

    def add(
        self,
        name: str,
        works: dict[str, Work],
        faults: dict[str, str],
        pairs: dict[str, tuple[str, ...]],
        shares: dict[str, tuple[str, float]],
        **about,
    ) -> None:
        """Add a measurement.

        Args:
            name: what was measured.
            works: with their seconds; `facts` of a work are saved as they are.
            faults: what went wrong, by work.
            pairs: for a goal, the work that should be faster, and those of which the fastest is
                what it is compared with.
            shares: for a goal, a work that has `nbytes`, and the bytes per second it is held to.
            about: more facts.
        """
        found = {key: work.facts | _spread(work.seconds) for key, work in works.items()}
        for key, fault in faults.items():
            found.setdefault(key, {})["fault"] = fault
        seconds = {key: work.seconds for key, work in works.items() if work.seconds}
        goals = {}
        for goal, (own, *others) in pairs.items():
            there = [other for other in others if other in seconds]
            if own in seconds and there:
                best = min(there, key=lambda other: statistics.median(seconds[other]))
                goals[goal] = {"of": own, "to": best} | _ratio(ratios(seconds[best], seconds[own]))
            else:
                absent = [own] if own not in seconds else others
                goals[goal] = {
                    "fault": "; ".join(f"{w}: {faults.get(w, 'no figure')}" for w in absent)
                }
        for goal, (own, limit) in shares.items():
            if own in seconds:
                nbytes = works[own].facts["nbytes"]
                goals[goal] = {"of": own} | _ratio([nbytes / s / limit for s in seconds[own]])
            else:
                goals[goal] = {"fault": f"{own}: {faults.get(own, 'no figure')}"}
        self.data["measurements"][name] = self._stamp() | about | {"series": found, "goals": goals}
        self._write()

    def fail(self, name: str, fault: str, goals: Iterable[str]) -> None:
        """Add a measurement that could not be made."""
        entry = {"fault": fault, "series": {}, "goals": {goal: {"fault": fault} for goal in goals}}
        self.data["measurements"][name] = self._stamp() | entry
        self._write()

    def note(self, name: str, text: str) -> None:
        """Add something that went wrong beside the measurements."""
        self.data["notes"][name] = text
        self._write()

    def has(self, name: str) -> bool:
        """Whether the file has a measurement or gate of this name, even one that failed."""
        entry = self.data["measurements"].get(name) or self.data["gates"].get(name)
        return bool(entry) and not entry.get("fault", "").startswith(LOST)

    def lines(self, name: str) -> list[str]:
        """Say what a measurement means for its goals, a line each."""
        entry = self.data["measurements"][name]
        return [
            f"{GOALS[key].text}: {describe_ratio(key, case)}"
            for key, case in entry["goals"].items()
        ]

    def _stamp(self) -> dict:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {
            "at": now,
            "commit": self.about["commit"],
            "seconds_into_run": round(perf_counter() - self.started, 1),
        }

    def _write(self) -> None:
        self.data["seconds"] = round(perf_counter() - self.started, 1)
        self.data["goals"] = verdicts(self.data)
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(self.data, file, indent=1)
                file.write("\n")
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _spread(seconds: list[float]) -> dict:
    if not seconds:
        return {"seconds": []}
    return {
        "median": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "seconds": seconds,
    }


def _ratio(values: list[float]) -> dict:
    return {"ratio": statistics.median(values), "low": min(values), "high": max(values)}


def verdicts(data: dict) -> dict:
    """Judge every goal by the worst of the measurements that have it.

    Returns:
        by goal: `text`, `must`, `stretch`, `cases` (measurement -> ratio), and `ratio` and
        `verdict`: "stretch", "must", "below"; "red" if a gate of what was measured is; "failed" if
        a case has no figure; "not measured".
    """
    found = {}
    for key, goal in GOALS.items():
        cases = {
            name: (entry["goals"][key], entry.get("red"))
            for name, entry in data["measurements"].items()
            if key in entry.get("goals", {})
        }
        measured = [case["ratio"] for case, _ in cases.values() if "ratio" in case]
        entry = {"text": goal.text, "must": goal.must, "stretch": goal.stretch}
        entry["cases"] = {name: case for name, (case, _) in cases.items()}
        if not cases:
            verdict = "not measured"
        elif len(measured) < len(cases):
            verdict = "failed"
        elif any(red for _, red in cases.values()):
            verdict = "red"
        else:
            verdict = goal.verdict(measured)
        found[key] = entry | {"ratio": min(measured, default=None), "verdict": verdict}
    return found


def describe_ratio(key: str, case: dict) -> str:
    """Say a ratio with its spread beside what it should be, or why there is none."""
    goal = GOALS[key]
    if "fault" in case:
        return f"failed ({case['fault']})"
    low, middle, high = (goal.format(case[name]) for name in ("low", "ratio", "high"))
    beside = f", beside {case['to']}" if "to" in case else ""
    return (
        f"{middle} ({low} … {high}){beside}; must {goal.format(goal.must)}, "
        f"stretch {goal.format(goal.stretch)}: {goal.verdict([case['ratio']])}"
    )


def table(data: dict) -> list[str]:
    """Return the goals and what they reached, a line each, for a terminal."""
    lines = [f"{'goal':58} {'must':>7} {'stretch':>8} {'measured':>9}  verdict"]
    for key, entry in data.get("goals", {}).items():
        goal, ratio = GOALS[key], entry["ratio"]
        shown = "" if ratio is None else goal.format(ratio)
        note = {case["fault"] for case in entry["cases"].values() if "fault" in case}
        lines.append(
            f"{entry['text'][:58]:58} {goal.format(goal.must):>7} {goal.format(goal.stretch):>8} "
            f"{shown:>9}  {entry['verdict']}{''.join(f' ({n})' for n in sorted(note))}"
        )
    return lines
