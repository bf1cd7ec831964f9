"""The products of Hopper's tensor cores on a CPU: from the launcher on, threads in any order."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import compile_kernel

from mobilellm_fast import reference
from mobilellm_fast.kernels.hopper import products

INCLUDE = Path(__file__).parent / "cpp" / "wgmma"
SHARED_NBYTES = 227 << 10
KINDS = {0: 1, 9: 2}  # CUtensorMapDataType -> bytes
BF16 = torch.bfloat16


@pytest.fixture
def emulated(monkeypatch):
    """Launches run on the CPU, by as many clusters, and in the order of the seed, as said here."""
    said = SimpleNamespace(clusters=1, seed=0)

    def encode(place, kind, rank, address, sizes, strides, box, steps, *modes):
        words = [address.value, sizes[1], sizes[0], box[1], box[0], KINDS[kind]]
        assert strides[0] == sizes[0] * KINDS[kind]
        (ctypes.c_uint64 * 6).from_address(place.value)[:] = words
        return 0

    def loaded(source, constants, device, own):
        run = compile_kernel(source, dict(constants), INCLUDE)

        def launch_clusters(arguments, grid, threads, cluster, stream, early):
            assert grid[0] <= 2 * said.clusters and (threads, cluster) == (384, 2)
            run(arguments, grid[0], said.seed, SHARED_NBYTES)

        return SimpleNamespace(launch_clusters=launch_clusters)

    monkeypatch.setattr(products, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    monkeypatch.setattr(products, "loaded", loaded)
    monkeypatch.setattr(products, "_clusters", lambda device: said.clusters)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for cached in (products._arguments, products.tensor_map):
        cached.cache_clear()
    yield said
    for cached in (products._arguments, products.tensor_map):
        cached.cache_clear()


# rows, outputs, cols: less than a tile; several tiles of a cluster, and more steps than stages
@pytest.mark.parametrize("sizes", [(70, 40, 144), (300, 408, 48), (140, 208, 720)], ids=str)
@pytest.mark.parametrize("clusters, seed", [(1, 0), (1, 1), (2, 2)])
def test_int8_gemm(sizes, clusters, seed, emulated):
    emulated.clusters, emulated.seed = clusters, seed
    rows, outputs, cols = sizes
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randint(-127, 128, (n, cols), generator=generator, dtype=torch.int8)
        for n in (rows, outputs)
    )
    x_scales, weight_scales = (torch.rand(n, generator=generator) for n in (rows, outputs))
    out = torch.full((rows, outputs), torch.nan, dtype=BF16)
    assert products.int8_gemm(x, x_scales, weight, weight_scales, out)
    want = reference.int8_gemm(x, x_scales, weight, weight_scales, dtype=BF16)
    assert torch.equal(out, want)


@pytest.mark.parametrize("sizes", [(70, 40, 72), (300, 136, 24), (140, 72, 360)], ids=str)
@pytest.mark.parametrize("clusters, seed", [(1, 0), (1, 1), (2, 2)])
def test_swiglu(sizes, clusters, seed, emulated):
    emulated.clusters, emulated.seed = clusters, seed
    rows, inner, cols = sizes
    generator = torch.Generator().manual_seed(seed)
    x, gate, up = (
        torch.randn(n, cols, generator=generator).to(BF16) * spread
        for n, spread in ((rows, 1), (inner, cols**-0.5), (inner, cols**-0.5))
    )
    out = torch.full((rows, inner), torch.nan, dtype=BF16)
    assert products.swiglu(x, gate, up, out)
    want = reference.swiglu(*(t.double() for t in (x, gate, up)))
    assert ((out.double() - want).abs() <= 2**-8 * want.abs() + 1e-5).all()
