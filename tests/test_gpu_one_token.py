"""Decode attention and the head in CUDA C++: which calls they take, and what a Hopper GPU gives."""

import threading

import attention_bounds as bounds
import gpu_bounds
import pytest
import torch
from gpu_cases import Maker, decode_inputs
from interpreted import DEVICE, HAS_GPU

from mobilellm_fast import ops, reference

pytest.importorskip("triton")

from mobilellm_fast.kernels import gqa_decode, head_sample, weight_rows
from mobilellm_fast.kernels.hopper import cluster_attention, loader, streamed_head

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
RUNS = HAS_GPU and loader.runs_on(torch.device(DEVICE, torch.cuda.current_device()))
on_hopper = pytest.mark.skipif(not RUNS, reason="needs a Hopper GPU and NVRTC")
HALVES = pytest.mark.parametrize("dtype", loader.HALVES, ids=lambda dtype: str(dtype)[6:])
BF16 = torch.bfloat16
LENGTHS = (1, 17, 64, 129, 1000, 2047, 4096, 0, 3333)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv(loader.ONE_TOKEN, "1")


# ---- dispatch ----


@pytest.fixture
def taken(monkeypatch):
    """Notes what CUDA C++ is asked to do, where the GPU is said to be an H100; it does it."""
    calls = []
    for module, name in ((cluster_attention, "decode"), (streamed_head, "choose")):
        monkeypatch.setattr(module, "one_token_on", lambda device: True)
        monkeypatch.setattr(module, name, lambda *args: calls.append(args) or True)
    return calls


def test_clusters_take_decode_attention(taken):
    q, k, v, lengths = decode_inputs(6, 2, 64, 16, (5, 9), BF16)
    out = gqa_decode.gqa_decode(q, k, v, lengths)
    ((*tensors, scale, written),) = taken
    assert all(a is b for a, b in zip(tensors, (q, k, v, lengths), strict=True))
    assert scale == 0.125 and written is out
    gqa_decode.gqa_decode(q, k, v, lengths, scale=-2.0)
    assert taken[1][4] == 2.0 and torch.equal(taken[1][0], -q)


def test_what_clusters_do_not_take_is_left_to_triton(taken, monkeypatch):
    q, k, v, lengths = args = decode_inputs(6, 2, 64, 16, (5, 9), BF16)
    for out in (
        gqa_decode.gqa_decode(*args, cut=gqa_decode.cut_of(64, BF16)),
        gqa_decode.gqa_decode(*args, merge_last=True),
        gqa_decode.gqa_decode(q.float(), k.float(), v.float(), lengths),
    ):
        assert out.isfinite().all()
    assert not taken
    monkeypatch.setattr(cluster_attention, "decode", lambda *args: taken.append(args))
    assert gqa_decode.gqa_decode(*args).isfinite().all() and len(taken) == 1


def test_who_takes_the_head(taken, monkeypatch):
    make = Maker(BF16)
    x, codes = make.normal(1, 256), make.normal(300, 256, spread=0.1)
    head_sample.head_sample(x, codes)
    head_sample.head_sample(x[0], codes, 0.5, 7)
    assert [args[2:4] for args in taken] == [(0.0, 0), (2.0, 7)]
    want = int((x.double() @ codes.double().T).argmax())
    for given in ((make.normal(2, 256), codes), (x, *make.weights("int4_g32", 300, 256))):
        head_sample.head_sample(given[0], given[1], scales=given[2] if len(given) > 2 else None)
    shape = weight_rows.vector_shape(codes, "float", 256)
    assert head_sample.head_sample(x, codes, shape=shape)[0].item() == want
    assert len(taken) == 2
    monkeypatch.setattr(streamed_head, "choose", lambda *args: taken.append(args))
    ids, logprobs = head_sample.head_sample(x, codes)
    assert ids.item() == want and logprobs.isfinite() and len(taken) == 3


def test_without_a_hopper_gpu_triton_takes_everything(taken, monkeypatch):
    for module in (cluster_attention, streamed_head):
        monkeypatch.setattr(module, "one_token_on", lambda device: False)
    assert gqa_decode.gqa_decode(*decode_inputs(6, 2, 64, 16, (5, 9), BF16)).isfinite().all()
    make = Maker(BF16)
    head_sample.head_sample(make.normal(1, 256), make.normal(300, 256))
    assert not taken


# ---- decode attention, on a GPU ----


def captured(work):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        graph.kept = work()
    return graph


