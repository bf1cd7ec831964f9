"""`mobilellm_fast.load`: one model, seen by torch and by the engine."""

import contextlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import random_ids, random_weights, tiny_config
from safetensors.numpy import save_file

import mobilellm_fast
import mobilellm_fast.cuda.engine
from mobilellm_fast import cuda, loading
from mobilellm_fast.cuda.executor import check_cuda
from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.packing import pack_checkpoint
from mobilellm_fast.triton_version import has_triton


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    config = tiny_config(layer_sharing="immediate")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(random_weights(config), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("format", "tolerance"),
    [("fp32", 1e-5), ("bf16", 3e-2), ("int8", 5e-2), ("w8a8", 5e-2), ("int4", 5e-2)],
)
def test_torch_and_engine_compute_the_same(folder, format, tolerance):
    lm = mobilellm_fast.load(folder, format=format, threads=1)
    assert not lm.training
    assert (lm.engine.format, lm.engine.executor.threads) == (format, 1)
    ids = random_ids(lm.config, 30)
    with torch.no_grad():
        got = lm(torch.tensor(ids[None]))[0].float().numpy()
    want = lm.engine.forward(ids, lm.engine.new_cache(), all_logits=True)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    assert len(lm.generate([1, 2, 3], max_new_tokens=5).token_ids) <= 5
    assert lm.score(ids.tolist()).nll > 0


def test_weights_are_in_memory_once(folder):
    lm = mobilellm_fast.load(folder, format="fp32")
    gate = lm.model.layers[1].mlp.gate_proj.weight
    weight = lm.engine.weights["model.layers.1.mlp.gate_proj.weight"]
    assert gate.data_ptr() == weight.data.ctypes.data
    packed = mobilellm_fast.load(folder, format="int8")
    buffer = packed.model.layers[1].mlp.gate_proj.packed
    weight = packed.engine.weights["model.layers.1.mlp.gate_proj.weight"]
    assert buffer.data_ptr() == weight.data.ctypes.data


def test_training_reaches_generation(folder):
    lm = mobilellm_fast.load(folder, format="fp32")
    before = lm.engine.forward([1, 2], lm.engine.new_cache())
    lm(torch.tensor([[1, 2, 3]])).square().mean().backward()
    torch.optim.SGD(lm.parameters(), lr=0.1).step()
    after = lm.engine.forward([1, 2], lm.engine.new_cache())
    with torch.no_grad():
        want = lm(torch.tensor([[1, 2]]))[0, -1].numpy()
    assert not np.array_equal(before, after)
    assert np.abs(after - want).max() <= 1e-5 * np.abs(want).max()


def test_format_auto_is_int8_for_a_float_checkpoint(folder):
    assert mobilellm_fast.load(folder).engine.format == "int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": None}, r"\[load\] device must be 'auto', .*, got None"),
        ({"device": 1}, r"\[load\] device must be 'auto', .*, got 1"),
        ({"device": torch.device("meta")}, r"device must be 'auto', .*, got device\(type='meta'\)"),
        ({"device": torch.device("cuda", 99)}, "device 'cuda:99' must be a GPU that torch can use"),
        ({"device": "tpu"}, r"\[load\] device must be 'auto', 'cpu', 'cuda' or .*, got 'tpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' must be a GPU that torch can use, got"),
        ({"device": "cuda:x"}, "device 'cuda:x' must be a GPU that torch can use, got"),
        ({"device": "cuda", "format": "w8a8"}, "format must be one of .* on cuda, got 'w8a8'"),
        ({"device": "cuda", "kv_format": "int8"}, "kv_format must be one of .* on cuda"),
        ({"format": "int3"}, r"\[load\] format must be one of auto, fp32, .*, got 'int3'"),
        ({"threads": 0}, r"\[load\] threads must be an integer in 1\.\.1024, got 0"),
        ({"revision": "main"}, "revision needs a hub id"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(MobileLLMError, match=message):
        mobilellm_fast.load(folder, **arguments)


def test_auto_takes_the_cpu_for_what_the_gpu_cannot(folder, tmp_path, monkeypatch):
    """An image's format shows only when it is opened."""
    image = tmp_path / "model.mlf"
    pack_checkpoint(folder, format="w8a8").save(image)
    monkeypatch.setattr(loading, "_has_gpu", lambda: True)
    monkeypatch.setattr(cuda.engine, "check_cuda", lambda device: None)
    lm = mobilellm_fast.load(image)
    assert (lm.engine.format, lm.engine.on_gpu) == ("w8a8", False)
    with pytest.raises(MobileLLMError, match=r"format of .* must be one of .* on cuda, got 'w8a8'"):
        mobilellm_fast.load(image, device="cuda")


@pytest.mark.parametrize(
    ("name", "version", "enough"),
    [
        ("triton", "3.4.0", False),
        ("triton", "3.5.0", True),
        ("triton", "3.5rc1", True),
        ("triton", "3.10.1+git0", True),
        ("pytorch-triton-rocm", "3.4.0", False),
        ("pytorch-triton", "3.6.0", True),
        ("some-other-triton", "1.0", True),
    ],
)
def test_an_old_triton_is_none(name, version, enough, monkeypatch):
    """torch 2.6 to 2.8 bring versions in which the kernels cannot even be imported."""

    def known(asked):
        if asked != name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    has_triton.cache_clear()
    try:
        assert loading._has_gpu() is enough
        with (
            contextlib.nullcontext()
            if enough
            else pytest.raises(MobileLLMError, match="device 'cuda' needs Triton 3.5 or later")
        ):
            check_cuda("cuda")
    finally:
        has_triton.cache_clear()


def test_devices_and_numbers_of_other_libraries_will_do(folder):
    lm = mobilellm_fast.load(folder, device=torch.device("cpu"), threads=np.int64(1))
    assert lm.engine.executor.threads == 1


@pytest.mark.parametrize("path", [None, 1, "", b"x"])
def test_what_is_no_path_is_an_error(folder, path):
    """An empty one would be the working directory."""
    lm = mobilellm_fast.load(folder, threads=1)
    for function, name in (
        (lm.save_pretrained, r"\[save_pretrained\] directory"),
        (lm.session().save, r"\[save\] path"),
        (lm.restore_session, r"\[restore\] path"),
    ):
        with pytest.raises(MobileLLMError, match=rf"{name} must be a path, got {path!r}"):
            function(path)
    if path is not None:
        with pytest.raises(CheckpointError, match="source must be a path or a hub id, got"):
            mobilellm_fast.load(path)


def test_errors_of_files_name_no_temporary_one(folder):
    lm = mobilellm_fast.load(folder, threads=1)
    for function in (lm.save_pretrained, lm.session().save):
        with pytest.raises(CheckpointError) as caught:
            function(folder / "config.json" / "below")
        assert "Errno" not in str(caught.value)
        assert str(caught.value).count(str(folder)) == 1


def test_missing_source(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        mobilellm_fast.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        mobilellm_fast.load(tmp_path)


def test_loading_does_not_wake_the_compiler(folder):
    """Importing torch._dynamo takes a second, and nothing in load() needs it."""
    code = "import sys, mobilellm_fast; mobilellm_fast.load(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert "torch" in done.stdout.split(), done.stderr
    assert "torch._dynamo" not in done.stdout.split()


def test_engine_without_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mobilellm_fast\n"
        "engine = mobilellm_fast.Engine.load(sys.argv[1])\n"
        "print(len(engine.generate([1, 2], max_new_tokens=3).token_ids))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() in ("1", "2", "3"), done.stderr
