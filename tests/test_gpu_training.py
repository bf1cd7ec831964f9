"""Whole training steps through the Triton kernels, against the plain path on the CPU in float64.

Without a GPU the kernels are interpreted.
"""

import copy

import pytest
import torch
from gpu_bounds import UNITS
from helpers import packed_weights, random_ids, random_weights, tiny_config
from interpreted import DEVICE, HAS_GPU

pytest.importorskip("triton")
from mobilellm_fast import decoder, layers, loss
from mobilellm_fast.model import MobileLLM

pytestmark = [pytest.mark.gpu] if HAS_GPU else []

HALF = torch.bfloat16 if HAS_GPU else torch.float16  # bfloat16 is not interpreted
SMALL = dict(shape=(2, 9), hidden_size=96, head_dim=16)
CASES = {
    "float32": dict(SMALL, dtype=torch.float32),
    "compiled": dict(SMALL, dtype=HALF, compiled=True),
    "shared": dict(SMALL, dtype=HALF, layer_sharing="reverse", tie_word_embeddings=False),
}
if HAS_GPU:
    # wide and long enough for whole tiles
    large = dict(shape=(2, 300), hidden_size=576, intermediate_size=1536, vocab_size=2000)
    large |= dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512)
    large |= dict(tie_word_embeddings=False)  # else the logits of wide random rows are huge
    CASES |= {
        "large": dict(large, dtype=torch.bfloat16),
        "large_float32": dict(large, dtype=torch.float32),
        "float16": dict(SMALL, dtype=torch.float16, layer_sharing="immediate"),
        "mixed": dict(large, dtype=torch.float32, mixed=True),
        "compiled_large": dict(large, dtype=torch.bfloat16, compiled=True),
        "checkpointed": dict(SMALL, dtype=torch.bfloat16, checkpointed=True),
    }


@pytest.fixture
def use_kernels(ops_on_gpu, monkeypatch):
    """Return what makes models run ops with kernels; these are to write what is full of NaN."""

    def use():
        torch.use_deterministic_algorithms(True, warn_only=True)
        monkeypatch.setattr(loss, "GPU_CHUNK", 256)
        for module in (layers, decoder):
            monkeypatch.setattr(module, "ops", ops_on_gpu[0])

    yield use
    torch.use_deterministic_algorithms(False)


def step(lm, ids, mixed, run=None):
    """Return a step's loss and gradients in float64 on the CPU, and the graph's operators."""
    lm.zero_grad()
    with torch.autocast(ids.device.type, HALF, enabled=mixed):
        out = (lm if run is None else run)(ids, ids)
    operators = operators_of(out)
    out.backward()
    return out.item(), {n: p.grad.double().cpu() for n, p in lm.named_parameters()}, operators


def operators_of(tensor):
    names, found = set(), [tensor.grad_fn]
    seen = set(found)
    while found:
        node = found.pop()
        names.add(node.name())
        plan = getattr(node, "plan", None)  # of our ops
        if plan is not None and plan.save is not None:
            names.add(f"{node.name()}_saving")
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        found += fresh
    return " ".join(names)


@pytest.mark.parametrize("case", CASES)
def test_a_training_step(case, use_kernels):
    """As near to float64 as the plain path in the same dtype is, each gradient for itself."""
    options = dict(CASES[case])
    dtype, shape = options.pop("dtype"), options.pop("shape")
    flags = {name: options.pop(name, False) for name in ("mixed", "compiled", "checkpointed")}
    config = tiny_config(**options)
    lm = MobileLLM.from_weights(config, packed_weights(random_weights(config))).to(dtype)
    ids = torch.tensor(random_ids(config, *shape))
    exact_loss, exact, _ = step(copy.deepcopy(lm).double(), ids, False)
    _, plain, _ = step(lm, ids, flags["mixed"])

    use_kernels()
    lm, ids = lm.to(DEVICE), ids.to(DEVICE)
    lm.checkpoint_activations(flags["checkpointed"])
    backend = "inductor" if HAS_GPU else "aot_eager"
    run = torch.compile(lm, backend=backend, fullgraph=True) if flags["compiled"] else None
    got_loss, found, operators = step(lm, ids, flags["mixed"], run)

    unit = UNITS[HALF if flags["mixed"] else dtype]
    assert abs(got_loss - exact_loss) <= 4 * unit * exact_loss + 1e-5
    for name, want in exact.items():
        length = want.norm()
        near = ((plain[name] - want).norm() / length).item()
        got = ((found[name] - want).norm() / length).item()
        # both are sums of chance roundings; those of one matrix differ by half and more
        assert got <= 2 * near, f"{name}: {got:.1e} of the gradient, plainly {near:.1e}"
    assert 0 < near < (1e-4 if unit < 1e-6 else 0.1)
    if not (flags["compiled"] or flags["checkpointed"]):
        fused = dtype != torch.float32 and not flags["mixed"]
        assert "Backward_saving" in operators
        assert ("decoder_block" in operators) == fused
        assert ("gqa_attention" in operators) != fused


def test_hooks_of_fused_layers_are_called(use_kernels):
    use_kernels()
    config = tiny_config(num_hidden_layers=1)
    lm = MobileLLM.from_weights(config, packed_weights(random_weights(config))).to(DEVICE, HALF)
    ids = torch.tensor(random_ids(config, 1, 4)).to(DEVICE)
    want, seen = lm(ids), []
    lm.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(lm(ids), want, rtol=0, atol=0.02 * want.abs().max().item())
    assert seen[0].shape == (1, 4, config.intermediate_size)
