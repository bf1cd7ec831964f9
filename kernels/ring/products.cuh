// A stage's products: the warps multiply their chunks and store their parts of the sums, and one
// thread per pair of rows adds these up.
#pragma once
#include "ring.cuh"

constexpr int TOGETHER = ANY_SCALES ? 3 : 4;  // chunks that a warp has in registers at a time

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
        parts[(tile * TILE_PAIRS + me.lane / QUARTERS) * PAIR_FLOATS + quarter * PADDED_WARPS +
              me.warp] = sum;
}

// The sums of a pair, once all warps have stored their parts.
DEVICE float2 joined(const float* parts, int pair) {
    parts += pair * PAIR_FLOATS;
    return make_float2(sum_of_warps(parts), sum_of_warps(parts + PADDED_WARPS));
}

// Multiply `tiles` tiles, `steps` chunks of each, some chunks at a time: these are taken together, the
// first ones before `receive()` waits for the inputs.
template <int KIND, class Receive>
DEVICE void multiply(
    const Worker& me, Reader& reader, int tiles, int steps, int row_nbytes, const Inputs<KIND>& inputs,
    float* parts, const Receive& receive) {
    const int total = tiles * steps;
    int tile = 0, step = 0;
    TileSums<KIND> sums;
    const unsigned char* digits = inputs.column;
    ROLLED for (int begin = 0; begin < total; begin += TOGETHER) {
        Pieces pieces[TOGETHER];
        // all are written: a register that is not always is kept from one stage to the next
        UNROLL for (int i = 0; i < TOGETHER; ++i) {
            pieces[i] = {};
            if (begin + i < total) pieces[i] = reader.take<KIND>(me);
        }
        reader.give_back(me, least(TOGETHER, total - begin));
        if (begin == 0) receive();
        UNROLL for (int i = 0; i < TOGETHER; ++i) {
            if (begin + i >= total) break;
            if (MIXED_KINDS) {  // what lies behind a row can be no number at all
                const int within = (me.warp + step * WARPS) * CHUNK_NBYTES;
                if (within + me.lane % QUARTERS * PIECE_NBYTES >= row_nbytes) pieces[i] = {};
            }
            sums.add(pieces[i], digits, inputs.scale(me, step));
            digits += inputs.stride;
            if (++step == steps) {
                store_sums(me, sums, tile, parts);
                sums = {};
                digits = inputs.column;
                ++tile;
                step = 0;
            }
        }
    }
}
