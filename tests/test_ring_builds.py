"""The kernel of the tier `ring`, compiled by NVRTC for the models, without a GPU."""

import re

import pytest

pytest.importorskip("cuda.bindings.nvrtc")
pytest.importorskip("triton")

from builds_decode import PROGRAMS
from homeless import take_home_away
from machine_code import MachineCode

from mobilellm_fast.config import MobileLLMConfig
from mobilellm_fast.cuda import ring
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.kernels.cuda_source import compile_source

SHARED_LIMIT = 227 << 10  # of an H100's multiprocessor, which has one program


def constants(model, kind, finishers=ring.FINISHERS, **others):
    config = MobileLLMConfig.preset(f"MobileLLM-{model}")
    ends = "int8" if kind == "int4_g32" else kind
    sizes = ring.kernel_constants(config, kind, ends, ends, "fp16", PROGRAMS, finishers)
    return sizes | {"SHARED_LIMIT": SHARED_LIMIT} | others


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    "finishers, leave_first, tiles, kv_format",
    [(0, 0, 0, "fp16"), (1, 1, 1, "bf16")],
)
@pytest.mark.parametrize(
    "model, kind", [("125M", "bf16"), ("350M", "int8_g32"), ("1.5B", "bf16"), ("1.5B", "int4_g32")]
)
def test_nothing_spills_and_products_are_by_tensor_cores(
    model, kind, finishers, leave_first, tiles, kv_format, tmp_path
):
    options = {"LEAVE_FIRST": leave_first, "ATTEND_BY_TILES": tiles}
    sizes = constants(model, kind, finishers, **options, CACHE=ring.CACHES[kv_format])
    made = MachineCode(ring.SOURCE, sizes, "sm_90", tmp_path)
    made.check_registers(sizes["THREADS"])
    assert ("HMMA.16816.F32.BF16" if kind == "bf16" else "IMMA.16832.S8.S8") in made.text
    assert "LDS.128" in made.text
    copies = [operands for name, operands in made.instructions if name.startswith("UBLKCP")]
    assert copies and all(("desc" in copy) == leave_first for copy in copies), "say what to keep"
    if tiles:
        assert "MOVM.16" in made.text
        assert f"HMMA.1688.F32{'.BF16' * (kv_format == 'bf16')}" in made.text
    # all products of a layer go through the same instructions, which a cache holds
    assert len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", made.text, re.MULTILINE)) * 16 < 96 << 10


def test_what_does_not_compile_says_why():
    broken = constants("125M", "bf16") | {"VOCAB": 3}
    with pytest.raises(MobileLLMError, match="does not compile:(.|\n)*loaded four by four"):
        compile_source(ring.SOURCE, broken, "sm_90")


def test_a_gpu_with_less_shared_memory_is_told_so():
    small = constants("1.5B", "bf16") | {"SHARED_LIMIT": 99 << 10}
    with pytest.raises(MobileLLMError, match="more shared memory than a program can have"):
        compile_source(ring.SOURCE, small, "sm_120")


def test_machine_code_is_kept_and_not_trusted(monkeypatch, tmp_path):
    from cuda.bindings import nvrtc

    def compiled():
        return compile_source(ring.SOURCE, constants("125M", "bf16"), "sm_90")

    first = compiled()
    (kept,) = (tmp_path / "cuda").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert compiled() == first
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", None)
    assert compiled() == first


def test_without_a_home_directory_nothing_is_kept(monkeypatch):
    take_home_away(monkeypatch)
    assert compile_source(ring.SOURCE, constants("125M", "bf16"), "sm_90")
