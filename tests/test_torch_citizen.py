"""What torch offers any module: compile, export, counters, checkpointing, data parallelism."""

import copy
import socket

import data_parallel
import interpreted
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mobilellm_fast.config import MobileLLMConfig, expected_shapes
from mobilellm_fast.model import MobileLLM


def build(kind="fp32", format=None, **changes):
    config = tiny_config(**changes)
    packed = packed_weights(random_weights(config), kind)
    return MobileLLM.from_weights(config, packed, format or kind)


def ids_of(lm, *shape, seed=0):
    return torch.tensor(random_ids(lm.config, *shape, seed=seed))


def gradients(lm, loss):
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters()}


@pytest.mark.parametrize("sharing", [False, *SHARING])
def test_checkpointed_activations_give_the_same_gradients(sharing):
    lm = build(layer_sharing=sharing, layer_repeats=3)
    ids = ids_of(lm, 2, 9)
    want = gradients(lm, lm(ids, ids))
    kept = saved_elements(lm, ids)
    lm.checkpoint_activations()
    got = gradients(lm, lm(ids, ids))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)
    assert saved_elements(lm, ids) < 0.4 * kept
    lm.checkpoint_activations(False)
    assert saved_elements(lm, ids) == kept


def saved_elements(lm, ids):
    """Elements that the forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.data_ptr() for p in lm.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lm(ids, ids)
    del loss
    return sum(seen.values())


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_loss_compiles_to_one_graph(kind):
    lm = build(kind, layer_sharing=True)
    ids = ids_of(lm, 2, 8)
    compiled = torch.compile(lm, backend="aot_eager", fullgraph=True)
    got, want = gradients(lm, compiled(ids, ids)), gradients(lm, lm(ids, ids))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_compiled_by_inductor():
    """Forward and backward as generated code."""
    lm = build(num_hidden_layers=1)
    ids = ids_of(lm, 2, 8)
    compiled = torch.compile(lm, fullgraph=True)
    got, want = gradients(lm, compiled(ids, ids)), gradients(lm, lm(ids, ids))
    for name in want:  # other orders of sums in float32
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4_g32"])
def test_export_round_trip(kind, tmp_path):
    """One program for any batch and length, saved and read again."""
    lm = build(kind, "int8" if kind == "int8" else "int4", layer_sharing="reverse").eval()
    if kind == "fp32":
        lm = build(layer_sharing="reverse").eval()
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq", min=2, max=256)}
    shapes = {"input_ids": axes}
    program = torch.export.export(lm, (ids_of(lm, 2, 9),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "lm.pt2")
    again = torch.export.load(tmp_path / "lm.pt2").module()
    for shape in ((2, 9), (1, 30), (5, 3)):
        ids = ids_of(lm, *shape, seed=3)
        with torch.no_grad():
            torch.testing.assert_close(again(ids), lm(ids), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_floating_point_operations_are_counted(kind):
    """Two per weight and token in products; attention beside them; training takes three times."""
    lm = build(kind, num_hidden_layers=3)
    ids = ids_of(lm, 2, 16)
    shapes = expected_shapes(lm.config).values()
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)  # tied: one is both
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        lm(ids)
    config = lm.config
    heads, tokens = config.num_attention_heads * config.head_dim, ids.numel()
    attention = 2 * 2 * 16 * heads * tokens * config.num_hidden_layers
    assert forward.get_total_flops() == 2 * matrices * tokens + attention
    with FlopCounterMode(display=False) as step:
        lm(ids).sum().backward()
    if kind == "int8":  # no gradients of weights
        return
    # torch itself counts nothing for the gradient of its CPU attention
    assert step.get_total_flops() == 3 * 2 * matrices * tokens + attention


def test_the_profiler_names_ops_and_blocks():
    lm = build("int8")
    ids = ids_of(lm, 1, 5)
    with torch.profiler.profile() as profile, torch.no_grad():
        lm(ids)
    names = {event.key for event in profile.key_averages()}
    ops = {"rms_norm", "rope", "gqa_attention", "linear", "embed"}
    assert {f"mobilellm_fast::{op}" for op in ops} <= names


def test_meta_models_materialise():
    """As large models are built: shapes first, memory later, then weights."""
    config = MobileLLMConfig.preset("MobileLLM-LS-350M")
    lm = MobileLLM(config, device="meta")
    assert lm(torch.zeros(1, 7, dtype=torch.int64, device="meta")).shape == (1, 7, 32000)
    small = MobileLLM(tiny_config(), device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    small.reset_parameters()
    torch.manual_seed(0)
    fresh = MobileLLM(tiny_config())
    ids = ids_of(fresh, 1, 6)
    torch.testing.assert_close(small(ids), fresh(ids), rtol=0, atol=0)


def test_models_keep_their_rotation_in_any_dtype():
    """Rotary tables are no buffers: rounding them to bfloat16 would move far tokens."""
    lm = build(max_position_embeddings=256)
    twin = copy.deepcopy(lm).to(torch.bfloat16).float()
    with torch.no_grad():
        for a, b in zip(twin.parameters(), lm.parameters(), strict=True):
            a.copy_(b)
    ids = ids_of(lm, 1, 200)
    torch.testing.assert_close(twin(ids), lm(ids), rtol=0, atol=0)


def test_longer_than_the_table_of_rotations(monkeypatch):
    lm = build()
    ids = ids_of(lm, 1, 40)
    want = lm(ids)
    monkeypatch.setattr("mobilellm_fast.decoder.TABLE_LENGTH", 16)
    again = MobileLLM.from_weights(lm.config, lm.weights())
    assert len(again.model._tables[0]) == 16
    assert_logits_close(again(ids), want, 1e-6)


@pytest.mark.parametrize(
    ("kind", "kernels"), [("ddp", False), ("fsdp", False), ("fsdp", True)], ids=str
)
def test_two_processes_train_like_one(kind, kernels, tmp_path):
    if kernels and not interpreted.INTERPRETED:
        pytest.skip("there is a GPU, or no Triton")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "losses.pt"
    torch.multiprocessing.spawn(data_parallel.train, (2, port, kind, kernels, path), nprocs=2)
    want = [loss.item() for loss in data_parallel.steps(*data_parallel.build())]
    assert want[-1] < want[0] - 0.01
    assert torch.load(path) == pytest.approx(want, rel=1e-5)


def test_tables_move_with_the_model():
    """What is copied to a GPU in each step makes that step wait."""
    lm = MobileLLM(tiny_config(), device="meta")
    assert {t.device.type for t in lm.model._tables} == {"cpu"}  # the values are not lost
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm.to_empty(device="cuda")
    assert {t.device.type for t in lm.model._tables} == {"cuda"}
