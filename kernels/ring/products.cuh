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

// The first chunks of a stage of a layer, which are taken before its inputs are there, ...
template <int STAGE>
struct FirstPieces {
    static constexpr int STEPS = shape_of(STAGE).steps();
    static constexpr int COUNT = least(TAKEN_EARLY, shape_of(STAGE).total());
    Pieces pieces[COUNT];

    DEVICE FirstPieces(const Worker& me, Reader& reader, int block) {
        for_each<0, COUNT>([&](auto chunk) {
            constexpr int CHUNK = decltype(chunk)::VALUE;
            pieces[CHUNK] = reader.take<STAGE, CHUNK % STEPS>(me, block, CHUNK / STEPS);
        });
    }
};

// ... and all products of the stage.
template <int STAGE>
DEVICE void multiply(
    const Worker& me, Reader& reader, int block, const FirstPieces<STAGE>& first,
    const Inputs<STAGE>& inputs, float* parts) {
    constexpr int KIND = shape_of(STAGE).kind, STEPS = shape_of(STAGE).steps();
    for_each<0, shape_of(STAGE).tiles()>([&](auto tile) {
        constexpr int TILE = decltype(tile)::VALUE;
        TileSums<KIND> sums;
        for_each<0, STEPS>([&](auto step) {
            constexpr int STEP = decltype(step)::VALUE, CHUNK = TILE * STEPS + STEP;
            if constexpr (CHUNK < FirstPieces<STAGE>::COUNT)
                inputs.template multiply<STEP>(first.pieces[CHUNK], sums);
            else
                inputs.template multiply<STEP>(reader.take<STAGE, STEP>(me, block, TILE), sums);
        });
        store_sums(me, sums, TILE, parts);
    });
}

// The scale of a row whose inputs share one.
template <int STAGE>
DEVICE float row_scale(const Codes& matrix, long long block, int row) {
    constexpr Shape SHAPE = shape_of(STAGE);
    if constexpr (SHAPE.kind != INT8) return 1;
    return reinterpret_cast<const float*>(matrix.scales + block * (static_cast<long long>(SHAPE.rows) * 4))[row];
}
