"""Launches of one kernel with the same sizes again and again, without Triton's launcher.

Triton binds arguments, looks at each for what the compiler may assume, and finds the build in a
dictionary, which takes the host longer than a short kernel takes the GPU. A `Launch` does that
once: all its arguments but the tensors are fixed, and of those it only checks the alignment.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED = 16  # bytes: what Triton tells the compiler of pointers that are multiples
SIZES = 1024  # launches of different sizes that a launcher keeps
DESCRIPTORS = 4096  # addresses whose descriptors are kept

# whose builds are called as below, which Triton does not promise
_KNOWN = (3, 5) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 7)


class _Address:
    """What a descriptor asks of a tensor."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Tiles:
    """Descriptors of matrices of one size, each in one piece.

    Args:
        shape: (rows, cols) of a matrix.
        block: the same of a tile.
        dtype: of the elements.
    """

    def __init__(self, shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.block, self.dtype = shape, list(block), dtype
        self._known: dict[int, TensorDescriptor] = {}

    def of(self, tensor: Tensor | _Address) -> TensorDescriptor:
        """Return a descriptor of what is at the address of a tensor of as many elements."""
        return TensorDescriptor(tensor, self.shape, (self.shape[1], 1), self.block)

    def at(self, address: int) -> TensorDescriptor:
        """Return a descriptor that does not keep a tensor alive."""
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= DESCRIPTORS:
                self._known.clear()
            found = self._known[address] = self.of(_Address(address, self.dtype))
        return found


class Launch:
    """A launch whose arguments but the tensors are fixed.

    Args:
        kernel: a function of `triton.jit`, whose first parameters are the tensors.
        grid: its programs.
        numbers: the arguments behind the tensors, in order.
        tiles: for tensors that go as descriptors: their place -> `Tiles`.
        constants: the `tl.constexpr` parameters, and options such as `num_warps`.

    What else a build depends on, dtypes and the device, has to be the same in every call.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[Any],
        tiles: dict[int, Tiles] | None = None,
        **constants: Any,
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.numbers, self.tiles, self.constants = tuple(numbers), tiles or {}, constants
        self._run: Any = None
        self._between: tuple = ()  # arguments of the build's launcher, before the tensors
        self._behind: tuple = ()  # and behind them

    def __call__(self, *tensors: Tensor) -> None:
        addresses = [t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        aligned = bits % ALIGNED == 0
        if self._run is not None and aligned:
            for place, tiles in self.tiles.items():
                addresses[place] = tiles.at(addresses[place])
            stream = self._stream(self._device)
            self._run(*self.grid, stream, *self._between, *addresses, *self._behind)
            return
        args = [self.tiles[i].of(t) if i in self.tiles else t for i, t in enumerate(tensors)]
        build = self.kernel[self.grid](*args, *self.numbers, **self.constants)
        if _KNOWN and aligned and hasattr(build, "packed_metadata"):
            self._keep(build, len(tensors))

    def _keep(self, build: Any, tensors: int) -> None:
        names = self.kernel.arg_names[tensors + len(self.numbers) :]
        self._behind = (*self.numbers, *(self.constants[name] for name in names))
        # what is passed on to hooks, and the hooks, of which there are none
        self._between = (build.function, build.packed_metadata, None, None, None)
        self._stream = driver.active.get_current_stream
        self._device = driver.active.get_current_device()
        self._run = build.run
