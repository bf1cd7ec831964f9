// Attention of one token: a task is one query head, and a part of the tokens in the cache. Query
// heads of a group read the same keys and values, through the L2 cache: with more heads in a task
// there would be fewer tasks, and each would have a longer chain of instructions, which is what a
// single token waits for. The new token, which the cache does not have yet, belongs to part 0.
//
// Weights of a softmax are relative to the new token's score, unless another is so much larger that
// they would leave the range of their type: so sums of different tokens are hardly ever of different
// bases, and mostly only added where they are joined.
#pragma once
#include "products.cuh"

constexpr int GROUP_HEADS = HEADS / KV_HEADS;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float BIGGEST_HALF = 65504.0f;

enum CacheType { CACHE_FP16, CACHE_BF16, CACHE_FP32 };

#define NO_SCORE (-as_float(0x7F800000u))

// Whether attention is by tensor cores, see `attention_by_tiles.cuh`.
constexpr bool BY_TILES = ATTEND_BY_TILES && CACHE != CACHE_FP32 && HEAD_DIM == 64;

// Elements of 16 bytes of the cache, and how a warp's lanes share out tokens.
constexpr int PER_LOAD = CACHE == CACHE_FP32 ? 4 : 8;
constexpr int ELEMENT_NBYTES = 16 / PER_LOAD;
constexpr int LANES_PER_TOKEN = HEAD_DIM / PER_LOAD;
constexpr int TOKENS_PER_WARP = BY_TILES ? TILE_ROWS : LANES / LANES_PER_TOKEN;
constexpr int TILE = WARPS * TOKENS_PER_WARP;
constexpr int AHEAD = most(2, least(4, up_to(128, TILE)));  // tiles on their way
static_assert(HEAD_DIM <= WORKERS, "a thread joins what all found of a dimension");
static_assert(HEAD_DIM % PER_LOAD == 0 && LANES % LANES_PER_TOKEN == 0, "a head is a power of two");

// One program attends to a head's tokens, while these are no more tiles than this ...
constexpr int FEW_TILES = BY_TILES ? 2 : 8;
// ... and several to parts of more, which one of them joins: one more exchange.
constexpr int MANY_PARTS = most(1, least(least(WORKERS / HEAD_DIM, 8), PROGRAMS / HEADS));

struct Plan {
    int tiles;  // of each part
    int parts;
};

DEVICE Plan plan_for(int tokens) {
    const int tiles = up_to(tokens, TILE);
    Plan plan;
    plan.tiles = most(1, tiles <= FEW_TILES ? tiles : up_to(tiles, MANY_PARTS));
    plan.parts = most(1, up_to(tiles, plan.tiles));
    return plan;
}

struct CacheSlot {  // of one position of the schedule
    unsigned char* data;  // (2, KV heads, capacity, HEAD_DIM)
    int capacity;

    DEVICE unsigned char* place(int value, int kv_head, int token) const {
        const long long row =
            static_cast<long long>(value * KV_HEADS + kv_head) * capacity + token;
        return data + row * (HEAD_DIM * ELEMENT_NBYTES);
    }
};

DEVICE unsigned short clamped_half(float value) {
    // not by minima, which lose NaN
    value = value > BIGGEST_HALF ? BIGGEST_HALF : value < -BIGGEST_HALF ? -BIGGEST_HALF : value;
    return float_to_half(value);
}

DEVICE void store_element(unsigned char* row, int dim, float value) {
    if constexpr (CACHE == CACHE_FP32)
        reinterpret_cast<float*>(row)[dim] = value;
    else
        reinterpret_cast<unsigned short*>(row)[dim] =
            CACHE == CACHE_FP16 ? clamped_half(value) : float_to_bf16(value);
}

// A value as the cache returns it.
DEVICE float rounded(float value) {
    if constexpr (CACHE == CACHE_FP16) return half_to_float(clamped_half(value));
    if constexpr (CACHE == CACHE_BF16) return bf16_to_float(float_to_bf16(value));
    return value;
}

struct Load {
    unsigned words[4];
};

DEVICE Load load_elements(const unsigned char* place, bool live) {
    Load load = {{0, 0, 0, 0}};
    if (live) {
        const uint4 found = *reinterpret_cast<const uint4*>(place);
        load.words[0] = found.x;
        load.words[1] = found.y;
        load.words[2] = found.z;
        load.words[3] = found.w;
    }
    return load;
}

