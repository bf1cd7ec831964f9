// Products of tiles of 16 rows with a vector, by tensor cores, which take bf16: weights are exact in
// it, an input is the sum of two. A chunk is RING_TILES bytes of each row of eight pairs: lane 4 r + q
// has 16 of every 64 bytes of both rows of pair r, so that what it multiplies is what it requested
// itself.
//
// An instruction multiplies a matrix A of 16 rows with a matrix B of 8 columns; of A, a lane has its
// own weights. Were B the inputs alone, the products of the four lanes of a pair would be summed up,
// which have other scales, and seven columns would be idle. So columns 2 q and 2 q + 1 have both
// halves of the inputs of the lanes q, and zeros for others: what a lane gets are the two halves of
// the products of its own weights. Only lanes whose column is their own have inputs to load.
//
// Otherwise it is as in `pairs.cuh`: a ring per warp, requests ahead of the use, one code for all.
#pragma once
#include "matrices.cuh"

constexpr int PIECES = CHUNK_NBYTES / 64;  // of a lane and row, 16 bytes each
static_assert(CHUNK_NBYTES % 64 == 0, "four lanes have 64 bytes of a row");
constexpr int DEPTH = RING_DEPTH;
static_assert(BODY_KIND != FP32 && HEAD_KIND != FP32, "float32 weights are not exact in bf16");

// 16 bytes of a lane's inputs, for four of the instructions' registers.
constexpr int units(int kind) { return per_lane(kind) / 8; }

// What an input becomes the place of: the order in which `unpack` makes weights of codes.
template <int KIND>
constexpr int place_in_lane(int k) {
    if (KIND == BF16) return k;
    const int word = k / 4 % 4, byte = k % 4;
    const int swapped = byte % 2 * 2 + byte / 2;
    if (KIND == INT4_G32) return word * 8 + byte % 2 * 4 + k / 16 * 2 + byte / 2;
    return word * 4 + swapped;
}

template <int KIND>
DEVICE void store_input(float* inputs, int k, float value) {
    constexpr int EACH = per_lane(KIND);
    const int piece = k / (4 * EACH), lane = k / EACH % 4, place = place_in_lane<KIND>(k % EACH);
    unsigned short* const halves = reinterpret_cast<unsigned short*>(inputs) +
                                   ((piece * units(KIND) + place / 8) * 8 + lane * 2) * 8 +
                                   place % 8;
    const unsigned short high = float_to_bf16(value);
    halves[0] = high;
    halves[8] = float_to_bf16(value - bf16_to_float(high));
}

// Pairs of weights in bf16 of a word, `place_in_lane` says which.
template <int KIND>
struct Unpacked {
    static constexpr int COUNT = KIND == INT4_G32 ? 4 : KIND == BF16 ? 1 : 2;
    unsigned pairs[COUNT];

    DEVICE explicit Unpacked(unsigned word) {
        if constexpr (KIND == BF16) {
            pairs[0] = word;
        } else if constexpr (KIND == INT4_G32) {
            // the last bits of 128 + code
            UNROLL for (int i = 0; i < 4; ++i) 
                pairs[i] = masked_or(word >> 4 * i, 0x000F000Fu, 0x43004300u);
        } else {
            // 128 + the low seven bits, and -128 or, for negative ones, -256
            UNROLL for (int i = 0; i < 2; ++i) {
                const unsigned bytes = word >> 8 * i;
                pairs[i] = add_bf16_pairs(
                    masked_or(bytes, 0x007F007Fu, 0x43004300u),
                    masked_or(bytes, 0x00800080u, 0xC300C300u));
            }
        }
    }
};

constexpr float CODE_BIAS = 128.0f;  // of codes of 4 bits

struct Ring {  // of a warp
    Codes16 codes[DEPTH][PIECES][2][LANES];
    unsigned scales[has_scales(BODY_KIND) || has_scales(HEAD_KIND) ? DEPTH : 1][PIECES][2][LANES];
};

// Requests a warp's chunks, DEPTH ahead of their use: of all stages, layers and steps.
struct Source {
    const Layout* layouts;
    const int* schedule;
    Ring* ring;
    int length;           // of the schedule
    bool is_idle;         // this warp has no share of anything
    int stage, position;  // in the schedule
    int left;             // chunks in this stage
    int block, chunk, tile;
    int slot;        // of the ring, to read and then to fill again
    bool has_rows;   // this lane has, in this tile
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

