// Products of pairs of rows with a vector, by fused multiply-adds. A chunk is 16 bytes of each of two
// rows per lane.
//
// A warp's chunks, of all matrices in the order of their use, pass through a ring of its own in
// shared memory: they are requested while the programs still wait for each other. A lane reads what
// it requested itself, so nothing but its own copies is waited for.
//
// All matrices go through the same few instructions, whatever their sizes: those of a whole layer,
// each with its own, would not fit into the cache of instructions.
#pragma once
#include "matrices.cuh"

// An equal part of the chunks of all the program's pairs, in the order of memory.
template <int STAGE>
DEVICE Share share_of(const Worker& me, int first, int pairs) {
    constexpr Shape SHAPE = shape_of(STAGE);
    constexpr int CHUNKS = SHAPE.chunks(), ROW = SHAPE.row_nbytes(), SCALES = SHAPE.scales_nbytes();
    const int begin = me.warp() * SHAPE.per_warp();
    const int left = pairs * CHUNKS - begin;
    const int pair = begin / CHUNKS, row = row_of(STAGE, first + pair);
    Share share;
    share.total = left < 0 ? 0 : left < SHAPE.per_warp() ? left : SHAPE.per_warp();
    share.chunk = begin % CHUNKS;
    share.tile = pair;
    share.start = row * ROW + share.chunk * CHUNK_NBYTES;
    share.scales = row * SCALES + share.chunk * chunk_scales_nbytes(SHAPE.kind);
    share.part = pair * SHAPE.parts() + me.warp() - pair * CHUNKS / SHAPE.per_warp();
    share.next_part = (pair + 1) * SHAPE.parts();
    share.pairs_of_head =
        STAGE == QUERY ? HEAD_DIM / 2 - (first + pair) % (HEAD_DIM / 2) : SHAPE.rows;
    return share;
}

// What a matrix multiplies, as its lanes read it.
template <int KIND>
DEVICE void store_input(float* inputs, int k, float value) {
    inputs[input_place<KIND>(k)] = value;
}

constexpr bool ANY_SCALES = has_scales(BODY_KIND) || has_scales(HEAD_KIND);

struct Ring {  // of a warp
    Codes16 codes[DEPTH][2][LANES];
    unsigned scales[ANY_SCALES ? DEPTH : 1][2][LANES];
};

// Requests a warp's chunks, DEPTH ahead of their use.
struct Source : Course {
    Ring* ring;
    int chunk, pairs_of_head;
    const unsigned char* codes;   // of the next chunk, this lane's part
    const unsigned char* scales;  // of the next chunk

    DEVICE Source(
        const Worker& me, const Layout* layouts, const int* schedule, int length, Ring* ring)
        : Course(me, layouts, schedule, length), ring(ring) {
        enter(me);
        ROLLED for (int i = 0; i < DEPTH; ++i) request(me);
    }

    // What this lane has of the next chunk, when it is there.
    template <int KIND>
    DEVICE void load(const Worker& me, Piece (&pieces)[2]) const {
        wait_for_copies<DEPTH - 1>();
        UNROLL for (int row = 0; row < 2; ++row) {
            pieces[row].codes = ring->codes[slot][row][me.lane()];
            if constexpr (has_scales(KIND)) {
                pieces[row].scales = ring->scales[slot][row][me.lane()];
                if constexpr (KIND == INT8_G32) pieces[row].scales >>= me.lane() / 2 % 2 * 16;
            }
        }
    }

    DEVICE void enter(const Worker& me) {
        const Layout& layout = layouts[stage];
        const Share& share = layout.shares[me.warp()];
        left = share.total;
        chunk = share.chunk;
        pairs_of_head = share.pairs_of_head;
        const long long block = stage == HEAD ? 0 : schedule[position];
        codes = layout.codes.codes + block * layout.block_nbytes + share.start + me.lane() * 16;
        scales = layout.codes.scales + block * layout.block_scales_nbytes + share.scales;
    }

    DEVICE void copy(const Worker& me, const Layout& layout) {
        const int lane_chunk = chunk * LANES + me.lane();
        const bool live = lane_chunk * 16 < layout.row_nbytes;
        copy_16_later(&ring->codes[slot][0][me.lane()], codes, live);
        copy_16_later(&ring->codes[slot][1][me.lane()], codes + layout.distance, live);
        if constexpr (ANY_SCALES) {
            const int kind = stage == HEAD ? HEAD_KIND : BODY_KIND;
            if (has_scales(kind)) {
                // of one group, or of two neighbours
                const unsigned char* from =
                    scales + (kind == INT4_G32 ? me.lane() * 4 : me.lane() / 4 * 4);
                copy_4_later(&ring->scales[slot][0][me.lane()], from, live);
                copy_4_later(
                    &ring->scales[slot][1][me.lane()], from + layout.scales_distance, live);
            }
        }
        close_copies();
    }

    // The next chunk, into the slot that was read just now.
    DEVICE void request(const Worker& me) {
        if (is_idle) return;
        while (left == 0) {
            next_stage();
            enter(me);
        }
        const Layout& layout = layouts[stage];
        copy(me, layout);
        codes += CHUNK_NBYTES;
        if (ANY_SCALES) scales += chunk_scales_nbytes(stage == HEAD ? HEAD_KIND : BODY_KIND);
        next_slot();
        --left;
        if (++chunk == layout.chunks) {
            chunk = 0;
            codes += layout.next;
            scales += layout.next_scales;
            if (--pairs_of_head == 0) {  // behind the other half of the head
                pairs_of_head = HEAD_DIM / 2;
                codes += layout.distance;
                scales += layout.scales_distance;
            }
        }
    }
};

// Store the sums of a warp over its part of a pair of rows.
DEVICE void store_part(const Worker& me, float2* part, const float (&sums)[2]) {
    // each half of the warp keeps one row
    const bool upper = me.lane() >= LANES / 2;
    float sum = upper ? sums[1] : sums[0];
    sum += shuffle_xor(upper ? sums[0] : sums[1], LANES / 2);
    UNROLL for (int mask = LANES / 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (me.lane() % (LANES / 2) == 0) reinterpret_cast<float*>(part)[upper] = sum;
}

// Multiply this warp's share of a stage; `parts` (pairs, parts of a pair) gets the sums. Parts that
// no warp has are never written, and stay zero.
template <int KIND>
DEVICE void multiply(
    const Worker& me, const Layout& layout, Source& source, const float* inputs, float2* parts) {
    const Share share = layout.shares[me.warp()];
    const int chunks = layout.chunks, parts_of_pair = layout.parts;
    int chunk = share.chunk, part = share.part, next_part = share.next_part;
    const float4* const places = reinterpret_cast<const float4*>(inputs);
    float sums[2] = {0, 0};
    const auto end_pair = [&] {
        store_part(me, parts + part, sums);
        sums[0] = sums[1] = 0;
        chunk = 0;
        part = next_part;
        next_part += parts_of_pair;
    };
    ROLLED for (int left = share.total; left > 0; --left) {
        Piece pieces[2];
        source.load<KIND>(me, pieces);
        multiply_pieces<KIND>(pieces, places, chunk, me.lane(), sums);
        source.request(me);
        if (++chunk == chunks || left == 1) end_pair();
    }
}
