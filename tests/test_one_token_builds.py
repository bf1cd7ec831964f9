"""Decode attention and the head in CUDA C++, compiled by NVRTC, and launched by a stand-in.

No GPU is needed; `test_gpu_one_token.py` runs them.
"""

import ctypes
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")
pytest.importorskip("triton")

from cuda.bindings import driver
from machine_code import REGISTERS, MachineCode

from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.kernels import cuda_source
from mobilellm_fast.kernels.cuda_source import Kernel
from mobilellm_fast.kernels.hopper import cluster_attention, loader, streamed_head

SHARED_NBYTES = 228 << 10  # of a multiprocessor
OWN_SHARED_NBYTES = 1 << 10  # that each program takes besides
BF16, FP16 = torch.bfloat16, torch.float16


class Build(MachineCode):
    def __init__(self, source, constants, folder):
        super().__init__(source, dict(constants), "sm_90", folder)
        self.code, self.constants = self.names, dict(constants)

    def check_fits(self):
        self.check_registers(self.constants["THREADS"] * self.constants["RESIDENT"])
        shared = (self.shared_nbytes + OWN_SHARED_NBYTES) * self.constants["RESIDENT"]
        assert 0 < shared <= SHARED_NBYTES

    def loads(self, code=None):
        return {c for c in code or self.code if c.startswith(("LDG", "LDGSTS"))}

    def before_waiting(self):
        return self.code[: self.code.index("ACQBULK")]


@pytest.fixture
def build(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path))
    return lambda source, constants: Build(source, constants, tmp_path)


@pytest.mark.parametrize(
    ("group", "dtype", "in_one_piece", "cluster"),
    [
        (3, BF16, True, cluster_attention.WIDE),
        (5, BF16, True, cluster_attention.NARROW),
        (5, FP16, False, cluster_attention.WIDE),
        (8, BF16, False, cluster_attention.NARROW),
    ],
)
def test_attention_fits_and_its_loads_are_wide(group, dtype, in_one_piece, cluster, build):
    constants = cluster_attention.constants(group, dtype, in_one_piece, cluster)
    made = build(cluster_attention.SOURCE, constants)
    made.check_fits()
    assert made.arguments_nbytes == [ctypes.sizeof(cluster_attention.Arguments)]
    assert {c for c in made.code if c.startswith("HMMA")} == {
        "HMMA.16816.F32.BF16" if dtype == BF16 else "HMMA.16816.F32"
    }
    assert made.loads() == {"LDG.E.STRONG.GPU", "LDG.E.NA.128"}
    assert made.loads(made.before_waiting()) == {"LDG.E.STRONG.GPU"}, "the kernel before may run"
    assert "UBLKPF.L2" in made.code or not in_one_piece
    # what came from other programs is not looked for among what this multiprocessor knows
    wait = next(i for i, c in enumerate(made.code) if c.startswith("SYNCS.PHASECHK"))
    assert "CCTL.IVALL" in made.code[wait:]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("cols", "dtype"), [(576, BF16), (1600, FP16), (256, FP16)])
def test_the_head_fits_and_leaves_room(cols, dtype, sample, build):
    made = build(streamed_head.SOURCE, streamed_head.constants(cols, dtype, sample))
    made.check_fits()
    assert made.arguments_nbytes == [ctypes.sizeof(streamed_head.Arguments)]
    # so that the next kernel is set up beside it
    assert 2 * (made.shared_nbytes + OWN_SHARED_NBYTES) <= SHARED_NBYTES
    assert 2 * made.used["REG"] * streamed_head.THREADS <= REGISTERS or cols == 1600
    assert any(c.startswith("LDGSTS.E.BYPASS.128") for c in made.code)
    assert not made.loads(made.before_waiting())
    # what a program found is there before it arrives, and read past the multiprocessor's cache
    arrival = next(i for i, c in enumerate(made.code) if c.startswith("ATOMG"))
    stored = next(i for i, c in enumerate(made.code) if c.startswith("STG.E.128.STRONG.GPU"))
    assert any(re.match(r"MEMBAR\..*GPU", c) for c in made.code[stored:arrival])
    assert all(c.endswith("STRONG.GPU") for c in made.loads(made.code[arrival:]))


