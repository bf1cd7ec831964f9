"""How many threads decode a model fastest here: measured once per machine and model, then kept.

More threads are not always faster: memory may be the limit already, cores may be hyperthreads or
busy. Results do not depend on the choice, so a wrong one costs time alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import _C
from .cache import cache_directory
from .executor import Executor, available_cpus
from .files import whole_file
from .version import __version__

MARGIN = 1.15  # a choice must decode so much faster than all threads, which prompts want
ROUNDS = 5  # in which every candidate takes its turn
BUDGET = 0.3  # seconds after which no further round begins
LIFETIME = 30 * 24 * 3600  # seconds until it is measured again: machines change


@dataclass(frozen=True)
class Choice:
    """How to run a model.

    Args:
        threads: how many compute.
        fetch_ahead: whether repeated blocks fetch the next one meanwhile, see `csrc/plan.h`.
    """

    threads: int
    fetch_ahead: bool = True


def choose(make_executor: Callable[[Choice], Executor], signature: str) -> Choice:
    """Return what decodes fastest on this machine.

    Args:
        make_executor: builds the model's executor for a choice.
        signature: what tells this model, and how it is run, from others.
    """
    cpus = available_cpus()
    default = Choice(cpus)
    file = _file(signature, cpus)
    if (kept := _read(file, cpus)) is not None:
        return kept
    executor = make_executor(default)
    candidates = [default]
    if executor.fetches_ahead:
        candidates.append(Choice(cpus, fetch_ahead=False))
    counts = {2**i for i in range(cpus.bit_length()) if 2**i < cpus}
    candidates += [Choice(count) for count in sorted(counts, reverse=True)]
    if len(candidates) == 1:
        return default
    seconds = _measure([executor, *map(make_executor, candidates[1:])])
    best = min(range(len(candidates)), key=seconds.__getitem__)
    choice = candidates[best] if seconds[best] * MARGIN < seconds[0] else default
    _write(file, choice)
    return choice


def _measure(executors: list[Executor]) -> list[float]:
    """Shortest time of a decode step with each, in turns: others may disturb any one of them."""
    caches = [executor.new_cache() for executor in executors]
    best = [float("inf")] * len(executors)
    deadline = time.perf_counter() + BUDGET
    for _ in range(ROUNDS):
        for i, (executor, cache) in enumerate(zip(executors, caches, strict=True)):
            for _ in range(2):  # the first wakes threads and fills caches
                begin = time.perf_counter()
                executor.forward([0], cache)
                best[i] = min(best[i], time.perf_counter() - begin)
                cache.truncate(0)
        if time.perf_counter() > deadline:
            break
    return best


def _file(signature: str, cpus: int) -> Path | None:
    """One small file per machine and model; None if there is no place for it."""
    machine = f"{__version__} {platform.machine()} {_processor()} {cpus} {_C.supported_isas()}"
    key = hashlib.sha256(f"{machine}\0{signature}".encode()).hexdigest()[:32]
    try:
        return cache_directory() / "calibration" / f"{key}.json"
    except OSError:  # no home directory
        return None


def _processor() -> str:
    """The processor's name, as the system calls it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor()


def _read(file: Path | None, cpus: int) -> Choice | None:
    """A choice that was kept; None if there is none, or it is old or damaged."""
    if file is None:
        return None
    try:
        if time.time() - file.stat().st_mtime > LIFETIME:
            return None
        fields: dict[str, Any] = json.loads(file.read_bytes())
        threads, fetch_ahead = fields["threads"], fields["fetch_ahead"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    good = type(threads) is int and 1 <= threads <= cpus and isinstance(fetch_ahead, bool)
    return Choice(threads, fetch_ahead) if good else None


def _write(file: Path | None, choice: Choice) -> None:
    """Keep a choice; a cache that cannot be written costs measuring again."""
    with contextlib.suppress(OSError):
        if file is not None:
            with whole_file(file) as out:
                out.write(json.dumps(asdict(choice)).encode())
