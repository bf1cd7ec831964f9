"""Everything that the GPU goals name, each beside what it is compared with, on one GPU.

    pytest bench/ --benchmark-only -m gpu              # everything
    pytest bench/ --benchmark-only -m gpu -k "gate or 125M-128"
    pytest bench/ --benchmark-only -m gpu --missing    # what the file of today lacks
    pytest bench/ --benchmark-only -m gpu --dry        # tiny models on a CPU: shows that it works

Peers that compile for long live in processes of their own, which get ready while the gates run;
kernels of ours are compiled by such processes, too. Nothing is timed meanwhile. What fails is in
the results as failed, and stops nothing else.
"""

import gpu_decodes
import pytest
from gpu_op_works import TOLERANCE, Sizes, goals_of, op_works, poisoned
from gpu_ours import TIERS
from gpu_timing import interleave, repeated
from timing import Work, median, publish

pytestmark = pytest.mark.gpu

ROUNDS = 15
SECONDS = 2.0  # of a measurement, beside its first round and the least rounds


def pytest_generate_tests(metafunc):
    cases = {
        "test_gate": TIERS,
        "test_decode": gpu_decodes.FIRST,
        "test_op": list(op_works(metafunc.config.getoption("dry"))),
        "test_more_decode": gpu_decodes.MORE,
        "test_peer": gpu_decodes.PEERS,
    }
    metafunc.parametrize("case", cases[metafunc.function.__name__], ids=str)


@pytest.fixture
def measure(session, benchmark):
    """Measure works in turns, save what was found, and fail if ours failed or is wrong."""

    def run(name, works, faults, pairs, shares, red="", **about):
        if red and not session.ungated:
            session.results.fail(name, f"RED: {red}", [*pairs, *shares])
            pytest.fail(f"RED: {red}; no speed is reported", pytrace=False)
        rounds, seconds = (2, 0.1) if session.dry else (ROUNDS, SECONDS)
        limits = [session.measure_bandwidth()] if shares else []
        broken = benchmark.pedantic(interleave, (works, rounds, seconds))
        for key, error in broken.items():
            faults[key] = session.failed(f"{name} {key}", error)
        if shares:
            limits.append(session.measure_bandwidth())
            about["copy_bandwidth"] = max(limits)
        held = {goal: (own, max(limits)) for goal, own in shares.items()}
        session.results.add(name, works, faults, pairs, held, red=red, **about)
        for key, work in works.items():
            if work.seconds:
                session.say(f"{name}: {key} {1e6 * median(work.seconds):.1f} µs")
        for key, fault in faults.items():
            session.say(f"{name}: {key} FAILED: {fault}")
        for line in session.results.lines(name):
            session.say(line)
        if any(work.seconds for work in works.values()):
            publish(benchmark, works)
        entry = session.results.data["measurements"][name]
        lacking = [goal["fault"] for goal in entry["goals"].values() if "fault" in goal]
        if lacking or red:
            pytest.fail("; ".join([*lacking, *([f"RED: {red}"] if red else [])]), pytrace=False)

    return run


@pytest.fixture
def tried(session, case):
    session.tried(gpu_decodes.Model("125M", tier=case).job)


@pytest.fixture
def quiet(session):
    session.quiet()


@pytest.fixture
def ready(session):
    session.peers_ready()


def _decode(case: gpu_decodes.Case, session, measure):
    with session.recording(case.name, case.goals):
        works, faults, red = session.decode_works(case)
        context, count = session.sizes(case)
        about = {"kind": "decode", "context": context, "batch": case.batch, "count": count}
        measure(case.name, works, faults, case.pairs, case.shares, red, **about)


def test_gate(case, session, tried, benchmark):
    """Logits no further from float32 than transformers' bf16, the same twice; poisoned memory."""
    name = f"gate-{case}"
    with session.recording(name, ()):
        found = benchmark.pedantic(session.gate_tier, (case,))
        session.results.gate(name, found)
    session.say(f"{name}: {found}")
    assert not found["red"], f"RED: {'; '.join(found['red'])}"


def test_decode(case, session, quiet, measure):
    _decode(case, session, measure)


def test_op(case, session, quiet, measure):
    with session.recording(case, goals_of(case)):
        l2_nbytes = session.results.about.get("l2_nbytes", 0)
        work = op_works(session.dry)[case](Sizes(session.device, l2_nbytes, session.dry))
        with poisoned():
            error = work.error()
        red = "" if error <= TOLERANCE else f"{work.name}: relative error {error:.3g}"
        works: dict[str, Work] = {}
        faults: dict[str, str] = {}
        for name, calls in {"ours": work.ours, **work.peers}.items():
            try:
                run, facts = repeated(calls(), session.device)
                works[name] = Work(run, facts | work.facts)
            except Exception as fault:
                faults[name] = session.failed(f"{case} {name}", fault)
        about = {"kind": "op", "title": work.name, "error": error}
        measure(case, works, faults, work.pairs, {}, red, **about)


def test_more_decode(case, session, quiet, measure):
    _decode(case, session, measure)


def test_peer(case, session, ready, measure):
    _decode(case, session, measure)
