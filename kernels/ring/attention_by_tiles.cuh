// Attention by tensor cores, for caches of 16 bits and heads of 64 dimensions: the tasks and parts of
// `attention.cuh`, in a fraction of its instructions.
//
// A warp takes a tile of 16 tokens. Scores are K q^T: keys are the rows of A, and columns 2 q and
// 2 q + 1 of B the query's two digits, for all q, so that every lane gets both digits' products of its
// two tokens. Results are V^T w^T: rows are dimensions, columns digits of the tokens' weights. Keys and
// values are multiplied as they are stored, and in registers as instructions take them before the
// query comes. In which order dimensions are summed is free: they are loaded 16 bytes at a time.
//
// The query, the new key and the new value are handed over as the instructions take them, too: a word
// has dimensions d and d + 32, which rotary embeddings turn with each other, in the cache's type.
//
// Weights are relative to the new token's score, and may be larger than 1, within what their digits
// can have: only what exceeds that makes a warp take its largest score instead.
#pragma once
#include "attention.cuh"

constexpr int HALF_DIM = HEAD_DIM / 2;
constexpr int HANDED_LOWER = QKV_ROWS / 2;  // words from a query's upper digits to its lower ones
constexpr int HANDED_WORDS = HANDED_LOWER + QUERIES / 2;

// What the lower digit of a number is multiplied with: in fp16 it would be lost where numbers are
// small, whose exponents end at 2^-24. So numbers are exact to 2^-22 of themselves, or 2^-36, in bf16
// to 2^-17; a query's components beyond 65,536 in units of the logarithm of a weight are taken for
// that in fp16.
constexpr float LOWER_SCALE = CACHE == CACHE_FP16 ? 2048 : 1;

DEVICE unsigned pack_cached(float first, float second) {
    return CACHE == CACHE_FP16 ? pack_fp16(first, second) : pack_bf16(first, second);
}
DEVICE float low_half(unsigned pair) {
    return CACHE == CACHE_FP16 ? half_to_float(pair & 0xFFFF) : as_float(pair << 16);
}
DEVICE float high_half(unsigned pair) {
    return CACHE == CACHE_FP16 ? half_to_float(pair >> 16) : as_float(pair & 0xFFFF0000u);
}
// What the upper digit of a number leaves.
DEVICE float lower_digit(float value, float upper) { return (value - upper) * LOWER_SCALE; }
DEVICE float join_digits(float upper, float lower) {
    return fma_(lower, 1 / LOWER_SCALE, upper);
}

DEVICE void multiply_cached(float (&sums)[4], unsigned a0, unsigned a1, unsigned b0) {
    if constexpr (CACHE == CACHE_FP16)
        multiply_half_tile_fp16(sums, a0, a1, b0);
    else
        multiply_half_tile(sums, a0, a1, b0);
}

// Hand over dimensions d and d + 32 of a query, which is multiplied with the scores' scale, of a key
// or of a value; `pair` counts them through all heads. Returns what the cache keeps of them.
DEVICE unsigned hand_over(uint2* handed, int pair, float low, float high, unsigned epoch) {
    const unsigned upper = pack_cached(low, high);
    store_word(handed + pair, upper, epoch);
    if (pair < QUERIES / 2) {
        const unsigned lower = pack_cached(
            lower_digit(low, low_half(upper)), lower_digit(high, high_half(upper)));
        store_word(handed + HANDED_LOWER + pair, lower, epoch);
    }
    return upper;
}

// A lane's share of 16 tokens, as it is in the cache.
struct TokenLoads {
    Load keys[4], values[4];

    // Keys of tokens r and r + 8, for lane 4 r + q: dimensions 8 q and 32 + 8 q, and those behind.
    // Values of tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9: dimension 8 r, and those behind. `of_keys`
    // and `of_values` are the first of them; of the tokens from r and from 2 q so many are left.
    DEVICE void load(
        const unsigned char* of_keys, const unsigned char* of_values, int left_of_keys,
        int left_of_values) {
        constexpr int ROW_NBYTES = HEAD_DIM * 2;
        UNROLL for (int i = 0; i < 4; ++i) {
            const int token = i / 2 * 8;
            keys[i] = load_elements(
                of_keys + token * ROW_NBYTES + i % 2 * HALF_DIM * 2, token < left_of_keys);
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            const int token = i / 2 * 8 + i % 2;
            values[i] = load_elements(of_values + token * ROW_NBYTES, token < left_of_values);
        }
    }
};

// The same as instructions take it.
struct TokenTile {
    unsigned keys[4][4];    // dimensions d and d + 32 in a word: of d and d + 1, tokens r and r + 8
    // tokens 2 q and 2 q + 1 in a word, of every other dimension; the same of the dimensions between;
    // both of 8 tokens on
    unsigned values[4][4];

