"""What the comparison with other engines rests on: the exported weights, and the figures."""

from pathlib import Path

import numpy as np
import peer_workers
import pytest
from checkpoint_files import write_directory
from export import export
from helpers import random_ids, random_weights, tiny_config
from peer_compare import compare, distance
from peer_workers import Spec, Unavailable, Worker

from mobilellm_fast.engine import Engine


@pytest.fixture
def model(tmp_path) -> Path:
    config = tiny_config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, layer_sharing="immediate"
    )
    return write_directory(tmp_path / "model", config, random_weights(config))


def logits(source: Path, ids: list[int]) -> np.ndarray:
    engine = Engine.load(source, format="fp32")
    return engine.forward(ids, engine.new_cache(), all_logits=True)


@pytest.mark.parametrize(("format", "largest"), [("F16", 1e-3), ("Q8_0", 1e-2), ("Q4_0", 1)])
def test_a_gguf_file_computes_what_the_model_computes(model, tmp_path, format, largest):
    ids = random_ids(tiny_config(), 12).tolist()
    path = export("llama.cpp", format, str(model), tmp_path)
    assert distance(logits(model, ids), logits(path, ids), ids)["kl"] < largest
    assert export("llama.cpp", format, str(model), tmp_path) == path  # kept


def test_distance_is_that_of_the_definition():
    p, q = np.array([[0.5, 0.25, 0.25]] * 200), np.array([[0.25, 0.5, 0.25]] * 200)
    found = distance(np.log(p) + 3, np.log(q) - 1, [0] * 200)
    assert found["kl"] == pytest.approx(0.25 * np.log(2))
    assert found["same_top1"] == 0
    assert found["perplexity"] == pytest.approx(4)
    assert found["perplexity_ratio"] == pytest.approx(2)


def test_ours_is_measured_and_a_missing_peer_is_reported(model, tmp_path):
    ours, peer = compare(
        [Spec.parse_ours("int8"), Spec.parse("llama.cpp:Q8_0:flash=on")],
        root=tmp_path,
        model=str(model),
        threads=1,
        context=4,
        tokens=3,
        rounds=2,
    )
    assert ours.fault is None and len(ours.seconds) == 2 and min(ours.seconds) > 0
    assert ours.about["weight_nbytes"] > 0
    assert not peer.seconds and "install llama.cpp" in peer.fault


def test_torch_runs_the_same_weights(model, tmp_path):
    ids, path = random_ids(tiny_config(), 12).tolist(), tmp_path / "logits.npy"
    worker = Worker(Spec.parse("torch:fp32"), str(model), 1, tmp_path)
    try:
        worker.ask("logits", ids=ids, path=str(path))
        assert len(worker.ask("decode", context=4, tokens=3)["seconds"]) == 3
        assert len(worker.ask("batch", sequences=2, context=4, tokens=3)["seconds"]) == 3
        assert worker.ask("prefill", tokens=5)["seconds"]
    finally:
        worker.close()
    assert distance(logits(model, ids), np.load(path), ids)["kl"] < 1e-6


def test_an_engine_that_fails_says_why(model, tmp_path):
    with pytest.raises(Unavailable, match="format must be one of"):
        Worker(Spec.parse_ours("int7"), str(model), 1, tmp_path)
    worker = Worker(Spec.parse_ours("int8"), str(model), 1, tmp_path)
    try:
        with pytest.raises(Unavailable, match="context holds"):
            worker.ask("prefill", tokens=10**6)
        assert worker.ask("prefill", tokens=3)["seconds"]  # and goes on
    finally:
        worker.close()


def test_an_environment_of_other_requirements_is_outdated(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_workers, "HERE", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "x.txt").write_text("")
    assert peer_workers.state("x", tmp_path) == "missing"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / peer_workers.INSTALLED).write_text("")
    assert peer_workers.state("x", tmp_path) == "installed"
    (tmp_path / "requirements" / "x.txt").write_text("# newer")
    assert peer_workers.state("x", tmp_path) == "outdated"
