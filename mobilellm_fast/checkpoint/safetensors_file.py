"""Reads `.safetensors` files without torch, one tensor at a time."""

import json
from functools import partial
from pathlib import Path

from ..errors import CheckpointError
from ..files import brief
from .checkpoint import StoredTensor
from .floats import read_floats

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {name} must be one of {', '.join(DTYPES)}, got {entry['dtype']}"
            )
        shape = tuple(entry["shape"])
        offset = 8 + header_size + entry["data_offsets"][0]
        tensors[name] = StoredTensor(shape, dtype, partial(read_floats, path, offset, shape, dtype))
    return tensors
