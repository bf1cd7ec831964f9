// Which rows of the matrices a program and its warps multiply: a program has a share of the rows, a
// warp of it a share of the chunks of these. Rows come in pairs, which read the same inputs; a chunk
// has a piece of one pair (`pairs.cuh`) or of several (`tiles.cuh`).
#pragma once
#include "weights.cuh"

static_assert(THREADS == WARPS * LANES, "a warp has 32 threads");

constexpr int TILE_PAIRS = TENSOR_CORES ? 8 : 1;        // of rows, that a chunk has a piece of
constexpr int CHUNK_NBYTES = TENSOR_CORES ? 128 : 512;  // of a row
constexpr int DEPTH = RING_DEPTH;                       // chunks of a warp on their way

enum Stage { QUERY, OUTPUT, GATE_UP, DOWN, HEAD, STAGES };

// Who runs this.
struct Worker {
    int thread, program;

    DEVICE Worker() : thread(thread_id()), program(program_id()) {}
    DEVICE int warp() const { return thread / LANES; }
    DEVICE int lane() const { return thread % LANES; }

    // Keep no addresses of the stage before.
    DEVICE void begin_stage() {
        forget(thread);
        forget(program);
    }
};

struct Shape {
    int rows, cols, kind;

    constexpr int pairs() const { return rows / 2; }
    constexpr int chunks() const { return up_to(row_nbytes(), CHUNK_NBYTES); }
    // with padding
    constexpr int inputs() const { return chunks() * (CHUNK_NBYTES / 16) * per_lane(kind); }
    constexpr int most_pairs() const { return up_to(pairs(), PROGRAMS); }
    constexpr int most_tiles() const { return up_to(most_pairs(), TILE_PAIRS); }
    constexpr int per_warp() const { return up_to(most_tiles() * chunks(), WARPS); }
    // Most warps that share a tile.
    constexpr int parts() const {
        return TENSOR_CORES                   ? (chunks() < WARPS ? chunks() : WARPS)
               : per_warp() % chunks() == 0   ? 1
               : chunks() % per_warp() == 0 ? chunks() / per_warp()
                                            : (chunks() - 2) / per_warp() + 2;
    }
    constexpr int row_nbytes() const { return ::row_nbytes(kind, cols); }
    constexpr int scales_nbytes() const { return ::scales_nbytes(kind, cols); }
};

constexpr int QUERIES = HEADS * HEAD_DIM;
constexpr int QKV_ROWS = QUERIES + 2 * KV_HEADS * HEAD_DIM;

constexpr Shape shape_of(int stage) {
    return stage == QUERY     ? Shape{QKV_ROWS, HIDDEN, BODY_KIND}
           : stage == OUTPUT  ? Shape{HIDDEN, QUERIES, BODY_KIND}
           : stage == GATE_UP ? Shape{2 * INNER, HIDDEN, BODY_KIND}
           : stage == DOWN    ? Shape{HIDDEN, INNER, BODY_KIND}
                              : Shape{VOCAB, HIDDEN, HEAD_KIND};
}

// Where what belongs to a stage begins, among the inputs and among the parts of all stages.
constexpr int NO_INPUTS = TENSOR_CORES ? CHUNK_NBYTES * 2 : 0;  // zeros before those of the first stage
constexpr int inputs_before(int stage) {
    return stage == 0 ? NO_INPUTS : inputs_before(stage - 1) + shape_of(stage - 1).inputs();
}
constexpr int parts_before(int stage) {
    return stage == 0 ? 0
                      : parts_before(stage - 1) +
                            shape_of(stage - 1).most_tiles() * TILE_PAIRS *
                                shape_of(stage - 1).parts();
}

// The first of a pair of rows: those that rotary embeddings turn with each other, a row of the gate
// and one of up, neighbours elsewhere.
DEVICE int row_of(int stage, int pair) {
    constexpr int HALF = HEAD_DIM / 2;
    return stage == QUERY     ? pair / HALF * HEAD_DIM + pair % HALF
           : stage == GATE_UP ? pair
                              : 2 * pair;
}

// From there to the other one.
DEVICE int row_distance(int stage) {
    return stage == QUERY ? HEAD_DIM / 2 : stage == GATE_UP ? INNER : 1;
}

DEVICE int first_pair(int pairs, int program) {
    return static_cast<long long>(program) * pairs / PROGRAMS;
}

struct Codes {
    const unsigned char* codes;
    const unsigned char* scales;
};

// A warp's share of a stage: chunks of tiles of pairs of rows, one after another.
struct Share {
    int total, chunk;   // how many; the first, in its tile
    int tile;           // of the first
    int start, scales;  // bytes from a block's matrix and scales to the first pair's first row
    int part;           // where the sums of the first tile go
    int next_part;      // of the second
    int pairs_of_head;  // of the first pair's head that are left, where heads matter
};