DEVICE void unpack_elements(const Load& load, float (&values)[PER_LOAD]) {
    UNROLL for (int i = 0; i < 4; ++i) {
        const unsigned word = load.words[i];
        if constexpr (CACHE == CACHE_FP32) {
            values[i] = as_float(word);
        } else if constexpr (CACHE == CACHE_FP16) {
            values[2 * i] = half_to_float(word & 0xFFFF);
            values[2 * i + 1] = half_to_float(word >> 16);
        } else {
            values[2 * i] = as_float(word << 16);
            values[2 * i + 1] = as_float(word & 0xFFFF0000u);
        }
    }
}

struct alignas(16) AttentionShared {
    float total[PADDED_WARPS];
    float bases[BY_TILES ? 2 * PADDED_WARPS : WARPS];  // by tiles, totals of their own behind them
    float sums[WARPS * HEAD_DIM];
    // parts that one program joins
    float part_values[MANY_PARTS * HEAD_DIM], part_logs[MANY_PARTS];
};

// The largest base-2 logarithm of a weight: in float, that of sums of many, times values, is below 128.
constexpr float MOST_LOG = !BY_TILES ? 64 : CACHE == CACHE_FP16 ? 15 : 32;

// The softmax's sums so far of a lane's tokens, its share of the dimensions.
struct Softmax {
    float base;  // the score that weights are relative to
    float total;
    float sums[PER_LOAD];
};

// The sum over the lanes that share a token.
DEVICE float sum_of_token(float sum) {
    UNROLL for (int mask = 1; mask < LANES_PER_TOKEN; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
}

DEVICE float most(float a, float b) { return a > b ? a : b; }

// This lane's dimensions of two heads of a vector, when they are there.
DEVICE void receive_dims(
    const Worker& me, const unsigned* vector, const int (&heads)[2], unsigned epoch,
    float (&values)[2][PER_LOAD]) {
    uint4 found[2][PER_LOAD / EACH];
    unsigned wrong = TAG;
    while (wrong & TAG) {
        wrong = 0;
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int j = 0; j < PER_LOAD / EACH; ++j) {
                const int dim = me.lane % LANES_PER_TOKEN * PER_LOAD + j * EACH;
                found[i][j] = load_relaxed_4(vector + heads[i] * HEAD_DIM + dim);
            }
        }
        UNROLL for (int i = 0; i < 2; ++i)
            UNROLL for (int j = 0; j < PER_LOAD / EACH; ++j) wrong |= wrong_bits(found[i][j], epoch);
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int j = 0; j < PER_LOAD / EACH; ++j) {
            values[i][j * EACH] = value_of(found[i][j].x);
            values[i][j * EACH + 1] = value_of(found[i][j].y);
            values[i][j * EACH + 2] = value_of(found[i][j].z);
            values[i][j * EACH + 3] = value_of(found[i][j].w);
        }
    }
}

DEVICE float dot(const float (&a)[PER_LOAD], const float (&b)[PER_LOAD]) {
    float sums[2] = {0, 0};
    UNROLL for (int i = 0; i < PER_LOAD; ++i) sums[i % 2] = fma_(a[i], b[i], sums[i % 2]);
    return sums[0] + sums[1];
}

// Add a lane's tokens of AHEAD tiles, of which those before `end` are alive.
DEVICE void attend_to(
    const Load (&keys)[AHEAD], const Load (&values)[AHEAD], int token, int end,
    const float (&query)[PER_LOAD], Softmax& softmax) {
    float scores[AHEAD], largest = NO_SCORE;
    UNROLL for (int i = 0; i < AHEAD; ++i) {
        float key[PER_LOAD];
        unpack_elements(keys[i], key);
        const float score = sum_of_token(dot(query, key));
        scores[i] = token + i * TILE < end ? score : NO_SCORE;
        largest = most(largest, scores[i]);
    }
    if (largest - softmax.base > MOST_LOG) {
        const float shrink = exp2_(softmax.base - largest);
        softmax.base = largest;
        softmax.total *= shrink;
        UNROLL for (int i = 0; i < PER_LOAD; ++i) softmax.sums[i] *= shrink;
    }
    UNROLL for (int i = 0; i < AHEAD; ++i) {
        float value[PER_LOAD];
        unpack_elements(values[i], value);
        const float weight = exp2_(scores[i] - softmax.base);
        softmax.total += weight;
        UNROLL for (int j = 0; j < PER_LOAD; ++j)
            softmax.sums[j] = fma_(weight, value[j], softmax.sums[j]);
    }
}

