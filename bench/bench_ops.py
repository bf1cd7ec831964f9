"""Every op on the shapes of MobileLLM-125M, on every table of kernels that this machine runs.

Of the larger models, their largest layer on the best table.

One thread: the stand-alone ops start a pool of threads per call, a model does not. A call comes
from Python and quantizes its inputs itself, as `ops` does; the smallest calls are mostly that.
"""

import pytest
from machine import peaks, read_rate
from op_works import OpCase, calls, check, demands, op_cases
from timing import ROUND_SECONDS, Probe, Work, interleave, repeated

from mobilellm_fast import _C

CASES = [
    pytest.param(case, id=str(case), marks=[pytest.mark.quick] if case.quick else [])
    for case in op_cases()
]


@pytest.mark.parametrize("case", CASES)
def test_op(case: OpCase, benchmark, rounds, smoke):
    """Times an op on each table in turns, if all of them compute what the reference does."""
    isas = _C.supported_isas()[: None if case.preset.endswith("-125M") else 1]
    for isa in isas:
        check(case, isa)
    facts = demands(case)
    seconds = 1e-4 if smoke else ROUND_SECONDS
    works = {isa: Work(repeated(call, seconds)) for isa, call in calls(case, isas).items()}
    by_memory = facts["source"] == "memory"
    read = 0.0 if by_memory else read_rate(facts["source"], 1)
    for isa, work in works.items():
        peak = peaks(1, isa)[facts["peak"]]
        work.facts = facts | {"threads": 1, "compute_seconds": facts["operations"] / peak}
        if not by_memory:  # its share of the memory is told by probes around its turns
            work.facts["floor_seconds"] = max(facts["nbytes"] / read, facts["operations"] / peak)
    benchmark.extra_info |= {"kind": "op", "title": str(case), "preset": case.preset}
    benchmark.extra_info["stem"] = case.stem
    probe = Probe({1}) if by_memory else None
    interleave(benchmark, works, rounds, probe, slow=10 * ROUND_SECONDS)
