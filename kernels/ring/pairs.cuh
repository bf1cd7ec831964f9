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

// What a matrix multiplies, as its lanes read it.
template <int KIND>
DEVICE void store_input(float* inputs, int k, float value) {
    inputs[input_place<KIND>(k)] = value;
}

constexpr int DEPTH = RING_DEPTH;

constexpr bool ANY_SCALES = has_scales(BODY_KIND) || has_scales(HEAD_KIND);
// A bulk copy, by one lane, is of multiples of 16 bytes at multiples of 16: scales come with some
// that are before and behind them.
constexpr int SPARE_SCALES = RING_BULK ? 4 : 0;

struct Ring {  // of a warp
    Codes16 codes[DEPTH][2][LANES];
    unsigned scales[ANY_SCALES ? DEPTH : 1][2][LANES + SPARE_SCALES];
    int spare_nbytes[DEPTH][2];  // before the scales of the two rows, with RING_BULK
    Arrival arrivals[DEPTH];     // of the copies of a chunk, with RING_BULK
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
    int round;      // even or odd: how often the ring went round
    const unsigned char* codes;   // of the next chunk, this lane's part if it copies that itself
    const unsigned char* scales;  // of the next chunk

    DEVICE Source(
        const Worker& me, const Layout* layouts, const int* schedule, int length, Ring* ring)
        : layouts(layouts), schedule(schedule), ring(ring), length(length), is_idle(true),
          stage(QUERY), position(0), slot(0), round(0) {
        if (RING_BULK && me.lane() == 0)
            ROLLED for (int i = 0; i < DEPTH; ++i) expect_nothing(&ring->arrivals[i]);
        if (RING_BULK) sync_warp();
        for (int i = 0; i < STAGES; ++i)
            if (layouts[i].shares[me.warp()].total > 0) is_idle = false;
        enter(me);
        ROLLED for (int i = 0; i < DEPTH; ++i) request(me);
        round = 0;
    }

    // The slot of the next chunk, or of the one after it.
    DEVICE int slot_of(int next) const {
        return next == 0 ? slot : slot + 1 == DEPTH ? 0 : slot + 1;
    }

    // Until the next COUNT chunks, one or two, are there.
    template <int COUNT>
    DEVICE void wait() const {
        if constexpr (RING_BULK) {
            wait_for_arrival(&ring->arrivals[slot], round);
            if (COUNT == 2)
                wait_for_arrival(&ring->arrivals[slot_of(1)], slot_of(1) == 0 ? round ^ 1 : round);
        } else {
            wait_for_copies<DEPTH - COUNT>();
        }
    }

    // What this lane has of the next chunk, or of the one after it.
    template <int KIND>
    DEVICE void load(const Worker& me, int next, Piece (&pieces)[2]) const {
        const int from = slot_of(next);
        UNROLL for (int row = 0; row < 2; ++row) {
            pieces[row].codes = ring->codes[from][row][me.lane()];
            if constexpr (has_scales(KIND)) pieces[row].scales = scales_of<KIND>(me, from, row);
        }
    }

    // Until nothing is on its way.
    DEVICE void finish() {
        if constexpr (!RING_BULK) {
            wait_for_copies<0>();
        } else if (!is_idle) {
            ROLLED for (int i = 0; i < DEPTH; ++i) {
                wait<1>();
                advance();
            }
        }
    }

    DEVICE void advance() {
        if (++slot == DEPTH) {
            slot = 0;
            round ^= 1;
        }
    }

