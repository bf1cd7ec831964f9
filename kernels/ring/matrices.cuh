// Which parts of the matrices a program and its warps multiply.
//
// A program has a share of the rows of every matrix, in pairs that read the same inputs; eight pairs
// make a tile. Of each tile a warp has every WARPS-th chunk: so it needs the same few inputs for all
// of them, and takes these itself, without waiting for other warps.
#pragma once
#include "weights.cuh"

constexpr int PADDED_WARPS = up_to(WARPS, 4) * 4;  // their parts of sums are read in fours
constexpr int WORKERS = WARPS * LANES;  // threads that multiply
// Behind them there may be warps that finish results; one warp more brings the weights.
constexpr int CARRIER = WARPS + FINISHERS;
static_assert(WARPS > 0 && FINISHERS >= 0, "no warp multiplies");
static_assert(THREADS == (CARRIER + 1) * LANES, "a warp has 32 threads");

// Wait for all threads that multiply.
DEVICE void sync_workers() { sync_threads<WORKERS>(); }

enum Stage { QUERY, OUTPUT, GATE_UP, DOWN, HEAD, STAGES };

template <int VALUE_>
struct Constant {
    static constexpr int VALUE = VALUE_;
};

// Calls `use(Constant<i>())` for i from BEGIN up to END.
template <int BEGIN, int END, class Use>
DEVICE void for_each(const Use& use) {
    if constexpr (BEGIN < END) {
        use(Constant<BEGIN>());
        for_each<BEGIN + 1, END>(use);
    }
}

struct Shape {
    int rows, cols, kind;

    constexpr int pairs() const { return rows / 2; }
    constexpr int row_nbytes() const { return ::row_nbytes(kind, cols); }
    constexpr int scales_nbytes() const { return ::scales_nbytes(kind, cols); }
    constexpr int chunks() const { return up_to(row_nbytes(), CHUNK_NBYTES); }
    // of a program
    constexpr int most_pairs() const { return up_to(pairs(), PROGRAMS); }
    constexpr int tiles() const { return up_to(most_pairs(), TILE_PAIRS); }
    // chunks of a warp, in a tile
    constexpr int steps() const { return up_to(chunks(), WARPS); }
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

// The first of a pair of rows: those that rotary embeddings turn with each other, a row of the gate
// and one of up, neighbours elsewhere.
DEVICE int row_of(int stage, int pair) {
    constexpr int HALF = HEAD_DIM / 2;
    return stage == QUERY     ? pair / HALF * HEAD_DIM + pair % HALF
           : stage == GATE_UP ? pair
                              : 2 * pair;
}

// From there to the other one.
constexpr int row_distance(int stage) {
    return stage == QUERY ? HEAD_DIM / 2 : stage == GATE_UP ? INNER : 1;
}

// Who runs this.
struct Worker {
    int thread, program, warp, lane;

    DEVICE Worker()
        : thread(thread_id()), program(program_id()), warp(same_for_warp(thread / LANES)),
          lane(thread % LANES) {}

    // Compute nothing of the stage before its turn: what others wait for comes first.
    DEVICE void begin_stage() {
        forget(thread);
        forget(program);
        forget(warp);
        forget(lane);
    }
};

struct Codes {
    const unsigned char* codes;
    const unsigned char* scales;
};
