"""The benchmarks themselves: a wrong kernel gets no speed, turns alternate, reports say it all."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, model_cases
from helpers import random_ids, random_weights, tiny_config, transformers_logits, transformers_model

from mobilellm_fast import _C
from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.engine import Engine

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("this tree has no benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import energy  # noqa: E402  on the path only now
import engines  # noqa: E402
import goals  # noqa: E402
import machine  # noqa: E402
import model_works  # noqa: E402
import op_works  # noqa: E402
import report  # noqa: E402
import report_tables  # noqa: E402
import saved_runs  # noqa: E402
import start_worker  # noqa: E402
import steadiness  # noqa: E402
import timing  # noqa: E402

FLIP_A_SIGN = """
import mobilellm_fast._C as _C

def pytest_collection_finish(session):
    for name, place in (("linear", 2), ("swiglu", 3)):
        right = getattr(_C, name)

        def flipped(*args, right=right, place=place):
            right(*args)
            args[place][:] *= -1

        setattr(_C, name, flipped)
"""


def test_a_broken_kernel_turns_its_benchmark_red(tmp_path):
    """In a whole run of pytest: broken ops fail and have no figures, another one has some."""
    (tmp_path / "flip_a_sign.py").write_text(FLIP_A_SIGN)
    saved = tmp_path / "run.json"
    path = os.pathsep.join(p for p in (str(tmp_path), os.environ.get("PYTHONPATH")) if p)
    command = [
        *(sys.executable, "-m", "pytest", "-p", "flip_a_sign", "--benchmark-only", "--smoke"),
        *(f"--benchmark-json={saved}", "-k", "quick and (linear or swiglu or rms_norm)"),
        *(f"--rootdir={BENCH.parent}", str(BENCH / "bench_ops.py")),
    ]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("linear", "swiglu"):
        assert f"RED: 125M-{name}-int8-int8_g32" in done.stdout
    assert "no speed is reported" in done.stdout
    titles = [entry["extra_info"]["title"] for entry in json.loads(saved.read_text())["benchmarks"]]
    assert titles and all("rms_norm" in title for title in titles)


@pytest.mark.parametrize("stem", CASES)
def test_every_op_has_a_gate_that_sees_a_flipped_sign(stem, monkeypatch):
    case = next(case for case in op_works.op_cases() if case.stem == stem and case.quick)
    op_works.check(case, "scalar")
    right = getattr(_C, stem)

    def flipped(*args):
        right(*args)
        outputs = {"linear": 2, "rms_norm": 3, "rope": 3, "swiglu": 3, "quantize_per_token": 1}
        args[outputs.get(stem, 4)][:] *= -1

    monkeypatch.setattr(_C, stem, flipped)
    with pytest.raises(AssertionError, match=r"RED: 125M-.* no speed is reported"):
        op_works.check(case, "scalar")


def test_all_ops_are_timed_on_shapes_of_models():
    assert model_cases(MobileLLMConfig.preset("MobileLLM-125M")).keys() == CASES.keys()
    names = [str(case) for case in op_works.op_cases()]
    assert len(set(names)) == len(names)
    for case in op_works.op_cases():
        if case.quick:
            assert min(op_works.demands(case)[k] for k in ("nbytes", "operations")) > 0


def test_what_an_op_demands_is_counted_right():
    sizes = dict(batch=1, seq=2, kv_seq=5, heads=6, kv_heads=2, head_dim=8)
    found = op_works.demands(op_works.OpCase("x", "gqa_attention", sizes, {}))
    products = (5 + 4) * 6 * 8  # of the second query with all keys, of the first with one less
    assert found["operations"] == 2 * 2 * products  # scores and values
    assert found["nbytes"] == 4 * (2 * 2 * 6 * 8 + 2 * 5 * 2 * 8)
    sizes, kind = {"rows": 3, "outputs": 64, "cols": 96}, {"kind": "int8", "activation": "int8_g32"}
    found = op_works.demands(op_works.OpCase("x", "linear", sizes, kind))
    assert found["operations"] == 2 * 3 * 64 * 96
    assert found["nbytes"] == 64 * 96 + 64 * 4 + 3 * 96 * 4 + 3 * 64 * 4
    assert (found["source"], found["peak"]) == ("memory", "int8")


def test_weights_rotate_through_more_than_the_cache(monkeypatch):
    monkeypatch.setattr(op_works._C, "last_level_cache_nbytes", lambda: 10**6)
    case = next(c for c in op_works.op_cases() if c.stem == "linear" and c.quick)
    args = op_works.make_args(case.stem, case.sizes, **case.options)
    copies = list(op_works._rotation(args))
    assert sum(own[1].nbytes for own in copies) > 2 * 10**6
    assert len({own[1].data_ptr() for own in copies}) == len(copies)
    assert all(torch.equal(own[1], args[1]) for own in copies)


def test_turns_alternate():
    order, benchmark = [], SimpleNamespace(extra_info={}, stats=None)
    benchmark.pedantic = lambda work: work()

    def work(name, seconds):
        return timing.Work(lambda: order.append(name) or seconds, {"tokens": 2})

    timing.interleave(benchmark, {"a": work("a", 1.0), "b": work("b", 3.0)}, 3)
    assert "".join(order) == "ab" + "ababab"  # a first round to warm up
    series = benchmark.extra_info["series"]
    assert series["a"]["seconds"] == [1.0] * 3 and series["b"]["tokens"] == 2


def probed_turns(rates: list[float], monkeypatch) -> tuple[timing.Work, timing.Work]:
    """Measure two works in 4 rounds; the memory reads `rates`, the last of them from then on."""
    monkeypatch.setattr(timing, "FRESH_SECONDS", -1)  # every probe is a new one
    left = list(rates)
    probe = timing.Probe({2}, lambda threads: left.pop(0) if len(left) > 1 else left[0])
    a, b = timing.Work(lambda: 1.0), timing.Work(lambda: 2.0)
    timing.take_turns({"a": a, "b": b}, 4, probe)
    return a, b


def test_rounds_are_added_while_the_memory_is_unsteady(monkeypatch):
    steady, changing = [1.0] * 4, [1.0, 1.0, 2.0, 2.0]  # four probes in a round; one warms up
    a, b = probed_turns([1.0], monkeypatch)
    assert len(a.seconds) == len(b.probes) == 4 and len(steadiness.ratios(b, a).values) == 4
    a, b = probed_turns(steady + 2 * changing + steady, monkeypatch)
    sample = steadiness.ratios(b, a)
    assert len(a.seconds) == 5 and sample.values == [2.0] * 3 and sample.discarded == 2
    a, b = probed_turns(steady + 100 * changing, monkeypatch)
    sample = steadiness.ratios(b, a)
    assert len(a.seconds) == 8 and not sample.steady and sample.values == [2.0] * 8  # bounded


def test_a_work_that_cannot_go_on_has_no_figures():
    left = [1.0, 1.0, None]
    a, b = timing.Work(lambda: 1.0), timing.Work(lambda: left.pop(0))
    timing.take_turns({"a": a, "b": b}, 3)
    assert len(a.seconds) == 3 and b.seconds == [] and left == []


def test_goals_keep_the_parts_that_were_not_measured():
    own, quality = (goals.PARTS[name][0] for name in ("own", "quality"))
    text = f"# Goals\n\nA note.\n\n## {own}\n\nold\n\n## Beside other engines\n\npeers\n"
    found = goals.merged(text, {own: "new", quality: "fine"})
    assert found.startswith(f"# Goals\n\nA note.\n\n## {own}\n\nnew\n\n## Beside")
    assert "old" not in found and "\n\npeers\n\n## Quality" in found and found.endswith("fine\n")
    assert goals.merged(found, {"Beside other engines": "peers"}) == found
    assert goals.merged("", {own: "new"}).endswith(f"## {own}\n\nnew\n")


def test_energy_where_it_can_be_read(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of it, not counted
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000000")
    (zone / "energy_uj").write_text("999000000")
    meter = energy.Meter(tmp_path)
    before = meter.joules()
    (zone / "energy_uj").write_text("2000000")  # wrapped
    assert meter.readable and meter.since(before) == pytest.approx(3)
    assert not energy.Meter(tmp_path / "absent").readable


@pytest.mark.parametrize("format", ["int8", "int4", "fp32"])
def test_engines_of_random_weights_run(format, tmp_path):
    config = engines.smoke_shape(engines.shape("LS-125M"))
    image = engines.random_image(config, format, "random")
    engine = Engine(config, image.weights, format, threads=1)
    logits = engine.forward([1, 2, 3], engine.new_cache())
    assert abs(logits).max() < 100 and logits.std() > 0.01
    for work in (model_works.decode(engine, 4, 2), model_works.prefill(engine, 4)):
        assert work.run() > 0
    assert engines.shape("125M-unshared").num_hidden_layers == 60


def test_transformers_shares_layers_with_a_cache():
    """The paper's sharing model in transformers: with a cache, what it computes without one."""
    from transformers import DynamicCache

    config = tiny_config(layer_sharing="immediate")
    model = transformers_model(config, random_weights(config))
    ids = torch.as_tensor(random_ids(config, 1, 7))
    with torch.inference_mode():
        want = transformers_logits(config, model, ids)
        start_worker.share_layers(model, 2)
        cache = DynamicCache(config=model.config)
        got = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7)]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


