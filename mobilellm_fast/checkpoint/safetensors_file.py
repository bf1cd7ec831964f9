"""Reads and writes `.safetensors` files without torch, one tensor at a time."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..files import brief, whole_file
from ..quant import ALIGNMENT
from .checkpoint import StoredTensor
from .floats import read_floats
from .packed_tensors import read_bytes

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PACKED = "U8"  # quantized matrices, see `packed_tensors`
WRITTEN = {np.dtype(np.uint8): PACKED, np.dtype(np.float32): "F32", np.dtype(np.uint16): "BF16"}


def safetensors_tensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a file.

    Raises:
        CheckpointError: the file is damaged, or holds something else than floats.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks the header, that every tensor has shape * dtype bytes, and that the
        # tensors cover the file without holes or overlaps. The file is not read any further:
        # the library would need torch to hand out bfloat16.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({brief(error)})") from None

    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        offset = 8 + header_size + entry["data_offsets"][0]
        if entry["dtype"] == PACKED and ".packed_" in name:
            tensors[name] = StoredTensor(shape, "uint8", partial(read_bytes, path, offset, shape))
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {name} must be one of {', '.join(DTYPES)}, got {entry['dtype']}"
            )
        tensors[name] = StoredTensor(shape, dtype, partial(read_floats, path, offset, shape, dtype))
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a file that appears complete under its name, or not at all.

    What is a multiple of 64 bytes, such as packed matrices, comes first and so lies at one.

    Args:
        tensors: float32, uint16 (the bits of bfloat16) or uint8, by name.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT != 0)
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers wants to know
    offset = 0
    for name in ordered:
        array = tensors[name]
        end = offset + array.nbytes
        entry = {"dtype": WRITTEN[array.dtype], "shape": array.shape, "data_offsets": [offset, end]}
        header[name], offset = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(tensors[name]).data)