# ---- launches ----


class Driver:
    """Stands in for the driver: notes what it is told to launch, and with which arguments."""

    def __init__(self, structure):
        self.structure, self.launches, self.attributes = structure, [], []
        self.context, self.__name__ = "a context", "driver"

    def cuLaunchKernelEx(self, config, function, addresses, extra):
        if self.context is None:
            return (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        place = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))[0]
        arguments = self.structure.from_buffer_copy(
            ctypes.string_at(place, ctypes.sizeof(self.structure))
        )
        self.launches.append((config, arguments))
        return (0,)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.attributes.append((attribute, value))
        return (0,)

    CUfunction_attribute = driver.CUfunction_attribute


@pytest.fixture
def launcher(monkeypatch):
    """Has a module launch on the tensors of a CPU; returns the driver, and what is loaded."""

    def install(module):
        noting, loaded = Driver(module.Arguments), []
        found = Kernel.__new__(Kernel)
        found._driver, found._function, found.shared_nbytes = noting, None, 1000
        found._large_clusters = False
        monkeypatch.setattr(module, "loaded", lambda *key: loaded.append(key) or found)
        monkeypatch.setattr(module, "one_token_on", lambda device: True)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        stream = SimpleNamespace(cuda_stream=77)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        return noting, loaded

    return install


def shape_of(config):
    names = driver.CUlaunchAttributeID
    values = {attribute.id: attribute.value for attribute in config.attrs}
    early = values[names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION]
    assert early.programmaticStreamSerializationAllowed == 1
    assert config.numAttrs == len(values) and int(config.hStream) == 77
    cluster = values[names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION].clusterDim
    assert (cluster.y, cluster.z) == (config.blockDimY, config.blockDimZ) == (1, 1)
    grid = config.gridDimX, config.gridDimY, config.gridDimZ
    return grid, cluster.x, config.blockDimX, config.sharedMemBytes


@pytest.mark.parametrize(("batch", "cluster"), [(1, 16), (4, 16), (5, 8)])
def test_attention_is_launched_with_its_tensors(batch, cluster, launcher):
    noting, loaded = launcher(cluster_attention)
    q = torch.empty(batch, 25, 64, dtype=BF16)
    k, v = torch.empty(batch, 5, 100, 64, dtype=BF16), torch.empty(batch, 100, 5, 64, dtype=BF16)
    v, lengths, out = v.transpose(1, 2), torch.empty(batch, dtype=torch.int32), torch.empty_like(q)
    for _ in range(2):
        assert cluster_attention.decode(q, k, v, lengths, 0.5, out)
    (config, a), (again, _) = noting.launches
    assert again is config, "made anew"
    assert shape_of(config) == ((cluster, 5, batch), cluster, 128, 1000)
    assert len(noting.attributes) == (cluster == 16)
    chosen = cluster_attention.constants(5, BF16, False, cluster)
    assert loaded == [(cluster_attention.SOURCE, chosen, q.get_device())] * 2
    assert [a.q, a.k, a.v, a.lengths, a.out] == [t.data_ptr() for t in (q, k, v, lengths, out)]
    assert [a.q_batch, a.q_head, a.out_batch, a.out_head] == [3200, 128] * 2
    assert [a.k_batch, a.k_head, a.k_seq] == [64000, 12800, 128]
    assert [a.v_batch, a.v_head, a.v_seq] == [64000, 128, 640]
    assert a.capacity == 100 and abs(a.scale - 0.5 * 1.442695) < 1e-6


def test_the_head_is_launched_with_its_tensors(launcher):
    noting, loaded = launcher(streamed_head)
    x, codes = torch.empty(1, 576, dtype=FP16), torch.empty(500, 576, dtype=FP16)
    ids, logprobs = torch.empty(1, dtype=torch.int64), torch.empty(1)
    assert streamed_head.choose(x, codes, 0.0, 0, ids, logprobs)
    assert streamed_head.choose(x, codes, 2.0, -1, ids, logprobs)
    (config, a), (_, drawn) = noting.launches
    assert shape_of(config) == ((132, 1, 1), 1, 512, 1000)
    assert [key[1] for key in loaded] == [
        streamed_head.constants(576, FP16, sample) for sample in (False, True)
    ]
    assert [a.x, a.rows, a.id, a.logprob] == [t.data_ptr() for t in (x, codes, ids, logprobs)]
    assert a.shares % 16 == 0 and a.counter and (a.vocab, a.inverse) == (500, 0)
    assert (drawn.seed, drawn.inverse) == (2**64 - 1, 2)


