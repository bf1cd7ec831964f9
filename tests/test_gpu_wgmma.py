"""Products by clusters in CUDA C++: which calls they take, and on a Hopper GPU, what comes out."""

import threading

import gpu_bounds
import pytest
import torch
from gpu_bounds import assert_within
from gpu_cases import Maker
from interpreted import DEVICE, HAS_GPU

from mobilellm_fast import ops, reference

pytest.importorskip("triton")

from mobilellm_fast.kernels import int8_gemm, swiglu, tiles
from mobilellm_fast.kernels.hopper import products

RUNS = HAS_GPU and products.runs_on(torch.device(DEVICE, torch.cuda.current_device()))
on_hopper = pytest.mark.skipif(not RUNS, reason="needs a Hopper GPU and NVRTC")
HALVES = pytest.mark.parametrize("dtype", products.HALVES, ids=lambda dtype: str(dtype)[6:])
# rows, outputs, cols: less than a tile, a bit more than tiles, no multiple of anything but 16
ODD = [(1, 16, 16), (80, 464, 1600), (208, 208, 304), (257, 200, 144), (1300, 1000, 1168)]
MANY = [(1024, 3072, 1152), (2048, 4352, 1600)]  # of which int8_gemm takes clusters
LONG = (8192, 4352, 1600)  # of which swiglu does
BF16 = torch.bfloat16


def name_of(value):
    """The name of a case: options by their keys, as values print differently in each process."""
    return ",".join(value) or "plain" if isinstance(value, dict) else str(value)


# ---- dispatch ----


@pytest.fixture
def taken(monkeypatch):
    """Notes who is called, where the GPU is said to be an H100; nothing is computed."""
    calls = []

    def note(name, result):
        return lambda *args: calls.append(name) or result

    class NotingKernel:
        def __getitem__(self, grid):
            return lambda *args, **options: calls.append("triton")

    monkeypatch.setattr(products, "runs_on", lambda device: True)
    monkeypatch.setattr(tiles, "_has_copy_engine", lambda device: True)
    for module, name in ((int8_gemm, "int8_gemm"), (swiglu, "swiglu")):
        monkeypatch.setattr(module, "processors", lambda device: 132)
        monkeypatch.setattr(products, name, note("clusters", True))
        module._by_clusters.cache_clear()
    monkeypatch.setattr(int8_gemm, "_int8_gemm", NotingKernel())
    monkeypatch.setattr(swiglu, "_launch_of", lambda *args: note("triton", None))
    yield calls
    int8_gemm._by_clusters.cache_clear()
    swiglu._by_clusters.cache_clear()


def multiply(rows, outputs, cols, scales_from=0, **options):
    codes = torch.empty(rows, cols, dtype=torch.int8, device=DEVICE)
    weight = torch.empty(outputs, cols, dtype=torch.int8, device=DEVICE)
    scales = torch.empty(outputs + scales_from, device=DEVICE)[scales_from:]
    return int8_gemm.int8_gemm(codes, codes[:, 0].float(), weight, scales, **options)


@pytest.mark.parametrize(
    ("sizes", "options", "who"),
    [
        *((sizes, {}, "clusters") for sizes in MANY),
        ((4096, 1600, 4352), {}, "clusters"),
        ((1024, 3072, 1152), {"dtype": torch.float16}, "clusters"),
        ((256, 3072, 1152), {}, "triton"),
        ((2048, 1600, 1152), {}, "triton"),  # of 2 rounds of tiles the second would be short
        ((1024, 3076, 1152), {}, "triton"),  # rows of the result are not aligned
        ((1024, 3072, 1144), {}, "triton"),
        ((1024, 3072, 1152), {"bias": torch.empty(3072, device=DEVICE)}, "triton"),
        ((1024, 3072, 1152), {"tiling": int8_gemm.SMALL}, "triton"),
    ],
    ids=name_of,
)
def test_who_takes_int8_gemm(sizes, options, who, taken):
    out = multiply(*sizes, **options)
    assert taken == [who]
    assert out.shape == sizes[:2] and out.dtype == options.get("dtype", BF16)


def test_what_clusters_refuse_is_left_to_triton(taken, monkeypatch):
    monkeypatch.setattr(products, "int8_gemm", lambda *args: False)
    multiply(*MANY[0])
    assert taken == ["triton"]


def gate(rows, inner, cols, dtype=BF16, launcher=swiglu.swiglu, **options):
    weights = torch.empty(2, inner, cols, dtype=dtype, device=DEVICE)
    return launcher(torch.empty(rows, cols, dtype=dtype, device=DEVICE), *weights, **options)


@pytest.mark.parametrize(
    ("sizes", "options", "who"),
    [
        ((8192, 4352, 64), {}, "clusters"),
        ((2048, 1536, 576), {}, "triton"),  # where they were slower
        ((8192, 4356, 64), {}, "triton"),
        ((8192, 4352, 60), {}, "triton"),
        ((8192, 4352, 64), {"tiling": swiglu.LARGE}, "triton"),
        ((8192, 4352, 64), {"launcher": swiglu.swiglu_saving}, "triton"),
    ],
    ids=name_of,
)
def test_who_takes_swiglu(sizes, options, who, taken):
    gate(*sizes, **options)
    assert taken == [who]


def test_without_a_hopper_gpu_triton_takes_everything(taken, monkeypatch):
    monkeypatch.setattr(products, "runs_on", lambda device: False)
    multiply(*MANY[0])
    gate(8192, 4352, 64)
    assert taken == ["triton", "triton"]


