"""The products of Hopper's tensor cores in CUDA C++, compiled by NVRTC, and launched by a stand-in.

No GPU is needed; `test_gpu_wgmma.py` runs them.
"""

import ctypes
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")
pytest.importorskip("triton")

from cuda.bindings import driver
from machine_code import MachineCode

from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.kernels import cuda_source
from mobilellm_fast.kernels.cuda_source import Kernel, compile_source
from mobilellm_fast.kernels.hopper import products

SHARED_LIMIT = 227 << 10  # of a multiprocessor, which has one program


@pytest.mark.parametrize(
    "int8, dtype, product",
    [
        (True, torch.bfloat16, "IGMMA.64x192x32.S8.S8"),
        (True, torch.float16, "IGMMA.64x192x32.S8.S8"),
        (False, torch.bfloat16, "HGMMA.64x256x16.F32.BF16"),
        (False, torch.float16, "HGMMA.64x256x16.F32"),
    ],
)
def test_nothing_spills_and_products_stay_under_way(int8, dtype, product, monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path))
    made = MachineCode(products.SOURCE, products.constants(int8, dtype), "sm_90a", tmp_path)
    made.check_registers(products.THREADS)
    assert 128 << 10 < made.shared_nbytes <= SHARED_LIMIT
    # the launch copies as many bytes of arguments as the kernel takes
    assert made.arguments_nbytes == [ctypes.sizeof(products.Arguments)]
    lines, names = made.instructions, made.names
    assert [n for n in names if "GMMA" in n] == [product] * (products.STEP_NBYTES // 32)
    # of a loop over inputs, and behind it: else products would wait for each other
    waits = [rest for name, rest in lines if name == "WARPGROUP.DEPBAR.LE"]
    assert [re.search(r"gsb0, (\w+)", rest)[1] for rest in waits] == ["0x1", "0x0"]
    assert not {n for n in names if n.split(".")[0] in ("LDL", "STL")}
    assert "UTMALDG.2D.MULTICAST" in names
    # groups that want more registers than there are would wait for them forever
    asked = [re.search(r"(0x\w+|\d+) ;", rest)[1] for name, rest in lines if "SETMAXREG" in name]
    few, many = sorted(int(number, 0) for number in asked)
    groups = products.THREADS // 128
    assert few + (groups - 1) * many <= made.used["REG"] * groups
    early = names[: names.index("ACQBULK")]
    assert not [n for n in early if n.split(".")[0] in ("LDG", "STG", "UTMALDG", "UTMASTG")]
    # the kernel before may write scales while this one runs already
    assert not [n for n in names if n.startswith("LDG") and "CONSTANT" in n]


def test_older_gpus_are_refused_by_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path))
    with pytest.raises(MobileLLMError, match="product.cu does not compile"):
        compile_source(products.SOURCE, products.constants(True, torch.float16), "sm_90")


class Driver:
    """Stands in for the driver: notes what it is told to launch."""

    def __init__(self):
        self.launches = []

    def cuLaunchKernelEx(self, config, function, addresses, extra):
        place = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))[0]
        self.launches.append((config, ctypes.cast(place, ctypes.POINTER(products.Arguments))[0]))
        return (0,)


@pytest.fixture
def launches(monkeypatch):
    """A kernel that notes launches, on the tensors of a CPU."""
    noting = Driver()
    product = Kernel.__new__(Kernel)
    product._driver, product._function, product.shared_nbytes = noting, None, 1000
    product._large_clusters = False
    maps = []

    def encode(place, kind, rank, address, sizes, strides, box, steps, *modes):
        assert place.value % 64 == 0 and rank == 2 and modes == (0, 3, 3, 0) and [*steps] == [1, 1]
        maps.append((kind, address.value, [*sizes], [*strides], [*box]))
        ctypes.memset(place.value, len(maps), 128)
        return 0

    monkeypatch.setattr(products, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=encode))
    monkeypatch.setattr(products, "loaded", lambda *key: product)
    monkeypatch.setattr(products, "_clusters", lambda device: 66)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for cached in (products._arguments, products.tensor_map):
        cached.cache_clear()
    yield noting.launches, maps
    for cached in (products._arguments, products.tensor_map):
        cached.cache_clear()


