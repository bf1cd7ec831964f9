"""The loss of a head in chunks: values, gradients, memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import packed_weights, random_ids, random_weights, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from mobilellm_fast import loss as loss_module
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.loss import LinearCrossEntropy, next_token_loss
from mobilellm_fast.model import MobileLLM


def plain(hidden, weight, labels):
    logits = F.linear(hidden[:, :-1], weight).flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten())


def example(dtype=torch.float64, batch=2, seq=13, n=6, vocab=11):
    torch.manual_seed(0)
    hidden = torch.randn(batch, seq, n, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, n, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (batch, seq))
    labels[0, 3:6] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
def test_equals_cross_entropy(chunk):
    hidden, weight, labels = example()
    got, want = next_token_loss(hidden, weight, labels, chunk), plain(hidden, weight, labels)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(3 * got, (hidden, weight)),
        torch.autograd.grad(3 * want, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradcheck(chunk):
    hidden, weight, labels = example(seq=5)
    flat = hidden.detach().flatten(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: LinearCrossEntropy.apply(h, w, labels.flatten(), chunk), (flat, weight)
    )


@pytest.mark.parametrize("chunk", [3, 100])
def test_functions_of_it_are_transformed(chunk):
    hidden, weight, labels = (t.detach() for t in example())

    def ours(hidden, weight, labels):
        return next_token_loss(hidden, weight, labels, chunk)

    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        close(
            transform(ours, argnums=1)(hidden, weight, labels),
            transform(plain, argnums=1)(hidden, weight, labels),
        )
    each = torch.func.vmap(torch.func.grad(ours), in_dims=(0, None, 0))
    samples = hidden[:, None], weight, labels[:, None]
    for got, *sample in zip(each(*samples), samples[0], samples[2], strict=True):
        close(got, torch.func.grad(plain)(sample[0], weight, sample[1]))


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_wanted_gradients_are_computed(wanted, chunk):
    hidden, weight, labels = example()
    (hidden if wanted == "weight" else weight).requires_grad_(False)
    next_token_loss(hidden, weight, labels, chunk).backward()
    assert (hidden.grad is None) == (wanted == "weight")
    assert (weight.grad is None) == (wanted == "hidden")


def test_bfloat16_loses_less_than_its_logits():
    hidden, weight, labels = example(torch.bfloat16, n=64, vocab=200, seq=40)
    got = next_token_loss(hidden, weight, labels)
    assert got.dtype == torch.float32
    exact = plain(hidden.double(), weight.double(), labels)
    assert abs(got.item() - exact.item()) < 2**-8 * exact.item()
    got.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_models_return_the_loss_of_their_logits(kind, tied):
    config = tiny_config(tie_word_embeddings=tied, layer_sharing=True)
    packed = packed_weights(random_weights(config), kind)
    lm = MobileLLM.from_weights(config, packed, kind)
    ids = torch.tensor(random_ids(config, 2, 9))
    labels = ids.clone()
    labels[1, :5] = -100
    got = lm(ids, labels)
    logits = lm(ids)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    parameters = list(lm.parameters())
    assert parameters
    for a, b in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=4e-6)  # float32, in chunks


def test_compiled_losses_are_computed_in_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_cross_entropy", None)  # of the form for transforms
    hidden, weight, labels = example(torch.float32)
    compiled = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight, labels, 5), plain(hidden, weight, labels))


def test_a_model_is_a_function_of_its_parameters():
    torch.manual_seed(0)
    lm = MobileLLM(tiny_config()).double()  # sums in another order are all that differs
    ids = torch.tensor(random_ids(lm.config, 2, 12))
    parameters = {name: p.detach() for name, p in lm.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(lm, parameters, (ids, ids))

    got = torch.func.grad(loss)(parameters)
    lm(ids, ids).backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-14)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 512)
    hidden = torch.randn(4, 513, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(0, 1000, (4, 513))
    with Peak() as chunked:
        next_token_loss(hidden, weight, labels).backward()
    with Peak() as whole:
        plain(hidden, weight, labels).backward()
    assert whole.elements >= 2048 * 1000
    assert chunked.elements <= 512 * 1000


@pytest.mark.parametrize("chunk", [5, 100])
def test_three_products_and_no_more(chunk):
    """As plain autograd: logits, and the gradients of both factors."""
    hidden, weight, labels = example(torch.float32, n=32, vocab=64)
    counts = []
    for loss in (lambda *args: next_token_loss(*args, chunk), plain):
        with FlopCounterMode(display=False) as counter:
            loss(hidden, weight, labels).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 9), r"labels must be \(2, 8\) integers, got \(2, 9\) torch.float32"),
        (torch.zeros(2, 8), r"labels must be \(2, 8\) integers, got \(2, 8\) torch.float32"),
        ([1, 2], r"labels must be \(2, 8\) integers, got \(\) <class 'list'>"),
        (torch.full((2, 8), 97), r"labels must be in \[0, 97\), got 97"),
        (torch.full((2, 8), -1), r"labels must be in \[0, 97\), got -1"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(MobileLLMError, match=message):
        MobileLLM(tiny_config())(torch.zeros(2, 8, dtype=torch.int64), labels)


def test_a_sequence_of_one_predicts_nothing():
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(MobileLLMError, match="labels must have .* at least 2 tokens"):
        MobileLLM(tiny_config())(ids, ids)