SLOW, FAST = {"2": 1e6}, {"2": 2e6}  # the memory's two speeds


def saved_run(path: Path, slower: float = 1.0, probes: tuple | None = None) -> saved_runs.Run:
    """A run with one benchmark of two formats, a peer that is missing, and nothing else.

    `probes`: of int4's turns; by default as of int8's, always fast.
    """
    facts = {"bits_per_weight": 8.0, "weight_nbytes": 10**6, "parameters": 10**6, "context": 128}
    facts |= {"threads": 2, "tokens": 1, "nbytes": 10**6}
    always = ((FAST, FAST),) * 3
    decode = {
        "int8": {"seconds": [1.0, 1.0, 4.0], "probes": always} | facts,
        "int4": {"seconds": [0.5 * slower, 0.5 * slower, 2.0 * slower]} | facts,
    }
    decode["int4"]["probes"] = probes or always
    limits = {"memory": 1e10, "last_level": None, "l2": 1e11, "barrier_seconds": 1e-7}
    limits["scalar"] = {"int8": 1e10, "fp32": 1e9}
    versions = {"mobilellm_fast": "9.9"}
    machine = {"processor": "A processor", "cpus": 2, "system": "Linux", "isas": ["scalar"]}
    machine |= {"versions": versions, "command": "pytest bench/", "limits": {"1": limits}}
    about = {"kind": "decode", "title": "125M, decode", "preset": "125M"}
    peers = {"kind": "peers", "title": "Engines", "op": "decode"}
    peers["series"] = {"llama.cpp:Q8_0": {"seconds": [], "fault": "llama.cpp is missing"}}
    raw = {
        "machine_info": {"bench": machine},
        "commit_info": {"id": "abcdef0123456789", "dirty": False},
        "datetime": "2026-11-24T12:00:00+00:00",
        "benchmarks": [{"extra_info": about | {"series": decode}}, {"extra_info": peers}],
    }
    path.write_text(json.dumps(raw))
    return saved_runs.Run.read(path)


