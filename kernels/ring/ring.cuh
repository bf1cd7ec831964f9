// How weights get to where they are multiplied.
//
// A warp's chunks, in the order of their use, pass through a ring of its own in shared memory: they
// are requested while the programs still wait for each other. A lane reads what it requested itself,
// so nothing but its own copies is waited for. All sizes are constants, so that a request is an
// addition or two.
#pragma once
#include "inputs.cuh"

// Parts of sums: of a pair its first row's, one of each warp, then its second row's. Pairs are apart
// so that the threads that read them meet no bank twice.
constexpr int PAIR_FLOATS = 2 * WARPS + 4;
constexpr int HEAD_TILES = 8;  // that are added up together, of the many of the head
constexpr int most_tiles(int stage = 0) {
    return stage == HEAD ? least(HEAD_TILES, shape_of(HEAD).tiles())
                         : most(shape_of(stage).tiles(), most_tiles(stage + 1));
}
constexpr int PARTS = most_tiles() * TILE_PAIRS * PAIR_FLOATS;

constexpr int most_body_pairs(int stage = 0) {
    return stage == HEAD ? 0 : most(shape_of(stage).most_pairs(), most_body_pairs(stage + 1));
}
static_assert(most_body_pairs() <= THREADS, "a thread finishes one pair");

// Chunks of a warp in the stages of a layer before one.
constexpr int before(int stage) { return stage == 0 ? 0 : before(stage - 1) + shape_of(stage - 1).total(); }
constexpr int LAYER = before(HEAD);  // in a whole layer
constexpr int stage_of(int chunk) {
    return chunk < before(OUTPUT) ? QUERY : chunk < before(GATE_UP) ? OUTPUT : chunk < before(DOWN) ? GATE_UP : DOWN;
}

constexpr bool ANY_SCALES = has_scales(BODY_KIND) || has_scales(HEAD_KIND);
constexpr int CODES_NBYTES = LANES * PIECE_NBYTES;  // of one of the rows of all pairs
constexpr int SLOT_NBYTES = 2 * CODES_NBYTES + (ANY_SCALES ? 2 * LANES * 4 : 0);
// What a program has beside its rings, or a little more.
constexpr int OTHER_NBYTES =
    WARPS * static_cast<int>(sizeof(WarpInputs)) + DIGITS_NBYTES + 2 * PARTS * 4 + (WARPS + 12) * HEAD_DIM * 4 + 2048;
// Chunks on their way: no more than RING_DEPTH, a layer, and what there is room for.
constexpr int DEPTH =
    least(least(RING_DEPTH, LAYER), (SHARED_LIMIT - OTHER_NBYTES) / (WARPS * SLOT_NBYTES));
constexpr int RING_NBYTES = DEPTH * SLOT_NBYTES;
static_assert(DEPTH > 0, "more shared memory than a program can have");

// Request a warp's chunk number STEP of a tile, or nothing.
template <int STAGE, int STEP>
DEVICE void request(
    const Worker& me, const Codes& matrix, int block, int tile, unsigned char* slot) {
    constexpr Shape SHAPE = shape_of(STAGE);
    constexpr int ROW = SHAPE.row_nbytes(), SCALES = SHAPE.scales_nbytes();
    const int chunk = me.warp + STEP * WARPS, quarter = me.lane % QUARTERS;
    const int within = chunk * CHUNK_NBYTES + quarter * PIECE_NBYTES;
    const int pair = tile * TILE_PAIRS + me.lane / QUARTERS;
    // programs differ by one pair at most: only the last tile can lack some
    bool live = tile < SHAPE.tiles() - 1 || pair < me.pairs[STAGE];
    if constexpr ((STEP + 1) * WARPS * CHUNK_NBYTES > ROW) live = live && within < ROW;
    const int row = row_of(STAGE, me.first_pair[STAGE] + pair);
    const unsigned char* const from = matrix.codes + block * (static_cast<long long>(SHAPE.rows) * ROW) +
                                      (row * ROW + within);
    copy_16_later(slot + me.lane * PIECE_NBYTES, from, live);
    copy_16_later(
        slot + CODES_NBYTES + me.lane * PIECE_NBYTES, from + row_distance(STAGE) * ROW, live);
    if constexpr (has_scales(SHAPE.kind)) {
        // of one group, or of two neighbours
        const unsigned char* const scales =
            matrix.scales + block * (static_cast<long long>(SHAPE.rows) * SCALES) +
            (row * SCALES + chunk * chunk_scales_nbytes(SHAPE.kind) +
             (SHAPE.kind == INT4_G32 ? quarter * 4 : 0));
        unsigned char* const to = slot + 2 * CODES_NBYTES + me.lane * 4;
        copy_4_later(to, scales, live);
        copy_4_later(to + LANES * 4, scales + row_distance(STAGE) * SCALES, live);
    }
}

// A warp's ring of chunks, always with DEPTH groups of copies on their way.
struct Ring {
    unsigned char* begin;
    int offset;  // of the slot to read, and then to fill again

    DEVICE explicit Ring(unsigned char* begin) : begin(begin), offset(0) {}

    // What this lane has of the next chunk, when it is there.
    template <int KIND>
    DEVICE Pieces take(const Worker& me) const {
        wait_for_copies<DEPTH - 1>();
        const unsigned char* const slot = begin + offset;
        Pieces pieces;
        UNROLL for (int row = 0; row < 2; ++row) {
            pieces.codes[row] = *reinterpret_cast<const Codes16*>(
                slot + row * CODES_NBYTES + me.lane * PIECE_NBYTES);
            pieces.scales[row] = 0;
            if constexpr (has_scales(KIND)) {
                pieces.scales[row] = *reinterpret_cast<const unsigned*>(
                    slot + 2 * CODES_NBYTES + row * LANES * 4 + me.lane * 4);
                if constexpr (KIND == INT8_G32) pieces.scales[row] >>= me.lane % QUARTERS / 2 * 16;
            }
        }
        return pieces;
    }

    // After `request(slot)` or nothing, go on to the next one.
    template <class Request>
    DEVICE void refill(const Request& request) {
        request(begin + offset);
        close_copies();
        offset = offset + SLOT_NBYTES == RING_NBYTES ? 0 : offset + SLOT_NBYTES;
    }

    // Until nothing is on its way.
    DEVICE void finish() { wait_for_copies<0>(); }
};

// Where what is to be multiplied next comes from.
struct Blocks {
    int now, next;  // blocks; `next` is of the next layer
    bool is_last;   // after this layer comes the head
};

// Request chunk CHUNK of a layer, or of what follows it: of the next layer, or of the head.
template <int CHUNK>
DEVICE void request_ahead(
    const Worker& me, const Codes (&matrices)[STAGES], const Blocks& blocks, unsigned char* slot) {
    constexpr bool IS_NEXT = CHUNK >= LAYER;
    constexpr int OF_LAYER = CHUNK % LAYER, STAGE = stage_of(OF_LAYER);
    constexpr int OF_STAGE = OF_LAYER - before(STAGE), STEPS = shape_of(STAGE).steps();
    if (IS_NEXT && blocks.is_last) {
        constexpr int HEAD_STEPS = shape_of(HEAD).steps();
        if constexpr (OF_LAYER < shape_of(HEAD).total())
            request<HEAD, OF_LAYER % HEAD_STEPS>(me, matrices[HEAD], 0, OF_LAYER / HEAD_STEPS, slot);
    } else {
        request<STAGE, OF_STAGE % STEPS>(
            me, matrices[STAGE], IS_NEXT ? blocks.next : blocks.now, OF_STAGE / STEPS, slot);
    }
}