// What all stages want to know, found in shared memory by the number of the stage.
struct Layout {
    Codes codes;  // of block 0
    long long block_nbytes, block_scales_nbytes;
    int chunks, parts, row_nbytes, row_scales_nbytes;
    int distance, scales_distance;  // bytes to the other row of a pair
    int next, next_scales;          // bytes from behind a row to the next pair's first row
    int first_pair, pairs;          // of this program
    int inputs, first_part;         // where they begin
    Share shares[WARPS];
};

// A warp's place in the order of its chunks: of all stages, layers and steps.
struct Course {
    const Layout* layouts;
    const int* schedule;
    int length;           // of the schedule
    bool is_idle;         // this warp has no share of anything
    int stage, position;  // in the schedule
    int left;             // chunks in this stage
    int slot;             // of the ring, to read and then to fill again

    DEVICE Course(const Worker& me, const Layout* layouts, const int* schedule, int length)
        : layouts(layouts), schedule(schedule), length(length), is_idle(true), stage(QUERY),
          position(0), slot(0) {
        for (int i = 0; i < STAGES; ++i)
            if (layouts[i].shares[me.warp()].total > 0) is_idle = false;
    }

    DEVICE void next_stage() {
        if (stage == HEAD) {
            stage = QUERY;
            position = 0;
        } else if (stage < DOWN) {
            ++stage;
        } else if (++position == length) {
            stage = HEAD;
        } else {
            stage = QUERY;
        }
    }

    DEVICE void next_slot() { slot = slot + 1 == DEPTH ? 0 : slot + 1; }

    // Until nothing is on its way.
    DEVICE void finish() { wait_for_copies<0>(); }
};

constexpr bool has_scales(int kind) { return kind == INT8_G32 || kind == INT4_G32; }

// Bytes of a chunk's scales of a row.
constexpr int chunk_scales_nbytes(int kind) {
    return CHUNK_NBYTES / 16 * (kind == INT4_G32 ? 4 : kind == INT8_G32 ? 1 : 0);
}

// The share of a warp in `pairs` of the program's from `first` on; in `pairs.cuh` and `tiles.cuh`.
template <int STAGE>
DEVICE Share share_of(const Worker& me, int first, int pairs);

template <int STAGE>
DEVICE void set_layout(const Worker& me, const Codes& codes, Layout& layout) {
    constexpr Shape SHAPE = shape_of(STAGE);
    constexpr int CHUNKS = SHAPE.chunks(), ROW = SHAPE.row_nbytes(), SCALES = SHAPE.scales_nbytes();
    const int first = first_pair(SHAPE.pairs(), me.program);
    const int pairs = first_pair(SHAPE.pairs(), me.program + 1) - first;
    if (me.thread == 0) {
        layout.codes = codes;
        layout.block_nbytes = static_cast<long long>(SHAPE.rows) * ROW;
        layout.block_scales_nbytes = static_cast<long long>(SHAPE.rows) * SCALES;
        layout.chunks = CHUNKS;
        layout.parts = SHAPE.parts();
        layout.row_nbytes = ROW;
        layout.row_scales_nbytes = SCALES;
        layout.distance = row_distance(STAGE) * ROW;
        layout.scales_distance = row_distance(STAGE) * SCALES;
        const int step = row_of(STAGE, 1);
        layout.next = step * ROW - CHUNKS * CHUNK_NBYTES;
        layout.next_scales = step * SCALES - CHUNKS * chunk_scales_nbytes(SHAPE.kind);
        layout.first_pair = first;
        layout.pairs = pairs;
        layout.inputs = inputs_before(STAGE);
        layout.first_part = parts_before(STAGE);
    }
    if (me.lane() == 0) layout.shares[me.warp()] = share_of<STAGE>(me, first, pairs);
}

constexpr int most_parts_of_pair(int stage) {
    return stage == 0 ? shape_of(0).parts()
           : shape_of(stage).parts() > most_parts_of_pair(stage - 1)
               ? shape_of(stage).parts()
               : most_parts_of_pair(stage - 1);
}
constexpr int MOST_PARTS_OF_PAIR = most_parts_of_pair(STAGES - 1);

// The sums of a pair, once all warps have stored their parts.
DEVICE float2 joined(const float2* parts, const Layout& layout, int pair) {
    const int count = layout.parts;
    parts += pair / TILE_PAIRS * TILE_PAIRS * count + pair % TILE_PAIRS;
    float2 sum = parts[0];
    UNROLL for (int part = 1; part < MOST_PARTS_OF_PAIR; ++part) {
        if (part < count) {
            const float2 more = parts[part * TILE_PAIRS];
            sum.x += more.x;
            sum.y += more.y;
        }
    }
    return sum;
}

// The scale of a row whose inputs share one.
template <int KIND>
DEVICE float row_scale(const Layout& layout, long long block, int row) {
    if constexpr (KIND != INT8) return 1;
    return reinterpret_cast<const float*>(
        layout.codes.scales + block * layout.block_scales_nbytes)[row];
}
