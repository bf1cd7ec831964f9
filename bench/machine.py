"""What is known of the machine: its names and versions, and its limits, measured when asked for."""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

from mobilellm_fast import _C
from mobilellm_fast.executor import available_cpus
from mobilellm_fast.version import __version__

SOURCES = ("memory", "last_level", "l2")
PACKAGES = ("torch", "numpy", "transformers", "gguf", "pytest-benchmark")


def processor() -> str:
    """Name this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def command(program: str) -> str:
    """Return how this process was called, without the folders that files lie in here."""
    return " ".join([program, *(re.sub(r"(^|=)/.*/", r"\1", word) for word in sys.argv[1:])])


def facts() -> dict:
    """Describe the machine and the software, as every saved run does."""
    versions = {"mobilellm_fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": processor(),
        "system": platform.platform(),
        "cpus": available_cpus(),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "l2_nbytes": _C.l2_cache_nbytes(),
        "last_level_cache_nbytes": _C.last_level_cache_nbytes(),
        "isas": _C.supported_isas(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "command": command("pytest"),
    }


def read_rate(source: str, threads: int) -> float | None:
    """Measure what `threads` threads read, in bytes/s.

    Args:
        source: "memory"; "last_level", the cache, None where there is none beyond the second
            level; or "l2".
    """
    l2, last = _C.l2_cache_nbytes(), _C.last_level_cache_nbytes()
    if source == "memory":
        return _C.read_bandwidth(threads)
    if source == "l2":
        return _C.cache_bandwidth(threads, l2 // 2)
    each = last // 2 // threads
    return _C.cache_bandwidth(threads, each) if each >= 2 * l2 else None


def peaks(threads: int, isa: str) -> dict[str, float]:
    """Measure operations/s of registers alone, of one table."""
    return {"int8": _C.int8_peak(threads, isa), "fp32": _C.fp32_peak(threads, isa)}


def thread_counts() -> list[int]:
    """List 1, 2, 4 ... and all processors."""
    cpus = available_cpus()
    return sorted({cpus, *(2**i for i in range(cpus.bit_length()) if 2**i <= cpus)})


def limits() -> dict:
    """Measure every limit, for 1 and all threads."""
    return {
        str(threads): {source: read_rate(source, threads) for source in SOURCES}
        | {"barrier_seconds": _C.barrier_seconds(threads)}
        | {isa: peaks(threads, isa) for isa in _C.supported_isas()}
        for threads in sorted({1, available_cpus()})
    }
