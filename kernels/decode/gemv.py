"""Matrix times vector, for one decoded token: tiles of rows, requested before they are needed.

A tile is some rows of a weight matrix, in *pieces* of its inputs. A piece of a tile has the shape
`(LANES, ROWS, chunks, VEC)`: LANES threads side by side along the inputs, each with `VEC`
neighbouring ones, which is one load of up to 16 bytes, chunk after chunk. The order of the axes is
the one in which Triton deals out threads: along the inputs, then along the rows. A short row
belongs to one warp, which sums it without the others; a long one to as many warps as it takes, so
that a thread keeps few inputs and many weights may be on their way.

A piece of the inputs, `(PIECE,)`, spreads over all threads, and is dealt to the lanes through
shared memory.

`load_tile` and `multiply_tile` are apart because weights are known before inputs are: a tile is
requested, then whoever computes the inputs is waited for.
"""

import triton
import triton.language as tl

from .grid_sync import receive

ONE_EXPONENT = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.constexpr_function
def row_stride(COLS, KIND):
    """Elements of `codes` per row: bytes of two inputs each for int4_g32, else inputs."""
    return (COLS + 31) // 32 * 16 if KIND == "int4_g32" else COLS


@triton.constexpr_function
def group_count(COLS):
    """Groups of 32 inputs, which share a scale in the *_g32 kinds."""
    return (COLS + 31) // 32


@triton.constexpr_function
def warp_inputs(KIND):
    """Inputs of a long row that a warp takes at once."""
    return 32 * {"fp32": 4, "bf16": 8, "fp16": 8, "int4_g32": 32}.get(KIND, 16)


