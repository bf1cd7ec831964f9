"""C++ kernels of every ISA: exact integers, saturation, tails, and no access out of bounds."""

import ctypes
import mmap

import numpy as np
import pytest

from mobilellm_fast import _C, quant

ISAS = _C.supported_isas()
ROWS = (*range(1, 10), 16, 33)
WEIGHT_SHAPES = [
    (1, 1),
    (15, 31),
    (16, 32),
    (17, 33),
    (33, 100),
    (192, 576),
    (576, 1536),
    (40, 4352),
]


def matrix(rows, cols, seed):
    return np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)


def quantized_rows(x):
    """What the kernels do to activations: codes (int64) and scales (float32), per row."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(x * inverse).astype(np.int64), (largest / np.float32(127))[:, 0]


def low_codes(x, codes):
    """What the codes of a group leave, in 254ths of their scale, where the group is wide."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rest = x * inverse - codes.astype(np.float32)
    wide = (codes**2).sum(axis=1, keepdims=True) <= 7 * 127**2 // 4
    return np.where(wide, np.rint(rest * np.float32(254)), 0).astype(np.int64)


def exact_linear(x, tensor, activation):
    """The integer kernels' result, operation by operation."""
    weights = tensor.codes.astype(np.int64)
    codes, scale = quantized_rows(x)
    if tensor.kind == activation == "int8":
        total = codes @ weights.T
        assert np.abs(total).max() < 2**31
        return total.astype(np.float32) * scale[:, None] * tensor.scales
    acc = np.zeros((len(x), len(weights)), np.float32)

    def fma(a, b, acc):  # 64 bits of mantissa hold the exact sum
        wide = a.astype(np.longdouble) * b.astype(np.longdouble) + acc
        return wide.astype(np.float32)

    def add(acc, code, step, part, group):
        total = (code @ weights[:, part].T).astype(np.float32)
        if tensor.kind == "int8":
            return fma(total, step[:, None], acc)
        return fma(total * step[:, None], tensor.scales[:, group], acc)

    low_acc = np.zeros_like(acc)
    for first in range(0, x.shape[1], 32):
        part, group = slice(first, first + 32), first // 32
        low = np.zeros_like(codes[:, part])
        if activation == "int8":
            high = codes[:, part]
        else:
            high, scale = quantized_rows(x[:, part])
            if activation == "int8_g32":
                low = low_codes(x[:, part], high)
        low_scale = scale * np.float32(1 / 254)
        low_acc = add(low_acc, low, low_scale, part, group)
        acc = add(acc, high, scale, part, group)
        if tensor.minimums is not None:
            sums, low_sums = (c.sum(axis=1).astype(np.longdouble) for c in (high, low))
            whole = (sums.astype(np.float32) * scale).astype(np.longdouble)
            whole = (low_sums * low_scale.astype(np.longdouble) + whole).astype(np.float32)
            acc = fma(tensor.minimums[:, group], whole[:, None], acc)
    acc += low_acc
    return acc * tensor.scales if tensor.kind == "int8" else acc