    // Until nothing is on its way.
    DEVICE void finish() { wait_for_copies<0>(); }

    DEVICE void enter(const Worker& me) {
        const Layout& layout = layouts[stage];
        const Share& share = layout.shares[me.warp()];
        left = share.total;
        chunk = share.chunk;
        tile = share.tile;
        block = stage == HEAD ? 0 : schedule[position];
        enter_tile(me);
    }

    DEVICE void enter_tile(const Worker& me) {
        const Layout& layout = layouts[stage];
        const int quarter = me.lane() % 4, pair = tile * TILE_PAIRS + me.lane() / 4;
        has_rows = pair < layout.pairs;
        const int row = row_of(stage, layout.first_pair + (has_rows ? pair : 0));
        codes = layout.codes.codes + block * layout.block_nbytes +
                (row * layout.row_nbytes + chunk * CHUNK_NBYTES + quarter * 16);
        if constexpr (has_scales(BODY_KIND) || has_scales(HEAD_KIND)) {
            const int kind = stage == HEAD ? HEAD_KIND : BODY_KIND;
            scales = layout.codes.scales + block * layout.block_scales_nbytes +
                     (row * layout.row_scales_nbytes + chunk * chunk_scales_nbytes(kind) +
                      (kind == INT4_G32 ? quarter * 4 : 0));
        }
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
        const int distance = layout.distance, scales_distance = layout.scales_distance;
        // of this lane's first piece on
        const int rest = has_rows ? layout.row_nbytes - chunk * CHUNK_NBYTES - me.lane() % 4 * 16 : 0;
        const int chunks = layout.chunks;
        UNROLL for (int piece = 0; piece < PIECES; ++piece) {
            Codes16(&to)[2][LANES] = ring->codes[slot][piece];
            copy_16_later(&to[0][me.lane()], codes + piece * 64, rest > piece * 64);
            copy_16_later(&to[1][me.lane()], codes + distance + piece * 64, rest > piece * 64);
        }
        codes += CHUNK_STEP * CHUNK_NBYTES;
        if constexpr (has_scales(BODY_KIND) || has_scales(HEAD_KIND)) {
            const int kind = stage == HEAD ? HEAD_KIND : BODY_KIND;
            if (has_scales(kind)) {
                const int step = chunk_scales_nbytes(kind) / PIECES;
                UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                    unsigned(&to)[2][LANES] = ring->scales[slot][piece];
                    const unsigned char* from = scales + piece * step;
                    copy_4_later(&to[0][me.lane()], from, rest > piece * 64);
                    copy_4_later(&to[1][me.lane()], from + scales_distance, rest > piece * 64);
                }
                scales += CHUNK_STEP * chunk_scales_nbytes(kind);
            }
        }
        close_copies();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        --left;
        chunk += CHUNK_STEP;
        if (chunk >= chunks) {
            chunk = RING_SLICES ? me.warp() : 0;
            ++tile;
            enter_tile(me);
        }
    }
};

// The products of 16 bytes of a lane's two rows, to be added to those in `sums`: two halves of each.
template <int KIND>
DEVICE void multiply_piece(const Codes16 (&codes)[2], const uint4* inputs, float (&sums)[4]) {
    constexpr int COUNT = Unpacked<KIND>::COUNT;
    UNROLL for (int unit = 0; unit < COUNT; ++unit) {
        unsigned weights[2][4];
        UNROLL for (int row = 0; row < 2; ++row)
            UNROLL for (int i = 0; i < 4; i += COUNT) {
                const Unpacked<KIND> unpacked(codes[row].words[(4 * unit + i) / COUNT]);
                UNROLL for (int j = 0; j < COUNT; ++j) weights[row][i + j] = unpacked.pairs[j];
            }
        const uint4 x = inputs[unit * 8];
        multiply_tile(
            sums, weights[0][0], weights[1][0], weights[0][1], weights[1][1], x.x, x.y);
        multiply_tile(
            sums, weights[0][2], weights[1][2], weights[0][3], weights[1][3], x.z, x.w);
    }
}

