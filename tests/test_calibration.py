"""The choice of threads: measured once, kept, bounded, and never a reason to fail."""

import json
import os
import time

import pytest
from helpers import tiny_config, weights_in

from mobilellm_fast import calibration
from mobilellm_fast.calibration import Choice, choose


class Clock:
    """Executors whose steps take as long as told, on a clock of their own."""

    def __init__(self, monkeypatch, seconds, fetches_ahead=False):
        self.now, self.made = 0.0, []
        monkeypatch.setattr(calibration.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(calibration, "available_cpus", lambda: 4)
        clock = self

        class Executor:
            def __init__(self, choice):
                self.seconds = seconds[choice.threads, choice.fetch_ahead]
                self.fetches_ahead = fetches_ahead
                clock.made.append(choice)

            def new_cache(self):
                return self

            def truncate(self, tokens):
                pass

            def forward(self, ids, cache):
                clock.now += self.seconds

        self.executor = Executor


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path))
    return tmp_path / "calibration"


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [({4: 1, 2: 2, 1: 4}, 4), ({4: 2, 2: 1, 1: 3}, 2), ({4: 1, 2: 0.97, 1: 5}, 4)],
    ids=["more is faster", "fewer is faster", "a tie keeps all"],
)
def test_the_fastest_is_chosen_and_kept(monkeypatch, cache, seconds, threads):
    clock = Clock(monkeypatch, {(n, True): s / 1e4 for n, s in seconds.items()})
    assert choose(clock.executor, "model") == Choice(threads)
    assert clock.made == [Choice(4), Choice(2), Choice(1)]
    assert choose(clock.executor, "model") == Choice(threads)
    assert len(clock.made) == 3  # from the file
    assert choose(clock.executor, "another model") == Choice(threads)
    assert len(clock.made) == 6


def test_fetching_ahead_is_a_candidate_where_it_happens(monkeypatch):
    seconds = {(4, True): 2e-4, (4, False): 1e-4, (2, True): 3e-4, (1, True): 4e-4}
    clock = Clock(monkeypatch, seconds, fetches_ahead=True)
    assert choose(clock.executor, "model") == Choice(4, fetch_ahead=False)


def test_slow_models_are_measured_once(monkeypatch):
    clock = Clock(monkeypatch, {(4, True): 10, (2, True): 20, (1, True): 40})
    assert choose(clock.executor, "model") == Choice(4)
    assert clock.now == 2 * (10 + 20 + 40)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"threads": 9, "fetch_ahead": true}',
     b'{"threads": "2", "fetch_ahead": true}', b'{"threads": 2, "fetch_ahead": 1}', b"\xff"],
)  # fmt: skip
def test_damaged_files_are_measured_anew(monkeypatch, cache, content):
    clock = Clock(monkeypatch, {(4, True): 1e-4, (2, True): 2e-4, (1, True): 4e-4})
    choose(clock.executor, "model")
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert choose(clock.executor, "model") == Choice(4)
    assert len(clock.made) == 6
    assert json.loads(file.read_bytes()) == {"threads": 4, "fetch_ahead": True}


def test_old_files_are_measured_anew(monkeypatch, cache):
    clock = Clock(monkeypatch, {(4, True): 1e-4, (2, True): 2e-4, (1, True): 4e-4})
    choose(clock.executor, "model")
    (file,) = cache.iterdir()
    old = time.time() - calibration.LIFETIME - 60
    os.utime(file, (old, old))
    choose(clock.executor, "model")
    assert len(clock.made) == 6


def test_a_cache_that_cannot_be_written_costs_time_alone(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "file"))
    clock = Clock(monkeypatch, {(4, True): 1e-4, (2, True): 2e-4, (1, True): 4e-4})
    assert choose(clock.executor, "model") == Choice(4)


def test_one_processor_leaves_no_choice(monkeypatch, cache):
    clock = Clock(monkeypatch, {(1, True): 1e-4})
    monkeypatch.setattr(calibration, "available_cpus", lambda: 1)
    assert choose(clock.executor, "model") == Choice(1)
    assert clock.now == 0 and not cache.exists()


def test_real_steps_are_timed(cache):
    from mobilellm_fast.executor import Executor

    config = tiny_config(layer_sharing="immediate")
    weights = weights_in("int8", config)

    def make(choice):
        return Executor(config, weights, "int8", choice.threads, fetch_ahead=choice.fetch_ahead)

    assert make(Choice(1)).fetches_ahead and not make(Choice(1, fetch_ahead=False)).fetches_ahead
    chosen = choose(make, "tiny")
    assert 1 <= chosen.threads <= calibration.available_cpus()