def linear(x, weight, activation, isa, threads=1):
    out = np.full((len(x), weight.rows), np.nan, np.float32)
    _C.linear(x, weight.as_tuple(), out, activation, isa, threads)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("activation", ["int8_g32", "int8_g32_plain", "int8"])
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_linear_is_exact(isa, kind, activation, shape):
    tensor = quant.quantize(matrix(*shape, 0), kind)
    weight = quant.pack(tensor)
    x = matrix(33, shape[1], 1)
    want = exact_linear(x, tensor, activation)
    for rows in ROWS:
        assert np.array_equal(linear(x[:rows], weight, activation, isa), want[:rows])
    for threads in (2, 5, 8):
        assert np.array_equal(linear(x, weight, activation, isa, threads), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("cols", [3584, 24640, 66000])
def test_rows_are_what_they_are_alone(isa, kind, cols):
    """Of inputs so wide that a panel holds few rows of them, or none."""
    weight = quant.pack(quant.quantize(matrix(17, cols, 0), kind))
    x = matrix(64 if cols < 4096 else 9, cols, 1)
    alone = np.concatenate([linear(row[None], weight, "int8_g32", isa) for row in x])
    assert np.array_equal(linear(x, weight, "int8_g32", isa), alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["int8_g32", "int8_g32_plain", "int8"])
@pytest.mark.parametrize("sign", [1, -1])
def test_linear_does_not_saturate(isa, activation, sign):
    """Every product at its largest, all of one sign, over the longest row of any model."""
    cols = 4352
    x = np.full((3, cols), np.float32(sign))
    for code in (127, -127):
        codes = np.full((16, cols), code, np.int8)
        tensor = quant.QuantizedTensor("int8", codes, np.ones(16, np.float32))
        want = exact_linear(x, tensor, activation)
        assert np.abs(want - sign * code * cols).max() <= cols * 127 * 1e-6
        assert np.array_equal(linear(x, quant.pack(tensor), activation, isa), want)
    for kind, code, mins in (
        ("int8_g32", -127, None),
        ("int4_g32", 15, -1.0),
        ("int4_sym_g32", 15, None),
        ("int4_sym_g32", 0, None),
    ):
        codes = np.full((16, cols), code, np.uint8 if kind in quant.INT4_KINDS else np.int8)
        scales = np.ones((16, cols // 32), np.float16)
        mins = None if mins is None else np.full_like(scales, mins)
        tensor = quant.QuantizedTensor(kind, codes, scales, mins)
        assert np.array_equal(
            linear(x, quant.pack(tensor), activation, isa), exact_linear(x, tensor, activation)
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_minimums_that_are_not_stored_give_the_same_bits(isa, shape):
    """As those that are: a grid is computed with alike in both layouts."""
    grid = quant.quantize(matrix(*shape, 0), "int4_sym_g32")
    mins = grid.minimums.astype(np.float16)
    stored = quant.pack(quant.QuantizedTensor("int4_g32", grid.codes, grid.scales, mins))
    x = matrix(33, shape[1], 1)
    for rows in ROWS:
        got = linear(x[:rows], quant.pack(grid), "int8_g32", isa)
        assert np.array_equal(got, linear(x[:rows], stored, "int8_g32", isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("code", [-128, -1, 0, 1, 127])
def test_every_weight_byte(isa, code):
    """GGUF files may hold -128, which our own rounding never makes."""
    codes = np.full((16, 64), code, np.int8)
    tensor = quant.QuantizedTensor("int8_g32", codes, np.ones((16, 2), np.float16))
    x = matrix(5, 64, 2)
    assert np.array_equal(
        linear(x, quant.pack(tensor), "int8_g32", isa), exact_linear(x, tensor, "int8_g32")
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_float_linear_and_swiglu(isa, kind, shape):
    gate, up = (quant.pack(matrix(*shape, seed), kind) for seed in (0, 1))
    x = matrix(33, shape[1], 2)
    exact = [x.astype(np.float64) @ w.dequantize().astype(np.float64).T for w in (gate, up)]
    absolute = [
        np.abs(x).astype(np.float64) @ np.abs(w.dequantize()).astype(np.float64).T
        for w in (gate, up)
    ]
    # A sum of n products in 16 lanes: n / 16 + 4 additions and one product, 2^-24 each.
    bound = [total * (shape[1] / 16 + 6) * 2**-24 for total in absolute]
    want = linear(x, gate, "float", isa)
    assert (np.abs(want - exact[0]) <= bound[0]).all()
    for rows in ROWS:
        assert np.array_equal(linear(x[:rows], gate, "float", isa), want[:rows])

    out = np.full((33, shape[0]), np.nan, np.float32)
    _C.swiglu(x, gate.as_tuple(), up.as_tuple(), out, "float", isa)
    silu = exact[0] / (1 + np.exp(-exact[0]))
    # |silu'| <= 1.1; exp, division and product add a few units in the last place.
    bound = (
        1.1 * bound[0] * np.abs(exact[1])
        + np.abs(silu) * bound[1]
        + 8 * 2**-24 * np.abs(silu * exact[1])
    )
    assert (np.abs(out - silu * exact[1]) <= bound + 1e-12).all()


@pytest.mark.parametrize("isa", ISAS)
def test_silu_over_its_whole_range(isa):
    x = np.concatenate([np.linspace(-110, 110, 4001), [0, -0.0, 1e-30, -1e-30]]).astype(np.float32)[
        :, None
    ]
    one = quant.pack(np.ones((1, 1), np.float32)).as_tuple()
    out = np.full_like(x, np.nan)
    _C.swiglu(x, one, one, out, "float", isa)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64))) * x
    # Below -88 the result is a denormal's square away from 0; above it, exp is good to 2 ulp.
    assert (np.abs(out - exact) <= 6 * 2**-24 * np.abs(exact) + 1e-33).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gate_kind", quant.QUANTIZED_KINDS)
@pytest.mark.parametrize("up_kind", quant.QUANTIZED_KINDS)
def test_swiglu_of_integer_weights(isa, gate_kind, up_kind):
    """Of one kind or, as a GGUF file may have them, of two."""
    gate, up = quant.pack(matrix(200, 96, 0), gate_kind), quant.pack(matrix(200, 96, 1), up_kind)
    x = matrix(70, 96, 2)
    g, u = (linear(x, w, "int8_g32", isa).astype(np.float64) for w in (gate, up))
    want = g / (1 + np.exp(-g)) * u
    for rows in (1, 2, 9, 70):
        for threads in (1, 3):
            out = np.full((rows, 200), np.nan, np.float32)
            _C.swiglu(x[:rows], gate.as_tuple(), up.as_tuple(), out, "int8_g32", isa, threads)
            bound = 8 * 2**-24 * np.abs(want[:rows]) + 1e-30
            assert (np.abs(out - want[:rows]) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_per_token(isa):
    x = matrix(7, 45, 0)
    x[3] = 0
    x[4] = np.arange(-22, 23) + 0.5  # ties
    q, scale = np.full((7, 45), 99, np.int8), np.full(7, np.nan, np.float32)
    _C.quantize_per_token(x, q, scale, isa)
    codes, scales = quantized_rows(x)
    assert np.array_equal(q, codes)
    assert np.array_equal(scale, scales)


class Guarded:
    """Arrays whose last byte is followed by a page that faults when touched."""

    def __init__(self):
        self.maps = []

    def copy(self, array):
        array = np.ascontiguousarray(array)
        page = mmap.PAGESIZE
        size = -(-max(array.nbytes, 1) // page) * page
        memory = mmap.mmap(-1, size + page)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
        guarded = np.frombuffer(memory, np.uint8, array.nbytes, size - array.nbytes).view(
            array.dtype
        )
        guarded = guarded.reshape(array.shape)
        guarded[:] = array
        return guarded


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_touched_beyond_the_arrays(isa):
    guarded = Guarded()
    for rows, cols in [(1, 1), (15, 31), (17, 33), (33, 100)]:
        for kind in ("fp32", "bf16", *quant.QUANTIZED_KINDS):
            weight = quant.pack(matrix(rows, cols, 0), kind)
            weight = quant.PackedWeight(kind, rows, cols, guarded.copy(weight.data))
            activation = "float" if kind in ("fp32", "bf16") else "int8_g32"
            for m in (1, 2, 5, 9):
                x, out = guarded.copy(matrix(m, cols, 1)), guarded.copy(matrix(m, rows, 2))
                _C.linear(x, weight.as_tuple(), out, activation, isa)
                _C.swiglu(x, weight.as_tuple(), weight.as_tuple(), out, activation, isa)
        x, out, w = (
            guarded.copy(matrix(3, cols, 1)),
            guarded.copy(matrix(3, cols, 2)),
            guarded.copy(matrix(1, cols, 3)[0]),
        )
        _C.rms_norm(x, w, 1e-5, out, isa)
        q, scale = guarded.copy(np.zeros((3, cols), np.int8)), guarded.copy(np.zeros(3, np.float32))
        _C.quantize_per_token(x, q, scale, isa)
    for heads, dim in [(1, 2), (3, 10), (2, 64)]:
        x = guarded.copy(np.ones((4, heads, dim), np.float32))
        angles = guarded.copy(np.ones((4, dim // 2), np.float32))
        _C.rope(x, angles, angles, guarded.copy(x), isa)
        _C.gqa_attention(
            x, guarded.copy(x[:, :1]), guarded.copy(x[:, :1]), 1.0, guarded.copy(x), isa
        )


def test_sums_that_would_not_fit_are_refused():
    weight = quant.PackedWeight("int8", 1, 132_128, np.zeros(64 + 16 * 132_128, np.uint8))
    x, out = np.zeros((1, 132_128), np.float32), np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="at most 132104 columns for int8 activations"):
        _C.linear(x, weight.as_tuple(), out, "int8")
    _C.linear(x, weight.as_tuple(), out, "int8_g32")


def test_bad_arguments_are_refused():
    weight = quant.pack(matrix(4, 8, 0))
    x, out = matrix(2, 8, 0), matrix(2, 4, 0)
    for arguments, message in [
        (
            (x[:, :7].copy(), weight.as_tuple(), out, "float"),
            r"x must be .* of shape \(any, 8\), got float32 \(2, 7\)",
        ),
        ((x.astype(np.float64), weight.as_tuple(), out, "float"), "x must be C-contiguous float32"),
        ((x.T.copy().T, weight.as_tuple(), out, "float"), "x must be C-contiguous float32"),
        ((x, weight.as_tuple(), out[:1], "float"), r"out must be .* of shape \(2, 4\)"),
        ((x, weight.as_tuple(), out, "int8_g32"), "float weights float ones"),
        (
            (x, weight.as_tuple(), out, "int5"),
            "activation must be float, int8, int8_g32 or int8_g32_plain, got int5",
        ),
        ((x, ("int3", 4, 8, weight.data), out, "float"), "unknown weight kind int3"),
        (
            (x, ("fp32", 5, 8, weight.data), out, "float"),
            r"weight must hold 160 contiguous, aligned bytes .* got 128",
        ),
        ((x, weight.as_tuple(), out, "float", "sse9"), "isa must be one of .* got sse9"),
        ((x, weight.as_tuple(), out, "float", "", 0), r"threads must be in 1\.\.1024, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.linear(*arguments)