def test_a_cpu_does_not_run_them():
    assert not products.runs_on(torch.device("cpu"))


# ---- results ----


def int8_args(rows, outputs, cols):
    make = Maker(torch.float32)
    scales = (make.normal(n, dtype=torch.float32).abs() / 100 for n in (rows, outputs))
    x_scales, weight_scales = scales
    return make.codes(rows, cols), x_scales, make.codes(outputs, cols), weight_scales


def swiglu_args(dtype, rows, inner, cols):
    make = Maker(dtype)
    weights = (make.normal(inner, cols, spread=2 * cols**-0.5) for _ in range(2))
    return make.normal(rows, cols), *weights


def by_clusters(function, args, outputs, dtype):
    out = torch.empty(len(args[0]), outputs, dtype=dtype, device=DEVICE)
    assert function(*args, out)
    return out


@pytest.mark.gpu
@on_hopper
@HALVES
@pytest.mark.parametrize("sizes", [*ODD, *MANY], ids=str)
def test_int8_gemm_has_the_bits_of_tritons(sizes, dtype, poisoned):
    args = int8_args(*sizes)
    want = int8_gemm.int8_gemm(*args, dtype=dtype, tiling=int8_gemm.SMALL)
    for _ in range(3):
        got = by_clusters(products.int8_gemm, args, sizes[1], dtype)
        assert torch.equal(got, want)
    if sizes in ODD:
        reference_args = [t.cpu() for t in args]
        assert torch.equal(got.cpu(), reference.int8_gemm(*reference_args, dtype=dtype))


@pytest.mark.gpu
@on_hopper
@HALVES
@pytest.mark.parametrize("sizes", [*ODD, (2048, 1536, 576)], ids=str)
def test_swiglu_is_the_reference(sizes, dtype, poisoned):
    args = swiglu_args(dtype, *sizes)
    got = by_clusters(products.swiglu, args, sizes[1], dtype)
    exact = [t.double().cpu() for t in args]
    assert_within(got, reference.swiglu(*exact), gpu_bounds.swiglu(*exact), dtype)
    for _ in range(3):
        assert torch.equal(by_clusters(products.swiglu, args, sizes[1], dtype), got)


@pytest.mark.gpu
@on_hopper
@HALVES
def test_swiglu_is_near_tritons(dtype, poisoned):
    args = swiglu_args(dtype, *LONG)
    got, want = swiglu.swiglu(*args), swiglu.swiglu(*args, tiling=swiglu.LARGE)
    assert torch.equal(got, by_clusters(products.swiglu, args, LONG[1], dtype)), "not by clusters"
    assert (got.float() - want.float()).norm() <= 2**-8 * want.float().norm()


@pytest.mark.gpu
@on_hopper
def test_large_gates_do_not_overflow():
    x = torch.full((128, 16), 100.0, dtype=BF16, device=DEVICE)
    x[1::2] *= -1
    weights = torch.full((2, 128, 16), 1e17, dtype=BF16, device=DEVICE)
    got = by_clusters(products.swiglu, (x, *weights), 128, BF16)
    assert got[::2].isinf().all() and (got[1::2] == 0).all()


@pytest.mark.gpu
@on_hopper
def test_ops_are_captured_in_graphs_and_see_new_inputs():
    args = int8_args(*MANY[0])
    ops.int8_gemm(*args, None, BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # each scales by what the one before wrote, though it is set up before that one ends
        scales = args[1]
        for _ in range(5):
            captured = ops.int8_gemm(args[0], scales, *args[2:], None, BF16)
            scales = captured[:, 0].float() * 1e-3
    for seed in (1, 2):
        args[0].copy_(Maker(torch.float32, seed).codes(*args[0].shape))
        graph.replay()
        scales = args[1]
        for _ in range(5):
            want = int8_gemm.int8_gemm(args[0], scales, *args[2:], tiling=int8_gemm.SMALL)
            scales = want[:, 0].float() * 1e-3
        assert torch.equal(captured, want)


@pytest.mark.gpu
@on_hopper
def test_threads_with_streams_of_their_own():
    args = int8_args(*MANY[0])
    want = int8_gemm.int8_gemm(*args, tiling=int8_gemm.SMALL)
    torch.cuda.synchronize()
    same = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [ops.int8_gemm(*args, None, BF16) for _ in range(20)]
            same.append(all(torch.equal(g, want) for g in got))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4


@pytest.mark.gpu
@on_hopper
def test_a_thread_that_has_not_used_the_gpu():
    """torch has made no context its own, as nothing is allocated there."""
    args = int8_args(208, 208, 304)
    outs = [torch.full((208, 208), torch.nan, dtype=BF16, device=DEVICE) for _ in range(2)]
    assert products.int8_gemm(*args, outs[0])
    taken = []
    thread = threading.Thread(target=lambda: taken.append(products.int8_gemm(*args, outs[1])))
    thread.start()
    thread.join()
    assert taken == [True] and torch.equal(*outs)


@pytest.mark.gpu
@on_hopper
def test_compiled_ops_take_clusters():
    args = int8_args(*MANY[0])
    compiled = torch.compile(lambda *args: ops.int8_gemm(*args, None, BF16) + 1)
    assert torch.equal(compiled(*args), ops.int8_gemm(*args, None, BF16) + 1)
