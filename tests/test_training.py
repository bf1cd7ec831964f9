"""The trainer: its recipe, its checkpoints, what it does when things go wrong."""

import dataclasses
import math
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_config

from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.loading import load
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.train import Corpus, Recipe, Trainer, text
from mobilellm_fast.train.__main__ import main

RECIPE = Recipe(steps=8, batch_size=2, seq_len=16, learning_rate=5e-3, warmup_steps=2)
WORDS = "the cat sat on the mat and the dog saw the cat. "


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(1, 4, (2000,), generator=generator)
    ids = steps.cumsum(0) % 97  # the next id is one of three
    return Corpus(ids[:1800], ids[1800:])


def model(**changes):
    torch.manual_seed(0)
    return MobileLLM(tiny_config(**changes))


def run(trainer, steps=None):
    for state in trainer.run():
        if state.step == steps:
            break
    return trainer.state


def test_learning_rate():
    recipe = Recipe(steps=110, warmup_steps=10, learning_rate=1e-3, final_ratio=0.1)
    rates = [recipe.learning_rate_at(step) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(1e-3 * 0.55)
    assert rates[110] == pytest.approx(1e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_optimizer_is_the_papers():
    optimizer = Recipe().optimizer(model().parameters())
    matrices, vectors = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (matrices["betas"], matrices["weight_decay"]) == ((0.9, 0.95), 0.1)
    assert vectors["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in vectors["params"]) and len(vectors["params"]) == 5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_learns(corpus, dtype):
    recipe = dataclasses.replace(RECIPE, steps=60, batch_size=8, learning_rate=1e-2, dtype=dtype)
    trainer = Trainer(model(layer_sharing="reverse"), corpus, recipe)
    before = trainer.validate()
    assert before == pytest.approx(math.log(97), abs=0.1)
    state = run(trainer)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert state.validations[60] < 2.5  # log 3 is the least


def test_resuming_changes_no_bit(corpus, tmp_path):
    path = tmp_path / "checkpoint.pt"
    options = dict(save_every=3, validate_every=4)
    whole = Trainer(model(), corpus, RECIPE, tmp_path / "whole.pt", **options)
    want = run(whole)
    run(Trainer(model(), corpus, RECIPE, path, **options), steps=5)  # the save was after 3
    second = Trainer(model(), corpus, RECIPE, path, resume=True, **options)
    assert second.state.step == 3
    assert run(second) == want
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_nan_stops_and_keeps_the_last_good_checkpoint(corpus, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer = Trainer(model(), corpus, RECIPE, path, save_every=2)
    run(trainer, steps=4)
    good = path.read_bytes()
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    with pytest.raises(MobileLLMError, match=r"the loss is nan at step 4; the last good .*\.pt"):
        run(trainer)
    assert path.read_bytes() == good
    with pytest.raises(CheckpointError, match=r"not written, model.norm.weight is not finite"):
        trainer.save()
    assert path.read_bytes() == good
    again = Trainer(model(), corpus, RECIPE, path, resume=True)
    assert run(again).step == RECIPE.steps


def test_a_gradient_that_overflows_stops(corpus):
    trainer = Trainer(model(), corpus, RECIPE)
    trainer.model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(MobileLLMError, match="norm of the gradients is (inf|nan) at step 0"):
        run(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(config=dict(layer_sharing=True)), "another config: architectures is"),
        (dict(config=dict(hidden_size=60)), "another config: .*is 8 there, 10 here"),
        (dict(recipe=dict(learning_rate=1e-3)), "recipe: learning_rate is 0.005 there, 0.001 here"),
        (dict(cut=100), "is of another text"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(corpus, tmp_path, changes, message):
    path = tmp_path / "checkpoint.pt"
    run(Trainer(model(), corpus, RECIPE, path))
    other = Corpus(corpus.train[changes.get("cut", 0) :], corpus.validation)
    recipe = dataclasses.replace(RECIPE, **changes.get("recipe", {}))
    with pytest.raises(CheckpointError, match=message) as error:
        Trainer(model(**changes.get("config", {})), other, recipe, path, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle", "other"])
def test_a_damaged_checkpoint_is_refused(corpus, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    run(Trainer(model(), corpus, RECIPE, path))
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "pickle":
        torch.save({"version": print}, path)
    else:
        torch.save({"version": 99}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: (not a|there is no)") as error:
        Trainer(model(), corpus, RECIPE, path, resume=True)
    assert "\n" not in str(error.value)


KILLED = """
import sys, torch
from pathlib import Path
from mobilellm_fast.files import whole_file
path = Path(sys.argv[1])
with whole_file(path) as file:
    file.write(bytes(100_000))
    file.flush()
    print("half", flush=True)
    sys.stdin.read()  # killed here
"""


def test_a_save_that_is_killed_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"whole")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == b"whole"


def test_a_model_that_cannot_be_saved_whole_keeps_its_old_files(tmp_path, monkeypatch):
    lm = model()
    lm.save_pretrained(tmp_path / "lm")
    before = {file.name: file.read_bytes() for file in (tmp_path / "lm").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("mobilellm_fast.interchange.write_json", fail)
    with torch.no_grad():
        lm.model.norm.weight += 1
    with pytest.raises(CheckpointError, match="cannot be written .*disk full"):
        lm.save_pretrained(tmp_path / "lm")
    assert {file.name: file.read_bytes() for file in (tmp_path / "lm").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["lm"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(steps=0), "steps must be an integer from 1, got 0"),
        (dict(batch_size=1.5), "batch_size must be an integer from 1, got 1.5"),
        (dict(learning_rate=-1.0), "learning_rate must be a number from 0, got -1.0"),
        (dict(clip=float("nan")), "clip must be a number from 0, got nan"),
        (dict(betas=(0.9, 1.0)), r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        (dict(dtype="fp16"), "dtype must be one of fp32, bf16, got 'fp16'"),
    ],
)
def test_wrong_recipes_are_refused(fields, message):
    with pytest.raises(MobileLLMError, match=message):
        Recipe(**fields)


def test_sequences_beyond_the_context_are_refused(corpus):
    with pytest.raises(MobileLLMError, match="seq_len must be at most the context of 256, got 300"):
        Trainer(model(), corpus, dataclasses.replace(RECIPE, seq_len=300))


def test_a_trainer_without_a_checkpoint_neither_resumes_nor_saves(corpus):
    message = r"\[train\] checkpoint must be the path of a file, got None"
    with pytest.raises(MobileLLMError, match=message):
        Trainer(model(), corpus, RECIPE, resume=True)
    with pytest.raises(MobileLLMError, match=message):
        Trainer(model(), corpus, RECIPE).save()


def test_a_tokenizer_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file: cannot be written \([A-Z][a-z ]+\)$"):
        text.write_tokenizer(text.train_tokenizer(WORDS, 300), tmp_path / "file")


def test_splitting_a_text_loses_and_repeats_nothing():
    lines = [f"line {i} " + "x" * (i % 90) + "\n" for i in range(20_000)]
    train, validation = text.split("".join(lines))
    assert sorted(train.splitlines() + validation.splitlines()) == sorted(
        line.rstrip("\n") for line in lines
    )
    assert 0.03 < len(validation) / (len(train) + len(validation)) < 0.07


def test_a_text_that_is_too_short_is_refused():
    tokenizer = text.train_tokenizer(WORDS, 260)
    with pytest.raises(MobileLLMError, match="vocab_size must be at least 257, got 256"):
        text.train_tokenizer(WORDS, 256)
    assert b"<|endoftext|>" in tokenizer


COMMAND = "--steps 4 --seq-len 32 --batch-size 2 --vocab-size 300 --warmup-steps 1 --save-every 2"
SHAPE = "--set hidden_size=32 num_hidden_layers=2 layer_sharing=immediate num_attention_heads=4"


def test_command_trains_resumes_and_writes_a_model(tmp_path, capsys):
    book, out = tmp_path / "book.txt", tmp_path / "out"
    book.write_text(WORDS * 400)
    command = [str(book), "--out", str(out), *COMMAND.split(), *SHAPE.split()]
    assert main(command) == 0
    assert "validation loss" in capsys.readouterr().out
    lm = load(out, format="fp32")
    assert lm.config.layer_sharing == "immediate"
    assert lm.tokenizer.decode(lm.tokenizer.encode("the cat")) == "the cat"
    assert len(lm.generate("the cat", max_new_tokens=4).token_ids) <= 4
    lines = (out / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss,validation" and len(lines) == 5
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert main(command) == 1
    assert "checkpoint.pt is there; --resume goes on from it" in capsys.readouterr().err
    before = lm.state_dict()
    assert main([*command, "--resume"]) == 0  # nothing is left to do: the same model again
    after = load(out, format="fp32").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main([*command, "--resume", "--learning-rate", "1"]) == 1
    assert "another recipe: learning_rate" in capsys.readouterr().err

    tuned = tmp_path / "tuned"
    assert main([str(book), "--out", str(tuned), "--model", str(out), *COMMAND.split()]) == 0
    assert load(tuned, format="fp32").config == lm.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "width=3"], "--set must name a field of MobileLLMConfig, got 'width'"),
        (["--preset", "MobileLLM-2B"], "preset must be one of"),
        (["--seq-len", "100000"], "tokens to train with, got"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, options, message):
    book = tmp_path / "book.txt"
    book.write_text(WORDS * 50)
    assert main([str(book), "--out", str(tmp_path / "out"), "--vocab-size", "300", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main([str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]) == 1
    assert "none.txt: not readable as text" in capsys.readouterr().err
