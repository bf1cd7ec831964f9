"""Reads `pytorch_model.bin`: a zip of raw storages and a pickle that may name tensors only."""

import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..files import brief
from .checkpoint import StoredTensor
from .floats import FLOAT_TYPES

# Pages of a mapped file count as the process's memory until it is unmapped: so map it afresh
# after this many bytes.
BYTES_PER_MAPPING = 32 << 20


def torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a file that `torch.save` wrote (torch 1.6 or newer).

    Raises:
        CheckpointError: the file is damaged, its pickle names anything but tensors and their
            storages (no code in it is run), or torch is not installed.
    """
    file = _TorchFile(path)
    return {
        name: StoredTensor(tuple(tensor.shape), _dtype(tensor), partial(file.read, name))
        for name, tensor in file.state.items()
    }


class _TorchFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = _load(path)
        self._mapped = 0

    def read(self, name: str) -> np.ndarray:
        import torch

        if self._mapped >= BYTES_PER_MAPPING:
            self.state = None
            self.state, self._mapped = _load(self.path), 0
        tensor = self.state[name]
        self._mapped += tensor.nbytes
        widened = tensor.detach().to(torch.float32, copy=True)  # the mapping must not outlive us
        return np.ascontiguousarray(widened.numpy())


def _load(path: Path) -> dict:
    try:
        import torch
    except ImportError:
        raise CheckpointError(f"{path}: reading a .bin checkpoint needs torch installed") from None

    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(f"{path}: not a zip file as torch.save writes it")
    try:
        with warnings.catch_warnings():  # about damaged files, which it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types for damaged files
        raise CheckpointError(f"{path}: {_reason(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a dict of tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        _check(path, name, tensor)
    return state


def _check(path: Path, name: object, tensor: object) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise CheckpointError(f"{path}: must map names to tensors, got {name!r}: {kind}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name} must be dense, got {tensor.layout}")
    if _dtype(tensor) not in FLOAT_TYPES:
        raise CheckpointError(
            f"{path}: tensor {name} must be one of {', '.join(FLOAT_TYPES)}, got {_dtype(tensor)}"
        )
    # A few bytes seen through zero strides could pretend to be terabytes.
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: tensor {name} is larger than its data in the file")


def _dtype(tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    """torch explains over many lines; keep the fact."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return f"refused: the pickle names {named[1]}, and only tensors are read"
    return f"not a readable torch file ({brief(error)})"
