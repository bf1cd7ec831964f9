"""Starts of engines in processes of their own, as works to measure in turns."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from timing import Work

SCRIPT = Path(__file__).resolve().parent / "start_worker.py"
PARTS = ("import", "load", "first_token", "init", "execute", "peak_nbytes")


def start(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, float]:
    """Run a process up to its end.

    Returns:
        what `start_worker` prints, and "process": seconds from its start to the first token.

    Raises:
        RuntimeError: it failed; says what it printed last.
    """
    command = [sys.executable, str(SCRIPT), *arguments]
    with tempfile.TemporaryFile("w+") as log:
        started = perf_counter()
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        first = process.stdout.readline()
        seconds = perf_counter() - started
        rest = process.communicate()[0]
        if process.returncode or not first:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {last}")
    return json.loads(rest) | {"process": seconds}


def starting(
    *arguments: str,
    part: str = "process",
    before: Callable[[], dict[str, str] | None] = lambda: None,
    **facts,
) -> Work:
    """Make a work of starting an engine; its seconds are those of `part`.

    Every part goes to the facts, one figure per round; the round that warms up is left out.

    Args:
        arguments: of `start_worker`.
        part: "process" or one of `PARTS`.
        before: called before each start, returns changes to the environment.
        facts: more to save.
    """
    parts: dict[str, list[float]] = {}
    runs = 0

    def run() -> float:
        nonlocal runs
        found = start(*arguments, environment=before())
        for name, value in found.items() if runs else ():
            parts.setdefault(name, []).append(value)
        runs += 1
        return found[part]

    return Work(run, {"parts": parts, "tokens": 1, **facts})
