"""Decode attention and the head in CUDA C++ on a CPU: from the launcher on, in any order."""

import math
from pathlib import Path
from types import SimpleNamespace

import attention_bounds as bounds
import gpu_bounds
import pytest
import torch
from emulated_cuda import compile_kernel

from mobilellm_fast import reference
from mobilellm_fast.kernels.hopper import cluster_attention, streamed_head

INCLUDE = Path(__file__).parent / "cpp" / "one_token"
SHARED_NBYTES = 227 << 10
BF16 = torch.bfloat16
CACHE_LENGTH = 4200


@pytest.fixture
def emulated(monkeypatch):
    """Launches run on the CPU, as on a GPU of so many multiprocessors, in the order of the seed."""
    said = SimpleNamespace(processors=132, seed=0, grids=[])
    counter = torch.zeros(1, dtype=torch.int32)

    def loaded(source, constants, device):
        def launch_clusters(arguments, grid, threads, cluster, stream):
            said.grids.append(grid)
            sizes = dict(constants) | {"KV_HEADS": grid[1]}
            assert threads == sizes["THREADS"] and cluster == sizes.get("CLUSTER", 1)
            run = compile_kernel(source, sizes, INCLUDE)
            run(arguments, math.prod(grid), said.seed, SHARED_NBYTES)

        return SimpleNamespace(launch_clusters=launch_clusters)

    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for module in (cluster_attention, streamed_head):
        monkeypatch.setattr(module, "loaded", loaded)
        monkeypatch.setattr(module, "one_token_on", lambda device: True)
        monkeypatch.setattr(module, "multiprocessors", lambda device: said.processors)
    monkeypatch.setattr(streamed_head, "counters_of", lambda device, count: counter)
    yield said
    assert counter.item() == 0, "the next launch finds no zero"


def decode_inputs(heads, kv_heads, lengths, in_one_piece=True):
    generator = torch.Generator().manual_seed(heads)
    shape = len(lengths), kv_heads, CACHE_LENGTH, 64
    if not in_one_piece:
        shape = len(lengths), CACHE_LENGTH, kv_heads, 64
    qkv = torch.randn(len(lengths), heads + 2 * kv_heads, 64, generator=generator).to(BF16)
    q = qkv[:, :heads]
    caches = [torch.randn(shape, generator=generator).to(BF16) for _ in range(2)]
    if not in_one_piece:
        caches = [cache.transpose(1, 2) for cache in caches]
    for cache in caches:
        for i, length in enumerate(lengths):
            cache[i, :, max(length, 0) :] = float("nan")
    return (q, *caches, torch.tensor(lengths, dtype=torch.int32))


def decode(q, k, v, lengths):
    out = torch.full((*q.shape[:2], 72), float("nan"), dtype=BF16)[..., :64]
    assert cluster_attention.takes(q, k, v, out)
    assert cluster_attention.decode(q, k, v, lengths, 0.125, out)
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "lengths", "in_one_piece"),
    [
        # a key, a tile and a bit, parts of one tile all full, one more key
        (3, 1, (1, 17, 1024, 1025), True),
        (10, 2, (0, 300), False),
        (8, 1, (-1, 513), True),
        # of a part three steps, the last of one tile; two steps, the last part of which is short
        (2, 1, (2 * CACHE_LENGTH,), True),
        (1, 1, (2100,), False),
    ],
    ids=str,
)
def test_decode(heads, kv_heads, lengths, in_one_piece, emulated):
    q, k, v, all_lengths = decode_inputs(heads, kv_heads, lengths, in_one_piece)
    outs = []
    # clusters of 16, then of 8
    for emulated.processors, emulated.seed in ((132, 1), (0, 2)):
        outs.append(decode(q, k, v, all_lengths))
    assert [grid[0] for grid in emulated.grids] == [16, 8]
    assert torch.equal(*outs), "bits depend on the size of clusters"
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        length = min(max(length, 0), CACHE_LENGTH)
        want = bounds.decode(q[one], k[one], v[one], length, 0.125)
        want.check(f"sequence {i}", outs[0][one])


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_a_sequence_is_decoded_alike_in_every_order(in_one_piece, emulated):
    q, k, v, lengths = decode_inputs(3, 1, (700,), in_one_piece)
    outs = []
    for emulated.seed in range(4):
        outs.append(decode(q, k, v, lengths))
    assert all(torch.equal(out, outs[0]) for out in outs)


def choose(x, codes, temperature=0.0, seed=0):
    ids, logprobs = torch.full((1,), -1), torch.full((1,), float("nan"))
    assert streamed_head.takes(x, codes)
    inverse = 1 / temperature if temperature else 0.0
    assert streamed_head.choose(x, codes, inverse, seed, ids, logprobs)
    return ids, logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("vocab", "cols", "programs"),
    [(1000, 576, 2), (1201, 256, 1), (40, 1600, 2), (2, 256, 3)],
    ids=str,
)
def test_head(vocab, cols, programs, temperature, emulated):
    emulated.processors, emulated.seed = programs, vocab
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(1, cols, generator=generator).to(BF16)
    codes = (torch.randn(vocab, cols, generator=generator) * 3 * cols**-0.5).to(BF16)
    seed = 5 + (7 << 40)
    ids, logprobs = choose(x, codes, temperature, seed)
    logits = x.double() @ codes.double().T
    bound = gpu_bounds.product(x.double(), codes.double())
    scores, slack = logits, bound
    if temperature:
        noise = reference.gumbel(seed, torch.arange(vocab)[None])
        scores = logits / temperature + noise
        slack = bound / temperature + gpu_bounds.gumbel(noise) + 2 * gpu_bounds.U * scores.abs()
    assert scores.max() - scores[0, ids] <= 2 * slack.max()
    want = logits.log_softmax(-1)[0, ids]
    far = 2 * bound.max() + (16 + want.abs()) * gpu_bounds.U + 1e-6 * (vocab > 1000)
    assert (logprobs - want).abs() <= far < 0.1


def test_of_equal_logits_the_first_is_taken(emulated):
    emulated.processors = 3
    x = torch.ones(1, 256, dtype=BF16)
    codes = torch.zeros(300, 256, dtype=BF16)
    codes[[70, 71, 150, 299]] = 1
    ids, logprobs = choose(x, codes)
    assert ids.item() == 70 and abs(logprobs.item() + math.log(4)) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_some_row_and_nan(value, temperature, emulated):
    emulated.processors = 2
    x = torch.ones(1, 256, dtype=BF16)
    codes = torch.full((50, 256), value if value < 0 else 0.0, dtype=BF16)
    codes[20:, 0] = value
    ids, logprobs = choose(x, codes, temperature)
    assert 0 <= ids.item() < 50 and logprobs.isnan()
