"""Matrix times vector, for one decoded token: tiles of rows, requested before they are needed.

A tile is `ROWS` rows of a weight matrix, one per warp. Its inputs are cut into pieces of up to
1024, and a piece of a tile has the shape `(LANES, ROWS, chunks, VEC)`: 32 lanes side by side along
the inputs, each with `VEC` neighbouring ones, which is one load of up to 16 bytes, chunk after
chunk. The order of the axes is the one in which Triton deals out lanes, then warps: so a row is
summed within a warp. A piece of the inputs, `(PIECE,)`, spreads over all threads, and is dealt to
every warp through shared memory.

`load_tile` and `multiply_tile` are apart because weights are known before inputs are: a tile is
requested, then whoever computes the inputs is waited for.
"""

import triton
import triton.language as tl

from .grid_sync import receive

LANES = tl.constexpr(32)
PIECE = tl.constexpr(1024)


@triton.constexpr_function
def row_stride(COLS, KIND):
    """Elements of `codes` per row: bytes of two inputs each for int4_g32, else inputs."""
    return (COLS + 31) // 32 * 16 if KIND == "int4_g32" else COLS


@triton.constexpr_function
def group_count(COLS):
    """Groups of 32 inputs, which share a scale in the *_g32 kinds."""
    return (COLS + 31) // 32


@triton.constexpr_function
def piece_count(COLS):
    return (COLS + 1023) // 1024


@triton.constexpr_function
def piece_size(COLS, piece):
    """Inputs of a piece, those beyond the last included: a power of two of at least 256."""
    rest = max(COLS - 1024 * piece, 256)
    return min(1 << (rest - 1).bit_length(), 1024)


