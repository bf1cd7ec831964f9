"""Reads one tensor of a GGUF file: as codes where our kernels know the grid, else as float32."""

from pathlib import Path

import numpy as np

from ..quant import GROUP, QuantizedTensor
from .floats import CHUNK, read_array, read_floats
from .gguf_file import GGUFTensor

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# ggml's blocks of 32: float16 scale `d`, float16 minimum `m`, codes `q`. A 4-bit block holds
# element j in the low half of byte j and element j + 16 in the high half.
BLOCKS = {
    "Q4_0": np.dtype([("d", "<f2"), ("q", "u1", GROUP // 2)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", GROUP // 2)]),
    "Q8_0": np.dtype([("d", "<f2"), ("q", "i1", GROUP)]),
}


def can_decode(type_name: str) -> bool:
    """Tell whether tensors of a GGUF type can be read; not every type of ggml holds weights."""
    if type_name in FLOATS or type_name in BLOCKS:
        return True
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[type_name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def stored_dtype(tensor: GGUFTensor) -> str:
    """Name what `read_gguf_tensor` reads, as `StoredTensor.dtype` does."""
    if tensor.type in BLOCKS and len(tensor.shape) == 2:
        return {"Q4_0": "int4_sym", "Q4_1": "int4", "Q8_0": "int8"}[tensor.type]
    return FLOATS.get(tensor.type, "float32")


def read_gguf_tensor(path: Path, tensor: GGUFTensor) -> np.ndarray | QuantizedTensor:
    """Read a tensor: Q4_0, Q4_1 and Q8_0 matrices bit for bit as codes, the rest as float32.

    Raises:
        CheckpointError: the file became shorter since it was opened.
    """
    if tensor.type in FLOATS:
        return read_floats(path, tensor.offset, tensor.shape, FLOATS[tensor.type])
    if tensor.type in BLOCKS and len(tensor.shape) == 2:
        return _read_codes(path, tensor)
    return _dequantize(path, tensor)


def _read_codes(path: Path, tensor: GGUFTensor) -> np.ndarray | QuantizedTensor:
    rows, cols = tensor.shape
    groups = cols // GROUP
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        blocks = read_array(file, BLOCKS[tensor.type], rows * groups).reshape(rows, groups)
    scales = np.ascontiguousarray(blocks["d"], np.float16)
    if tensor.type == "Q8_0":
        codes = np.ascontiguousarray(blocks["q"]).reshape(rows, cols)
        return QuantizedTensor("int8_g32", codes, scales)
    nibbles = blocks["q"]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(rows, cols)
    if tensor.type == "Q4_0":
        return QuantizedTensor("int4_sym_g32", codes, scales)
    mins = np.ascontiguousarray(blocks["m"], np.float16)
    return QuantizedTensor("int4_g32", codes, scales, mins)


def _dequantize(path: Path, tensor: GGUFTensor) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.type]
    out = np.empty(tensor.shape, np.float32)
    rows = out.reshape(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes // len(rows)
    step = max(1, CHUNK // rows.shape[1])  # rows at a time: decoding needs several float copies
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            raw = read_array(file, np.dtype("u1"), len(part) * row_bytes)
            with np.errstate(all="ignore"):  # damaged scales overflow; the caller refuses those
                part[:] = dequantize(raw.reshape(len(part), row_bytes), kind)
    return out