def attributes(config):
    cluster, early = driver.CUlaunchAttributeID(4), driver.CUlaunchAttributeID(6)
    values = {attribute.id: attribute.value for attribute in config.attrs}
    size = values[cluster].clusterDim
    assert (size.x, size.y, size.z) == (2, 1, 1)
    assert config.numAttrs == len(values)
    return early in values and values[early].programmaticStreamSerializationAllowed == 1


def test_int8_gemm_is_launched_with_its_matrices(launches):
    noted, maps = launches
    x, weight = torch.ones(1000, 144, dtype=torch.int8), torch.ones(3080, 144, dtype=torch.int8)
    x_scales, weight_scales, out = (
        torch.ones(1000),
        torch.ones(3080),
        torch.empty(1000, 3080).half(),
    )
    for _ in range(2):
        assert products.int8_gemm(x, x_scales, weight, weight_scales, out)
    (config, arguments), (again, _) = noted
    assert again is config, "made anew"
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (2 * 4 * 17 - 4, 1, 1)
    assert (config.blockDimX, config.sharedMemBytes, int(config.hStream)) == (384, 1000, 77)
    assert attributes(config)
    assert maps == [
        (0, weight.data_ptr(), [144, 3080], [144], [128, 96]),
        (0, x.data_ptr(), [144, 1000], [144], [128, 128]),
        (6, out.data_ptr(), [3080, 1000], [6160], [64, 64]),
    ]
    places = (arguments.x, arguments.weight, arguments.second, arguments.out)
    assert [bytes(place) for place in places] == [bytes([i]) * 128 for i in (2, 1, 1, 3)]
    assert arguments.x_scales == x_scales.data_ptr()
    assert arguments.weight_scales == weight_scales.data_ptr()
    assert (arguments.rows, arguments.outputs, arguments.cols) == (1000, 3080, 144)


def test_swiglu_is_launched_with_its_matrices(launches):
    noted, maps = launches
    x, gate, up = (torch.ones(n, 72, dtype=torch.bfloat16) for n in (300, 136, 136))
    out = torch.empty(300, 136, dtype=torch.bfloat16)
    assert products.swiglu(x, gate, up, out)
    ((config, arguments),) = noted
    assert config.gridDimX == 2 * 2 * 2 and not attributes(config)
    assert sorted(m[1] for m in maps) == sorted(t.data_ptr() for t in (x, gate, up, out))
    assert [m[4] for m in maps if m[1] != out.data_ptr()] == [[64, 128]] * 3
    assert len({bytes(arguments.weight), bytes(arguments.second)}) == 2


def test_what_the_kernel_does_not_take(launches):
    x, weight, scales = torch.ones(4, 16).char(), torch.ones(8, 16).char(), torch.ones(9)
    assert not products.int8_gemm(x, scales[:4], weight, scales[:8], torch.empty(4, 8))
    assert not products.int8_gemm(x, scales[:4], weight, scales[1:], torch.empty(4, 8).half())
    assert not products.swiglu(torch.ones(4, 16), *[torch.ones(8, 16)] * 2, torch.empty(4, 8))
    assert not launches[0]


def test_a_driver_that_refuses_is_heard(launches, monkeypatch):
    refusing = SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1)
    monkeypatch.setattr(products, "_driver", lambda: refusing)
    with pytest.raises(MobileLLMError, match="cuTensorMapEncodeTiled failed: 1"):
        products.tensor_map(16, (4, 16), (4, 16), torch.int8)


def test_matrices_are_described_in_a_thread_without_a_context(launches, monkeypatch):
    current = []
    status = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
    asking = SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 0 if current else int(status))
    monkeypatch.setattr(products, "_driver", lambda: asking)
    monkeypatch.setattr(cuda_source, "use_context", lambda: current.append("one"))
    assert len(products.tensor_map(16, (4, 16), (4, 16), torch.int8)) == 128


def test_what_cannot_be_loaded_is_left_to_triton(launches, monkeypatch):
    """As while a graph is captured, see `loader.loaded`."""
    monkeypatch.setattr(products, "loaded", lambda *key: None)
    x, weight = (torch.zeros(rows, 64, dtype=torch.int8) for rows in (512, 192))
    scales = torch.ones(512), torch.ones(192)
    assert not products.int8_gemm(x, scales[0], weight, scales[1], torch.zeros(512, 192).bfloat16())