def test_a_report_has_figures_their_origin_and_what_is_missing(tmp_path):
    text = report_tables.report(saved_run(tmp_path / "run.json"), {})
    assert "| 125M, decode | int4 | 8.00 | 1.0 | 2.0 | 500.00 (500.00 … 2000.00) | 100% |" in text
    assert "| 0.50 |" in text  # of each round: noise that hits both leaves the ratio alone
    assert "0 of 3 rounds of ratios do not count" in text
    assert "**missing**: llama.cpp is missing" in text
    assert "- Table 7 of the MobileLLM paper" in text and "not readable here" in text
    for part in ("A processor", "2026-11-24 12:00", "mobilellm_fast 9.9", "`pytest bench/`"):
        assert part in text


def test_rounds_of_unsteady_memory_do_not_count(tmp_path):
    """Not where a turn's own probes differ, nor where two turns had different memories."""
    mixed = ((FAST, FAST), (SLOW, FAST), (SLOW, SLOW))
    run = saved_run(tmp_path / "1.json", probes=mixed)
    sample = run.benchmarks[0].ratios("int4")
    assert sample.values == [0.5] and (sample.rounds, sample.discarded) == (3, 2)
    text = report_tables.report(run, {})
    assert "| 0.50, 1 of 3 rounds |" in text and "2 of 3 rounds of ratios do not count" in text
    # Its share is of the larger probe, in rounds of its own that are steady.
    int4 = run.benchmarks[0].series["int4"]
    assert steadiness.bandwidths(int4) == [2e6, 2e6, 1e6]
    assert steadiness.shares(int4).values == [1.0, 0.5]
    run = saved_run(tmp_path / "2.json", probes=((SLOW, SLOW),) * 3)
    sample = run.benchmarks[0].ratios("int4")
    assert sample.values == [0.5] * 3 and sample.discarded == 3
    assert "0.50, memory unsteady in all 3 rounds" in report_tables.report(run, {})