@triton.constexpr_function
def row_warps(COLS, KIND, WARPS):
    """Warps along the inputs: more than one where a row is long."""
    if COLS <= 1024:
        return 1
    warps = -(-COLS // warp_inputs(KIND))
    return min(1 << (warps - 1).bit_length(), WARPS)


@triton.constexpr_function
def lane_count(COLS, KIND, WARPS):
    """Threads along the inputs."""
    return 32 * row_warps(COLS, KIND, WARPS)


@triton.constexpr_function
def piece_size(COLS, KIND, WARPS):
    """Inputs of a piece, those beyond the last included: a power of two."""
    if COLS <= 1024:
        return max(1 << (COLS - 1).bit_length(), 256)
    return warp_inputs(KIND) * row_warps(COLS, KIND, WARPS)


@triton.constexpr_function
def piece_count(COLS, KIND, WARPS):
    """Pieces of a row."""
    return -(-COLS // piece_size(COLS, KIND, WARPS))


@triton.constexpr_function
def vector_width(COLS, KIND, WARPS):
    """Elements of `codes` that a lane loads at once; words of 8 inputs for int4_g32."""
    lanes = lane_count(COLS, KIND, WARPS)
    if KIND == "int4_g32":
        return 4
    nbytes = {"fp32": 4, "bf16": 2, "fp16": 2}.get(KIND, 1)
    return min(16 // nbytes, piece_size(COLS, KIND, WARPS) // lanes, COLS & -COLS)


@triton.constexpr_function
def chunk_count(COLS, KIND, WARPS):
    """Loads of a lane in a piece."""
    per_lane = piece_size(COLS, KIND, WARPS) // lane_count(COLS, KIND, WARPS)
    inputs = 32 if KIND == "int4_g32" else vector_width(COLS, KIND, WARPS)
    return max(per_lane // inputs, 1)


@triton.constexpr_function
def padded_size(COLS, KIND, WARPS):
    """Inputs that the lanes of one piece take: for int4_g32 whole groups, also of short rows."""
    inputs = 32 if KIND == "int4_g32" else vector_width(COLS, KIND, WARPS)
    return lane_count(COLS, KIND, WARPS) * chunk_count(COLS, KIND, WARPS) * inputs


@triton.constexpr_function
def tile_rows(COUNT, COLS, KIND, WARPS, PROGRAMS, MATRICES=1):
    """Rows of a tile of COUNT rows over PROGRAMS programs, of each of MATRICES matrices.

    A tile takes at most 32 registers of a thread, for two matrices 16 each unless more avoid a
    second tile; codes of few bits half of it, since taking them apart needs registers, too. But a
    long row is summed with at least three others, so that they share the exchange.
    """
    groups = WARPS * 32 // lane_count(COLS, KIND, WARPS)
    per_row = vector_width(COLS, KIND, WARPS) * chunk_count(COLS, KIND, WARPS)
    per_row *= {"fp32": 4, "int4_g32": 8}.get(KIND, 2) * piece_count(COLS, KIND, WARPS)
    share = -(-COUNT // PROGRAMS)
    wanted = max(1 << (share - 1).bit_length(), groups)
    rows = groups
    for nbytes in (128, 128 // MATRICES):
        rows = max(nbytes // per_row, 1) * groups
        rows = 1 << (rows.bit_length() - 1)
        if wanted <= rows:
            return wanted
    return min(max(rows, 4), wanted)


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
    codes, scales, row, live, COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr
):  # -> codes of each piece, scales of each piece
    """Request the rows `row` (ROWS,) of a matrix, those that are `live`."""
    stride: tl.constexpr = row_stride(COLS, KIND) // (4 if KIND == "int4_g32" else 1)
    groups: tl.constexpr = group_count(COLS)
    width: tl.constexpr = vector_width(COLS, KIND, WARPS)
    if KIND == "int4_g32":
        codes = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    pieces = ()
    piece_scales = ()
    for piece in tl.static_range(piece_count(COLS, KIND, WARPS)):
        lane = _lane(COLS, KIND, WARPS, piece)
        inside = (lane < stride)[:, None, :] & live[None, :, None]
        place = codes + (row[None, :, None] * stride + lane[:, None, :])[:, :, :, None]
        place += tl.arange(0, width)[None, None, None, :]
        pieces = pieces + (tl.load(place, mask=inside[:, :, :, None], other=0),)
        if KIND == "int4_g32" or KIND == "int8_g32":
            group = lane // (4 if KIND == "int4_g32" else 32)
            place = scales + row[None, :, None] * groups + group[:, None, :]
            piece_scales = piece_scales + (tl.load(place, mask=inside, other=0),)
    if KIND == "int8":
        piece_scales = (tl.load(scales + row, mask=live, other=0),)
    return pieces, piece_scales


@triton.jit
def _lane(COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr, piece: tl.constexpr):
    """Where in a row of codes each lane of each chunk begins: (LANES, chunks)."""
    lanes: tl.constexpr = lane_count(COLS, KIND, WARPS)
    width: tl.constexpr = vector_width(COLS, KIND, WARPS)
    chunk = tl.arange(0, chunk_count(COLS, KIND, WARPS))
    first: tl.constexpr = piece * chunk_count(COLS, KIND, WARPS) * lanes * width
    return first + (chunk[None, :] * lanes + tl.arange(0, lanes)[:, None]) * width


@triton.jit
def receive_inputs(
    vector, epoch, COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr, WAIT: tl.constexpr
):  # -> (PIECE,) of each piece
    """Wait for a vector (COLS,) that other programs publish."""
    size: tl.constexpr = padded_size(COLS, KIND, WARPS)
    count: tl.constexpr = piece_count(COLS, KIND, WARPS)
    index = tl.arange(0, size)
    live = (COLS - index + size - 1) // size
    return receive(vector, index, live, epoch, size, WARPS, WAIT, count, size)


@triton.jit
def load_norm(weight, COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr):
    """Request the weights of a norm: (PIECE,) of each piece."""
    size: tl.constexpr = padded_size(COLS, KIND, WARPS)
    pieces = ()
    for piece in tl.static_range(piece_count(COLS, KIND, WARPS)):
        index = piece * size + tl.arange(0, size)
        pieces = pieces + (tl.load(weight + index, mask=index < COLS, other=0),)
    return pieces


@triton.jit
def normed(
    x, weight, eps, COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr
):  # -> pieces, factor
    """Return x * weight, and the factor that makes it `rms_norm(x, weight, eps)`."""
    pieces = ()
    squares = tl.zeros((padded_size(COLS, KIND, WARPS),), tl.float32)
    for piece in tl.static_range(piece_count(COLS, KIND, WARPS)):
        squares += x[piece] * x[piece]
        pieces = pieces + (x[piece] * weight[piece],)
    return pieces, tl.rsqrt(tl.sum(squares, 0) / COLS + eps)


@triton.jit
def deal(
    x, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr
):  # -> for each piece (LANES, ROWS, chunks, VEC)
    """Give the inputs to the lanes that multiply with them.

    A word of int4_g32 takes eight inputs, of so many tensors; a ninth has their sum in each group.
    """
    lanes: tl.constexpr = lane_count(COLS, KIND, WARPS)
    chunks: tl.constexpr = chunk_count(COLS, KIND, WARPS)
    dealt = ()
    for piece in tl.static_range(piece_count(COLS, KIND, WARPS)):
        if KIND == "int4_g32":
            # input 16 h + 4 w + 2 o + k of a group is in word w, byte 2 o + k, nibble h
            values = tl.reshape(x[piece], (chunks, lanes, 2, 4, 2, 2))
            low, high = tl.split(tl.permute(values, (1, 0, 3, 4, 5, 2)))
            dealt = dealt + _bytes_to_rows(low, ROWS) + _bytes_to_rows(high, ROWS)
            sums = tl.permute(tl.sum(tl.reshape(x[piece], (chunks, lanes, 32)), 2), (1, 0))
            dealt = dealt + (sums[:, None, :] + tl.zeros((1, ROWS, 1), tl.float32),)
        else:
            values = tl.reshape(x[piece], (chunks, lanes, vector_width(COLS, KIND, WARPS)))
            dealt = dealt + (_to_rows(tl.permute(values, (1, 0, 2)), ROWS),)
    return dealt


@triton.jit
def _bytes_to_rows(half, ROWS: tl.constexpr):  # (..., words, 2, 2) -> (..., words) of each byte
    even, odd = tl.split(half)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (
        _to_rows(first, ROWS),
        _to_rows(second, ROWS),
        _to_rows(third, ROWS),
        _to_rows(fourth, ROWS),
    )


@triton.jit
def _to_rows(x, ROWS: tl.constexpr):
    # the sum has the shape, and so the layout, of a tile: the exchange stays out of its loop
    return x[:, None, :, :] + tl.zeros((1, ROWS, 1, 1), tl.float32)


@triton.jit
def multiply_tile(
    tile, x, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr
):  # -> (ROWS,) float32
    """Multiply a tile of `load_tile` with inputs of `deal`; products and sums in float32."""
    out = tl.zeros((lane_count(COLS, KIND, WARPS), ROWS), tl.float32)
    for piece in tl.static_range(piece_count(COLS, KIND, WARPS)):
        weights = tile[0][piece]
        if KIND == "int4_g32":
            # Each code is taken as 1 + code / 16: its bits become the first of a mantissa. That is
            # two operations, and no conversion, of which a GPU does few.
            products = tl.zeros(weights.shape, tl.float32)
            for nibble in tl.static_range(8):
                values = _nibble(weights, 8 * (nibble % 4) + 4 * (nibble // 4))
                products += values * x[9 * piece + nibble]
            scale, minimum = unpack_pair(tile[1][piece])
            total = x[9 * piece + 8]
            out += tl.sum((tl.sum(products, 3) - total) * (16 * scale) + total * minimum, 2)
        else:
            sums = tl.sum(weights.to(tl.float32) * x[piece], 3)
            if KIND == "int8_g32":
                sums = sums * tile[1][piece].to(tl.float32)
            out += tl.sum(sums, 2)
    y = tl.sum(out, 0)
    if KIND == "int8":
        y = y * tile[1][0]
    return y


@triton.jit
def _nibble(words, shift: tl.constexpr):
    """Return 1 + n / 16 of the nibble that is `shift` bits up in each word."""
    words = words >> (shift - 19) if shift > 19 else words << (19 - shift)
    return ((words & 0x00780000) | ONE_EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def unpack_pair(pair):  # int32 -> scale, min, float32
    """Split the two float16 that a group of int4_g32 has."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    low = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, low