// The sums of a lane's inputs, as `multiply_piece` with weights of one.
template <int KIND>
DEVICE void add_inputs(const uint4* inputs, float (&sums)[4]) {
    constexpr unsigned ONES = 0x3F803F80u;
    UNROLL for (int unit = 0; unit < units(KIND); ++unit) {
        const uint4 x = inputs[unit * 8];
        multiply_tile(sums, ONES, ONES, ONES, ONES, x.x, x.y);
        multiply_tile(sums, ONES, ONES, ONES, ONES, x.z, x.w);
    }
}

// Multiply this warp's share of a stage; `parts` (tiles, parts of a tile, pairs) gets the sums. Parts
// that no warp has are never written, and stay zero.
template <int KIND>
DEVICE void multiply(
    const Worker& me, const Layout& layout, Source& source, const float* inputs, float2* parts) {
    const Share share = layout.shares[me.warp()];
    const int chunks = layout.chunks, parts_of_tile = layout.parts * TILE_PAIRS;
    int chunk = share.chunk, part = share.part, next_part = share.next_part;
    // columns of other lanes' inputs are zero
    const int column = me.lane() / 4, quarter = me.lane() % 4;
    const bool is_own = column / 2 == quarter;
    constexpr int PIECE_UNITS = units(KIND) * 8;
    static_assert(PIECES * PIECE_UNITS * 16 <= NO_INPUTS * 4, "more zeros are read than there are");
    const uint4* const places =
        reinterpret_cast<const uint4*>(is_own ? inputs : inputs - layout.inputs) +
        (is_own ? column : 0);
    const int step = is_own ? PIECES * PIECE_UNITS : 0;
    float sums[2] = {0, 0};
    float products[4] = {0, 0, 0, 0};
    ROLLED for (int left = share.total; left > 0; --left) {
        wait_for_copies<DEPTH - 1>();
        const uint4* const x = places + chunk * step;
        UNROLL for (int piece = 0; piece < PIECES; ++piece) {
            const uint4* const mine = x + piece * PIECE_UNITS;
            Codes16 codes[2];
            UNROLL for (int row = 0; row < 2; ++row)
                codes[row] = source.ring->codes[source.slot][piece][row][me.lane()];
            if constexpr (has_scales(KIND)) {
                float totals[4] = {0, 0, 0, 0};
                if constexpr (KIND == INT4_G32) add_inputs<KIND>(mine, totals);
                const float total = totals[0] + totals[1];
                UNROLL for (int i = 0; i < 4; ++i) products[i] = 0;
                multiply_piece<KIND>(codes, mine, products);
                UNROLL for (int row = 0; row < 2; ++row) {
                    unsigned scales = source.ring->scales[source.slot][piece][row][me.lane()];
                    const float product = products[2 * row] + products[2 * row + 1];
                    if constexpr (KIND == INT4_G32) {
                        const float scale = half_to_float(scales & 0xFFFF);
                        const float low = half_to_float(scales >> 16);
                        sums[row] = fma_(
                            scale, fma_(-CODE_BIAS, total, product), fma_(low, total, sums[row]));
                    } else {
                        scales >>= quarter / 2 * 16;
                        sums[row] = fma_(half_to_float(scales & 0xFFFF), product, sums[row]);
                    }
                }
            } else {
                multiply_piece<KIND>(codes, mine, products);
            }
        }
        // the last one, if later, when the results are out
        if (!RING_LAST_LATER || left > 1) source.request(me);
        chunk += CHUNK_STEP;
        if (chunk >= chunks || left == 1) {
            UNROLL for (int row = 0; row < 2; ++row) {
                if constexpr (!has_scales(KIND)) {
                    sums[row] = products[2 * row] + products[2 * row + 1];
                    products[2 * row] = products[2 * row + 1] = 0;
                }
                sums[row] += shuffle_xor(sums[row], 1);
                sums[row] += shuffle_xor(sums[row], 2);
            }
            if (quarter == 0) parts[part + me.lane() / 4] = make_float2(sums[0], sums[1]);
            sums[0] = sums[1] = 0;
            chunk = RING_SLICES ? me.warp() : 0;
            part = next_part;
            next_part += parts_of_tile;
        }
    }
}
