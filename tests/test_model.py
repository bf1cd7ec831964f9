"""The torch model against transformers, the oracle."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from helpers import (
    MODEL_CONFIGS,
    SHARING,
    assert_logits_close,
    packed_weights,
    random_ids,
    random_weights,
    tiny_config,
    transformers_logits,
    transformers_model,
)

from mobilellm_fast import ops, reference
from mobilellm_fast.config import PRESETS
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.loading import load
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.quant import QUANTIZED_KINDS

SHARED_CONFIGS = {
    f"{sharing}_x{repeats}": tiny_config(
        num_hidden_layers=3, layer_sharing=sharing, layer_repeats=repeats
    )
    for sharing, repeats in itertools.product(SHARING, (2, 3))
}


def build(config, seed=0):
    weights = random_weights(config, seed)
    return MobileLLM.from_weights(config, packed_weights(weights)), weights


@pytest.mark.parametrize("batch, seq", [(1, 1), (2, 7), (3, 40)])
@pytest.mark.parametrize("name", MODEL_CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(name, batch, seq):
    config = MODEL_CONFIGS[name]
    model, weights = build(config)
    ids = random_ids(config, batch, seq)
    want = transformers_logits(config, transformers_model(config, weights), ids)
    assert_logits_close(model(torch.tensor(ids)), want)


@pytest.mark.parametrize("name", SHARED_CONFIGS)
@torch.no_grad()
def test_shared_logits_equal_a_plain_loop_over_layers(name):
    config = SHARED_CONFIGS[name]
    model, weights = build(config)
    ids = random_ids(config, 2, 30)
    want = transformers_logits(config, transformers_model(config, weights), ids)
    got = model(torch.tensor(ids))
    assert_logits_close(got, want)
    # ... and the strategies are not the same function
    for other in SHARED_CONFIGS.values():
        if other != config:
            twin = MobileLLM.from_weights(other, packed_weights(weights))
            assert (twin(torch.tensor(ids)) - got).abs().max() > 0.01 * got.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharing", [False, *SHARING])
def test_gradients_equal_transformers(sharing, tied):
    """Shared blocks and a tied embedding are used several times; their gradients add up."""
    config = tiny_config(layer_sharing=sharing, layer_repeats=3, tie_word_embeddings=tied)
    model, weights = build(config)
    theirs = transformers_model(config, weights)
    ids = torch.tensor(random_ids(config, 2, 13))
    for logits in (model(ids), transformers_logits(config, theirs, ids)):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    got = {name: p.grad for name, p in model.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        error, scale = (grad - expected[name]).abs().max(), expected[name].abs().max()
        assert scale > 0
        assert error <= 2e-4 * scale, name


def test_training_step_lowers_the_loss():
    torch.manual_seed(0)
    config = tiny_config(layer_sharing=True)
    model = MobileLLM(config)
    ids = torch.tensor(random_ids(config, 4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_interchanges_with_transformers(tied):
    config = tiny_config(tie_word_embeddings=tied)
    theirs = transformers_model(config, random_weights(config, 1))
    ours = MobileLLM(config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ids = torch.tensor(random_ids(config, 1, 9))
    with torch.no_grad():
        ours.load_state_dict(theirs.state_dict())
        assert_logits_close(ours(ids), theirs(ids).logits)
        fresh = transformers_model(config, random_weights(config, 2))
        fresh.load_state_dict(ours.state_dict())
        assert_logits_close(ours(ids), fresh(ids).logits)
    assert sum(p.numel() for p in ours.parameters()) == config.num_parameters


def test_tied_state_dict_may_leave_the_head_out_but_not_contradict_it():
    config = tiny_config()
    model = MobileLLM(config)
    state = model.state_dict()
    del state["lm_head.weight"]
    model.load_state_dict(state)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    with pytest.raises(RuntimeError, match=r"lm_head.weight differs from the embedding"):
        model.load_state_dict(state)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_modules_hold_the_published_number_of_parameters(name):
    config = PRESETS[name]
    model = MobileLLM(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters


def test_initial_weights():
    torch.manual_seed(0)
    model = MobileLLM(tiny_config(initializer_range=0.05))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert 0.04 < p.std() < 0.06, name


@torch.no_grad()
def test_bfloat16():
    """bf16 rounds to 2^-9 at each of a few operations per layer; errors add like noise."""
    config = tiny_config()
    model, weights = build(config)
    ids = torch.tensor(random_ids(config, 2, 20))
    exact = model(ids)
    half = copy.deepcopy(model).to(torch.bfloat16)
    got = half(ids)
    assert got.dtype == torch.bfloat16
    ours = (got.float() - exact).square().mean().sqrt()
    assert ours <= 0.02 * exact.square().mean().sqrt()
    theirs = transformers_model(config, weights).to(torch.bfloat16)(ids).logits.float()
    assert ours <= 1.2 * (theirs - exact).square().mean().sqrt()


def test_bfloat16_trains():
    config = tiny_config(layer_sharing=True)
    model = MobileLLM(config, dtype=torch.bfloat16)
    model(torch.tensor(random_ids(config, 2, 5))).float().logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_dtype_and_device_of_fresh_models():
    assert MobileLLM(tiny_config(), dtype=torch.float64).model.norm.weight.dtype == torch.float64
    assert MobileLLM(tiny_config(), device="meta").model.norm.weight.is_meta


@pytest.mark.parametrize("format", ["int8", "w8a8", "int4"])
@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@torch.no_grad()
def test_quantized_model_equals_its_dequantized_weights(kind, format, monkeypatch):
    """What is left is the rounding of activations to 8 bits."""
    config = tiny_config(hidden_size=96, layer_sharing="reverse", tie_word_embeddings=False)
    packed = packed_weights(random_weights(config), kind)
    model = MobileLLM.from_weights(config, packed, format)
    exact = {name: w if isinstance(w, np.ndarray) else w.dequantize() for name, w in packed.items()}
    twin = MobileLLM.from_weights(config, packed_weights(exact))
    ids = torch.tensor(random_ids(config, 2, 11))
    got = model(ids)
    assert_logits_close(got, twin(ids), 0.1)
    monkeypatch.setattr(ops, "linear", reference.linear)
    # the same but for codes that fall to the other side of a half: no or 1e-2 over twelve seeds
    assert_logits_close(got, model(ids), 2e-2)


def test_quantized_weights_let_gradients_through():
    config = tiny_config()
    model = MobileLLM.from_weights(config, packed_weights(random_weights(config), "int8"), "int8")
    model(torch.tensor(random_ids(config, 1, 6))).sum().backward()
    names = {name for name, _ in model.named_parameters()}
    assert names and all("norm" in name for name in names)
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", ["fp32", "bf16", *QUANTIZED_KINDS])
def test_weights_are_shared_not_copied(kind):
    config = tiny_config(tie_word_embeddings=False)
    packed = packed_weights(random_weights(config), kind)
    model = MobileLLM.from_weights(config, packed, "int8")
    back = model.weights()
    assert back.keys() == packed.keys()
    for name, weight in packed.items():
        if isinstance(weight, np.ndarray):
            np.testing.assert_array_equal(back[name], weight)
        else:
            assert back[name].kind == kind
            assert np.shares_memory(back[name].data, weight.data), name


def test_bf16_weights_compute_like_bf16_modules():
    config = tiny_config()
    packed = packed_weights(random_weights(config), "bf16")
    model = MobileLLM.from_weights(config, packed, "bf16")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    twin = MobileLLM.from_weights(
        config,
        packed_weights(
            {n: w if isinstance(w, np.ndarray) else w.dequantize() for n, w in packed.items()}
        ),
    )
    ids = torch.tensor(random_ids(config, 1, 12))
    with torch.no_grad():
        assert_logits_close(model(ids).float(), twin(ids), 0.05)


def test_wrong_weights_are_refused():
    config = tiny_config()
    packed = packed_weights(random_weights(config))
    missing = {k: v for k, v in packed.items() if k != "model.norm.weight"}
    with pytest.raises(MobileLLMError, match=r"weights lack model.norm.weight"):
        MobileLLM.from_weights(config, missing)
    with pytest.raises(MobileLLMError, match=r"weights have an unexpected lm_head.weight"):
        MobileLLM.from_weights(config, packed | {"lm_head.weight": packed["model.norm.weight"]})
    wrong = packed | {"model.norm.weight": np.ones(47, np.float32)}
    with pytest.raises(MobileLLMError, match=r"must have shape \(48,\), got \(47,\)"):
        MobileLLM.from_weights(config, wrong)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros(5, dtype=torch.int64),
            r"input_ids must be \(batch, seq\) integers, got \(5,\)",
        ),
        (torch.zeros(1, 5), r"integers, got \(1, 5\) torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), "must have 1 to 256 tokens, got 0"),
        (torch.zeros(1, 257, dtype=torch.int64), "must have 1 to 256 tokens, got 257"),
        (torch.tensor([[1, 97]]), r"must be in \[0, 97\), got 97"),
        (torch.tensor([[1, -1]]), r"must be in \[0, 97\), got -1"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(ids, message):
    with pytest.raises(MobileLLMError, match=message) as error:
        MobileLLM(tiny_config())(ids)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["fp32", *QUANTIZED_KINDS])
def test_a_batch_of_nothing_has_no_logits(kind):
    config = tiny_config()
    model = MobileLLM.from_weights(config, packed_weights(random_weights(config), kind))
    with torch.no_grad():
        assert model(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, config.vocab_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_inputs(dtype):
    model, _ = build(tiny_config())
    ids = torch.tensor(random_ids(model.config, 1, 4))
    with torch.no_grad():
        torch.testing.assert_close(model(ids.to(dtype)), model(ids), rtol=0, atol=0)


def test_compiles_to_one_graph():
    config = tiny_config(layer_sharing=True)
    model, _ = build(config)
    ids = torch.tensor(random_ids(config, 2, 8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_logits_close(compiled(ids), model(ids), 1e-5)
    compiled(ids).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-5, atol=1e-5)


def greedy_without_cache(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def build_fresh(**changes):
    """A model without special tokens, so that generation does not end early."""
    config = tiny_config(bos_token_id=None, eos_token_id=None, **changes)
    return build(config)[0]


@pytest.mark.parametrize("sharing", [False, *SHARING])
def test_generation_continues_what_forward_predicts(sharing):
    model = build_fresh(layer_sharing=sharing)
    prompt = [5, 7, 11]
    got = model.generate(prompt, max_new_tokens=12)
    assert list(got.token_ids) == greedy_without_cache(model, prompt, 12)


def test_engine_reads_the_parameters_and_follows_their_changes():
    model = build_fresh()
    engine = model.engine
    assert model.engine is engine
    assert np.shares_memory(
        engine.weights["model.embed_tokens.weight"].data,
        model.model.embed_tokens.weight.detach().numpy(),
    )
    before = model.generate([1, 2], max_new_tokens=8).token_ids
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    after = list(model.generate([1, 2], max_new_tokens=8).token_ids)
    assert after == greedy_without_cache(model, [1, 2], 8)
    assert after != list(before)

    model.load_state_dict(build_fresh().state_dict())
    assert list(model.generate([1, 2], max_new_tokens=8).token_ids) == list(before)
    model.to(torch.bfloat16)
    assert model.engine.format == "bf16"
    assert len(model.generate([1, 2], max_new_tokens=8).token_ids) == 8


class Adapter(torch.nn.Module):
    """A layer with something added, under the names of PEFT: `weight` is the base layer's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.added = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.added(x)