def test_a_thread_without_a_context_gets_one(launcher, monkeypatch):
    noting, _ = launcher(streamed_head)
    x, ids = torch.empty(1, 576, dtype=FP16), torch.empty(1, dtype=torch.int64)
    noting.context = None
    monkeypatch.setattr(cuda_source, "use_context", lambda: setattr(noting, "context", "one"))
    assert streamed_head.choose(x, x, 0.0, 0, ids, ids.float())
    assert noting.context == "one" and len(noting.launches) == 1
    noting.context = None
    monkeypatch.setattr(cuda_source, "use_context", lambda: None)
    with pytest.raises(MobileLLMError, match="CUDA_ERROR_INVALID_CONTEXT"):
        streamed_head.choose(x, x, 0.0, 0, ids, ids.float())


def large(batch, heads, kv_heads, capacity):
    """q, k_cache, v_cache and out, of which nobody asks for values."""
    q = torch.empty(batch, heads, 64, dtype=BF16, device="meta")
    cache = torch.empty(batch, kv_heads, capacity, 64, dtype=BF16, device="meta")
    return q, cache, cache, q


def test_a_kernel_is_loaded_in_the_context_that_torch_uses(monkeypatch):
    """Also in a thread that has none yet."""
    current = []

    def load(code):
        invalid = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        return (0 if current == ["of device 3"] else invalid), "module"

    def copy(address, place, size):
        ctypes.c_uint.from_address(address).value = 1000
        return (0,)

    for name, call in {
        "cuDeviceGet": lambda ordinal: (0, f"device {ordinal}"),
        "cuDevicePrimaryCtxRetain": lambda device: (0, f"of {device}"),
        "cuCtxSetCurrent": lambda context: current.append(context) or (0,),
        "cuModuleLoadData": load,
        "cuModuleGetFunction": lambda module, name: (0, "function"),
        "cuModuleGetGlobal": lambda module, name: (0, 0, 4),
        "cuMemcpyDtoH": copy,
        "cuFuncSetAttribute": lambda *args: (0,),
    }.items():
        monkeypatch.setattr(driver, name, call)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    cuda_source._context.cache_clear()
    try:
        assert Kernel(b"code", "name").shared_nbytes == 1000
    finally:
        cuda_source._context.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, out: (q.float(), k.float(), v.float(), out.float()),
        lambda q, k, v, out: (q[..., :32], k[..., :32], v[..., :32], out[..., :32]),
        lambda q, k, v, out: (q, k[:, :1], v[:, :1], out),  # a group of 10
        lambda q, k, v, out: (q, k.view(-1)[1:12801].view(k[:, :, :50].shape), v, out),
        lambda q, k, v, out: (q, k, torch.empty(2, 2, 100, 68, dtype=BF16)[..., :64], out),
        lambda q, k, v, out: (q, k, v, torch.empty(2, 10, 72, dtype=BF16)[..., 4:68]),
        lambda q, k, v, out: (q, k, v, torch.empty(2, 10, 128, dtype=BF16)[..., ::2]),
        lambda q, k, v, out: (q, k, v, out.half()),
        lambda q, k, v, out: large(2**16, 2, 2, 100),
        lambda q, k, v, out: large(1, 2, 2**16, 100),
        lambda q, k, v, out: large(1, 2, 2, 2**28 + 1),
    ],
    ids=(
        *("float32", "head_dim", "group", "address", "stride"),
        *("address of out", "columns", "dtype"),
        *("batch", "kv_heads", "capacity"),
    ),
)
def test_attention_that_is_left_to_triton(change, launcher):
    launcher(cluster_attention)
    q, k = torch.empty(2, 10, 64, dtype=BF16), torch.empty(2, 2, 100, 64, dtype=BF16)
    usual = q, k, k.clone(), torch.empty_like(q)
    assert cluster_attention.takes(*usual)
    assert cluster_attention.takes(*large(2**16 - 1, 2, 2, 100))
    assert cluster_attention.takes(*large(1, 2, 2, 2**28))
    assert not cluster_attention.takes(*change(*usual))


