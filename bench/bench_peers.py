"""Our engine beside others, on the same weights, in one run, in turns; and the quality of each."""

from pathlib import Path

import machine
import pytest
from export import default_root
from peer_compare import Contest, Result
from peer_workers import Spec
from timing import Work, publish

OURS = ("int8", "int4", "w8a8", "bf16")
PEERS = (
    "llama.cpp:Q8_0",
    "llama.cpp:Q8_0:flash=on",
    "llama.cpp:Q8_0:flash=off",
    "llama.cpp:Q4_0",
    "llama.cpp:F16",
    "llama.cpp:as-shipped",
    "onnxruntime-genai:int8",
    "onnxruntime-genai:int4",
    "openvino:int8",
    "openvino:int4",
    "ctranslate2:int8",
    "torch:fp32",
    "torch:bf16",
    "torch:fp32:compile=on",
)
QUICK = (2, 1)  # of ours and of the peers
# Fewer than of `peers.py`: engines are many.
TOKENS = {"decode": 32, "prefill": 512, "batch": 8}
ROUNDS = {"decode": 5, "prefill": 3, "batch": 3}


@pytest.fixture(scope="module")
def contest(request, pytestconfig, smoke):
    """Engines, loaded once for all tests of this module: a few if only quick ones run, else all."""
    here = [item for item in request.session.items if item.path == request.path]
    quick = smoke or all(item.get_closest_marker("quick") for item in here)
    ours, peers = (OURS[: QUICK[0]], PEERS[: QUICK[1]]) if quick else (OURS, PEERS)
    specs = [Spec.parse_ours(text) for text in ours] + [Spec.parse(text) for text in peers]
    root = pytestconfig.getoption("peers_root") or default_root()
    model = pytestconfig.getoption("model")
    peers = Contest(
        specs,
        root=Path(root).expanduser().resolve(),
        model=model,
        threads=machine.available_cpus(),
    )
    with peers:
        yield peers


def _works(results: list[Result], tokens: int) -> dict[str, Work]:
    works = {}
    for result in results:
        facts = result.about | {"fault": result.fault, "tokens": tokens}
        works[str(result.spec)] = Work(
            lambda: 0.0, facts, seconds=result.seconds, probes=result.probes
        )
    return works


@pytest.mark.parametrize(
    "op", [pytest.param("decode", marks=pytest.mark.quick), "prefill", "batch"]
)
def test_peers(op, contest, benchmark, rounds, smoke, say):
    """Times every engine in turns; one that is missing is part of the result."""
    contest.progress = say
    sizes = {"context": 8, "tokens": 4} if smoke else {"tokens": TOKENS[op]}
    results = contest.measure(op, rounds=min(rounds, ROUNDS[op]), **sizes)
    if op == "batch" and not any(result.seconds for result in results):
        pytest.skip(f"missing: {'; '.join(f'{r.spec}: {r.fault}' for r in results)}")
    benchmark.pedantic(lambda: None)
    tokens = sizes["tokens"]
    title = {
        "decode": f"decode of {tokens} tokens",
        "prefill": f"prefill of {tokens} tokens, per token",
        "batch": f"decode of 8 sequences together, {tokens} steps",
    }[op]
    benchmark.extra_info |= {"kind": "peers", "op": op, "title": f"Engines, {title}"}
    publish(benchmark, _works(results, 8 if op == "batch" else 1))
    assert op == "batch" or results[0].seconds, results[0].fault


def test_quality(contest, benchmark, smoke, say):
    """Measures perplexity and divergence from fp32 of every engine and format, on the same text.

    Options (flash attention, compilation) are judged by speed alone.
    """
    if smoke:
        pytest.skip("quality takes a minute: not in a smoke run")
    contest.progress = say
    results = contest.quality(lambda spec: not spec.options)
    benchmark.pedantic(lambda: None)
    title = "Engines, quality on 1537 tokens of English"
    benchmark.extra_info |= {"kind": "quality", "title": title}
    benchmark.extra_info["series"] = {
        str(r.spec): {"seconds": [], "fault": r.fault, "quality": r.quality} | r.about
        for r in results
    }
    assert results[0].quality, results[0].fault
