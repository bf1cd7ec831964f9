// A matrix times a vector, by all programs: each has a share of the rows, each warp of a program a
// share of the chunks of these, in the order of memory. Rows are computed in pairs, which read the
// same inputs.
//
// A warp's chunks, of all matrices in the order of their use, pass through a ring of its own in
// shared memory: they are requested while the programs still wait for each other. A lane reads what
// it requested itself, so nothing but its own copies is waited for.
//
// All matrices go through the same few instructions, whatever their sizes: those of a whole layer,
// each with its own, would not fit into the cache of instructions.
#pragma once
#include "weights.cuh"

static_assert(THREADS == WARPS * LANES, "a warp has 32 threads");

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
    constexpr int chunks() const { return up_to(cols, per_lane(kind) * LANES); }
    constexpr int inputs() const { return chunks() * per_lane(kind) * LANES; }  // with padding
    constexpr int most_pairs() const { return up_to(pairs(), PROGRAMS); }
    constexpr int per_warp() const { return up_to(most_pairs() * chunks(), WARPS); }
    // Most warps that share a pair.
    constexpr int parts() const {
        return per_warp() % chunks() == 0   ? 1
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
constexpr int inputs_before(int stage) {
    return stage == 0 ? 0 : inputs_before(stage - 1) + shape_of(stage - 1).inputs();
}
constexpr int parts_before(int stage) {
    return stage == 0 ? 0
                      : parts_before(stage - 1) +
                            shape_of(stage - 1).most_pairs() * shape_of(stage - 1).parts();
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

// A warp's share of a stage: chunks of two rows, one after another.
struct Share {
    int total, chunk;   // how many; the first, in its row
    int start, scales;  // bytes from a block's matrix and scales to the first pair's first row
    int part;           // where the sums of the first pair go
    int next_part;      // of the second
    int pairs_of_head;  // of the first pair's head that are left, where heads matter
};

// What all stages want to know, found in shared memory by the number of the stage.
struct Layout {
    Codes codes;  // of block 0
    long long block_nbytes, block_scales_nbytes;
    int chunks, parts, row_nbytes;
    int distance, scales_distance;  // bytes to the other row of a pair
    int next, next_scales;          // bytes from behind a row to the next pair's first row
    int first_pair, pairs;          // of this program
    int inputs, first_part;         // where they begin
    Share shares[WARPS];
};

constexpr bool has_scales(int kind) { return kind == INT8_G32 || kind == INT4_G32; }

// Bytes of a chunk's scales.
constexpr int chunk_scales_nbytes(int kind) {
    return kind == INT4_G32 ? LANES * 4 : kind == INT8_G32 ? LANES : 0;
}

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
        layout.distance = row_distance(STAGE) * ROW;
        layout.scales_distance = row_distance(STAGE) * SCALES;
        const int step = row_of(STAGE, 1);
        layout.next = step * ROW - CHUNKS * LANES * 16;
        layout.next_scales = step * SCALES - CHUNKS * chunk_scales_nbytes(SHAPE.kind);
        layout.first_pair = first;
        layout.pairs = pairs;
        layout.inputs = inputs_before(STAGE);
        layout.first_part = parts_before(STAGE);
    }
    if (me.lane() == 0) {
        const int begin = me.warp() * SHAPE.per_warp();
        const int left = pairs * CHUNKS - begin;
        const int pair = begin / CHUNKS;
        const int row = row_of(STAGE, first + pair);
        Share share;
        share.total = left < 0 ? 0 : left < SHAPE.per_warp() ? left : SHAPE.per_warp();
        share.chunk = begin % CHUNKS;
        share.start = row * ROW + share.chunk * LANES * 16;
        share.scales = row * SCALES + share.chunk * chunk_scales_nbytes(SHAPE.kind);
        share.part = pair * SHAPE.parts() + me.warp() - pair * CHUNKS / SHAPE.per_warp();
        share.next_part = (pair + 1) * SHAPE.parts();
        share.pairs_of_head =
            STAGE == QUERY ? HEAD_DIM / 2 - (first + pair) % (HEAD_DIM / 2) : SHAPE.rows;
        layout.shares[me.warp()] = share;
    }
}