def test_heads_that_are_left_to_triton(launcher):
    launcher(streamed_head)
    x, codes = torch.empty(1, 1608, dtype=BF16), torch.empty(9, 1608, dtype=BF16)
    assert streamed_head.takes(x[:, :1600].clone(), codes[:, :1600].clone())
    assert streamed_head.takes(x[:, :256].clone(), codes[:, :256].clone())
    for cols in (252, 580, 1608, 248):
        assert not streamed_head.takes(x[:, :cols].clone(), codes[:, :cols].clone())
    one, other = x[:, :576].clone(), codes[:, :576].clone()
    assert not streamed_head.takes(one, other.half())
    assert not streamed_head.takes(one.float(), other.float())
    assert not streamed_head.takes(x[0, 1:577], other)


def test_a_cpu_runs_neither(monkeypatch):
    assert not loader.runs_on(torch.device("cpu"))
    monkeypatch.setenv(loader.ONE_TOKEN, "1")
    assert not loader.one_token_on(torch.device("cpu"))


@pytest.mark.parametrize("asked, taken", [(None, False), ("0", False), ("1", True)])
def test_they_are_taken_where_the_environment_asks(monkeypatch, asked, taken):
    monkeypatch.setattr(loader, "runs_on", lambda device: True)
    monkeypatch.delenv(loader.ONE_TOKEN, raising=False)
    if asked is not None:
        monkeypatch.setenv(loader.ONE_TOKEN, asked)
    assert loader.one_token_on(torch.device("cuda")) is taken


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(loader, "kernel", None)
    assert loader.loaded(cluster_attention.SOURCE, (), 99) is None
    tensors = [torch.empty(1, 1, 1, 64, dtype=BF16)] * 2
    q, lengths = tensors[0][0], torch.ones(1, dtype=torch.int32)
    monkeypatch.setattr(cluster_attention, "multiprocessors", lambda device: 132)
    assert not cluster_attention.decode(q, *tensors, lengths, 1.0, q)
    x, ids = torch.empty(1, 256, dtype=BF16), torch.empty(1, dtype=torch.int64)
    assert not streamed_head.choose(x, x, 0.0, 0, ids, ids.float())


def test_each_gpu_loads_what_is_compiled_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))
    monkeypatch.setattr(cuda_source, "compile_source", lambda source, constants, arch: arch)
    monkeypatch.setattr(cuda_source, "Kernel", lambda code, name: SimpleNamespace(code=code))
    monkeypatch.setattr(loader, "_loaded", {})
    cuda_source.kernel.cache_clear()
    try:
        found = [loader.loaded(Path("a.cu"), (), *key) for key in ((0,), (1,), (0, "a"), (0,))]
    finally:
        cuda_source.kernel.cache_clear()
    assert [kernel.code for kernel in found] == ["sm_90", "sm_91", "sm_90a", "sm_90"]
    assert found[3] is found[0]


@pytest.mark.parametrize("status", ["OUT_OF_MEMORY", "STREAM_CAPTURE_UNSUPPORTED"])
def test_a_kernel_that_cannot_be_loaded_now_may_be_later(monkeypatch, status):
    answers = [getattr(driver.CUresult, f"CUDA_ERROR_{status}"), 0]

    def load(*key):
        cuda_source._check(answers.pop(0), driver)
        return "kernel"

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "kernel", load)
    monkeypatch.setattr(loader, "_loaded", {})
    found = [loader.loaded(cluster_attention.SOURCE, (), 99) for _ in range(3)]
    assert found == [None, "kernel", "kernel"]


def test_a_kernel_that_cannot_be_loaded_is_told_of_once(monkeypatch):
    def refuse(*key):
        raise MobileLLMError("[cuda] driver failed: CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "kernel", refuse)
    monkeypatch.setattr(loader, "_loaded", {})
    with pytest.warns(UserWarning, match="Triton's kernel is taken: .*UNSUPPORTED_PTX"):
        assert loader.loaded(cluster_attention.SOURCE, (), 99) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.loaded(cluster_attention.SOURCE, (), 99) is None