    // A chunk by bulk copies; what is there of rows that end before stays: weights of another kind
    // would be no numbers.
    static_assert(
        !RING_BULK || BODY_KIND == HEAD_KIND || (BODY_KIND > BF16 && HEAD_KIND > BF16),
        "bulk copies are for weights of one kind, or for integers");
    DEVICE void copy_in_bulk(const Layout& layout) {
        const int kind = stage == HEAD ? HEAD_KIND : BODY_KIND;
        const int left_nbytes = layout.row_nbytes - chunk * CHUNK_NBYTES;
        const int nbytes = left_nbytes < CHUNK_NBYTES ? left_nbytes : CHUNK_NBYTES;
        Arrival* const arrival = &ring->arrivals[slot];
        int expected = 2 * nbytes;
        const unsigned char* first[2];
        int scales_nbytes[2];
        if (ANY_SCALES && has_scales(kind)) {
            UNROLL for (int row = 0; row < 2; ++row) {
                const unsigned char* from = scales + row * layout.scales_distance;
                const int spare = static_cast<int>(reinterpret_cast<unsigned long long>(from) & 15);
                ring->spare_nbytes[slot][row] = spare;
                first[row] = from - spare;
                scales_nbytes[row] = up_to(spare + nbytes / 16 * (kind == INT4_G32 ? 4 : 1), 16) * 16;
                expected += scales_nbytes[row];
            }
        }
        expect_copies(arrival, expected);
        copy_bulk_later(ring->codes[slot][0], codes, nbytes, arrival);
        copy_bulk_later(ring->codes[slot][1], codes + layout.distance, nbytes, arrival);
        if (ANY_SCALES && has_scales(kind))
            UNROLL for (int row = 0; row < 2; ++row)
                copy_bulk_later(ring->scales[slot][row], first[row], scales_nbytes[row], arrival);
    }

    DEVICE void enter(const Worker& me) {
        const Layout& layout = layouts[stage];
        const Share& share = layout.shares[me.warp()];
        left = share.total;
        chunk = share.chunk;
        pairs_of_head = share.pairs_of_head;
        const long long block = stage == HEAD ? 0 : schedule[position];
        codes = layout.codes.codes + block * layout.block_nbytes + share.start;
        if (!RING_BULK) codes += me.lane() * 16;
        scales = layout.codes.scales + block * layout.block_scales_nbytes + share.scales;
    }

    // A chunk by each lane's own copies.
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

    // The scales of a lane's part of a row, where it has some.
    template <int KIND>
    DEVICE unsigned scales_of(const Worker& me, int from, int row) const {
        if constexpr (!RING_BULK) {
            unsigned found = ring->scales[from][row][me.lane()];
            if constexpr (KIND == INT8_G32) found >>= me.lane() / 2 % 2 * 16;
            return found;
        } else {
            const unsigned char* first =
                reinterpret_cast<const unsigned char*>(ring->scales[from][row]) +
                ring->spare_nbytes[from][row];
            if constexpr (KIND == INT4_G32)
                return reinterpret_cast<const unsigned*>(first)[me.lane()];
            else
                return reinterpret_cast<const unsigned short*>(first)[me.lane() / 2];
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
        if constexpr (RING_BULK) {
            sync_warp();  // all lanes have read what is there
            if (is_elected()) copy_in_bulk(layout);
        } else {
            copy(me, layout);
        }
        codes += CHUNK_NBYTES;
        if (ANY_SCALES) scales += chunk_scales_nbytes(stage == HEAD ? HEAD_KIND : BODY_KIND);
        advance();
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
    int left = share.total;
    if constexpr (RING_CHUNKS == 2) {
        // two at a time: one wait, and two chains of additions side by side
        ROLLED for (; left > 1; left -= 2) {
            source.wait<2>();
            Piece first[2], second[2];
            source.load<KIND>(me, 0, first);
            source.load<KIND>(me, 1, second);
            const bool ends = chunk + 1 == chunks;
            float more[2] = {0, 0};
            multiply_pieces<KIND>(first, places, chunk, me.lane(), sums);
            multiply_pieces<KIND>(second, places, ends ? 0 : chunk + 1, me.lane(), more);
            const int count = RING_LAST_LATER && left == 2 ? 1 : 2;
            ROLLED for (int i = 0; i < count; ++i) source.request(me);
            if (ends)
                end_pair();
            else
                ++chunk;
            UNROLL for (int row = 0; row < 2; ++row) sums[row] += more[row];
            if (++chunk == chunks || left == 2) end_pair();
        }
    }
    ROLLED for (; left > 0; --left) {
        source.wait<1>();
        Piece pieces[2];
        source.load<KIND>(me, 0, pieces);
        multiply_pieces<KIND>(pieces, places, chunk, me.lane(), sums);
        // the last one, if later, when the results are out
        if (!RING_LAST_LATER || left > 1) source.request(me);
        if (++chunk == chunks || left == 1) end_pair();
    }
}