    DEVICE TokenTile(const TokenLoads& loads) {
        UNROLL for (int j = 0; j < 2; ++j) {
            UNROLL for (int i = 0; i < 4; ++i) {
                const unsigned low = loads.keys[2 * j].words[i], high = loads.keys[2 * j + 1].words[i];
                keys[i][j] = low_halves(low, high);
                keys[i][2 + j] = high_halves(low, high);
            }
        }
        UNROLL for (int j = 0; j < 2; ++j) {
            UNROLL for (int i = 0; i < 4; ++i) {
                const unsigned even = loads.values[2 * j].words[i];
                const unsigned odd = loads.values[2 * j + 1].words[i];
                values[2 * j][i] = low_halves(even, odd);
                values[2 * j + 1][i] = high_halves(even, odd);
            }
        }
    }

    DEVICE void have_ready(bool never) {
        UNROLL for (int i = 0; i < 4; ++i) {
            ::have_ready(values[i], never);
            ::have_ready(keys[i], never);
        }
    }

    // Scores of tokens r and r + 8.
    DEVICE void multiply(const uint4 (&query)[4], float (&scores)[2]) const {
        float sums[2][4] = {};  // of every other instruction, so that fewer wait for each other
        UNROLL for (int i = 0; i < 4; ++i) {
            multiply_cached(sums[0], keys[i][0], keys[i][1], query[i].x);
            multiply_cached(sums[1], keys[i][2], keys[i][3], query[i].z);
        }
        UNROLL for (int i = 0; i < 2; ++i)
            scores[i] = join_digits(
                sums[0][2 * i] + sums[1][2 * i], sums[0][2 * i + 1] + sums[1][2 * i + 1]);
    }
};

// A lane's words of the query, those of one digit, and of the new key.
struct HandedWords {
    uint4 query[4], key[4];  // two of each, with their epochs

    DEVICE void load(const uint2* queries, const uint2* keys) {
        UNROLL for (int i = 0; i < 4; ++i) query[i] = load_2_words(queries + 2 * i);
        UNROLL for (int i = 0; i < 4; ++i) key[i] = load_2_words(keys + 2 * i);
    }
    DEVICE bool are_of(unsigned epoch) const {
        unsigned wrong[4];
        UNROLL for (int i = 0; i < 4; ++i)
            wrong[i] = (query[i].y ^ epoch) | (query[i].w ^ epoch) | (key[i].y ^ epoch) |
                       (key[i].w ^ epoch);
        return (wrong[0] | wrong[1] | wrong[2] | wrong[3]) == 0;
    }
    // The score of the new token: its key is in rows r of A, and in rows r + 8 what is not looked at.
    DEVICE float new_score() const {
        float sums[2][4] = {};
        UNROLL for (int i = 0; i < 4; ++i) {
            multiply_cached(sums[0], key[i].x, key[i].y, query[i].x);
            multiply_cached(sums[1], key[i].z, key[i].w, query[i].z);
        }
        return join_digits(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]);
    }
};

// The softmax's sums of a warp's tokens.
struct TileSoftmax {
    float reference = 0;  // the score that weights are relative to
    float peak = 0;       // relative to the new token's
    // of dimensions 8 r + 2 i, 0 and 2 and 4 and 6 behind, then 1 and 3 and 5 and 7: two in each, both
    // with both digits of weights
    float sums[4][4] = {};
    float total[4] = {};

    // Add a tile, of which so many tokens are left from token r; to nothing if it is the first.
    template <bool IS_FIRST>
    DEVICE void add(const TokenTile& tile, const float (&scores)[2], int left) {
        float logs[2];
        UNROLL for (int i = 0; i < 2; ++i)
            logs[i] = 8 * i < left ? scores[i] - reference : NO_SCORE;
        if (any_of_warp(logs[0] > MOST_LOG || logs[1] > MOST_LOG)) {
            float largest = most(logs[0], logs[1]);
            UNROLL for (int mask = QUARTERS; mask < LANES; mask *= 2)
                largest = most(largest, shuffle_xor(largest, mask));
            reference += largest;
            peak += largest;
            UNROLL for (int i = 0; i < 2; ++i) logs[i] -= largest;
            const float shrink = exp2_(-largest);
            UNROLL for (int i = 0; i < 4 * !IS_FIRST; ++i) {
                total[i] *= shrink;
                UNROLL for (int j = 0; j < 4; ++j) sums[i][j] *= shrink;
            }
        }
        const float weights[2] = {exp2_(logs[0]), exp2_(logs[1])};
        const unsigned upper = pack_cached(weights[0], weights[1]);
        const float uppers[2] = {low_half(upper), high_half(upper)};
        constexpr unsigned ONES = CACHE == CACHE_FP16 ? 0x3C003C00u : 0x3F803F80u;
        UNROLL for (int half = 0; half < 2; ++half) {
            const unsigned digits = transposed(
                pack_cached(weights[half], lower_digit(weights[half], uppers[half])));
            multiply_cached(total, ONES, ONES, digits);
            UNROLL for (int i = 0; i < 4; ++i) {
                const unsigned(&values)[4] = tile.values[2 * half + i / 2];
                multiply_cached(sums[i], values[i % 2 * 2], values[i % 2 * 2 + 1], digits);
            }
        }
    }