class Rounded(torch.nn.Linear):
    """As other libraries' layers: a product of their own, by the weight alone."""

    def forward(self, x):
        return super().forward(x.bfloat16().float())


def test_layers_of_others_that_compute_with_their_weight_alone_generate():
    model = build_fresh()
    want = list(model.generate([1, 2], max_new_tokens=8).token_ids)
    mlp = model.model.layers[0].mlp
    rounded = Rounded(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    rounded.weight = mlp.up_proj.weight
    mlp.up_proj, mlp.down_proj = rounded, torch.compile(mlp.down_proj)
    model.train().eval()
    assert list(model.generate([1, 2], max_new_tokens=8).token_ids) == want


@pytest.mark.parametrize("change", [Adapter, "bias", "parametrization"])
def test_layers_that_compute_more_than_their_weight_are_refused(change, tmp_path):
    """Generation and saving would leave out what an adapter or a bias adds."""
    model = build_fresh()
    before = list(model.generate([1, 2], max_new_tokens=8).token_ids)
    mlp = model.model.layers[0].mlp
    if change == "parametrization":  # its `weight` is what the layer computes with
        double = torch.nn.Module()
        double.forward = lambda weight: weight * -20
        torch.nn.utils.parametrize.register_parametrization(mlp.up_proj, "weight", double)
        after = list(model.generate([1, 2], max_new_tokens=8).token_ids)
        assert after == greedy_without_cache(model, [1, 2], 8) != before
        return
    if change == "bias":
        mlp.up_proj.bias = torch.nn.Parameter(torch.ones(mlp.up_proj.out_features))
    else:
        mlp.up_proj = change(mlp.up_proj)
    for use in (lambda: model.generate([1, 2]), lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(MobileLLMError, match="up_proj.weight must be all that its layer"):
            use()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_copies_are_independent(kind):
    config = tiny_config(eos_token_id=None)
    weights = packed_weights(random_weights(config), kind)
    model = MobileLLM.from_weights(config, weights, kind)
    want = list(model.generate([1, 2], max_new_tokens=8).token_ids)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.model.norm.weight.zero_()
    for other in (twin, again):
        assert other.engine is not model.engine
        assert list(other.generate([1, 2], max_new_tokens=8).token_ids) == want


def test_models_off_the_cpu_do_not_generate():
    with pytest.raises(MobileLLMError, match=r"model.embed_tokens.weight must be .* on meta"):
        MobileLLM(tiny_config(), device="meta").generate([1], max_new_tokens=1)
    quantized = load("tiny", device="cpu", format="int8").to("meta")
    with pytest.raises(MobileLLMError, match=r"model.embed_tokens.weight must have .* on meta"):
        quantized.generate([1], max_new_tokens=1)
    half = MobileLLM(tiny_config(), dtype=torch.float16)
    with pytest.raises(MobileLLMError, match=r"must be float32 or bfloat16 on cpu, got float16"):
        half.generate([1], max_new_tokens=1)
