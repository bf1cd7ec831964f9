"""Quantized matrices in a safetensors file, as `interchange` writes them and kernels read them."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import quant
from ..config import MobileLLMConfig, expected_shapes
from ..errors import CheckpointError
from ..quant import PackedWeight, QuantizedTensor
from .checkpoint import StoredTensor
from .floats import read_array

METHOD = "mobilellm_fast"  # `quant_method` in config.json
DTYPES = {"int8": "int8_rows", "int8_g32": "int8", "int4_g32": "int4", "int4_sym_g32": "int4_sym"}


def packed_name(name: str, kind: str) -> str:
    """The name of a matrix's packed data: "x.weight" of kind "int8" is "x.packed_int8"."""
    return f"{name.removesuffix('weight')}packed_{kind}"


def format_of(path: Path, raw: Mapping[str, Any]) -> str | None:
    """Return the format that a config.json says its weights are in, None for floats.

    Raises:
        CheckpointError: quantization that is not ours.
    """
    settings = raw.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or settings.get("quant_method") != METHOD:
        raise CheckpointError(f"{path}: quantization_config = {settings!r} is not supported")
    if settings.get("format") not in quant.INTEGER_FORMATS:
        raise CheckpointError(
            f"{path}: quantization_config must name a format of {quant.INTEGER_FORMATS}, "
            f"got {settings.get('format')!r}"
        )
    return settings["format"]


def named_matrices(
    path: Path, tensors: Mapping[str, StoredTensor], config: MobileLLMConfig
) -> dict[str, StoredTensor]:
    """Give packed tensors the names and the shapes of the matrices that they hold."""
    named = dict(tensors)
    for name, shape in expected_shapes(config).items():
        for kind in quant.QUANTIZED_KINDS if len(shape) == 2 else ():
            stored = named.pop(packed_name(name, kind), None)
            if stored is None:
                continue
            if name in named:
                raise CheckpointError(f"{path}: {name} is there twice")
            nbytes = quant.packed_nbytes(kind, *shape)
            if stored.dtype != "uint8" or stored.shape != (nbytes,):
                raise CheckpointError(
                    f"{path}: {packed_name(name, kind)} must have {nbytes} bytes for {shape}, "
                    f"got {stored.dtype} {stored.shape}"
                )
            read = partial(_unpack, path, packed_name(name, kind), stored, kind, shape)
            named[name] = StoredTensor(shape, DTYPES[kind], read)
    return named


def read_bytes(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read uint8 at a place of a file, to a multiple of 64 bytes of memory."""
    out = quant.aligned_empty(math.prod(shape))
    with open(path, "rb") as file:
        file.seek(offset)
        out[:] = read_array(file, np.dtype(np.uint8), out.size)
    return out


def _unpack(
    path: Path, name: str, stored: StoredTensor, kind: str, shape: tuple[int, int]
) -> QuantizedTensor:
    tensor = quant.unpack(PackedWeight(kind, *shape, stored.read()))
    # -128 has no counterpart, and kernels rely on that
    if tensor.codes.dtype == np.int8 and (tensor.codes == -128).any():
        raise CheckpointError(f"{path}: {name} must have codes from -127, got -128")
    return tensor
