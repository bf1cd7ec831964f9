"""The attention kernels for GPUs: on one, if there is one, else interpreted on the CPU."""

import functools
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attention_bounds as bounds
import pytest
import torch
from gpu_cases import decode_inputs
from interpreted import DEVICE, HAS_GPU
from torch.library import opcheck

from mobilellm_fast import ops, reference
from mobilellm_fast.errors import MobileLLMError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]
only_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

HALF = torch.bfloat16 if HAS_GPU else torch.float16  # bfloat16 is not interpreted
ALL = (torch.float32, torch.float16, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16)
CASES = [  # seq, kv_seq, heads, kv_heads, head_dim
    (9, 9, 6, 2, 64),
    (40, 100, 6, 2, 64),
    (1, 1, 3, 1, 64),
    (7, 20, 3, 1, 6),
    (33, 33, 5, 1, 80),
    (65, 65, 2, 2, 34),
    (2, 64, 5, 1, 128),
]
LONG_CASES = [  # whole tiles, and one more; for a GPU
    (128, 128, 9, 3, 64),
    (129, 300, 15, 5, 64),
    (384, 384, 20, 5, 64),
    (500, 1000, 25, 5, 64),
    (513, 513, 8, 2, 128),
    (200, 333, 6, 6, 96),
]
DECODE_CASES = [  # heads, kv_heads, head_dim, capacity, lengths
    (9, 3, 64, 70, (70, 1, 17)),
    (5, 5, 64, 40, (0, 33)),
    (25, 5, 64, 150, (129,)),
    (20, 5, 80, 17, (17, 16)),
    (4, 1, 6, 33, (99, 32)),  # beyond the capacity
    (17, 1, 128, 20, (19,)),
]
LONG_DECODE_CASES = [
    (9, 3, 64, 4096, (4096, 1000, 128, 129)),
    (15, 5, 64, 8192, (8192, 4097)),
    (20, 5, 64, 2048, tuple(range(7, 2048, 32))),
    (25, 5, 64, 1024, (1024,)),
    (32, 8, 128, 3000, (2999, 3000)),
]


def each(cases, long_cases):
    """List (case, dtype): all dtypes for few, since each kernel is compiled anew for each."""
    cases = cases + long_cases if HAS_GPU else cases
    first = 1 if HAS_GPU else 2
    few = [(case, dtype) for case in cases[:first] for dtype in ALL]
    rest = [(case, HALF) for case in cases[first:]]
    rest += [] if HAS_GPU else [(case, torch.float32) for case in cases[first:]]
    return few + rest


ATTENTION, DECODE = each(CASES, LONG_CASES), each(DECODE_CASES, LONG_DECODE_CASES)
EACH_ATTENTION = pytest.mark.parametrize(("case", "dtype"), ATTENTION, ids=str)
EACH_DECODE = pytest.mark.parametrize(("case", "dtype"), DECODE, ids=str)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """On a GPU, compile what the tests launch, many kernels at a time, unless xdist does so."""
    if not HAS_GPU or "PYTEST_XDIST_WORKER" in os.environ:
        return
    calls = [functools.partial(attend, *run, tile) for run in ATTENTION for tile in tiles(*run)]
    calls += [functools.partial(differentiate, *run) for run in ATTENTION]
    calls += [functools.partial(decode, *run, *way) for run in DECODE for way in ways(*run)]
    compile_together(calls)


def compile_together(calls):
    """Make calls side by side, so that their kernels are compiled at the same time."""
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()
    torch.cuda.synchronize()