constexpr int DEPTH = RING_DEPTH;

struct Ring {  // of a warp
    Codes16 codes[DEPTH][2][LANES];
    unsigned scales[has_scales(BODY_KIND) || has_scales(HEAD_KIND) ? DEPTH : 1][2][LANES];
};

// Requests a warp's chunks, DEPTH ahead of their use: of all stages, layers and steps.
struct Source {
    const Layout* layouts;
    const int* schedule;
    Ring* ring;
    int length;     // of the schedule
    bool is_idle;   // this warp has no share of anything
    int stage, position;  // in the schedule
    int left;       // chunks in this stage
    int chunk, pairs_of_head;
    int slot;       // of the ring, to read and then to fill again
    const unsigned char* codes;   // of the next chunk, this lane's part
    const unsigned char* scales;  // of the next chunk

    DEVICE Source(
        const Worker& me, const Layout* layouts, const int* schedule, int length, Ring* ring)
        : layouts(layouts), schedule(schedule), ring(ring), length(length), is_idle(true),
          stage(QUERY), position(0), slot(0) {
        for (int i = 0; i < STAGES; ++i)
            if (layouts[i].shares[me.warp()].total > 0) is_idle = false;
        enter(me);
        ROLLED for (int i = 0; i < DEPTH; ++i) request(me);
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

    // The next chunk, into the slot that was read just now.
    DEVICE void request(const Worker& me) {
        if (is_idle) return;
        while (left == 0) {
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
            enter(me);
        }
        const Layout& layout = layouts[stage];
        const int lane_chunk = chunk * LANES + me.lane();
        const bool live = lane_chunk * 16 < layout.row_nbytes;
        copy_16_later(&ring->codes[slot][0][me.lane()], codes, live);
        copy_16_later(&ring->codes[slot][1][me.lane()], codes + layout.distance, live);
        codes += LANES * 16;
        if constexpr (has_scales(BODY_KIND) || has_scales(HEAD_KIND)) {
            const int kind = stage == HEAD ? HEAD_KIND : BODY_KIND;
            if (has_scales(kind)) {
                // of one group, or of two neighbours
                const unsigned char* from =
                    scales + (kind == INT4_G32 ? me.lane() * 4 : me.lane() / 4 * 4);
                copy_4_later(&ring->scales[slot][0][me.lane()], from, live);
                copy_4_later(
                    &ring->scales[slot][1][me.lane()], from + layout.scales_distance, live);
                scales += chunk_scales_nbytes(kind);
            }
        }
        close_copies();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
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
    const Worker& me, const Layout& layout, Source& source, const float4* inputs, float2* parts) {
    const Share share = layout.shares[me.warp()];
    const int chunks = layout.chunks, parts_of_pair = layout.parts;
    int chunk = share.chunk, part = share.part, next_part = share.next_part;
    float sums[2] = {0, 0};
    ROLLED for (int left = share.total; left > 0; --left) {
        wait_for_copies<DEPTH - 1>();
        Piece pieces[2];
        UNROLL for (int row = 0; row < 2; ++row) {
            pieces[row].codes = source.ring->codes[source.slot][row][me.lane()];
            if constexpr (has_scales(KIND))
                pieces[row].scales = source.ring->scales[source.slot][row][me.lane()];
            if constexpr (KIND == INT8_G32) pieces[row].scales >>= me.lane() / 2 % 2 * 16;
        }
        multiply_pieces<KIND>(pieces, inputs, chunk, me.lane(), sums);
        source.request(me);
        if (++chunk == chunks || left == 1) {
            store_part(me, parts + part, sums);
            sums[0] = sums[1] = 0;
            chunk = 0;
            part = next_part;
            next_part += parts_of_pair;
        }
    }
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
    float2 sum = parts[pair * count];
    UNROLL for (int part = 1; part < MOST_PARTS_OF_PAIR; ++part) {
        if (part < count) {
            const float2 more = parts[pair * count + part];
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
