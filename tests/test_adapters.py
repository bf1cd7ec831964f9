"""Our models behind transformers' and lm-eval's interfaces, against their own."""

import json

import numpy as np
import pytest
import torch
from helpers import packed_weights, random_ids, random_weights, tiny_config, transformers_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mobilellm_fast.adapters.lm_eval import EvaluatedModel
from mobilellm_fast.adapters.transformers import as_transformers
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.loading import load
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.train import train_tokenizer, write_tokenizer

TEXT = "the cat sat on the mat. the dog saw the cat, and the cat saw the dog.\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(train_tokenizer(TEXT, 300), folder / "tokenizer")
    config = tiny_config(vocab_size=300, bos_token_id=0, eos_token_id=0)
    lm = MobileLLM.from_weights(config, packed_weights(random_weights(config)))
    lm._engine_options["tokenizer"] = tokenizer
    lm.save_pretrained(folder / "lm")
    return folder / "lm"


def both(**changes):
    config = tiny_config(**{"bos_token_id": None, "eos_token_id": None} | changes)
    weights = random_weights(config)
    ours = as_transformers(MobileLLM.from_weights(config, packed_weights(weights)))
    return ours, transformers_model(config, weights)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_equals_transformers_own_model(options):
    ours, theirs = both()
    ids = torch.tensor(random_ids(theirs.config, 3, 7))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # two prompts are shorter, and padded on the left
    mask[2, :1] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0} | options
    want = theirs.generate(ids, attention_mask=mask, **options)
    got = ours.generate(ids, attention_mask=mask, **options)
    assert got.shape == (3, 16)
    assert torch.equal(got, want)


def test_layer_shared_models_generate_with_a_cache():
    ours, _ = both(layer_sharing=True)
    ids = torch.tensor(random_ids(ours.lm.config, 1, 5))
    got = ours.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 5:]
    assert got.tolist() == ours.lm.generate(ids[0].tolist(), max_new_tokens=8).token_ids


def test_forward_without_a_cache_returns_all_logits():
    ours, theirs = both()
    ids = torch.tensor(random_ids(theirs.config, 2, 6))
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_loss_and_gradients_for_a_trainer():
    ours, theirs = both()
    ids = torch.tensor(random_ids(theirs.config, 2, 6))
    losses = []
    for model in (ours, theirs):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    table = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.get_input_embeddings().weight.grad, table, rtol=3e-4, atol=5e-6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)
    with pytest.raises(MobileLLMError, match="attention_mask must not pad on the left"):
        ours(ids, attention_mask=mask, labels=ids)


def test_padding_on_the_left_has_gradients():
    ours, theirs = both()
    ids = torch.tensor(random_ids(theirs.config, 3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    grads = []
    for model in (ours, theirs):
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        grads.append(model.get_input_embeddings().weight.grad)
    got, want = grads
    assert (got - want).norm() < 1e-5 * want.norm(), (got - want).norm() / want.norm()


def test_a_loop_that_gives_new_tokens_alone():
    ours, theirs = both()
    ids = torch.tensor(random_ids(theirs.config, 2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    steps = []
    for model in (ours, theirs):
        with torch.no_grad():
            first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
            cache = first.past_key_values
            second = model(ids[:, 4:], attention_mask=mask[:, :5], past_key_values=cache)
            third = model(ids[:, :2], attention_mask=mask, past_key_values=cache)
            steps.append((second.logits, third.logits))
    # float32 in another order: 1.4e-5 off at most, beside logits of up to 37
    torch.testing.assert_close(steps[0], steps[1], rtol=2e-5, atol=2e-5)
    with pytest.raises(MobileLLMError, match="past_key_values must be .* got DynamicCache"):
        both()[0](ids, past_key_values=cache)
    ours, _ = both()
    with torch.no_grad(), pytest.raises(MobileLLMError, match=r"shape \(2, 6\), .* got \(2, 1\)"):
        ours(ids[:, :1], attention_mask=mask[:, :1], past_key_values=ours(ids).past_key_values)


@pytest.mark.parametrize(
    "option", [{"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": True}]
)
def test_what_the_engine_does_not_show_is_refused(option):
    ours, _ = both()
    ids = torch.tensor([[1, 2]])
    with pytest.raises(MobileLLMError, match=f"{next(iter(option))} must be left out"):
        ours(ids, **option)
    if "use_cache" not in option:
        with pytest.raises(MobileLLMError, match="must be left out"):
            ours.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **option)
    with torch.no_grad():
        assert ours(ids, return_dict=False)[0].shape == (1, 2, ours.lm.config.vocab_size)


def test_a_loss_is_divided_by_the_items_of_all_accumulated_batches():
    """`Trainer` gives their number to models that take it, and then divides no more itself."""
    ours, theirs = both()
    ids = torch.tensor(random_ids(theirs.config, 2, 9))
    labels = ids.clone()
    labels[0, 5:] = -100
    for items in (None, 48, torch.tensor(48)):
        got, want = (m(ids, labels=labels, num_items_in_batch=items) for m in (ours, theirs))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_texts_packed_into_one_row_are_refused(grad):
    ours, _ = both()
    ids = torch.tensor(random_ids(ours.lm.config, 2, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.set_grad_enabled(grad):
        want = ours(ids, attention_mask=mask).logits
        left_padded = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 2, 3]])
        got = ours(ids, attention_mask=mask, position_ids=left_padded).logits
        assert torch.equal(got, want)
        assert torch.equal(ours(ids, position_ids=torch.arange(6)[None]).logits, ours(ids).logits)
        three = [list(range(6))] * 3
        for packed in ([[0, 1, 2, 0, 1, 2]], [[1, 2, 3, 4, 5, 6]], [[0, 1, 2]], three):
            with pytest.raises(MobileLLMError, match="position_ids must count"):
                ours(ids, position_ids=torch.tensor(packed))
    with torch.no_grad():
        cache = ours(ids[:, :4]).past_key_values
        ours(ids[:, 4:], past_key_values=cache, position_ids=torch.tensor([[4, 5]]))
        with pytest.raises(MobileLLMError, match="position_ids must count"):
            ours(ids[:, 4:], past_key_values=cache, position_ids=torch.tensor([[0, 1]]))
        cache = ours(ids[:, :4], attention_mask=mask[:, :4]).past_key_values  # one is padded
        ours(ids[:, 4:], past_key_values=cache, position_ids=torch.tensor([[4, 5], [2, 3]]))


def test_only_the_logits_to_keep_come_with_gradients_too():
    ours, _ = both()
    ids = torch.tensor(random_ids(ours.lm.config, 2, 5))
    logits = ours(ids).logits
    assert logits.requires_grad
    for keep in (1, 3):
        assert torch.equal(ours(ids, logits_to_keep=keep).logits, logits[:, -keep:])


def test_a_refused_resize_leaves_the_model_as_it_was():
    ours, _ = both()
    ids = torch.tensor([[1, 2, 3]])
    want = ours(ids).logits
    for same in (None, ours.lm.config.vocab_size):
        assert ours.resize_token_embeddings(same) is ours.get_input_embeddings()
    with pytest.raises(MobileLLMError, match="vocabulary of a model is fixed"):
        ours.resize_token_embeddings(ours.lm.config.vocab_size + 3)
    assert torch.equal(ours(ids).logits, want)


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_what_a_wrapped_model_saves_loads(folder, tmp_path, format):
    lm = load(folder, device="cpu", format=format)
    wrapped = as_transformers(lm)
    wrapped.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    wrapped.save_pretrained(tmp_path, state_dict=wrapped.state_dict())
    again = load(tmp_path, device="cpu", format=format)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids), lm(ids))
    assert wrapped.state_dict().keys() == lm.state_dict().keys()
    saved = load_file(tmp_path / "model.safetensors")  # as a trainer goes on from a checkpoint
    for value in lm.state_dict().values():
        value.zero_()
    missing, unexpected = wrapped.load_state_dict(saved, strict=False)
    assert not unexpected
    assert not missing
    assert torch.equal(again(ids), lm(ids))