def inputs(seq, kv_seq, heads, kv_heads, head_dim, dtype, batch=None, seed=0):
    """Return q, k, v and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch or (2 if HAS_GPU or seq < 20 else 1)  # interpreting takes its time
    shapes = ((seq, heads), (kv_seq, kv_heads), (kv_seq, kv_heads), (seq, heads))
    made = (torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes)
    return tuple(t.to(dtype).to(DEVICE) for t in made)


def tiles(case, dtype):
    """Tiles to try: small ones, so that a short sequence has several, and those of a GPU."""
    from mobilellm_fast.kernels.gqa_attention import Tile, backend_of, tile_of

    if not HAS_GPU:
        return [Tile(32, 16, 4, 2, descriptors=dtype == torch.float16)]
    several = [Tile(64, 128, 4, 2), Tile(128, 64, 8, 3, True)]
    wanted = case in CASES[:2] and dtype != torch.float32
    usual = tile_of("forward", case[-1], dtype, backend_of(torch.device(DEVICE)))
    return [usual, *(several if wanted else [])]


def attend(case, dtype, tile):
    from mobilellm_fast.kernels.gqa_attention import forward

    q, k, v, _ = inputs(*case, dtype)
    return forward(q, k, v, case[-1] ** -0.5, tile)[0]


def differentiate(case, dtype):
    from mobilellm_fast.kernels.gqa_attention import Tile, backward, forward

    q, k, v, grad = inputs(*case, dtype)
    scale = case[-1] ** -0.5
    small = None if HAS_GPU else (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1))
    out, lse = forward(q, k, v, scale)
    return out, *backward(grad, q, k, v, out, lse, scale, small)


@EACH_ATTENTION
def test_forward(case, dtype):
    q, k, v, _ = inputs(*case, dtype)
    want = bounds.forward(q, k, v, case[-1] ** -0.5)
    for tile in tiles(case, dtype):
        want.check("out", attend(case, dtype, tile))


@EACH_ATTENTION
def test_backward(case, dtype):
    out, *found = differentiate(case, dtype)
    q, k, v, grad = inputs(*case, dtype)
    want = bounds.backward(grad, q, k, v, out, case[-1] ** -0.5)
    for name, expected, got in zip(("dq", "dk", "dv"), want, found, strict=True):
        expected.check(name, got)
    if HAS_GPU:
        again = differentiate(case, dtype)
        assert all(torch.equal(a, b) for a, b in zip((out, *found), again, strict=True))


def test_log_sum_exp():
    from mobilellm_fast.kernels.gqa_attention import forward

    q, k, v, _ = inputs(5, 12, 6, 2, 64, torch.float32)
    _, lse = forward(q, k, v, 0.3)
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(3, 2)).double() * 0.3
    visible = torch.ones(5, 12, dtype=torch.bool, device=DEVICE).tril(7)
    want = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_scales(scale):
    from mobilellm_fast.kernels.gqa_attention import backward, forward

    q, k, v, grad = inputs(9, 21, 4, 2, 16, torch.float32, batch=1)
    out, lse = forward(q, k, v, scale)
    bounds.forward(q, k, v, scale).check("out", out)
    want = bounds.backward(grad, q, k, v, out, scale)
    found = backward(grad, q, k, v, out, lse, scale)
    for name, expected, got in zip(("dq", "dk", "dv"), want, found, strict=True):
        expected.check(name, got)


@pytest.mark.parametrize("descriptors", [False, True])
def test_strides_do_not_matter(descriptors):
    from mobilellm_fast.kernels.gqa_attention import Tile, backward, forward

    tile = Tile(16, 16, 4, 1, descriptors)
    args = inputs(9, 21, 4, 2, 16, torch.float16)
    strided = [
        args[0].transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([args[1], args[1]], -1)[..., 16:],
        args[2].repeat_interleave(2, -1)[..., ::2],
        args[3][:, :, :1].expand_as(args[3]),
    ]
    whole = [t.contiguous() for t in strided]
    results = []
    for q, k, v, grad in (strided, whole):
        out, lse = forward(q, k, v, 0.25, tile)
        results.append((out, *backward(grad, q, k, v, out, lse, 0.25)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_no_tokens():
    from mobilellm_fast.kernels.gqa_attention import backward, forward

    q, k, v, grad = inputs(0, 4, 4, 2, 16, torch.float32)
    out, lse = forward(q, k, v, 0.25)
    assert out.shape == q.shape and lse.shape == (2, 4, 0)
    dq, dk, dv = backward(grad, q, k, v, out, lse, 0.25)
    assert dq.shape == q.shape and not dk.any() and not dv.any()


def test_what_is_not_a_number_stays_in_its_sequence_and_in_its_future():
    from mobilellm_fast.kernels.gqa_attention import forward

    q, k, v, _ = inputs(20, 20, 3, 1, 16, torch.float32, batch=2)
    clean, _ = forward(q, k, v, 0.25)
    k[0, 15] = float("nan")
    out, _ = forward(q, k, v, 0.25)
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, :15], clean[0, :15])
    assert out[0, 15:].isnan().all()


@only_gpu
@pytest.mark.parametrize("kv_seq", [2048, 8192])
def test_long_sequences(kv_seq):
    from mobilellm_fast.kernels.gqa_attention import forward

    q, k, v, _ = inputs(kv_seq, kv_seq, 9, 3, 64, torch.bfloat16, batch=1)
    out, _ = forward(q, k, v, 0.125)
    # the last rows see everything; their references are small
    for start in (0, kv_seq // 2 - 20, kv_seq - 20):
        stop = start + 20
        want = bounds.forward(q[:, start:stop], k[:, :stop], v[:, :stop], 0.125)
        want.check(f"rows from {start}", out[:, start:stop])
    assert torch.equal(out, forward(q, k, v, 0.125)[0])


@only_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_accurate_as_torch(dtype):
    """Errors of the result and of the gradients beside those of torch's fused kernel."""
    args = inputs(700, 700, 15, 5, 64, dtype)
    *leaves, grad = args
    wide = [t.double().requires_grad_() for t in leaves]
    exact = reference.gqa_attention(*wide)
    exact = [exact, *torch.autograd.grad(exact, wide, grad.double())]

    def errors(attend):
        inner = [t.clone().requires_grad_() for t in leaves]
        out = attend(*inner)
        found = [out, *torch.autograd.grad(out, inner, grad)]
        return [
            ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)
        ]

    ours, torchs = errors(ops.gqa_attention), errors(ops._fused_attention)
    print(f"\n{dtype}: relative errors of out, dq, dk, dv: {ours}, of torch's {torchs}")
    for mine, its in zip(ours, torchs, strict=True):
        assert mine <= 1.05 * its


