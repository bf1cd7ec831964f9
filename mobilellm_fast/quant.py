"""Weight formats: how numbers become codes, and how codes lie in memory.

A weight matrix has ``rows`` output channels and ``cols`` inputs. Its *kind* says how it is stored:

================  ===================================================  ===================
kind              value of an element                                  bits per weight
================  ===================================================  ===================
``fp32``          itself, float32, row-major                           32
``bf16``          itself, upper half of a float32 as uint16            16
``int8``          ``scale[row] * code``, code in [-127, 127]           8 + 32 / cols
``int8_g32``      ``scale[row, group] * code`` (GGUF Q8_0)             8.5
``int4_g32``      ``scale[row, group] * code + min[row, group]``,      5
                  code in [0, 15] (GGUF Q4_1)
``int4_sym_g32``  ``scale[row, group] * (code - 8)`` (GGUF Q4_0)       4.5
================  ===================================================  ===================

Groups are 32 consecutive inputs of one row, because MobileLLM's widths (576, 960, 1152, 1600)
are multiples of 32 but not of 128. Quantized kinds are packed into *tiles* of 16 rows; inside a
tile the order is input-major, 4 inputs of each of the 16 rows at a time (64 bytes, one cache
line), so that one dot-product instruction serves 4 (NEON), 8 (AVX2) or 16 (AVX-512) rows and no
horizontal sum is ever needed. Scales lie between the codes, where they are wanted. The layout is
the same on every machine; ``csrc/quant.h`` states it byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import MobileLLMError

FORMATS = ("fp32", "bf16", "int8", "w8a8", "int4", "int4_all")
INTEGER_FORMATS = FORMATS[2:]
GROUP = 32  # inputs that share a scale in the *_g32 kinds; inputs are padded to a multiple of it
TILE_ROWS = 16  # rows of a packed tile: the int32 lanes of one 512-bit register
STEP = 4  # inputs of one row that lie next to each other: one lane of a dot-product instruction
ALIGNMENT = 64  # bytes: one cache line, one 512-bit load
ROWS_PER_BLOCK = 4096  # rows converted at a time: 9 MB of float32 at 576 columns
HEADS = ("embed_tokens.weight", "lm_head.weight")  # names of what may serve as output head
INT4_KINDS = ("int4_g32", "int4_sym_g32")
QUANTIZED_KINDS = ("int8", "int8_g32", *INT4_KINDS)
KINDS = ("fp32", "bf16", *QUANTIZED_KINDS)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight matrix on a quantization grid, not yet packed.

    Args:
        kind: one of `QUANTIZED_KINDS`.
        codes: ``(rows, cols)`` int8, or uint8 in 0..15 for `INT4_KINDS`.
        scales: ``(rows,)`` float32 for ``int8``, else ``(rows, cols / 32)`` float16.
        mins: ``(rows, cols / 32)`` float16 for ``int4_g32``, else ``None``.
    """

    kind: str
    codes: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.codes.shape

    @property
    def minimums(self) -> np.ndarray | None:
        """What is added to scaled codes, ``(rows, cols / 32)`` float32, or None for nothing."""
        if self.kind == "int4_sym_g32":
            return np.float32(-8) * self.scales.astype(np.float32)
        return None if self.mins is None else self.mins.astype(np.float32)

    def take_rows(self, index: np.ndarray) -> QuantizedTensor:
        """Return the rows ``index`` (a permutation or a selection) in that order."""
        mins = None if self.mins is None else self.mins[index]
        return QuantizedTensor(self.kind, self.codes[index], self.scales[index], mins)

    def dequantize(self) -> np.ndarray:
        """Return the values, ``(rows, cols)`` float32."""
        if self.kind == "int8":
            return self.codes * self.scales[:, None]
        rows, cols = self.codes.shape
        groups = -(-cols // GROUP)
        codes = np.zeros((rows, groups * GROUP), np.float32)
        codes[:, :cols] = self.codes
        values = codes.reshape(rows, groups, GROUP) * self.scales.astype(np.float32)[..., None]
        if self.minimums is not None:
            values += self.minimums[..., None]
        return np.ascontiguousarray(values.reshape(rows, -1)[:, :cols])


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight matrix in the memory layout that the kernels read.

    Args:
        kind: one of the kinds of this module.
        rows: output channels.
        cols: inputs.
        data: ``(rows, cols)`` float32 (``fp32``) or uint16 (``bf16``), else flat uint8 tiles,
            64-byte aligned.
    """

    kind: str
    rows: int
    cols: int
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of `data`: tiles with their scales and padding."""
        return self.data.nbytes

    def dequantize(self) -> np.ndarray:
        """Return the values, ``(rows, cols)`` float32."""
        if self.kind == "fp32":
            return self.data
        if self.kind == "bf16":
            return from_bf16(self.data)
        return unpack(self).dequantize()

    def as_tuple(self) -> tuple[str, int, int, np.ndarray]:
        """Return ``(kind, rows, cols, data)``, the form that the C++ extension takes."""
        return self.kind, self.rows, self.cols, self.data


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 (nearest, ties to even); returns the bits as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantize(weight: np.ndarray, kind: str) -> QuantizedTensor:
    """Round a float matrix to the nearest codes of ``kind``.

    Args:
        weight: ``(rows, cols)`` float32, finite.
        kind: one of `QUANTIZED_KINDS`.

    Raises:
        MobileLLMError: unknown kind, or a weight that is not finite.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if not np.isfinite(weight).all():
        raise MobileLLMError("[quantize] weight must be finite, got NaN or infinity")
    if kind == "int8":
        scales = np.abs(weight).max(axis=1, initial=0.0) / np.float32(127)
        codes = np.rint(weight * _reciprocal(scales)[:, None])
        return QuantizedTensor(kind, np.clip(codes, -127, 127).astype(np.int8), scales)
    if kind not in QUANTIZED_KINDS:
        raise MobileLLMError(f"[quantize] kind must be one of {QUANTIZED_KINDS}, got {kind!r}")

    rows, cols = weight.shape
    if np.abs(weight).max(initial=0) > np.finfo(np.float16).max:
        raise MobileLLMError(f"[quantize] weight exceeds the float16 scales of {kind}")
    # Pad with the row's last value: it widens no group's range.
    padded = np.pad(weight, ((0, 0), (0, -cols % GROUP)), mode="edge")
    groups = padded.reshape(rows, -1, GROUP)
    mins = None
    if kind == "int8_g32":
        scales = (np.abs(groups).max(axis=2) / np.float32(127)).astype(np.float16)
        offset, low, high, code_type = np.float32(0), -127, 127, np.int8
    elif kind == "int4_sym_g32":  # the value of largest magnitude is code 0, of either sign
        peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
        scales = (peak[..., 0] / np.float32(-8)).astype(np.float16)
        offset = np.float32(-8) * scales.astype(np.float32)[..., None]
        low, high, code_type = 0, 15, np.uint8
    else:
        mins = groups.min(axis=2).astype(np.float16)
        offset, low, high, code_type = mins.astype(np.float32)[..., None], 0, 15, np.uint8
        scales = ((groups.max(axis=2) - offset[..., 0]) / np.float32(15)).astype(np.float16)
    # Divide by the scale as stored, so that rounding it to float16 costs no second error.
    codes = np.rint((groups - offset) * _reciprocal(scales.astype(np.float32))[..., None])
    codes = np.clip(codes, low, high).astype(code_type).reshape(rows, -1)[:, :cols]
    return QuantizedTensor(kind, np.ascontiguousarray(codes), scales, mins)


def _reciprocal(scales: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where the scale is 0 or too small for that (a row or group of zeros)."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > 2.0**-100)


def pack(
    tensor: QuantizedTensor | np.ndarray, kind: str | None = None, out: np.ndarray | None = None
) -> PackedWeight:
    """Lay a matrix out for the kernels.

    Args:
        tensor: codes on a grid, or float32 ``(rows, cols)``.
        kind: the kind to store; ``None`` keeps a quantized tensor's own grid (float32: ``fp32``).
            A quantized tensor of another kind is dequantized and rounded again.
        out: flat uint8 of `packed_nbytes(kind, rows, cols)`, 64-byte aligned, to write to.
    """
    own = tensor.kind if isinstance(tensor, QuantizedTensor) else "fp32"
    kind = kind or own
    rows, cols = tensor.shape
    data = aligned_empty(packed_nbytes(kind, rows, cols)) if out is None else out
    if kind in ("fp32", "bf16"):
        data = data.view(np.float32 if kind == "fp32" else np.uint16).reshape(rows, cols)
    # In blocks of rows, so that the float32 copies of an embedding never exist at once.
    for start in range(0, rows, ROWS_PER_BLOCK):
        block = slice(start, min(start + ROWS_PER_BLOCK, rows))
        part = tensor.take_rows(block) if isinstance(tensor, QuantizedTensor) else tensor[block]
        if isinstance(part, QuantizedTensor) and part.kind != kind:
            part = part.dequantize()
        if kind == "fp32":
            data[block] = part
        elif kind == "bf16":
            data[block] = to_bf16(part)
        else:
            if not isinstance(part, QuantizedTensor):
                part = quantize(part, kind)
            nbytes = tile_nbytes(kind, cols)
            tiles = data.reshape(-1, nbytes)[start // TILE_ROWS :]
            _write_tiles(part, tiles[: _ceil_div(part.shape[0], TILE_ROWS)])
    return PackedWeight(kind, rows, cols, data)


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """Undo :func:`pack` for a quantized kind; codes, scales and mins come back bit for bit."""
    rows, cols, kind = weight.rows, weight.cols, weight.kind
    tiles, groups = _ceil_div(rows, TILE_ROWS), _ceil_div(cols, GROUP)
    body = weight.data.reshape(tiles, tile_nbytes(kind, cols))
    headers, quants = (np.ascontiguousarray(part) for part in _records(body, kind, groups))

    if kind in INT4_KINDS:
        both = quants.reshape(tiles, -1, 1, 4, TILE_ROWS, STEP)
        quants = np.concatenate([both & 15, both >> 4], axis=2)
    steps = quants.reshape(tiles, -1, TILE_ROWS, STEP)
    codes = steps.swapaxes(1, 2).reshape(tiles * TILE_ROWS, -1)[:rows, :cols]
    codes = np.ascontiguousarray(codes)

    if kind == "int8":
        return QuantizedTensor(
            kind, codes.view(np.int8), headers.view(np.float32).reshape(-1)[:rows]
        )
    per_header = headers.view(np.float16).reshape(tiles, -1, 2, TILE_ROWS)
    if kind != "int4_g32":
        scales = per_header.reshape(tiles, -1, TILE_ROWS).swapaxes(1, 2)
        scales = scales.reshape(tiles * TILE_ROWS, -1)[:rows, :groups]
        codes = codes if kind in INT4_KINDS else codes.view(np.int8)
        return QuantizedTensor(kind, codes, np.ascontiguousarray(scales))
    fields = per_header.transpose(2, 0, 3, 1).reshape(2, tiles * TILE_ROWS, groups)[:, :rows]
    return QuantizedTensor(kind, codes, fields[0].copy(), fields[1].copy())


def _write_tiles(tensor: QuantizedTensor, body: np.ndarray) -> None:
    """Write the codes and scales of ``tensor`` into ``body``, ``(tiles, tile_nbytes)`` uint8."""
    (rows, cols), kind = tensor.shape, tensor.kind
    tiles, groups = len(body), _ceil_div(cols, GROUP)
    even_groups = groups + (groups % 2 if _groups_per_header(kind, groups) == 2 else 0)

    codes = np.zeros((tiles * TILE_ROWS, even_groups * GROUP), np.uint8)
    codes[:rows, :cols] = tensor.codes.view(np.uint8)
    # Four codes of one row travel together, so move them as one uint32.
    words = codes.view(np.uint32).reshape(tiles, TILE_ROWS, -1).swapaxes(1, 2)
    quants = np.ascontiguousarray(words).view(np.uint8).reshape(tiles, even_groups, 2, -1)
    if kind in INT4_KINDS:  # steps 0..3 of a group in the low nibbles, 4..7 in the high ones
        quants = quants[:, :, 0] | (quants[:, :, 1] << 4)

    if kind == "int8":
        scales = np.zeros(tiles * TILE_ROWS, np.float32)
        scales[:rows] = tensor.scales
        header = scales.reshape(tiles, 1, TILE_ROWS)
    elif kind != "int4_g32":
        scales = np.zeros((tiles * TILE_ROWS, even_groups), np.float16)
        scales[:rows, :groups] = tensor.scales
        header = scales.reshape(tiles, TILE_ROWS, -1, 2).transpose(0, 2, 3, 1)
    else:
        fields = np.zeros((2, tiles * TILE_ROWS, groups), np.float16)
        fields[:, :rows] = tensor.scales, tensor.mins
        header = fields.reshape(2, tiles, TILE_ROWS, groups).transpose(1, 3, 0, 2)
    header = np.ascontiguousarray(header).reshape(tiles, header.shape[1], -1).view(np.uint8)
    records = np.concatenate([header, quants.reshape(tiles, header.shape[1], -1)], axis=2)
    # A last group that stands alone leaves out the codes of its missing partner.
    body[:] = records.reshape(tiles, -1)[:, : body.shape[1]]


def _records(body: np.ndarray, kind: str, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Split tiles into headers (tiles, records, 64) and codes (tiles, records, bytes)."""
    per_record = _groups_per_header(kind, groups)
    records = _ceil_div(groups, per_record)
    code_nbytes = per_record * GROUP * TILE_ROWS // (2 if kind in INT4_KINDS else 1)
    whole = np.zeros((len(body), records * (ALIGNMENT + code_nbytes)), np.uint8)
    whole[:, : body.shape[1]] = body
    whole = whole.reshape(len(body), records, -1)
    return whole[..., :ALIGNMENT], whole[..., ALIGNMENT:]


def tile_nbytes(kind: str, cols: int) -> int:
    """Bytes of one tile (16 rows); `csrc/quant.h` shows its layout."""
    groups = _ceil_div(cols, GROUP)
    headers = _ceil_div(groups, _groups_per_header(kind, groups))
    code_bits = 4 if kind in INT4_KINDS else 8
    return headers * ALIGNMENT + groups * GROUP * TILE_ROWS * code_bits // 8


def _groups_per_header(kind: str, groups: int) -> int:
    return {"int8": groups, "int4_g32": 1}.get(kind, 2)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def packed_nbytes(kind: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix."""
    if kind in ("fp32", "bf16"):
        return rows * cols * (4 if kind == "fp32" else 2)
    return _ceil_div(rows, TILE_ROWS) * tile_nbytes(kind, cols)


def aligned_empty(nbytes: int) -> np.ndarray:
    """Allocate uninitialised uint8 whose first byte is 64-byte aligned."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def activation_of(format: str) -> str:
    """What inputs of linear layers are rounded to in ``format`` at most, see `reference.linear`."""
    return {"fp32": "float", "bf16": "float", "w8a8": "int8"}.get(format, "int8_g32")


def activation_before(format: str, name: str, kind: str) -> str:
    """What the input of matrix `name`, stored in `kind`, is rounded to in ``format``.

    Wide groups (see `reference.round_activations`) go where they matter: before weights of 4 bits,
    and before the head, where a prompt has one row. `Executor` decides the same, for inputs that
    several matrices share together.
    """
    activation = activation_of(format)
    if activation != "int8_g32" or kind in INT4_KINDS or name.endswith(HEADS):
        return activation
    return "int8_g32_plain"


def kind_of(format: str, name: str, dtype: str) -> str:
    """Choose the kind that `format` stores matrix `name` in, which its file holds as `dtype`.

    A grid that the file brought along ("int4", "int8") is kept where the format allows it; `int4`
    stores the embedding and the head of a float checkpoint in int8, where four bits cost most, and
    `int4_all` stores every matrix in four bits.
    """
    own = {"int4": "int4_g32", "int4_sym": "int4_sym_g32", "int8": "int8_g32"}.get(dtype)
    if format in ("fp32", "bf16"):
        return format
    if format == "w8a8":  # the paper's scheme, exactly
        return "int8"
    if format == "int4_all":
        return own if own in INT4_KINDS else "int4_g32"
    if format == "int8":
        return "int8_g32" if own == "int8_g32" else "int8"
    if own is not None:
        return own
    return "int8" if name.endswith(HEADS) else "int4_g32"


def kinds_of(format: str) -> tuple[str, ...]:
    """Return the kinds that `kind_of` may choose for a format."""
    several = {
        "w8a8": ("int8",),
        "int8": ("int8", "int8_g32"),
        "int4": QUANTIZED_KINDS,
        "int4_all": INT4_KINDS,
    }
    return several.get(format, (format,))
