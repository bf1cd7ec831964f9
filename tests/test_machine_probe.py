"""Probes of the machine's limits: they measure something, for every table, and refuse nonsense."""

import pytest

from mobilellm_fast import _C


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_peaks_grow_from_real_work(isa):
    """No processor does 10^14 of these per second and core: that would be a loop optimised away."""
    for probe in (_C.int8_peak, _C.fp32_peak):
        assert 1e7 < probe(1, isa) < 1e14
    assert 1e7 < _C.cache_bandwidth(1, _C.l2_cache_nbytes() // 2, isa) < 1e13


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memory_and_barrier(threads):
    assert 1e7 < _C.read_bandwidth(threads) < 1e13  # 0 where a sum was wrong
    assert 0 < _C.barrier_seconds(threads) < 0.1
    # a buffer per thread that divides by nothing
    assert 1e7 < _C.cache_bandwidth(threads, 12345) < 1e13


def test_bad_arguments_are_refused():
    for call, message in (
        (lambda: _C.read_bandwidth(0), "threads must be in"),
        (lambda: _C.int8_peak(1, "sse9"), "isa must be one of"),
        (lambda: _C.cache_bandwidth(1, 0), "nbytes_per_thread must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