@only_gpu
def test_specialized_kernel():
    """In a process of its own: warps that wait for each other in vain would never end."""
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper")
    code = f"import {__name__}; {__name__}.check_specialized()"
    command = [sys.executable, "-c", code]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


def check_specialized():
    from mobilellm_fast.kernels.gqa_attention import Tile, forward

    def tiles_of(case):
        keys = 128 if case[-1] == 64 else 64
        return Tile(128, keys, 8, 2, True, True), Tile(192, keys, 8, 3, True, True)

    plain = Tile(128, 64, 8, 2)
    cases = [*CASES[:3], CASES[6], *LONG_CASES[:5]]
    runs = [(case, torch.bfloat16) for case in cases] + [(CASES[1], torch.float16)]
    compile_together(
        functools.partial(attend, *run, tile) for run in runs for tile in (*tiles_of(run[0]), plain)
    )
    for case, dtype in runs:
        q, k, v, _ = inputs(*case, dtype)
        want = bounds.forward(q, k, v, case[-1] ** -0.5)
        for tile in tiles_of(case):
            out, lse = forward(q, k, v, case[-1] ** -0.5, tile)
            want.check(f"{case} {tile}: out", out)
            other = forward(q, k, v, case[-1] ** -0.5, plain)[1]
            torch.testing.assert_close(lse, other, rtol=1e-5, atol=1e-5)
            for _ in range(20):  # whoever comes first
                assert torch.equal(out, forward(q, k, v, case[-1] ** -0.5, tile)[0])


