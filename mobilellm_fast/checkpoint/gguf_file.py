"""The GGUF container: metadata and tensor directory, checked against the size of the file.

The `gguf` package's own reader trusts what a file says of itself; here every count, length and
offset is compared with the bytes that are there before anything is allocated for it.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from ..files import brief

# metadata value type -> numpy type; the two missing ones are 8, string, and 9, array
SCALARS = {
    kind: np.dtype(code)
    for kind, code in enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])
} | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
STRING, ARRAY = 8, 9
MAX_DIMS = 4  # ggml's own limit


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` is rows first, `type` a name such as "Q4_1", sizes in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class Metadata(dict[str, Any]):
    """Metadata by key; values are bool, int, float, str, numpy array or list of str."""

    def typed(self, key: str, kind: type, default: Any = None) -> Any:
        """Return the value of `key`, or `default` where the file has none.

        Raises:
            CheckpointError: the value is not of type `kind` (an int passes for a float).
        """
        if key not in self:
            return default
        value = self[key]
        if type(value) is kind or (kind is float and type(value) is int):
            return value
        raise CheckpointError(f"{key} must be of type {kind.__name__}, got {brief(value)}")


@dataclass(frozen=True)
class GGUFFile:
    """An opened file."""

    path: Path
    metadata: Metadata
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read the metadata and the tensor directory of a GGUF file (version 2 or 3).

    Raises:
        CheckpointError: the file cannot be read, or is not a sound GGUF file; says what is wrong.
    """
    try:
        with open(path, "rb") as file:
            return _parse(path, _Bytes(file, path.stat().st_size))
    except (OSError, _BadFile) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file ({brief(error)})") from None


class _BadFile(Exception):
    pass


class _Bytes:
    """A file read from front to back, never beyond its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = self.left = size

    @property
    def position(self) -> int:
        return self.size - self.left

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _BadFile(f"{count} bytes expected at byte {self.position}, {self.left} are left")
        self.left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise _BadFile("the file became shorter while it was read")
        return data

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def string(self) -> str:
        at = self.position
        try:
            return self.take(self.u64()).decode("utf-8")
        except UnicodeDecodeError:
            raise _BadFile(f"the string at byte {at} is not UTF-8") from None


def _parse(path: Path, data: _Bytes) -> GGUFFile:
    if data.take(4) != b"GGUF":
        raise _BadFile("it does not begin with GGUF")
    version = data.u32()
    if version not in (2, 3):
        raise _BadFile(f"version must be 2 or 3, little-endian; got {version}")
    tensor_count, metadata_count = data.u64(), data.u64()

    metadata = Metadata()
    _repeat(metadata_count, lambda: _add(metadata, data.string(), lambda: _value(data, data.u32())))
    infos: dict[str, tuple] = {}
    _repeat(tensor_count, lambda: _add(infos, data.string(), lambda: _tensor_info(data)))

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _BadFile(f"general.alignment must be a power of two, got {alignment}")
    data_start = -(-data.position // alignment) * alignment
    tensors = {
        name: _locate(name, *info, alignment, data_start, data.size) for name, info in infos.items()
    }
    _check_overlap(list(tensors.values()))
    return GGUFFile(path, metadata, tensors)


def _repeat(count: int, read: Callable[[], None]) -> None:
    # A wrong count needs no check of its own: each entry takes bytes, and those run out.
    for _ in range(count):
        read()


def _add(entries: dict, name: str, read: Callable[[], Any]) -> None:
    if name in entries:
        raise _BadFile(f"{name!r} is there twice")
    entries[name] = read()


def _value(data: _Bytes, kind: int) -> Any:
    if kind in SCALARS:
        return np.frombuffer(data.take(SCALARS[kind].itemsize), SCALARS[kind])[0].item()
    if kind == STRING:
        return data.string()
    if kind != ARRAY:
        raise _BadFile(f"metadata of unknown type {kind}")
    item, count = data.u32(), data.u64()
    if item in SCALARS:
        return np.frombuffer(data.take(count * SCALARS[item].itemsize), SCALARS[item])
    if item != STRING:
        raise _BadFile(f"metadata array of unsupported type {item}")
    return [data.string() for _ in range(count)]


def _tensor_info(data: _Bytes) -> tuple[tuple[int, ...], int, int]:
    """Return shape (rows first), type number, offset into the data section."""
    dims = data.u32()
    if not 1 <= dims <= MAX_DIMS:
        raise _BadFile(f"a tensor must have 1 to {MAX_DIMS} dimensions, got {dims}")
    shape = struct.unpack(f"<{dims}Q", data.take(8 * dims))
    return shape[::-1], data.u32(), data.u64()


def _locate(
    name: str,
    shape: tuple[int, ...],
    type_number: int,
    offset: int,
    alignment: int,
    data_start: int,
    file_size: int,
) -> GGUFTensor:
    type_name, block, block_bytes = _type(name, type_number)
    if 0 in shape or shape[-1] % block:
        raise _BadFile(f"tensor {name} of type {type_name} cannot have shape {shape}")
    if offset % alignment:
        raise _BadFile(f"tensor {name} is not aligned to {alignment} bytes")
    nbytes = math.prod(shape) // block * block_bytes
    start = data_start + offset
    if start + nbytes > file_size:
        raise _BadFile(
            f"tensor {name} ends at byte {start + nbytes}, the file has {file_size} bytes"
        )
    return GGUFTensor(name, shape, type_name, start, nbytes)


def _type(name: str, number: int) -> tuple[str, int, int]:
    """Return name, elements per block and bytes per block of a tensor type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
        return kind.name, *GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise _BadFile(f"tensor {name} is of unknown type {number}") from None


def _check_overlap(tensors: list[GGUFTensor]) -> None:
    tensors = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.nbytes > after.offset:
            raise _BadFile(f"tensors {before.name} and {after.name} overlap")
