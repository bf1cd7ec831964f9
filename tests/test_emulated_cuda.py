"""The emulation of CUDA kernels: right results in every order, and an error for every fault."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from emulated_cuda import compile_kernel

EXAMPLES = Path(__file__).parent / "cpp" / "ring" / "examples.cu"
THREADS = 128
SEEDS = range(12)
FAULTS = (
    "none",
    "no barrier before read",
    "no barrier before write",
    "one thread returns",
    "another barrier",
    "half a warp shuffles",
    "one word missing",
    "one epoch for all",
    "too much shared memory",
    "misaligned",
    "no meeting before fence",
    "no fence at start",
    "fence before barriers",
    "no fence",
    "fence after arrival",
    "one lane fences",
    "no meeting of lanes",
    "arrival before wait",
    "no wait for readers",
    "one reader is late",
    "copies twice",
    "copies elsewhere",
    "no barriers",
    "arrives twice",
    "returns early",
)


def example(name):
    return compile_kernel(EXAMPLES, {"THREADS": THREADS}, name=name)


def structure(**fields):
    """Arguments: arrays become addresses, numbers ints."""
    values = [f.ctypes.data if isinstance(f, np.ndarray) else f for f in fields.values()]
    is_array = [isinstance(f, np.ndarray) for f in fields.values()]
    types = [ctypes.c_void_p if array else ctypes.c_int for array in is_array]
    members = list(zip(fields, types, strict=True))
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})(*values)


def run_sum(seed, fault="none", programs=4, rounds=30):
    """Return whether the sums are right."""
    x = np.arange(1000, dtype=np.float32)
    out = np.zeros(programs, np.float32)
    arguments = structure(x=x, out=out, size=x.size, rounds=rounds, fault=FAULTS.index(fault))
    example("sum")(arguments, programs, seed)
    return np.array_equal(out, np.full(programs, rounds * x.sum() + rounds * (rounds - 1) / 2))


def run_exchange(seed, fault="none", rounds=10):
    """Return whether the sum is right: each round gives both programs the sum of both."""
    words = np.zeros((2, 2, THREADS, 2), np.uint32)
    totals, arrived = np.zeros((2, THREADS), np.float32), np.zeros(1, np.uint32)
    out = np.zeros(1, np.float32)
    arguments = structure(
        words=words,
        totals=totals,
        arrived=arrived,
        out=out,
        rounds=rounds,
        fault=FAULTS.index(fault),
    )
    example("exchange")(arguments, 2, seed)
    return out[0] == sum(p + t for p in range(2) for t in range(THREADS)) * 2**rounds


def run_stream(seed, fault="none", rounds=9):
    """Return whether the sums are right."""
    numbers = np.arange(4 * rounds + 4, dtype=np.uint32)
    numbers = numbers[-numbers.ctypes.data % 16 // 4 :][: 4 * rounds]
    out = np.zeros(THREADS - 32, np.uint32)
    arguments = structure(numbers=numbers, out=out, rounds=rounds, fault=FAULTS.index(fault))
    example("stream")(arguments, 2, seed)
    return (out == numbers.sum()).all()


def faults_found(run, fault):
    """For each seed, an error's text or whether the result was right."""
    outcomes = []
    for seed in SEEDS:
        try:
            outcomes.append(run(seed, fault))
        except RuntimeError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.mark.parametrize("seed", SEEDS)
def test_correct_kernels(seed):
    assert run_sum(seed)
    assert run_sum(seed, programs=1, rounds=3)
    assert run_exchange(seed)
    assert run_stream(seed)


def test_a_seed_repeats_its_order():
    fault = "no barrier before read"
    assert faults_found(run_sum, fault) == faults_found(run_sum, fault)


@pytest.mark.parametrize("fault", ["no barrier before read", "no barrier before write"])
def test_missing_barrier(fault):
    assert sum(outcome is not True for outcome in faults_found(run_sum, fault)) >= len(SEEDS) // 2