@only_gpu
def test_training_runs_the_kernels():
    q, k, v, grad = inputs(100, 100, 9, 3, 64, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = ops.gqa_attention(q, k, v)
    assert len(out.grad_fn.saved_tensors) > len(leaves)  # what the backward kernel wants
    found = torch.autograd.grad(out, leaves, grad)
    want = bounds.backward(grad, *(t.detach() for t in (q, k, v, out)), 0.125)
    for name, expected, got in zip(("dq", "dk", "dv"), want, found, strict=True):
        expected.check(name, got)


# --- decode ------------------------------------------------------------------------------------


def ways(case, dtype):
    """(cut, who merges) to try; one cut has several tiles per span."""
    from mobilellm_fast.kernels.gqa_decode import Cut, cut_of

    several, usual = Cut(16, 4, 4, 2), cut_of(case[2], dtype)
    if case == DECODE_CASES[2]:  # more spans than are merged at a time
        return [(usual, True), (Cut(16, 16, 4, 1), True)]
    if case not in DECODE_CASES[:2]:
        return [(usual, True)] if HAS_GPU else [(usual, True), (several, False)]
    return [(usual, True), (several, True), (several, False)]


def decode(case, dtype, cut, merge_last):
    from mobilellm_fast.kernels.gqa_decode import gqa_decode

    args = decode_inputs(*case, dtype)
    out = torch.full_like(args[0], float("nan"))
    assert gqa_decode(*args, out=out, cut=cut, merge_last=merge_last) is out
    return out


@EACH_DECODE
def test_decode(case, dtype):
    _, _, head_dim, capacity, lengths = case
    q, k, v, _ = decode_inputs(*case, dtype)
    results = {}
    for cut, merge_last in ways(case, dtype):
        out = decode(case, dtype, cut, merge_last)
        for i, length in enumerate(lengths):
            one = slice(i, i + 1)
            want = bounds.decode(q[one], k[one], v[one], min(length, capacity), head_dim**-0.5)
            want.check(f"sequence {i}", out[one])
        if HAS_GPU:
            assert torch.equal(out, decode(case, dtype, cut, merge_last)), "not the same twice"
        assert torch.equal(out, results.setdefault(cut, out)), "who merges changed the result"


def test_a_sequence_is_decoded_alike_in_every_batch_and_cache():
    from mobilellm_fast.kernels.gqa_decode import gqa_decode

    q, k, v, lengths = decode_inputs(6, 2, 64, 300, (300, 17, 130), torch.float16)
    together = gqa_decode(q, k, v, lengths)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone = gqa_decode(
            q[one], k[one, :, :length], v[one, :, :length].contiguous(), lengths[one]
        )
        assert torch.equal(alone, together[one])


def test_decode_strides_do_not_matter():
    from mobilellm_fast.kernels.gqa_decode import gqa_decode

    q, k, v, lengths = decode_inputs(6, 2, 16, 40, (40, 9), torch.float32)
    strided = [
        torch.cat([q, q], -1)[..., 16:],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v.repeat_interleave(2, -1)[..., ::2],
    ]
    out = torch.empty(2, 12, 16, device=DEVICE)[:, ::2]
    gqa_decode(*strided, lengths, out=out)
    assert torch.equal(out, gqa_decode(q, k, v, lengths))


@only_gpu
def test_a_captured_decode_serves_every_length():
    from mobilellm_fast.kernels.gqa_decode import gqa_decode

    args = decode_inputs(15, 5, 64, 2048, (2048, 2048), torch.bfloat16)
    q, k, v, lengths = args
    gqa_decode(*args)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(gqa_decode(*args))
    streams = [torch.cuda.Stream() for _ in graphs]
    for length in (1, 127, 128, 129, 1000, 2048, 3, 0):
        lengths.fill_(length)
        want = gqa_decode(*args)
        torch.cuda.synchronize()
        for _ in range(20):  # at the same time, with counters of their own
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for out in outs:
            assert torch.equal(out, want)
        for i in range(2):
            exact = bounds.decode(q[i : i + 1], k[i : i + 1], v[i : i + 1], length, 0.125)
            exact.check(f"length {length}", want[i : i + 1])


@only_gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_decodes_that_are_set_up_early_wait_for_what_they_read(captured):
    """Each reads what the one before wrote, and what the one before that also used."""
    from mobilellm_fast.kernels.gqa_decode import gqa_decode

    q, k, v, lengths = decode_inputs(9, 3, 64, 1024, (1024, 70), torch.bfloat16)
    want = q
    for _ in range(20):
        want = gqa_decode(want, k, v, lengths)
        torch.cuda.synchronize()
    buffers = [torch.full_like(q, float("nan")) for _ in range(2)]

    def chain():
        gqa_decode(q, k, v, lengths, out=buffers[0])
        for i in range(19):
            gqa_decode(buffers[i % 2], k, v, lengths, out=buffers[1 - i % 2])

    replay = chain
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        replay = graph.replay
    for _ in range(20):
        buffers[0].fill_(float("nan"))
        replay()
        assert torch.equal(buffers[1], want)


def test_op_decodes():
    args = decode_inputs(6, 2, 16, 40, (40, 9, 0, 50), torch.float32)
    out = ops.gqa_decode(*args)
    for i, length in enumerate((40, 9, 0, 40)):
        q, k, v = (t[i : i + 1] for t in args[:3])
        bounds.decode(q, k, v, length, 0.25).check(f"sequence {i}", out[i : i + 1])
    opcheck(torch.ops.mobilellm_fast.gqa_decode.default, args)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[0], "q must have shape (batch, heads, head_dim), got (6, 16)"),
        (1, lambda t: t[:, :, :, :8], "k_cache must have shape (2, kv_heads, capacity, 16)"),
        (1, lambda t: t.double(), "k_cache must be float32, got float64"),
        (2, lambda t: t[:, :, :9], "v_cache must have shape (2, 2, 40, 16), got (2, 2, 9, 16)"),
        (3, lambda t: t.long(), "lengths must be int32, got int64"),
        (3, lambda t: t[:1], "lengths must have shape (2,), got (1,)"),
        (0, lambda t: t[:, :5], "k_cache must have a divisor of 5 heads, got 2"),
    ],
)
def test_op_names_what_is_wrong(place, change, message):
    args = list(decode_inputs(6, 2, 16, 40, (40, 9), torch.float32))
    args[place] = change(args[place])
    with pytest.raises(MobileLLMError) as error:
        ops.gqa_decode(*args)
    assert str(error.value).startswith(f"[gqa_decode] {message}")