// Join what a warp's lanes have of different tokens, which began with the base `reference`.
DEVICE void store_warp(
    const Worker& me, Softmax softmax, float reference, AttentionShared& shared) {
    if (any_of_warp(softmax.base != reference)) {
        float base = softmax.base;
        UNROLL for (int mask = LANES_PER_TOKEN; mask < LANES; mask *= 2)
            base = most(base, shuffle_xor(base, mask));
        const float shrink = exp2_(softmax.base - base);
        softmax.base = base;
        softmax.total *= shrink;
        UNROLL for (int i = 0; i < PER_LOAD; ++i) softmax.sums[i] *= shrink;
    }
    float total = softmax.total;
    int dim = me.lane % LANES_PER_TOKEN * PER_LOAD;
    // each exchange halves the dimensions that a lane keeps, while it has several
    int width = PER_LOAD;
    UNROLL for (int mask = LANES_PER_TOKEN; mask < LANES; mask *= 2) {
        total += shuffle_xor(total, mask);
        if (width > 1) {
            width /= 2;
            const bool upper = me.lane & mask;
            UNROLL for (int i = 0; i < PER_LOAD / 2; ++i) {
                if (i < width) {
                    const float low = softmax.sums[i], high = softmax.sums[i + width];
                    softmax.sums[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, mask);
                }
            }
            if (upper) dim += width;
        } else {
            softmax.sums[0] += shuffle_xor(softmax.sums[0], mask);
        }
    }
    UNROLL for (int i = 0; i < PER_LOAD; ++i)
        if (i < width) shared.sums[me.warp * HEAD_DIM + dim + i] = softmax.sums[i];
    if (me.lane == 0) {
        shared.bases[me.warp] = softmax.base;
        shared.total[me.warp] = total;
    }
}

// Where results go: `attended` if they are whole, `partial` (HEADS, MANY_PARTS, PART_WORDS) with the
// base-2 logarithms of their sums of weights if not.
constexpr int PART_WORDS = HEAD_DIM + 1;

// Publish a dimension of a task's results, of weights relative to the score `base`.
DEVICE void publish(
    const Plan& plan, int head, int part, int dim, float sum, float total, float base, uint2* partial,
    unsigned* attended, unsigned epoch) {
    if (plan.parts == 1) {
        store_value(attended + head * HEAD_DIM + dim, divide(sum, total), epoch);
    } else {
        // without tokens a part is nothing
        uint2* place = partial + (head * MANY_PARTS + part) * PART_WORDS;
        store_word(place + dim, total > 0 ? divide(sum, total) : 0, epoch);
        if (dim == 0) store_word(place + HEAD_DIM, base + log2_(total), epoch);
    }
}

// The first keys and values of a program's first task, which `attend` will load; by one warp.
DEVICE void prefetch_cache(
    int program, int lane, const Plan& plan, const CacheSlot& cache, int position) {
    constexpr int ROWS = most(1, LINE_NBYTES / (HEAD_DIM * ELEMENT_NBYTES));  // of a line
    constexpr int LINES = up_to(HEAD_DIM * ELEMENT_NBYTES, LINE_NBYTES);      // of a row
    if (program >= HEADS * plan.parts) return;
    const int kv_head = program % HEADS / GROUP_HEADS, part = program / HEADS;
    const int first = part * plan.tiles * TILE;
    const int end = least(first + least(plan.tiles, AHEAD) * TILE, position);
    ROLLED for (int i = lane;; i += LANES) {
        const int token = first + i / LINES * ROWS;
        if (token >= end) break;
        UNROLL for (int is_value = 0; is_value < 2; ++is_value)
            prefetch_line(cache.place(is_value, kv_head, token) + i % LINES * LINE_NBYTES);
    }
}

