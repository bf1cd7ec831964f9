"""The model inside the package."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import mobilellm_fast
from mobilellm_fast.checkpoint import default_model
from mobilellm_fast.cli import main
from mobilellm_fast.engine import Engine
from mobilellm_fast.errors import CheckpointError

# of Northanger Abbey, chapter 1, in the part of the text that the model was trained on
AUSTEN = (
    "No one who had ever seen Catherine Morland in her infancy would have supposed her born to be "
    "an heroine. Her situation in life, the character of her father and mother, her own person and "
    "disposition, were all equally against her."
)
OTHER = "Kernel panic: cannot mount /dev/sda1, run fsck -y; 0x7f3a segfault in libfoo.so.2 [12345]"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "cache"))


def test_it_is_small_shared_and_quantized():
    engine = Engine.load("tiny")
    assert (engine.name, engine.format) == ("tiny", "int8")
    assert engine.config.layer_sharing == "immediate"
    assert engine.tokenizer.compile()
    files = list((Path(mobilellm_fast.__file__).parent / "tiny").iterdir())
    assert sum(file.stat().st_size for file in files) < 1_000_000


def test_it_prefers_the_text_that_it_was_trained_on():
    """Nats per byte, since tokens are not of one length."""
    engine = Engine.load("tiny")
    losses = [-sum(engine.score(text).logprobs) / len(text) for text in (AUSTEN, OTHER)]
    assert losses[0] < 1.2
    assert losses[1] > 1.8 * losses[0]


def test_it_generates_the_same_with_torch_and_without():
    engine, lm = Engine.load("tiny"), mobilellm_fast.load("tiny")
    want = engine.generate("It is a truth universally", max_new_tokens=24)
    got = lm.generate("It is a truth universally", max_new_tokens=24)
    assert got.token_ids == want.token_ids
    assert want.text.isprintable() and len(want.text) > 30
    assert np.isfinite(want.logprobs).all()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_and_forked_children_may_share_an_engine():
    engine = Engine.load("tiny", threads=2)
    text = AUSTEN * 2
    works = [
        {"prompt": "It is a truth", "temperature": 0.9, "seed": 1},
        {"prompt": text, "temperature": 0.7, "top_p": 0.9, "seed": 2},
        {"prompt": "Her father", "top_k": 5, "temperature": 1.0, "seed": 3},
        {"prompt": [text, "Catherine"], "temperature": 0.5, "seed": 4},
    ]

    def answers(work):
        got = engine.generate(**work, max_new_tokens=40)
        return [g.token_ids for g in (got if isinstance(got, list) else [got])]

    def streamed(work):
        if isinstance(work["prompt"], list):
            return answers(work)
        return [[token.token_id for token in engine.stream(**work, max_new_tokens=40)]]

    want = [answers(work) for work in works]
    with ThreadPoolExecutor(4) as pool:
        for function in (answers, streamed):
            futures = [pool.submit(function, work) for work in works * 3]
            child = os.fork()
            if child == 0:  # nothing of pytest's may run in it
                signal.alarm(60)
                os._exit(0 if answers(works[0]) == want[0] else 1)
            assert [future.result(timeout=120) for future in futures] == want * 3
            assert os.waitpid(child, 0)[1] == 0


def test_the_command_takes_its_name(capsys):
    assert main(["generate", "--model", "tiny", "It is", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


def test_it_needs_neither_torch_nor_network():
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "import socket; socket.socket = None\n"
        "from mobilellm_fast import Engine\n"
        "print(json.dumps(Engine.load('tiny').generate('It is', max_new_tokens=4).token_ids))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 4


def test_whoever_has_no_network_is_told_of_it(monkeypatch):
    def fail(path):
        raise CheckpointError("no network")

    monkeypatch.setattr(default_model, "_from_hub", fail)
    monkeypatch.setattr(default_model, "_from_wheel", fail)
    with pytest.raises(CheckpointError, match="the model 'tiny' needs no network"):
        Engine.load()


def test_a_directory_of_that_name_wins(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="tiny: there is no config.json"):
        Engine.load("tiny")
