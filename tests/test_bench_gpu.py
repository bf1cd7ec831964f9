"""The GPU's benchmark on a CPU: what is wrong gets no figures, what fails is told."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("this tree has no benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import gpu_decodes  # noqa: E402  on the path only now
import gpu_goals  # noqa: E402
import gpu_models  # noqa: E402
import gpu_op_works  # noqa: E402
import gpu_ours  # noqa: E402
import gpu_pack  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_plain  # noqa: E402
import gpu_results  # noqa: E402
import gpu_session  # noqa: E402
import gpu_timing  # noqa: E402
import report_gpu  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")

FLIP_A_SIGN = """
import sys
sys.path.insert(0, {bench!r})
import gpu_ours

right = gpu_ours.StandIn.forward
gpu_ours.StandIn.forward = lambda self, *args, **options: -right(self, *args, **options)
"""


def run_pytest(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(p for p in (str(tmp_path), os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-m", "pytest", "--benchmark-only", f"--rootdir={BENCH.parent}"]
    command += ["-rs", *arguments, str(BENCH / "bench_gpu.py")]
    # as a process of its own, also beside workers of pytest-xdist, where benchmarks are off
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_dry_run_measures_gates_and_reports(tmp_path):
    chosen = "(gate and graph) or 1.5B-128 or sharing-350M or batch-8"
    done = run_pytest(
        tmp_path, "-m", "gpu", "--dry", "--gpu-results", str(tmp_path / "results"), "-k", chosen
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").iterdir()
    data = json.loads(path.read_text())
    assert data["dry"] and data["gates"]["gate-graph"]["red"] == []
    assert set(data["measurements"]) == {"1.5B-128", "sharing-350M", "batch-8"}
    for name in ("int8", "int4", "bandwidth-1.5B", "sharing-350M"):
        assert data["goals"][name]["ratio"] > 0
        assert data["goals"][name]["verdict"] in ("below", "must", "stretch")
        assert gpu_goals.GOALS[name].text in done.stdout
    assert data["goals"]["eager"]["verdict"] == "not measured"
    assert data["measurements"]["batch-8"]["series"]["graphed"]["seconds"]


def test_wrong_logits_turn_it_red_and_have_no_speed(tmp_path):
    (tmp_path / "flip_a_sign.py").write_text(FLIP_A_SIGN.format(bench=str(BENCH)))
    results = tmp_path / "results"
    arguments = ("-p", "flip_a_sign", "-m", "gpu", "--dry", "--gpu-results", str(results))
    done = run_pytest(tmp_path, *arguments, "-k", "(gate and graph) or 1B-128")
    assert done.returncode == 1
    assert "RED: chose a token" in done.stdout.replace("ours: ", "")
    (path,) = results.iterdir()
    data = json.loads(path.read_text())
    assert any(text.startswith("prompt: KL") for text in data["gates"]["gate-graph"]["red"])
    assert data["goals"]["bandwidth-1B"]["ratio"] is None
    assert data["goals"]["bandwidth-1B"]["verdict"] == "failed"
    assert data["measurements"]["1B-128"]["series"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run_pytest(tmp_path, "-m", "gpu")
    assert "finds no CUDA device; --dry runs tiny models on the CPU" in done.stdout
    assert " 0 passed" not in done.stdout and "failed" not in done.stdout
    done = run_pytest(tmp_path)
    assert "deselected" in done.stdout


def work(*seconds: float) -> timing.Work:
    values = iter((0.0, *seconds))  # the first round only warms up
    return timing.Work(lambda: next(values))


def test_a_work_that_fails_leaves_the_others_alone():
    def broken() -> float:
        raise ValueError("no such backend")

    works = {"a": work(1, 2, 3), "broken": timing.Work(broken), "b": work(4, 5, 6)}
    faults = gpu_timing.interleave(works, 3, 10)
    assert works["a"].seconds == [1, 2, 3] and works["b"].seconds == [4, 5, 6]
    assert not works["broken"].seconds
    assert "no such backend" in gpu_timing.describe(faults["broken"])


@pytest.fixture
def results(tmp_path):
    return gpu_results.Results(tmp_path, CPU, dry=True)


def measured(**seconds: list[float]) -> dict[str, timing.Work]:
    return {name: timing.Work(None, {"nbytes": 8}, list(s)) for name, s in seconds.items()}


def read(results) -> dict:
    return json.loads(results.path.read_text())


def test_a_ratio_is_to_the_fastest_of_the_others(results):
    works = measured(ours=[1, 2], flash=[2, 6], math=[9, 9])
    results.add("x", works, {"cudnn": "not here"}, {"head": ("ours", "flash", "cudnn", "math")}, {})
    goal = read(results)["goals"]["head"]
    assert goal["cases"]["x"] == {"of": "ours", "to": "flash", "ratio": 2.5, "low": 2, "high": 3}
    assert goal["verdict"] == "stretch"
    assert read(results)["measurements"]["x"]["series"]["cudnn"] == {"fault": "not here"}


def test_the_worst_case_counts_and_a_failed_one_fails_the_goal(results):
    results.add("x", measured(ours=[1], them=[1.5]), {}, {"head": ("ours", "them")}, {})
    results.add("y", measured(ours=[1], them=[1.2]), {}, {"head": ("ours", "them")}, {})
    assert read(results)["goals"]["head"]["ratio"] == 1.2
    assert read(results)["goals"]["head"]["verdict"] == "below"
    results.add("z", measured(ours=[1]), {"them": "missing"}, {"head": ("ours", "them")}, {})
    assert read(results)["goals"]["head"]["verdict"] == "failed"
    assert "them: missing" in "\n".join(gpu_results.table(read(results)))


def test_a_share_is_of_the_limit(results):
    results.add("x", measured(ours=[2, 4]), {}, {}, {"bandwidth-1B": ("ours", 5)})
    case = read(results)["goals"]["bandwidth-1B"]["cases"]["x"]
    assert case == {"of": "ours", "ratio": pytest.approx(0.6), "low": 0.4, "high": 0.8}


def test_another_run_of_the_day_keeps_what_it_does_not_measure(results, tmp_path):
    results.add("x", measured(ours=[1], them=[3]), {}, {"head": ("ours", "them")}, {})
    results.fail("y", f"{gpu_results.LOST} in x: illegal memory access", ["graphed"])
    results.fail("w", "it did not end", [])
    again = gpu_results.Results(tmp_path, CPU, dry=True)
    assert [again.has(name) for name in "xwyz"] == [True, True, False, False]
    again.add("y", measured(ours=[1], graphed=[3]), {}, {"graphed": ("ours", "graphed")}, {})
    goals = read(again)["goals"]
    assert goals["head"]["ratio"] == goals["graphed"]["ratio"] == 3
    assert [path.name for path in tmp_path.iterdir()] == [again.path.name]


def test_every_goal_is_measured_by_something():
    cases = (*gpu_decodes.FIRST, *gpu_decodes.MORE, *gpu_decodes.PEERS)
    by_cases = {goal for case in cases for goal in case.goals}
    by_ops = {goal for op in gpu_op_works.op_works(False) for goal in gpu_op_works.goals_of(op)}
    assert by_cases | by_ops == set(gpu_goals.GOALS)
    names = [case.name for case in cases]
    assert len(names) == len(set(names))


def test_the_bytes_of_a_step_are_those_of_the_weights_that_it_reads():
    config = gpu_models.shape("125M", False)
    matrices = config.num_parameters - (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert gpu_models.nbytes_per_token(config, "bf16", 0) == 2 * matrices
    kv = gpu_models.nbytes_per_token(config, "bf16", 10) - 2 * matrices
    assert kv == 10 * 30 * 2 * 3 * 64 * 2
    shared = gpu_models.shape("125M-shared", False)
    assert gpu_models.nbytes_per_token(shared, "bf16", 0) == 2 * matrices


@pytest.mark.parametrize("preset", ["125M", "125M-shared"])
def test_the_plain_model_is_the_reference(preset):
    """The peers' model, against transformers' layers."""
    from helpers import transformers_logits

    config = gpu_models.shape(preset, True)
    weights = gpu_plain.random_weights(config, CPU, torch.float32)
    ids = gpu_plain.random_ids(config, 20)
    unshared = gpu_models.shape("125M", True)
    model = gpu_peers.transformers_model(unshared, weights)
    with torch.no_grad():
        want = transformers_logits(config, model, torch.tensor([ids]))[0]
        got = gpu_plain.PlainModel(config, weights, 24).logits(ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", "graphed"])
def test_peers_decode_what_ours_does(name):
    config = gpu_models.shape("125M", True)
    weights = gpu_plain.random_weights(config, CPU, torch.float32)
    ids = [gpu_plain.random_ids(config, 12)]
    ours = gpu_ours.Ours(gpu_ours.executor(config, weights, dry=True), ids)
    with torch.no_grad():
        peer = gpu_peers.PEERS[name](config, weights, 12)
        peer.start(ids)
        for _ in range(2):  # rewinds
            count = 6 if name == "eager" else 1  # the graphed one keeps its context's length
            assert peer.decode(count)[1] == ours.decode(count)[1]


def test_a_copy_without_its_history_can_be_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "ROOT", tmp_path)
    assert gpu_pack.commit() == "unknown"


def test_packed_arrays_come_back():
    rng = np.random.default_rng(0)
    for array in (
        rng.integers(0, 16, (6, 64)).astype(np.uint8),
        rng.integers(-127, 128, (6, 64)).astype(np.int8),
        rng.normal(size=(3, 5)).astype(np.float16),
        rng.normal(size=7).astype(np.float32),
    ):
        data = gpu_pack.compress(array)
        back = gpu_pack.expand(data, array.dtype.str, list(array.shape))
        assert back.dtype == array.dtype and np.array_equal(back, array)


@pytest.mark.parametrize("name", gpu_op_works.op_works(True))
def test_ops_are_right_on_poisoned_memory(name):
    """The launchers as the benchmark calls them, interpreted; and the gate sees a wrong result."""
    pytest.importorskip("triton")
    sizes = gpu_op_works.Sizes(CPU, 0, dry=True)
    work = gpu_op_works.op_works(True)[name](sizes)
    with gpu_op_works.poisoned():
        assert torch.isnan(torch.empty(3)).all()
        assert work.error() <= gpu_op_works.TOLERANCE
    assert set(gpu_op_works.goals_of(name)) == set(work.pairs)
    assert {peer for _, *peers in work.pairs.values() for peer in peers} <= set(work.peers)


def test_the_distance_of_a_wrong_result_is_not_tolerated():
    exact = torch.randn(4, 5)
    for wrong in (-exact, exact * 1.01, exact[:2], exact * float("nan")):
        assert gpu_op_works.distance(wrong, exact) > gpu_op_works.TOLERANCE
    assert gpu_op_works.distance(exact.bfloat16(), exact) <= gpu_op_works.TOLERANCE


def test_the_report_has_every_figure_and_fault(results, tmp_path):
    works = measured(ours=[1e-6, 2e-6], them=[3e-6, 3e-6])
    results.add("x", works, {"cudnn": "not here"}, {"head": ("ours", "them")}, {}, kind="op")
    results.fail("y", "it did not end", ["graphed"])
    page = tmp_path / "gpu.md"
    page.write_text(f"# GPU\n\n{report_gpu.MARK}old\n")
    for _ in range(2):
        assert report_gpu.main([str(results.path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# GPU") and "old" not in text and text.count("### CPU (dry)") == 1
    assert "| 1.30× | 1.80× | **2.25×** | stretch |" in text
    assert "failed: it did not end" in text and "**failed**: not here" in text
    assert "1.5 (1.0 … 2.0)" in text and "A dry run" in text
    page.with_suffix(".json").write_text("[]")
    assert report_gpu.main([str(page.with_suffix(".json")), "--page", str(page)]) == 1


def test_the_report_has_the_newest_run_of_each_device_and_a_line_of_older_ones(results, tmp_path):
    results.add("x", measured(ours=[1], them=[1.5]), {}, {"head": ("ours", "them")}, {}, kind="op")
    data = read(results)
    runs = {
        "old": {"device": "A", "date": "2026-01-01T10:00:00+00:00", "notes": {"n": "Old code."}},
        "middle": {"device": "A", "date": "2026-01-02T10:00:00+00:00", "goals": {}},
        "newest": {"device": "A", "date": "2026-01-03T10:00:00+00:00"},
        "other": {"device": "B", "date": "2025-01-01T10:00:00+00:00"},
    }
    results.data["measurements"].clear()  # nothing measured
    runs["newest"]["goals"] = gpu_results.verdicts(results.data)
    paths = []
    for name, changes in runs.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(data | changes))
    page = tmp_path / "gpu.md"
    page.write_text(report_gpu.MARK)
    assert report_gpu.main([*map(str, paths), "--page", str(page)]) == 0
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### A", "### B"]
    assert "`newest.json`." in text and "`other.json`." in text
    first, second = (line for line in text.splitlines() if line.startswith("- 2026"))
    assert first.startswith("- 2026-01-02 10:00 UTC") and first.endswith("`middle.json`: no goal.")
    assert second.endswith("`old.json`: head 1.50×. Old code.")
    assert "| not measured; 1.50×, must, on 2026-01-01 10:00 UTC |" in text  # middle has no figure
    assert text.count("**1.50×**") == 1  # of B, whose only run is its newest


@pytest.mark.parametrize(("kind", "step"), [("bf16", 0), ("int8", 0.5), ("int4", 0.55)])
def test_executors_get_the_weights_that_peers_have(kind, step):
    """The exact values, or each within half a step (and the rounding of scales) of its grid."""
    pytest.importorskip("triton")
    from mobilellm_fast.cuda.executor import CudaExecutor

    config = replace(
        gpu_models.shape("1.5B", True), hidden_size=64, intermediate_size=96, head_dim=16
    )
    weights = gpu_plain.random_weights(config, CPU, torch.bfloat16)
    made = CudaExecutor(config, gpu_ours.cuda_weights(config, weights, kind), tier="graph")
    stored = gpu_ours.plain_weights(made, weights)
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        wide = weight.float()
        if wide.ndim == 1 or kind == "bf16":
            assert torch.equal(stored[name], wide)
            continue
        if kind == "int8" or name in ("model.embed_tokens.weight", "lm_head.weight"):
            steps = wide.abs().amax(-1, keepdim=True) / 127
        else:
            low, high = wide.unflatten(-1, (-1, 32)).aminmax(dim=-1)
            steps = ((high - low) / 15).repeat_interleave(32, -1)
        assert ((stored[name] - wide).abs() <= step * steps + 1e-3 * steps).all(), name


def test_a_tier_that_hung_in_a_process_of_its_own_is_not_run_here(tmp_path):
    run = gpu_session.Session(tmp_path, True, False, False, print)
    model = gpu_decodes.Model("125M", tier="persistent")

    class Hung:
        def wait(self, seconds):
            return None

        def close(self):
            self.closed = True

    run._workers[model.job] = hung = Hung()
    run.tried(model.job)
    assert hung.closed
    with pytest.raises(RuntimeError, match="it did not end in"):
        run.executor(model)
    with pytest.raises(RuntimeError, match="it did not end in"):
        run.gate_tier("persistent")
    assert run.executor(gpu_decodes.Model("125M", tier="pdl"))
    assert "it did not end" in json.dumps(read(run.results)["notes"])


def test_the_profile_finds_the_stages_of_the_persistent_kernel(tmp_path):
    profile_decode = importlib.import_module("profile_decode")
    kernels = importlib.import_module("mobilellm_fast.kernels.decode.persistent")
    copy = profile_decode.marked(kernels, tmp_path)
    assert Path(copy.__file__).read_text().count("_mark(") == len(profile_decode.ENDS) + 3
    assert copy.persistent_kernel.arg_names == kernels.persistent_kernel.arg_names
