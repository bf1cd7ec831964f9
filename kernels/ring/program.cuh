// What a program of the kernel is given, and what it keeps in shared memory.
#pragma once
#include "next_token.cuh"

// The vectors, one behind the other: values, then words.
constexpr int X = 0;
constexpr int MIDDLE = X + HIDDEN;
constexpr int QKV = MIDDLE + HIDDEN;
constexpr int ATTENDED = QKV + QKV_ROWS;
constexpr int GATED = ATTENDED + QUERIES;
constexpr int VALUES = up_to(GATED + INNER, 2);  // in words
constexpr int PARTIAL = VALUES;
// Words that are loaded two by two.
constexpr int HANDED = up_to(PARTIAL + HEADS * MANY_PARTS * PART_WORDS, 2) * 2;
static_assert(HANDED + HANDED_WORDS <= VECTORS, "vectors overlap");
constexpr int EPOCHS = 5;  // of a layer

static_assert(
    VOCAB % EACH == 0 && HIDDEN % EACH == 0 && INNER % EACH == 0, "values are loaded four by four");

struct alignas(16) Shared {
    Ring ring;
    WarpInputs inputs[WARPS];
    unsigned char zeros[2 * PIECE_NBYTES];  // digits of other lanes' inputs
    float parts[2][PARTS];                  // of one stage, and of the next
    float squares[PADDED_WARPS];
    Candidate candidates[WARPS];
    AttentionShared attention;
    // For warps that finish results. Of a layer's four stages, two have their sums in one place, one
    // after the other: the first in an even phase of its barriers, the second in an odd one.
    Barrier sums_stored[2], sums_read[2];
    Barrier token_known;  // a phase for each
    int token;            // the next to read
};

static_assert(sizeof(Shared) <= SHARED_LIMIT, "more shared memory than a program can have");
SHARED(decode, Shared)

struct Arguments {
    int steps;
    int token;     // the first to read
    int position;  // where it is
    int capacity;  // of the KV cache, in tokens
    int length;    // of the schedule
    unsigned first_epoch;  // of this launch, which uses `steps * (EPOCHS * length + 1)`
    float eps, scale, temperature;
    unsigned long long seed;
    const int* schedule;
    unsigned char* cache;  // (length, 2, KV_HEADS, capacity, HEAD_DIM)
    int* tokens;           // (steps,) what was chosen
    float* logprobs;
    unsigned* counter;     // 0 before the launch
    uint2* vectors;        // (VECTORS,), epochs below `first_epoch`
    Candidate* candidates; // (PROGRAMS,)
    float* logits;         // (VOCAB,) of the last step
    const float* cos;      // (positions, HEAD_DIM / 2)
    const float* sin;
    const float* attention_norms;  // (blocks, HIDDEN)
    const float* ffn_norms;
    const float* final_norm;
    Codes matrices[STAGES];        // of block 0; the others follow
    Codes embedding;
    long long* clock;  // (CLOCKED,) nanoseconds at the ends of program 0's stages, if CLOCKED
};

// One position of the schedule.
DEVICE CacheSlot cache_slot(const Arguments& arguments, int slot) {
    const long long nbytes = 2ll * KV_HEADS * arguments.capacity * HEAD_DIM * ELEMENT_NBYTES;
    return {arguments.cache + slot * nbytes, arguments.capacity};
}

DEVICE bool is_normed(int stage) { return stage == QUERY || stage == GATE_UP; }
