"""What kernels with matrix products share: tiles of row-major matrices, and the order of tiles.

A matrix comes as a pointer, or, where `described` allows, as a descriptor of its tiles, which the
copy engine of newer NVIDIA GPUs loads with neither registers nor instructions for addresses.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BAND = 8  # tile rows that are worked on together: they and the weights they meet stay in L2


@dataclass(frozen=True)
class Tiling:
    """How a matrix product is cut.

    Args:
        rows, outputs: of a tile of the result.
        inputs: that are added up at a time.
        warps, stages: of a program; stages are loads in flight, and the one that is computed with.
        programs: that run on one multiprocessor at a time.
        speed: in a product of many tiles, relative to other tilings.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    programs: int
    speed: float

    def tiles(self, rows: int, outputs: int) -> int:
        """Count the tiles of a result."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(outputs, self.outputs)

    def cost(self, rows: int, outputs: int, processors: int) -> float:
        """Estimate the time of a result: the tiles of the multiprocessor with most of them.

        One that has fewer tiles than programs is slower, by about a half: a program alone waits for
        its loads, its sums and its stores in turn.
        """
        most = triton.cdiv(self.tiles(rows, outputs), processors)
        slowdown = 1.0 if most >= self.programs else 1.5
        return most * self.rows * self.outputs * slowdown / self.speed


def choose(tilings: Sequence[Tiling], rows: int, outputs: int, processors: int) -> Tiling:
    """Choose the tiling that should be fastest for a result of (rows, outputs)."""
    return min(tilings, key=lambda tiling: tiling.cost(rows, outputs, processors))


def described(*matrices: Tensor) -> bool:
    """Whether tiles of these (rows, cols) matrices can come through the copy engine."""
    bits = 0
    for m in matrices:
        bits |= m.data_ptr() | m.shape[-1] * m.element_size()
    return bits % 16 == 0 and _has_copy_engine(matrices[0].device)


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    if device.type == "cpu":
        return True  # interpreted
    # Hopper and Blackwell of data centers; others have it, but half of the shared memory
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def tile_of(matrix: Tensor, rows: int, cols: int, tma: bool) -> Tensor | TensorDescriptor:
    """What `load_tile` takes for tiles of (rows, cols)."""
    return TensorDescriptor.from_tensor(matrix, [rows, cols]) if tma else matrix


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where kernels are interpreted, so that loops are run."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def depth(stages: int) -> int:
    """Stages as this machine's compiler takes them: AMD's makes no more than 2 of some loops."""
    return min(stages, 2) if torch.version.hip else stages


@triton.jit
def load_tile(
    matrix, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):  # -> (ROWS, COLS), zeros outside of the matrix
    """Load a tile by the copy engine (TMA), or through pointers."""
    if TMA:
        return matrix.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        return tl.load(matrix + r.to(tl.int64)[:, None] * cols + c[None, :], mask=mask, other=0)


@triton.jit
def store_tile(
    matrix, values, row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):
    """Store what of a tile lies within the matrix."""
    if TMA:
        matrix.store([row, col], values)
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        tl.store(matrix + r.to(tl.int64)[:, None] * cols + c[None, :], values, mask=mask)


@triton.jit
def tile_place(tile, down, across, BAND: tl.constexpr):  # -> tile row, tile column
    """Order tiles in bands of BAND tile rows, column by column, so that neighbours share inputs."""
    per_band = BAND * across
    first = tile // per_band * BAND
    height = min(down - first, BAND)
    within = tile % per_band
    return first + within % height, within // height