def test_words_become_visible_out_of_order():
    outcomes = faults_found(run_exchange, "one epoch for all")
    assert sum(outcome is not True for outcome in outcomes) >= len(SEEDS) // 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_everybody_waits(seed):
    with pytest.raises(RuntimeError, match=r"everybody waits; program 0: .* at examples\.cu:\d+"):
        run_exchange(seed, "one word missing")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("one thread returns", "returned"),
        ("another barrier", r"at examples\.cu:\d+ waits at a barrier, at another: .*\.cu:\d+"),
        ("half a warp shuffles", "shuffle"),
    ],
)
def test_divergence(seed, fault, error):
    with pytest.raises(RuntimeError, match=error):
        run_sum(seed, fault)


WRITTEN = r"copies over what thread \d+ may have written, without knowing of a fence since"
READ = r"copies over what thread \d+ may still read, without knowing of a fence since it waited"
LATE = r"waits for bytes that are overwritten already, by the copy at examples\.cu:\d+"
TWICE = r"copies over what the copy at examples\.cu:\d+ brings, without knowing of anybody who"
MADE = r"copies with a barrier without knowing of a fence since it was made at examples\.cu:\d+"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("no meeting before fence", WRITTEN),
        ("no fence at start", MADE),
        ("fence before barriers", MADE),
        ("no fence", READ),
        ("fence after arrival", READ),
        ("one lane fences", READ),
        ("no meeting of lanes", READ),
        ("one reader is late", LATE),
        ("copies twice", TWICE),
        ("copies elsewhere", "copies to no place of shared memory"),
        ("no barriers", "uses a barrier that nobody made"),
        ("arrives twice", "arrives once too often at a barrier"),
        ("returns early", "all threads returned before copies came"),
    ],
)
def test_misused_copies(fault, error):
    """In every order of the threads, also where results would be right."""
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=error):
            # the last copy of several may come while somebody waits for another
            run_stream(seed, fault, rounds=1 if fault == "returns early" else 9)


@pytest.mark.parametrize("fault", ["arrival before wait", "no wait for readers"])
def test_slots_that_are_filled_too_early(fault):
    """Depending on the order, a warp that misses a phase of a barrier may be found before."""
    errors = faults_found(run_stream, fault)
    assert all(isinstance(error, str) for error in errors), "an order in which it is not found"
    assert any(re.search(READ, error) for error in errors)


def run_numbers(fault="none"):
    with np.errstate(over="ignore", invalid="ignore"):
        halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
        # each half's value, those that lie in the middle of two, and those just beside them
        middle = (halves + np.nextafter(halves.astype(np.float16), np.float16(70000))) / 2
        floats = np.choose(np.arange(65536) % 3, [middle, np.nextafter(middle, 0), middle * 1.01])
    weights = np.zeros(12, np.uint32)
    start = -weights.ctypes.data % 16 // 4
    weights = weights[start : start + 5]
    weights[:] = [0x33221100, 0x77665544, 0xFFFFFFFF, 0x80000001, 0]
    results = dict(
        halves=np.zeros(65536, np.uint16),
        widened=np.zeros(65536, np.float32),
        weights=weights,
        integers=np.zeros(3, np.uint32),
        fused=np.zeros(1, np.float32),
    )
    example("numbers")(structure(floats=floats, **results, fault=FAULTS.index(fault)), 1)
    return floats, halves, results


def test_numbers():
    floats, halves, results = run_numbers()
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    is_nan = np.isnan(expected)
    assert (np.isnan(results["halves"].view(np.float16)) == is_nan).all()
    assert (results["halves"] == expected.view(np.uint16))[~is_nan].all()
    np.testing.assert_array_equal(results["widened"], halves)
    assert results["integers"].tolist() == [0x77221144, 0x80000000, 31]
    assert results["fused"][0] == 2.0**-24  # a rounded product would leave 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("too much shared memory", "wants 4194304 bytes of shared memory, has 65536"),
        ("misaligned", "no multiple of 16"),
    ],
)
def test_misuse(fault, error):
    with pytest.raises(RuntimeError, match=error):
        run_numbers(fault)


def test_arguments_of_another_size():
    with pytest.raises(TypeError, match="sum takes 32 bytes of arguments, got 4 of Arguments"):
        example("sum")(structure(size=1), 1)