def test_runs_that_disagree_are_marked(tmp_path, capsys):
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    runs = [saved_run(paths[0]), saved_run(paths[1], slower=1.05)]
    assert "1 of 1 ratios agree" in report_tables.agreements(runs)
    assert "between runs" not in report_tables.report(runs[1], {}, runs[:1])
    runs[1] = saved_run(paths[1], slower=1.2)
    text = report_tables.agreements(runs)
    assert "0 of 1 ratios agree" in text
    assert "| int4 | 0.500 | 0.600 | 20.0% | **above 10%** |" in text
    assert "| 0.60, **20% between runs** |" in report_tables.report(runs[1], {}, runs[:1])
    assert report.main(["--agree", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert "0 of 1 ratios agree within 10%" in said
    assert "125M, decode: int4: 0.500; 0.600: 20.0% apart" in said


def test_the_report_command(tmp_path, capsys):
    saved_run(tmp_path / "run.json")
    assert report.main([str(tmp_path / "run.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").exists()
    (tmp_path / "bad.json").write_text("{}")
    assert report.main([str(tmp_path / "bad.json")]) == 1
    assert "is not a run of pytest bench/" in capsys.readouterr().err


def test_plots_carry_their_origin(tmp_path):
    pytest.importorskip("matplotlib")
    from report_plots import write_plots

    plots = write_plots(saved_run(tmp_path / "run.json"), tmp_path)
    assert len(plots) == 2
    assert all((tmp_path / name).read_text().count("<svg") == 1 for name in plots.values())
    unprobed = saved_run(tmp_path / "run.json")
    for series in unprobed.of("decode")[0].series.values():
        series.probes.clear()
    assert len(write_plots(unprobed, tmp_path)) == 1  # without a share of the bandwidth


def test_commands_in_results_name_no_folder_of_the_machine(monkeypatch):
    words = ["bench", "-k", "a/b or c", "--out", "/some/where/run.json", "--root=/else/where/x"]
    monkeypatch.setattr(sys, "argv", ["/bin/pytest", *words])
    want = "pytest bench -k a/b or c --out run.json --root=x"
    assert machine.command("pytest") == want


@pytest.mark.parametrize(
    "program",
    ["arm_kleidiai", "goals", "page_cache", "peers", "report", "resident", "sweep_attention"],
)
def test_help_shows_the_commands_as_they_are_to_be_typed(program, monkeypatch, capsys):
    module = importlib.import_module(program)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    commands = [line for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert commands
    assert set(commands) <= set(capsys.readouterr().out.splitlines())


def test_goals_refuse_no_threads_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["goals.py", "--threads", "0"])
    with pytest.raises(SystemExit, match="2"):
        goals.main()
    assert "--threads: must be at least 1, got 0" in capsys.readouterr().err


def test_benchmarks_refuse_no_rounds():
    command = [sys.executable, "-m", "pytest", BENCH, "--benchmark-only", "--rounds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--rounds: must be a whole number from 1, got 0" in done.stderr
