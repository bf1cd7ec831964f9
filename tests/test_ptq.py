"""Quantization after training: rounding, smoothing, and the way to files and back."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from helpers import (
    SHARING,
    assert_logits_close,
    packed_weights,
    random_ids,
    random_weights,
    tiny_config,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mobilellm_fast import quant
from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.loading import load
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.ptq import dequantize_, quantize_, report
from mobilellm_fast.ptq.__main__ import main
from mobilellm_fast.ptq.rounding import round_int4
from mobilellm_fast.ptq.smoothing import smooth_
from mobilellm_fast.ptq.statistics import collect, input_of
from mobilellm_fast.quant import QuantizedTensor
from mobilellm_fast.train import train_tokenizer, write_tokenizer

TEXT = "the cat sat on the mat. the dog saw the cat, and the cat saw the dog.\n" * 40


def build(seed=0, **changes):
    config = tiny_config(**changes)
    return MobileLLM.from_weights(config, packed_weights(random_weights(config, seed)))


def gaussian(rows=24, cols=96, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def correlated(cols=96, count=2000, seed=1):
    """Inputs of which few directions matter, as in trained models, and their second moments."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=generator)
    x = torch.randn(count, cols // 4, generator=generator) @ mix
    x = x + 0.1 * torch.randn(count, cols, generator=generator)
    return x, x.t() @ x / count


def squared_error(weight, tensor: QuantizedTensor, x=None):
    error = weight - torch.from_numpy(tensor.dequantize())
    return (error if x is None else x @ error.t()).square().mean().item()


def q4_0(weight):
    """ggml's rule: the value of largest magnitude in 32 becomes code 0, of 16 around 8."""
    groups = weight.unflatten(-1, (-1, 32))
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (peak / -8).half().float()
    codes = (groups / scale + 8.5).floor().clamp(0, 15)
    scale = scale[..., 0].half().numpy()
    return QuantizedTensor("int4_sym_g32", codes.flatten(-2).to(torch.uint8).numpy(), scale)


@pytest.mark.parametrize("cols", [96, 83, 20])
def test_searched_grids_beat_the_range_of_the_group(cols):
    weight = gaussian(cols=cols)
    nearest = quant.quantize(weight.numpy(), "int4_g32")
    searched = round_int4(weight, torch.eye(cols))
    assert searched.codes.max() <= 15 and searched.shape == tuple(weight.shape)
    assert squared_error(weight, searched) < 0.9 * squared_error(weight, nearest)
    # group by group never worse, but for the float16 of what is stored
    per_group = [
        (weight - torch.from_numpy(t.dequantize())).square().split(32, dim=1)
        for t in (searched, nearest)
    ]
    for a, b in zip(*per_group, strict=True):
        assert (a.sum(1) <= b.sum(1) * 1.001 + 1e-12).all()


def test_the_grid_of_q4_0_is_never_worse_than_ggmls_rounding():
    weight = gaussian()
    ours, theirs = round_int4(weight, torch.eye(96), symmetric=True), q4_0(weight)
    assert ours.kind == theirs.kind
    assert squared_error(weight, ours) < 0.95 * squared_error(weight, theirs)
    x, moments = correlated()
    ours = round_int4(weight, moments, symmetric=True)
    assert squared_error(weight, ours, x) < 0.5 * squared_error(weight, theirs, x)


def test_errors_are_made_up_for_by_later_columns():
    weight = gaussian()
    x, moments = correlated()
    alone, together = round_int4(weight, torch.eye(96)), round_int4(weight, moments)
    assert squared_error(weight, together, x) < 0.5 * squared_error(weight, alone, x)


@pytest.mark.parametrize("symmetric", [False, True])
def test_extreme_groups(symmetric):
    weight = gaussian(rows=6)
    weight[0] = 0
    weight[1] = 3.25
    weight[2] *= 1e-30
    weight[3, 5] = 60000.0
    weight[4] = -weight[4].abs()
    for moments in (torch.eye(96), torch.zeros(96, 96), correlated()[1]):
        got = round_int4(weight, moments, symmetric=symmetric).dequantize()
        assert np.isfinite(got).all()
        assert np.abs(got[0]).max() == 0
        assert np.abs(got[2]).max() < 1e-6
        if moments[0, 1] == 0:  # else the column's error is for others to make up
            assert np.abs(got[1] - 3.25).max() < 0.01 * 3.25


def test_exact_grids_stay_exact():
    """What lies on a grid already, as the weights of a Q4_1 file do, is not moved."""
    exact = quant.quantize(gaussian().numpy(), "int4_g32")
    weight = torch.from_numpy(exact.dequantize())
    got = round_int4(weight, torch.eye(96)).dequantize()
    np.testing.assert_allclose(got, weight, rtol=0, atol=2e-3)


def with_outliers(lm, scale=30.0):
    """The same function, with features of very different sizes, as trained models have them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in lm.model.layers:
            for norm, layers in (
                (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (block.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                size = torch.ones(len(norm.weight))
                size[torch.randperm(len(size), generator=generator)[:3]] = scale
                norm.weight *= size
                for layer in layers:
                    part = block.self_attn if layer[0] in "qkv" else block.mlp
                    part.get_submodule(layer).weight /= size
    return lm


@pytest.mark.parametrize("sharing", [False, *SHARING])
@pytest.mark.parametrize("tied", [True, False])
def test_smoothing_is_the_same_function(sharing, tied):
    lm = with_outliers(build(layer_sharing=sharing, tie_word_embeddings=tied))
    ids = torch.tensor(random_ids(lm.config, 2, 40))
    want = lm(ids)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    chosen = smooth_(lm, collect(lm, ids))
    assert_logits_close(lm(ids), want, 1e-4)
    assert sum(strength > 0 for strength in chosen.values()) >= len(chosen) / 2
    assert ("lm_head" in chosen) == (not tied)
    changed = {n for n, p in lm.named_parameters() if not torch.equal(p, before[n])}
    assert "model.layers.0.input_layernorm.weight" in changed


@pytest.mark.parametrize("sharing", [False, "immediate"])
def test_smoothing_makes_w8a8_accurate(sharing):
    lm = with_outliers(build(layer_sharing=sharing, tie_word_embeddings=False))
    text = random_ids(lm.config, 200, seed=3).tolist()
    calibration = torch.tensor(random_ids(lm.config, 4, 128, seed=4))
    (plain,) = report(lm, text, ["w8a8"])
    (smooth,) = report(lm, text, ["w8a8"], calibration=calibration)
    assert smooth.kl < 0.3 * plain.kl
    assert smooth.bits_per_weight == plain.bits_per_weight


def test_calibrated_int4_is_better_than_nearest():
    lm = build(hidden_size=96, num_hidden_layers=1, tie_word_embeddings=False)
    text = random_ids(lm.config, 200, seed=3).tolist()
    calibration = torch.tensor(random_ids(lm.config, 16, 128, seed=4))
    (nearest,) = report(lm, text, ["int4_all"])
    (calibrated,) = report(lm, text, ["int4_all"], calibration=calibration)
    assert calibrated.kl < 0.9 * nearest.kl  # inputs of random models know no directions


def test_statistics_cover_all_passes_of_a_shared_block():
    lm = build(layer_sharing="reverse", layer_repeats=3)
    ids = torch.tensor(random_ids(lm.config, 2, 10))
    inputs = collect(lm, ids)
    found = []
    layer = lm.model.layers[0].mlp.gate_proj
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        lm(ids)
    handle.remove()
    x = torch.cat(found)
    assert len(found) == 3
    got = inputs[input_of("model.layers.0.mlp.up_proj.weight")]
    torch.testing.assert_close(got.peak, x.abs().amax(0))
    torch.testing.assert_close(got.moments, x.t() @ x / len(x), rtol=1e-5, atol=1e-5)
    assert input_of("model.embed_tokens.weight") == input_of("lm_head.weight") == "lm_head"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", quant.INTEGER_FORMATS)
def test_quantize_save_load_dequantize(format, tied, tmp_path):
    lm = build(
        tie_word_embeddings=tied, layer_sharing=True, hidden_size=40, num_attention_heads=5,
        num_key_value_heads=5,
    )  # fmt: skip
    ids = torch.tensor(random_ids(lm.config, 1, 12))
    exact = {name: p.detach().clone() for name, p in lm.named_parameters()}
    assert quantize_(lm, format) is lm
    rounded = lm(ids)
    assert lm.engine.format == format
    lm.save_pretrained(tmp_path / "lm")
    again = load(tmp_path / "lm")
    assert again.engine.format == format
    assert torch.equal(again(ids), rounded)
    assert_same_weights(lm, again)
    assert again.generate([1, 2], max_new_tokens=5).token_ids == (
        lm.generate([1, 2], max_new_tokens=5).token_ids
    )
    values = {
        name: w if isinstance(w, np.ndarray) else w.dequantize() for name, w in lm.weights().items()
    }
    kinds = {n: w.kind for n, w in lm.weights().items() if not isinstance(w, np.ndarray)}
    dequantize_(lm)
    assert lm.engine.format == "fp32"
    for name, p in lm.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), values[name])
        # normal weights in a row, or in groups of 32: 3.3 or 2 of them over 127 or 7.5 codes
        bound = 0.01 if p.ndim == 1 or kinds[name] == "int8" else 0.09
        assert (p - exact[name]).norm() <= bound * exact[name].norm(), name
    assert_logits_close(lm(ids), rounded, 0.1)
    lm(ids, ids).backward()
    assert all(p.grad is not None for p in lm.parameters())


def assert_same_weights(a, b):
    left, right = a.weights(), b.weights()
    assert left.keys() == right.keys()
    for name, weight in left.items():
        other = right[name]
        if not isinstance(weight, np.ndarray):
            assert weight.kind == other.kind, name
            weight, other = weight.data, other.data
        np.testing.assert_array_equal(weight, other, err_msg=name)


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_grid_of_q4_0_is_stored_in_4_5_bits(calibrated, tmp_path):
    lm = build(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    text = random_ids(lm.config, 256).tolist() if calibrated else None
    quantize_(lm, "int4_all", symmetric=True, calibration=text)
    matrices = [w for w in lm.weights().values() if not isinstance(w, np.ndarray)]
    assert {w.kind for w in matrices} == {"int4_sym_g32"}
    blocks = [w for w in matrices if w.rows % 16 == 0]
    assert sum(8 * w.nbytes for w in blocks) == 4.5 * sum(w.rows * w.cols for w in blocks)
    lm.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.engine.format == "int4_all"
    assert_same_weights(lm, again)
    ids = random_ids(lm.config, 20)
    got = lm.engine.forward(ids, lm.engine.new_cache(), all_logits=True)
    assert_logits_close(again(torch.tensor(ids[None]))[0], got, 0.05)


def test_quantized_state_dicts(tmp_path):
    lm = quantize_(build(), "int4")
    path = tmp_path / "state.safetensors"
    save_file(lm.state_dict(), path)
    other = quantize_(build(seed=1), "int4")
    other.load_state_dict(load_file(path))
    assert_same_weights(lm, other)
    wrong = quantize_(build(), "w8a8")
    with pytest.raises(RuntimeError, match=r"packed_int8.*\n?.*packed_int4_g32"):
        wrong.load_state_dict(load_file(path))


def test_packed_tensors_are_aligned_for_a_mapped_file(tmp_path):
    lm = quantize_(build(hidden_size=44, num_attention_heads=2), "int4")
    lm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert len(file.keys()) == len(lm.weights())
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    packed = {name: entry for name, entry in header.items() if "packed_" in name}
    assert len(packed) == 15
    assert all((8 + size + entry["data_offsets"][0]) % 64 == 0 for entry in packed.values())


def damaged(folder, change):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["quantization_config"].update(quant_method="gptq"), "is not supported"),
        (lambda f: f["quantization_config"].update(format="int3"), "must name a format of .*int3"),
        (lambda f: f.pop("quantization_config"), "model.embed_tokens.weight is missing"),
        (lambda f: f.update(hidden_size=54), r"packed_int8 must have \d+ bytes for \(54, 48\)"),
    ],
)
def test_quantized_directories_that_contradict_themselves_are_refused(change, message, tmp_path):
    quantize_(build(), "int8").save_pretrained(tmp_path / "lm")
    damaged(tmp_path / "lm", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "lm")
    assert "\n" not in str(error.value)


def test_codes_that_kernels_do_not_take_are_refused(tmp_path):
    quantize_(build(), "int8").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.packed_int8"][200] = 128
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="up_proj.packed_int8 must have codes from -127"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(format="fp32"), "format must be one of .*, got 'fp32'"),
        (dict(format="int4", calibration="text"), "must be token ids: there is no tokenizer"),
        (dict(format="int4", calibration=[1, 2, 3]), "at least 64 tokens, got 3"),
        (dict(format="int4", calibration=3), r"a text, or token ids .* got 3"),
        (dict(format="int4", calibration=[["a"]]), "a text, or token ids"),
        (dict(format="int4", calibration=torch.ones(99)), "a text, or token ids"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(MobileLLMError, match=message):
        quantize_(build(), **options)
    with pytest.raises(MobileLLMError, match="must have float weights, got int8"):
        quantize_(quantize_(build(), "int8"), "int4")
    lm = build()
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(MobileLLMError, match="layers.1.mlp.up_proj.weight must be finite"):
        quantize_(lm, "int4")


def test_a_quantized_head_cannot_be_untied():
    lm = build()
    quantize_(lm, "int8")
    with pytest.raises(MobileLLMError, match="the embedding must be float"):
        lm.untie()
    lm.model.embed_tokens = torch.nn.Identity()  # as a GPU's, it has no weight
    with pytest.raises(MobileLLMError, match="the embedding must be float"):
        lm.untie()


def test_untying_the_head_keeps_the_function(tmp_path):
    lm = build()
    ids = torch.tensor(random_ids(lm.config, 1, 9))
    want = lm(ids)
    lm.untie()
    torch.testing.assert_close(lm(ids), want, rtol=0, atol=0)
    lm.save_pretrained(tmp_path)
    again = load(tmp_path, format="fp32")
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(ids), want, rtol=0, atol=0)


def test_command(tmp_path, capsys):
    config = tiny_config(vocab_size=300, bos_token_id=0, eos_token_id=0)
    lm = MobileLLM.from_weights(config, packed_weights(random_weights(config)))
    lm._engine_options["tokenizer"] = write_tokenizer(train_tokenizer(TEXT, 300), tmp_path / "t")
    lm.save_pretrained(tmp_path / "lm")
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    model, out = str(tmp_path / "lm"), str(tmp_path / "out")
    assert main([model, "--text", str(book), "--formats", "int8", "w8a8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["int8", "w8a8"]
    numbers = [float(n) for n in re.findall(r"[\d.]+", lines[2].split("int8")[1])]
    assert 8 < numbers[0] < 16 and numbers[2] == pytest.approx(1, abs=0.1)
    command = [model, "--calibration", str(book), "--formats", "int4", "--out", out]
    assert main(command) == 0
    assert load(out).engine.format == "int4"
    assert main([model, "--formats", "int9", "--out", out]) == 1
    assert "format must be one of" in capsys.readouterr().err
    assert main([model]) == 1
    assert "--text to report on, or --out" in capsys.readouterr().err


def test_copies_of_quantized_models_are_independent():
    lm = quantize_(build(), "int8")
    twin = dequantize_(copy.deepcopy(lm))
    assert lm.engine.format == "int8" and twin.engine.format == "fp32"