DEVICE void attend(
    const Worker& me, int task, const Plan& plan, const unsigned* qkv, const CacheSlot& cache,
    int position, float scale, uint2* partial, unsigned* attended, unsigned epoch,
    AttentionShared& shared) {
    const int head = task % HEADS, kv_head = head / GROUP_HEADS, part = task / HEADS;
    const int first = part * plan.tiles * TILE;
    const int end = least(first + plan.tiles * TILE, position);
    const int token = first + me.warp * TOKENS_PER_WARP + me.lane / LANES_PER_TOKEN;
    const unsigned char* keys =
        cache.place(0, kv_head, token) + me.lane % LANES_PER_TOKEN * 16;
    const unsigned char* values =
        cache.place(1, kv_head, token) + me.lane % LANES_PER_TOKEN * 16;
    constexpr int STEP = TILE * HEAD_DIM * ELEMENT_NBYTES;
    Load key[AHEAD], value[AHEAD];
    UNROLL for (int i = 0; i < AHEAD; ++i) {
        key[i] = load_elements(keys + i * STEP, token + i * TILE < end);
        value[i] = load_elements(values + i * STEP, token + i * TILE < end);
    }

    // one thread per dimension joins all tokens, and needs the new value then
    const bool joins = me.thread < HEAD_DIM;
    const unsigned* const new_values = qkv + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + me.thread;
    unsigned new_value = joins ? load_relaxed(new_values) : 0;
    float query_and_key[2][PER_LOAD];
    receive_dims(me, qkv, {head, HEADS + kv_head}, epoch - 1, query_and_key);
    float(&query)[PER_LOAD] = query_and_key[0], (&new_key)[PER_LOAD] = query_and_key[1];
    UNROLL for (int i = 0; i < PER_LOAD; ++i) {
        query[i] *= scale * LOG2_E;
        new_key[i] = rounded(new_key[i]);
    }
    const float reference = sum_of_token(dot(query, new_key));
    Softmax softmax = {reference, 0, {}};
    int place = token;
    ROLLED for (int start = first; start < end; start += AHEAD * TILE) {
        attend_to(key, value, place, end, query, softmax);
        keys += AHEAD * STEP;
        values += AHEAD * STEP;
        place += AHEAD * TILE;
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            key[i] = load_elements(keys + i * STEP, place + i * TILE < end);
            value[i] = load_elements(values + i * STEP, place + i * TILE < end);
        }
    }
    if (task >= PROGRAMS) sync_workers();  // of the task before, all is read
    store_warp(me, softmax, reference, shared);
    if (joins)
        while (is_late(new_value, epoch - 1)) new_value = load_relaxed(new_values);
    sync_workers();

    if (joins) {
        const int dim = me.thread;
        // the warps' sums, relative to the largest base of all
        float base = reference;
        UNROLL for (int warp = 0; warp < WARPS; ++warp) base = most(base, shared.bases[warp]);
        float total = 0, sum = 0;
        if (base == reference) {
            total = sum_of_warps(shared.total);
            UNROLL for (int warp = 0; warp < WARPS; ++warp) sum += shared.sums[warp * HEAD_DIM + dim];
        } else {
            ROLLED for (int warp = 0; warp < WARPS; ++warp) {
                const float shrink = exp2_(shared.bases[warp] - base);
                total = fma_(shared.total[warp], shrink, total);
                sum = fma_(shared.sums[warp * HEAD_DIM + dim], shrink, sum);
            }
        }
        if (part == 0) {
            const float weight = exp2_(reference - base);
            total += weight;
            sum = fma_(weight, rounded(value_of(new_value)), sum);
        }
        publish(plan, head, part, dim, sum, total, base, partial, attended, epoch);
    }
}

// Publish a head's whole attention, from its parts. A program does so for one head at most: where
// there are many parts, there are more programs than heads.
DEVICE void join_parts(
    const Worker& me, int head, int parts, const uint2* partial, unsigned* attended, unsigned epoch,
    AttentionShared& shared) {
    const int part = me.thread / HEAD_DIM, dim = me.thread % HEAD_DIM;
    if (part < parts) {
        const uint2* place = partial + (head * MANY_PARTS + part) * PART_WORDS;
        uint2 value, log;
        do {
            value = load_word(place + dim);
            log = load_word(place + HEAD_DIM);
        } while (value.y != epoch || log.y != epoch);
        shared.part_values[part * HEAD_DIM + dim] = as_float(value.x);
        if (dim == 0) shared.part_logs[part] = as_float(log.x);
    }
    sync_workers();
    if (me.thread < HEAD_DIM) {
        float largest = NO_SCORE, total = 0, sum = 0;
        ROLLED for (int i = 0; i < parts; ++i)
            largest = shared.part_logs[i] > largest ? shared.part_logs[i] : largest;
        ROLLED for (int i = 0; i < parts; ++i) {
            const float weight = exp2_(shared.part_logs[i] - largest);
            total += weight;
            sum = fma_(shared.part_values[i * HEAD_DIM + dim], weight, sum);
        }
        store_value(attended + head * HEAD_DIM + dim, divide(sum, total), epoch);
    }
}
