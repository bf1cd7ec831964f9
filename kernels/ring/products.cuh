// A stage's products: the warps multiply their chunks and store their parts of the sums, and one
// thread per pair of rows adds these up.
#pragma once
#include "ring.cuh"

// Store a warp's part of the sums of a tile.
template <int KIND>
DEVICE void store_sums(const Worker& me, const TileSums<KIND>& sums, int tile, float* parts) {
    const int quarter = me.lane % QUARTERS;
    const float first = sums.first(), second = sums.second();
    // every other lane keeps one row
    float sum = quarter % 2 ? second : first;
    sum += shuffle_xor(quarter % 2 ? first : second, 1);
    sum += shuffle_xor(sum, 2);
    if (quarter < 2)
        parts[(tile * TILE_PAIRS + me.lane / QUARTERS) * PAIR_FLOATS + quarter * WARPS + me.warp] = sum;
}

// The sums of a pair, once all warps have stored their parts.
DEVICE float2 joined(const float* parts, int pair) {
    parts += pair * PAIR_FLOATS;
    return make_float2(sum_of_warps(parts), sum_of_warps(parts + WARPS));
}

// Multiply `tiles` tiles of a share. `pieces` is the first chunk, taken before the inputs are there, and
// afterwards the one behind, if there are `more` tiles.
template <int KIND>
DEVICE void multiply(
    const Worker& me, Reader& reader, int tiles, bool more, int steps, int row_nbytes,
    const Inputs<KIND>& inputs, Pieces& pieces, float* parts) {
    ROLLED for (int tile = 0; tile < tiles; ++tile) {
        TileSums<KIND> sums;
        const unsigned char* digits = inputs.column;
        int step = 0;
        while (true) {
            if (MIXED_KINDS) {  // what lies behind a row can be no number at all
                const int begin = (me.warp + step * WARPS) * CHUNK_NBYTES;
                if (begin + me.lane % QUARTERS * PIECE_NBYTES >= row_nbytes) pieces = {};
            }
            sums.add(pieces, digits, inputs.scale(me, step));
            const bool is_last = ++step == steps;
            if (!is_last || tile + 1 < tiles || more) pieces = reader.take<KIND>(me);
            if (is_last) break;
            digits += inputs.stride;
        }
        store_sums(me, sums, tile, parts);
    }
}