@triton.constexpr_function
def vector_width(COLS, KIND, piece):
    """Elements of `codes` that a lane loads at once."""
    nbytes = {"fp32": 4, "bf16": 2, "fp16": 2}.get(KIND, 1)
    stride = (COLS + 31) // 32 * 16 if KIND == "int4_g32" else COLS
    rest = max(COLS - 1024 * piece, 256)
    size = min(1 << (rest - 1).bit_length(), 1024)
    per_lane = size // 32 // (2 if KIND == "int4_g32" else 1)
    return min(16 // nbytes, per_lane, stride & -stride)


@triton.constexpr_function
def chunk_count(COLS, KIND, piece):
    rest = max(COLS - 1024 * piece, 256)
    size = min(1 << (rest - 1).bit_length(), 1024)
    nbytes = {"fp32": 4, "bf16": 2, "fp16": 2}.get(KIND, 1)
    stride = (COLS + 31) // 32 * 16 if KIND == "int4_g32" else COLS
    halves = 2 if KIND == "int4_g32" else 1
    return size // halves // 32 // min(16 // nbytes, size // 32 // halves, stride & -stride)


@triton.jit
def share_of(count: tl.constexpr, program, PROGRAMS: tl.constexpr):  # -> first, end
    """Split `count` rows evenly: what falls to one program."""
    return program * count // PROGRAMS, (program + 1) * count // PROGRAMS


@triton.constexpr_function
def tile_count(count, PROGRAMS, ROWS):
    """How many tiles of ROWS rows the largest share has."""
    return (-(-count // PROGRAMS) + ROWS - 1) // ROWS


@triton.jit
def load_tile(
    codes, scales, row, live, COLS: tl.constexpr, KIND: tl.constexpr
):  # -> codes of each piece, scales of each piece
    """Request the rows `row` (ROWS,) of a matrix, those that are `live`."""
    stride: tl.constexpr = row_stride(COLS, KIND)
    groups: tl.constexpr = group_count(COLS)
    pieces = ()
    piece_scales = ()
    for piece in tl.static_range(piece_count(COLS)):
        lane = _lane(COLS, KIND, piece)
        inside = (lane < stride)[:, None, :] & live[None, :, None]
        place = codes + (row[None, :, None] * stride + lane[:, None, :])[:, :, :, None]
        place += tl.arange(0, vector_width(COLS, KIND, piece))[None, None, None, :]
        pieces = pieces + (tl.load(place, mask=inside[:, :, :, None], other=0),)
        if KIND == "int4_g32" or KIND == "int8_g32":
            group = lane // (16 if KIND == "int4_g32" else 32)
            place = scales + row[None, :, None] * groups + group[:, None, :]
            piece_scales = piece_scales + (tl.load(place, mask=inside, other=0),)
    if KIND == "int8":
        piece_scales = (tl.load(scales + row, mask=live, other=0),)
    return pieces, piece_scales


@triton.jit
def _lane(COLS: tl.constexpr, KIND: tl.constexpr, piece: tl.constexpr):
    """Where in a row of codes each lane of each chunk begins: (LANES, chunks)."""
    width: tl.constexpr = vector_width(COLS, KIND, piece)
    chunk = tl.arange(0, chunk_count(COLS, KIND, piece))
    first: tl.constexpr = piece * (512 if KIND == "int4_g32" else 1024)
    return first + (chunk[None, :] * LANES + tl.arange(0, LANES)[:, None]) * width


@triton.jit
def receive_inputs(
    vector, epoch, COLS: tl.constexpr, ROWS: tl.constexpr, WAIT: tl.constexpr
):  # -> (PIECE,) of each piece
    """Wait for a vector (COLS,) that other programs publish."""
    pieces = ()
    for piece in tl.static_range(piece_count(COLS)):
        index = piece * PIECE + tl.arange(0, piece_size(COLS, piece))
        values = receive(
            vector, index, index < COLS, epoch, piece_size(COLS, piece), ROWS * LANES, WAIT
        )
        pieces = pieces + (values,)
    return pieces


@triton.jit
def load_norm(weight, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr):
    """Request the weights of a norm, in the shape of a tile: (LANES, ROWS, chunks, VEC), twice
    for int4_g32."""
    pieces = ()
    for piece in tl.static_range(piece_count(COLS)):
        lane = _lane(COLS, KIND, piece)
        if KIND == "int4_g32":
            lane = lane // 16 * 32 + lane % 16
        place = lane[:, None, :, None] + tl.zeros((1, ROWS, 1, 1), tl.int32)
        place += tl.arange(0, vector_width(COLS, KIND, piece))[None, None, None, :]
        pieces = pieces + (tl.load(weight + place, mask=place < COLS, other=0),)
        if KIND == "int4_g32":
            pieces = pieces + (tl.load(weight + place + 16, mask=place + 16 < COLS, other=0),)
    return pieces


@triton.jit
def deal(x, piece: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr):
    """Give a piece of the inputs to every warp, in the order of its codes.

    Returns:
        (LANES, 1, chunks, VEC), and for int4_g32 those of the other halves of the groups.
    """
    if KIND == "int4_g32":
        # a byte has inputs j and j + 16 of its group
        halves = tl.reshape(x, (piece_size(COLS, piece) // 32, 2, 16))
        low, high = tl.split(tl.permute(halves, (0, 2, 1)))
        return (_spread(low, piece, COLS, KIND), _spread(high, piece, COLS, KIND))
    else:
        return (_spread(x, piece, COLS, KIND),)


@triton.jit
def _spread(x, piece: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr):
    width: tl.constexpr = vector_width(COLS, KIND, piece)
    x = tl.reshape(x, (chunk_count(COLS, KIND, piece), LANES, width))
    return tl.permute(x, (1, 0, 2))[:, None, :, :]


@triton.jit
def deal_normed(
    x, weight, eps, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr
):  # -> dealt pieces, factor (ROWS,)
    """Deal x * weight, and the factor that makes it `rms_norm(x, weight, eps)`."""
    pieces = ()
    squares = tl.zeros((ROWS,), tl.float32)
    for piece in tl.static_range(piece_count(COLS)):
        parts = deal(x[piece], piece, COLS, KIND)
        for half in tl.static_range(2 if KIND == "int4_g32" else 1):
            part = parts[half] + tl.zeros((1, ROWS, 1, 1), tl.float32)
            squares += tl.sum(tl.sum(tl.sum(part * part, 3), 2), 0)
            norm = weight[piece * (2 if KIND == "int4_g32" else 1) + half]
            pieces = pieces + (part * norm,)
    return pieces, tl.rsqrt(squares / COLS + eps)


@triton.jit
def multiply_tile(
    tile, x, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr, DEALT: tl.constexpr
):  # -> (ROWS,) float32
    """Multiply a tile of `load_tile` with inputs; products and sums in float32.

    With DEALT, the inputs are those of `deal_normed`; else they are dealt here, piece by piece,
    since all of a long vector would not fit the registers.
    """
    out = tl.zeros((ROWS,), tl.float32)
    for piece in tl.static_range(piece_count(COLS)):
        if not DEALT:
            parts = deal(x[piece], piece, COLS, KIND)
        elif KIND == "int4_g32":
            parts = (x[2 * piece], x[2 * piece + 1])
        else:
            parts = (x[piece],)
        weights = tile[0][piece]
        if KIND == "int4_g32":
            low = (weights & 15).to(tl.float32) * parts[0]
            sums = tl.sum(low + (weights >> 4).to(tl.float32) * parts[1], 3)
            scale, minimum = unpack_pair(tile[1][piece])
            sums = sums * scale + tl.sum(parts[0] + parts[1], 3) * minimum
        else:
            sums = tl.sum(weights.to(tl.float32) * parts[0], 3)
            if KIND == "int8_g32":
                sums = sums * tile[1][piece].to(tl.float32)
        out += tl.sum(tl.sum(sums, 2), 0)
    if KIND == "int8":
        out = out * tile[1][0]
    return out


@triton.jit
def unpack_pair(pair):  # int32 -> scale, min, float32
    """Split the two float16 that a group of int4_g32 has."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    low = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, low