@on_hopper
@HALVES
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (25, 5), (8, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("in_one_piece", [True, False])
def test_decode(heads, kv_heads, in_one_piece, dtype, monkeypatch):
    q, k, v, lengths = decode_inputs(heads, kv_heads, 64, 4096, LENGTHS, dtype)
    if not in_one_piece:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    outs = []
    for cluster in (cluster_attention.WIDE, cluster_attention.NARROW) * 2:
        monkeypatch.setattr(cluster_attention, "cluster_of", lambda *_, size=cluster: size)
        out = torch.full_like(q, float("nan"))
        assert cluster_attention.takes(q, k, v, out)
        assert cluster_attention.decode(q, k, v, lengths, 0.125, out)
        outs.append(out)
    assert all(torch.equal(out, outs[0]) for out in outs)
    for i, length in enumerate(LENGTHS):
        one = slice(i, i + 1)
        want = bounds.decode(q[one], k[one], v[one], length, 0.125)
        want.check(f"sequence {i}", outs[0][one])


@on_hopper
def test_a_sequence_is_decoded_alike_in_every_batch_and_cache():
    q, k, v, lengths = decode_inputs(25, 5, 64, 4096, LENGTHS, BF16)
    together = ops.gqa_decode(q, k, v, lengths)
    for i, length in enumerate(LENGTHS):
        one = slice(i, i + 1)
        keys, values = (t[one, :, : max(length, 1)].contiguous() for t in (k, v))
        assert torch.equal(ops.gqa_decode(q[one], keys, values, lengths[one]), together[one])


@on_hopper
def test_decodes_in_graphs_wait_for_queries_and_lengths():
    """Each reads what the one before wrote; lengths grow in between."""
    q, k, v, first = decode_inputs(9, 3, 64, 1024, (900, 70), BF16)
    k, v = k.nan_to_num(), v.nan_to_num()
    buffers, lengths = [q.clone(), torch.empty_like(q)], first.clone()

    def chain(between=lambda: None):
        for i in range(12):
            gqa_decode.gqa_decode(buffers[i % 2], k, v, lengths, out=buffers[1 - i % 2])
            between()
            if i % 3 == 2:
                lengths.add_(37)
        return buffers[0]

    want = chain(torch.cuda.synchronize).clone()
    graph = captured(chain)
    for _ in range(20):
        buffers[0].copy_(q)
        lengths.copy_(first)
        graph.replay()
        assert torch.equal(buffers[0], want)


# ---- the head, on a GPU ----


@on_hopper
@HALVES
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("vocab", "cols"), [(32000, 576), (32001, 1600), (50, 264)], ids=str)
def test_head(vocab, cols, temperature, dtype):
    make = Maker(dtype)
    x, codes = make.normal(1, cols), make.normal(vocab, cols, spread=2 * cols**-0.5)
    assert streamed_head.takes(x, codes)
    ids, logprobs = ops.head_sample(x, codes, temperature, 5)
    for _ in range(3):
        again = ops.head_sample(x, codes, temperature, 5)
        assert torch.equal(again[0], ids) and torch.equal(again[1], logprobs)
    x64, weight = x.double().cpu(), codes.double().cpu()
    logits, bound = x64 @ weight.T, gpu_bounds.product(x64, weight)
    scores, slack = logits, bound
    if temperature:
        noise = reference.gumbel(5, torch.arange(vocab)[None])
        scores = logits / temperature + noise
        slack = bound / temperature + gpu_bounds.gumbel(noise) + 2 * gpu_bounds.U * scores.abs()
    ids, logprobs = ids.cpu(), logprobs.cpu()
    assert scores.max() - scores[0, ids] <= 2 * slack.max()
    want = logits.log_softmax(-1)[0, ids]
    far = 2 * bound.max() + (16 + want.abs()) * gpu_bounds.U + 1e-6 * (vocab > 1000)
    assert (logprobs - want).abs() <= far < 0.1


@on_hopper
def test_heads_in_graphs_and_on_streams_do_not_disturb_each_other():
    make = Maker(BF16)
    codes = make.normal(32000, 576, spread=0.1)
    states = [make.normal(1, 576) for _ in range(4)]
    want = [head_sample.head_sample(x, codes) for x in states]
    graphs = [captured(lambda x=x: head_sample.head_sample(x, codes)) for x in states]
    streams = [torch.cuda.Stream() for _ in states]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for graph, (ids, logprobs) in zip(graphs, want, strict=True):
        assert torch.equal(graph.kept[0], ids) and torch.equal(graph.kept[1], logprobs)


@on_hopper
def test_several_threads_call_both_at_once():
    make = Maker(BF16)
    x, codes = make.normal(1, 1592), make.normal(1000, 1592, spread=0.1)
    args = decode_inputs(7, 1, 64, 1024, (700,), BF16)
    results, start = [None] * 4, threading.Barrier(4)

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            start.wait()
            for _ in range(10):
                results[i] = *ops.head_sample(x, codes), ops.gqa_decode(*args)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