def test_pipeline(folder):
    lm = load(folder, format="fp32")
    pipe = pipeline(
        "text-generation",
        model=as_transformers(lm),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    (answer,) = pipe("the cat", max_new_tokens=6, do_sample=False)
    assert answer["generated_text"] == "the cat" + lm.generate("the cat", max_new_tokens=6).text


TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_a_local_task_agrees_with_lm_evals_own_backend(folder, tmp_path, monkeypatch):
    """On every log-likelihood, without network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [
        {
            "question": "the cat",
            "choices": [" sat on the mat", " mat", " saw the dog"],
            "answer": 0,
        },
        {"question": "the dog saw the", "choices": [" cat", " and", "!"], "answer": 0},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(TASK.replace("DATA", str(data)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = []
    for model in (
        EvaluatedModel(engine=load(folder, format="fp32").engine),
        HFLM(pretrained=str(folder), device="cpu", dtype="float32"),
    ):
        result = simple_evaluate(
            model, tasks=["local"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        samples = result["samples"]["local"]
        found.append([[float(r[0][0]) for r in s["resps"]] for s in samples])
        found.append([[str(r[0][1]) for r in s["resps"]] for s in samples])
    ours, our_greedy, theirs, their_greedy = found
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-3
    assert our_greedy == their_greedy


@pytest.mark.parametrize("max_length", [8, 64])
def test_rolling_and_generation_agree_with_lm_evals_own_backend(folder, max_length):
    ours = EvaluatedModel(engine=load(folder, format="fp32").engine, max_length=max_length)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=max_length)
    rolling = [Instance("loglikelihood_rolling", {}, (TEXT[:90],), 0)]
    got, want = ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling)
    assert got[0] == pytest.approx(want[0], abs=1e-3)
    pairs = [("the cat " * 9, " sat"), ("", "the dog"), ("the cat", " sat on the mat.")]
    likely = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for a, b in zip(ours.loglikelihood(likely), theirs.loglikelihood(likely), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
        assert a[1] == b[1]
    if max_length > 8:
        until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        asked = [Instance("generate_until", {}, ("the cat", until), 0)]
        assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_lm_eval_knows_the_model_type(folder):
    """As its command makes models; the command itself lists a thousand tasks before it starts."""
    model = get_model("mobilellm_fast").create_from_arg_string(
        f"pretrained={folder},format=int8,threads=1", {"batch_size": "1", "device": None}
    )
    assert isinstance(model, EvaluatedModel)
    assert (model.engine.format, model.engine.executor.threads) == ("int8", 1)
    assert (model.tok_encode("the cat"), model.max_length) == (
        model.engine.tokenizer.encode("the cat"),
        model.engine.config.context_length,
    )