    DEVICE void store(const Worker& me, AttentionShared& shared) const {
        if (me.lane & (QUARTERS - 1)) return;  // all four have the same
        float joined[8];
        UNROLL for (int i = 0; i < 8; ++i) {
            const float(&both)[4] = sums[i % 2 * 2 + i / 4];
            joined[i] = join_digits(both[i / 2 % 2 * 2], both[i / 2 % 2 * 2 + 1]);
        }
        float4* const to = reinterpret_cast<float4*>(shared.sums + me.warp * HEAD_DIM + me.lane * 2);
        to[0] = make_float4(joined[0], joined[1], joined[2], joined[3]);
        to[1] = make_float4(joined[4], joined[5], joined[6], joined[7]);
        if (me.lane == 0) {
            const float whole = join_digits(total[0], total[1]);
            shared.bases[me.warp] = peak;
            shared.bases[PADDED_WARPS + me.warp] = whole;
            // relative to another score it is not to be added to others': a sum with it is no number
            shared.total[me.warp] = peak > 0 ? as_float(0x7FC00000u) : whole;
        }
    }
};

// Load a lane's share of the warp's tile that begins at a token; `end` is that of the part.
DEVICE void load_tile(
    int lane, const CacheSlot& cache, int kv_head, int token, int end, TokenLoads& loads) {
    const int row = lane / QUARTERS, quarter = lane % QUARTERS;
    loads.load(
        cache.place(0, kv_head, token + row) + quarter * 16,
        cache.place(1, kv_head, token + 2 * quarter) + row * 16, end - token - row,
        end - token - 2 * quarter);
}

DEVICE void attend_by_tiles(
    Worker& me, int task, const Plan& plan, const uint2* handed, const CacheSlot& cache,
    int position, uint2* partial, unsigned* attended, unsigned epoch, AttentionShared& shared) {
    me.begin_stage();
    const int head = task % HEADS, kv_head = head / GROUP_HEADS, part = task / HEADS;
    const int first = part * plan.tiles * TILE;
    const int end = least(first + plan.tiles * TILE, position);
    int token = first + me.warp * TILE_ROWS;  // the warp's first

    // one thread per dimension joins all tokens, and needs the new value then
    const bool joins = me.thread < HEAD_DIM;
    const auto load_new_value = [&] {
        forget(me.thread);  // its place is not kept meanwhile
        return load_word(handed + (HEADS + KV_HEADS + kv_head) * HALF_DIM + me.thread % HALF_DIM);
    };
    uint2 new_value = make_uint2(0, epoch);  // of another epoch than it will have
    TileSoftmax softmax;
    if (token < end) {
        TokenLoads loads;
        load_tile(me.lane, cache, kv_head, token, end, loads);
        HandedWords found;
        const auto load_handed = [&] {
            forget(me.lane);  // places are not kept meanwhile
            const uint2* const queries = handed + head * HALF_DIM + me.lane % QUARTERS * 8;
            const uint2* const new_keys =
                handed + (HEADS + kv_head) * HALF_DIM + me.lane % QUARTERS * 8;
            found.load(queries + me.lane / QUARTERS % 2 * HANDED_LOWER, new_keys);
        };
        load_handed();
        if (joins) new_value = load_new_value();
        TokenTile tile(loads);
        tile.have_ready(epoch == 0);
        while (!found.are_of(epoch - 1)) load_handed();

        float scores[2];
        softmax.reference = found.new_score();
        tile.multiply(found.query, scores);
        forget(me.lane);  // where later tiles are is not kept meanwhile
        softmax.add<true>(tile, scores, end - token - me.lane / QUARTERS);
        ROLLED while (token + TILE < end) {
            token += TILE;
            load_tile(me.lane, cache, kv_head, token, end, loads);
            tile = TokenTile(loads);
            tile.multiply(found.query, scores);
            softmax.add<false>(tile, scores, end - token - me.lane / QUARTERS);
        }
    }

    if (task >= PROGRAMS) sync_workers();  // of the task before, all is read
    softmax.store(me, shared);
    if (joins)
        while (new_value.y != epoch - 1) new_value = load_new_value();
    sync_workers();

    if (joins) {
        const int dim = me.thread;
        float largest = 0, total = sum_of_warps(shared.total), sum = 0, new_weight = 1;
        if (total == total) {
            float sums[4] = {};
            UNROLL for (int warp = 0; warp < WARPS; ++warp)
                sums[warp % 4] += shared.sums[warp * HEAD_DIM + dim];
            sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        } else {
            ROLLED for (int warp = 0; warp < WARPS; ++warp)
                largest = most(largest, shared.bases[warp]);
            total = 0;
            ROLLED for (int warp = 0; warp < WARPS; ++warp) {
                const float shrink = exp2_(shared.bases[warp] - largest);
                total = fma_(shared.bases[PADDED_WARPS + warp], shrink, total);
                sum = fma_(shared.sums[warp * HEAD_DIM + dim], shrink, sum);
            }
            new_weight = exp2_(-largest);
        }
        if (part == 0) {
            total += new_weight;
            sum = fma_(
                new_weight, dim < HALF_DIM ? low_half(new_value.x) : high_half(new_value.x), sum);
        }
        publish(plan, head, part, dim, sum, total, largest, partial, attended, epoch);
    }
}
