"""The digits of inputs that the kernel of the tier `ring` multiplies with integer weights."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from emulated_cuda import compile_kernel

SOURCE = Path(__file__).parent / "cpp" / "ring" / "digits.cu"
LARGEST = 32512  # of numbers of two digits
PIECES = {"INT8": 16, "INT4_G32": 32}  # inputs that are one behind the other


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("inputs", "digits", "units", "sums")),
        ("warps", ctypes.c_int),
    ]


def digits_of(kind, inputs):
    """Return numbers (warps, 128), their sums (warps, 32), and what a one of them stands for."""
    inputs = np.ascontiguousarray(inputs, np.float32)
    warps = len(inputs)
    digits = np.zeros((warps, 256), np.int8)
    units, sums = np.zeros((warps, 32), np.float32), np.full((warps, 32), 7, np.int32)
    places = (array.ctypes.data for array in (inputs, digits, units, sums))
    compile_kernel(SOURCE, {"KIND": kind, "THREADS": 32})(Arguments(*places, warps), 1)
    # the larger digits of a piece, then its smaller ones
    larger, smaller = np.moveaxis(digits.reshape(warps, -1, 2, PIECES[kind]).astype(int), 2, 0)
    assert (units.view(np.int32) == units.view(np.int32)[:, :1]).all()
    return (256 * larger + smaller).reshape(warps, 128), sums, units[:, 0]


@pytest.mark.parametrize("kind", PIECES)
def test_every_number_beside_any_other(kind):
    """All numbers of two digits, those in the middle of two, and what is just beside the middle."""
    numbers = np.arange(-LARGEST, LARGEST + 1)
    middle = (numbers[:-1] + 0.5).astype(np.float32)
    beside = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))
    values = np.concatenate((numbers, middle, *beside)).astype(np.float32)
    values = np.random.default_rng(0).permutation(values)
    inputs = np.full((-(-len(values) // 126), 128), LARGEST, np.float32)
    inputs[:, 1] = -LARGEST
    inputs[:, 2:].flat[: len(values)] = values
    found, sums, unit = digits_of(kind, inputs)
    assert (unit == 1).all()
    np.testing.assert_array_equal(found, np.rint(inputs))
    np.testing.assert_array_equal(sums, found.reshape(-1, 32, 4).sum(-1))


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("largest", [1e-37, 1e-30, 3e-12, 0.7, 5e20, 1e37])
def test_numbers_are_relative_to_the_largest(kind, largest):
    """However large that is; what is less than 1e-30 is relative to that."""
    inputs = np.random.default_rng(1).uniform(-1, 1, (20, 128)).astype(np.float32)
    inputs[np.arange(20), np.arange(20) * 6] = 1
    inputs *= np.float32(largest)
    found, _, unit = digits_of(kind, inputs)
    exact = inputs.astype(np.float64) / max(largest, 1e-30) * LARGEST
    assert np.abs(found - exact).max() <= 0.51
    np.testing.assert_allclose(unit, max(largest, 1e-30) / LARGEST, rtol=1e-6)


@pytest.mark.parametrize("kind", PIECES)
def test_zeros_are_exact_and_what_is_no_number_stays_none(kind):
    inputs = np.zeros((6, 128), np.float32)
    inputs[1:, 77] = [np.nan, -np.nan, np.inf, -np.inf, 3e38]
    found, _, unit = digits_of(kind, inputs)
    assert not found[0].any() and np.isfinite(unit[0])
    assert np.isnan(unit[1:]).all()
