"""From nothing to the first token: cold (no packed image yet) and warm, and the memory it takes."""

import machine
import pytest
from starts import starting
from timing import interleave

from mobilellm_fast.checkpoint import locate


@pytest.mark.parametrize("format", [pytest.param("int4", marks=pytest.mark.quick), "int8"])
def test_start(format, benchmark, rounds, pytestconfig, tmp_path, say):
    """Times processes from their start to the first token of the real model.

    The files are in the system's cache; a cold start packs the model anew and writes its image.
    """
    path, _ = locate(pytestconfig.getoption("model"))
    threads = str(machine.available_cpus())
    arguments = ("ours", str(path), "--format", format, "--threads", threads)
    folders = iter(range(10**6))

    def empty_cache() -> dict[str, str]:
        return {"MOBILELLM_FAST_CACHE": str(tmp_path / f"{next(folders)}")}

    works = {
        "warm": starting(*arguments, before=lambda: {"MOBILELLM_FAST_CACHE": str(tmp_path)}),
        "cold": starting(*arguments, before=empty_cache),
    }
    title = f"Start to the first token, default model, {format}"
    benchmark.extra_info |= {"kind": "start", "title": title}
    say("starting processes")
    interleave(benchmark, works, min(rounds, 5))
