// Products of tiles of 16 rows of bf16 with a vector, by tensor cores: an input is the sum of two numbers
// in bf16. A chunk is 128 bytes of each row of eight pairs: lane 4 r + q has 16 of every 64 bytes of
// both rows of pair r, so that what it multiplies is what it requested itself.
//
// An instruction multiplies a matrix A of 16 rows with a matrix B of 8 columns; of A, a lane has its
// own weights. Columns 2 q and 2 q + 1 have both halves of the inputs of the lanes q, and zeros for
// others: what a lane gets are the two halves of the products of its own weights. Only lanes whose
// column is their own have inputs to load.
//
// Otherwise it is as in `pairs.cuh`: a ring per warp, requests ahead of the use, one code for all.
#pragma once
#include "matrices.cuh"

static_assert(BODY_KIND == BF16 && HEAD_KIND == BF16, "tensor cores take weights of bf16");

constexpr int PIECES = CHUNK_NBYTES / 64;  // of a lane and row, 16 bytes each
constexpr int EACH = 8;                    // inputs of a piece
constexpr int PIECE_UNITS = 8;             // 16 bytes each, of the inputs of a piece of the four lanes

template <int KIND>
DEVICE void store_input(float* inputs, int k, float value) {
    const int piece = k / (4 * EACH), lane = k / EACH % 4, place = k % EACH;
    unsigned short* const halves = reinterpret_cast<unsigned short*>(inputs) +
                                   (piece * PIECE_UNITS + lane * 2) * EACH + place;
    const unsigned short high = float_to_bf16(value);
    halves[0] = high;
    halves[EACH] = float_to_bf16(value - bf16_to_float(high));
}

// Every WARPS-th chunk of all the program's tiles: the same inputs, so that no other warp's are needed.
template <int STAGE>
DEVICE Share share_of(const Worker& me, int, int pairs) {
    constexpr Shape SHAPE = shape_of(STAGE);
    constexpr int CHUNKS = SHAPE.chunks();
    const int slices = me.warp() < CHUNKS ? up_to(CHUNKS - me.warp(), WARPS) : 0;
    Share share = {};
    share.total = up_to(pairs, TILE_PAIRS) * slices;
    share.chunk = me.warp();
    share.part = TILE_PAIRS * me.warp();
    share.next_part = TILE_PAIRS * (SHAPE.parts() + me.warp());
    return share;
}

struct Ring {  // of a warp
    Codes16 codes[DEPTH][PIECES][2][LANES];
};

// Requests a warp's chunks, DEPTH ahead of their use.
struct Source : Course {
    Ring* ring;
    int block, chunk, tile;
    bool has_rows;               // this lane has, in this tile
    const unsigned char* codes;  // of the next chunk, this lane's part

    DEVICE Source(
        const Worker& me, const Layout* layouts, const int* schedule, int length, Ring* ring)
        : Course(me, layouts, schedule, length), ring(ring) {
        enter(me);
        ROLLED for (int i = 0; i < DEPTH; ++i) request(me);
    }

    DEVICE void enter(const Worker& me) {
        const Layout& layout = layouts[stage];
        const Share& share = layout.shares[me.warp()];
        left = share.total;
        chunk = share.chunk;
        tile = share.tile;
        block = stage == HEAD ? 0 : schedule[position];
        enter_tile(me);
    }

    DEVICE void enter_tile(const Worker& me) {
        const Layout& layout = layouts[stage];
        const int quarter = me.lane() % 4, pair = tile * TILE_PAIRS + me.lane() / 4;
        has_rows = pair < layout.pairs;
        const int row = row_of(stage, layout.first_pair + (has_rows ? pair : 0));
        codes = layout.codes.codes + block * layout.block_nbytes +
                (row * layout.row_nbytes + chunk * CHUNK_NBYTES + quarter * 16);
    }

    // The next chunk, into the slot that was read just now.
    DEVICE void request(const Worker& me) {
        if (is_idle) return;
        while (left == 0) {
            next_stage();
            enter(me);
        }
        const Layout& layout = layouts[stage];
        const int distance = layout.distance;
        // of this lane's first piece on
        const int rest = has_rows ? layout.row_nbytes - chunk * CHUNK_NBYTES - me.lane() % 4 * 16 : 0;
        const int chunks = layout.chunks;
        UNROLL for (int piece = 0; piece < PIECES; ++piece) {
            Codes16(&to)[2][LANES] = ring->codes[slot][piece];
            copy_16_later(&to[0][me.lane()], codes + piece * 64, rest > piece * 64);
            copy_16_later(&to[1][me.lane()], codes + distance + piece * 64, rest > piece * 64);
        }
        codes += WARPS * CHUNK_NBYTES;
        close_copies();
        next_slot();
        --left;
        chunk += WARPS;
        if (chunk >= chunks) {
            chunk = me.warp();
            ++tile;
            enter_tile(me);
        }
    }
};

// The products of 16 bytes of a lane's two rows, to be added to those in `sums`: two halves of each.
DEVICE void multiply_piece(const Codes16 (&codes)[2], const uint4& x, float (&sums)[4]) {
    const unsigned(&a)[4] = codes[0].words, (&b)[4] = codes[1].words;
    multiply_tile(sums, a[0], b[0], a[1], b[1], x.x, x.y);
    multiply_tile(sums, a[2], b[2], a[3], b[3], x.z, x.w);
}

// Multiply this warp's share of a stage; `parts` (tiles, parts of a tile, pairs) gets the sums. Parts
// that no warp has are never written, and stay zero.
template <int KIND>
DEVICE void multiply(
    const Worker& me, const Layout& layout, Source& source, const float* inputs, float2* parts) {
    const Share share = layout.shares[me.warp()];
    const int chunks = layout.chunks, parts_of_tile = layout.parts * TILE_PAIRS;
    int chunk = share.chunk, part = share.part, next_part = share.next_part;
    // columns of other lanes' inputs are zero
    const int column = me.lane() / 4, quarter = me.lane() % 4;
    const bool is_own = column / 2 == quarter;
    static_assert(PIECES * PIECE_UNITS * 16 <= NO_INPUTS * 4, "more zeros are read than there are");
    const uint4* const places =
        reinterpret_cast<const uint4*>(is_own ? inputs : inputs - layout.inputs) +
        (is_own ? column : 0);
    const int step = is_own ? PIECES * PIECE_UNITS : 0;
    float products[4] = {0, 0, 0, 0};
    ROLLED for (int left = share.total; left > 0; --left) {
        wait_for_copies<DEPTH - 1>();
        const uint4* const x = places + chunk * step;
        UNROLL for (int piece = 0; piece < PIECES; ++piece)
            multiply_piece(
                {source.ring->codes[source.slot][piece][0][me.lane()],
                 source.ring->codes[source.slot][piece][1][me.lane()]},
                x[piece * PIECE_UNITS], products);
        source.request(me);
        chunk += WARPS;
        if (chunk >= chunks || left == 1) {
            float sums[2];
            UNROLL for (int row = 0; row < 2; ++row) {
                sums[row] = products[2 * row] + products[2 * row + 1];
                products[2 * row] = products[2 * row + 1] = 0;
                sums[row] += shuffle_xor(sums[row], 1);
                sums[row] += shuffle_xor(sums[row], 2);
            }
            if (quarter == 0) parts[part + me.lane() / 4] = make_float2(sums[0], sums[1]);
            chunk = me.warp();
            part = next_part;
            next_part += parts_of_tile;
        }
    }
}
