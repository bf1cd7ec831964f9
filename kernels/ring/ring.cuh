// How weights get to where they are multiplied.
//
// One warp of a program, the *carrier*, copies the program's share of all matrices, in the order of
// their use, to a ring of slots in shared memory: a slice of the rows of a tile, of which each warp has
// a chunk. It waits for nothing but free slots, so weights come while programs wait for each other.
#pragma once
#include "inputs.cuh"

// Parts of sums: of a pair its first row's, one of each warp, then its second row's. Pairs are apart
// so that the threads that read them meet no bank twice.
constexpr int PAIR_FLOATS = 2 * PADDED_WARPS + 4;
constexpr int HEAD_TILES = 8;  // that are added up together, of the many of the head
constexpr int most_tiles(int stage = 0) {
    return stage == HEAD ? least(HEAD_TILES, shape_of(HEAD).tiles())
                         : most(shape_of(stage).tiles(), most_tiles(stage + 1));
}
constexpr int PARTS = most_tiles() * TILE_PAIRS * PAIR_FLOATS;

constexpr int most_body_pairs(int stage = 0) {
    return stage == HEAD ? 0 : most(shape_of(stage).most_pairs(), most_body_pairs(stage + 1));
}
static_assert(FINISHERS > 0 || most_body_pairs() <= WORKERS, "a thread finishes one pair");

constexpr bool ANY_SCALES = has_scales(BODY_KIND) || has_scales(HEAD_KIND);
// What the slots hold beyond a row, left by others, is finite in one kind of weights.
constexpr bool MIXED_KINDS = BODY_KIND != HEAD_KIND && (BODY_KIND == BF16 || HEAD_KIND == BF16);
constexpr int TILE_ROWS = 2 * TILE_PAIRS;
constexpr int SLICE_NBYTES = WARPS * CHUNK_NBYTES;  // of a row: one chunk for each warp
// Rows are apart so that the lanes that read neighbouring ones meet no bank twice.
constexpr int SLICE_PITCH = up_to(SLICE_NBYTES, 128) * 128 + 64;
// Scales of rows may begin anywhere; copies begin at multiples of 16 bytes.
constexpr int SCALES_PITCH = WARPS * 16 + 16;
// Where it is said by how many bytes the scales of a row are shifted.
constexpr int SHIFTS = TILE_ROWS * (SLICE_PITCH + SCALES_PITCH);
constexpr int SLOT_NBYTES =
    TILE_ROWS * (SLICE_PITCH + (ANY_SCALES ? SCALES_PITCH + static_cast<int>(sizeof(int)) : 0));
// What a program has beside its ring, or a little more.
constexpr int OTHER_NBYTES =
    WARPS * static_cast<int>(sizeof(WarpInputs)) + 2 * PARTS * 4 + (WARPS + 12) * HEAD_DIM * 4 + 4096;
constexpr int SLOTS = least(RING_SLOTS, (SHARED_LIMIT - OTHER_NBYTES) / SLOT_NBYTES);
// With fewer, the carrier would wait for the warps more than they for each other.
static_assert(SLOTS >= 4, "more shared memory than a program can have");

// A program's share of a matrix, found in shared memory by the number of the stage.
struct Share {
    Codes matrix;  // of block 0; the others follow
    long long block_nbytes, block_scales_nbytes;
    int cols, row_nbytes, row_scales_nbytes, chunk_scales_nbytes;
    int distance;      // rows between those of a pair
    int tiles, steps;  // slices of a tile
    int fours;         // that a lane has of the inputs
    int first_pair, pairs;

    DEVICE int first_row(int stage, int pair) const { return row_of(stage, first_pair + pair); }
};

struct Ring {
    unsigned char slots[SLOTS][SLOT_NBYTES];
    Barrier full[SLOTS], empty[SLOTS];
    Share shares[STAGES];
};

// A place in the order of slices.
struct RingPlace {
    int slot;
    unsigned parity;

    DEVICE RingPlace() : slot(0), parity(0) {}

    DEVICE void advance() {
        if (++slot == SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Before anyone uses it, by one thread.
DEVICE void prepare(Ring& ring, int program, const Codes (&matrices)[STAGES]) {
    for_each<0, STAGES>([&](auto stage) {
        constexpr int STAGE = decltype(stage)::VALUE;
        constexpr Shape SHAPE = shape_of(STAGE);
        constexpr int ROW = SHAPE.row_nbytes(), SCALES = SHAPE.scales_nbytes();
        constexpr long long ROWS = SHAPE.rows, PAIRS = SHAPE.pairs();
        const int first = static_cast<int>(program * PAIRS / PROGRAMS);
        const int end = static_cast<int>((program + 1) * PAIRS / PROGRAMS);
        ring.shares[STAGE] = {
            matrices[STAGE], ROWS * ROW, ROWS * SCALES, SHAPE.cols, ROW, SCALES,
            has_scales(SHAPE.kind) ? chunk_scales_nbytes(SHAPE.kind) : 0, row_distance(STAGE),
            SHAPE.tiles(), SHAPE.steps(), fours_of(SHAPE.kind, SHAPE.steps()), first, end - first};
    });
    for (int i = 0; i < SLOTS; ++i) {
        init_barrier(ring.full[i], 1);
        init_barrier(ring.empty[i], WARPS);
    }
}

// The warp that brings the slices.
struct Carrier {
    Ring& ring;
    int lane;
    RingPlace place;  // to fill next

    DEVICE Carrier(Ring& ring, int lane) : ring(ring), lane(lane) {}

    // All slices of a matrix of a block, which is read `again` soon or not.
    DEVICE void bring(int stage, int block, bool again) {
        const Share& share = ring.shares[stage];
        // 16 lanes have the rows of a tile, first those of the pairs' first ones; the other lanes have
        // the scales of these rows
        const int number = lane % TILE_ROWS;
        const bool has_codes = lane < TILE_ROWS;
        const int row_nbytes = has_codes ? share.row_nbytes : share.row_scales_nbytes;
        const int slice_nbytes = has_codes ? SLICE_NBYTES : WARPS * share.chunk_scales_nbytes;
        const unsigned char* const matrix =
            has_codes ? share.matrix.codes + block * share.block_nbytes
                      : share.matrix.scales + block * share.block_scales_nbytes;
        const int to = has_codes ? number * SLICE_PITCH
                                 : TILE_ROWS * SLICE_PITCH + number * SCALES_PITCH;
        ROLLED for (int tile = 0; tile < share.tiles; ++tile) {
            const int pair = tile * TILE_PAIRS + number % TILE_PAIRS;
            const int row = share.first_row(stage, pair) + number / TILE_PAIRS * share.distance;
            const unsigned char* from = matrix + static_cast<long long>(row) * row_nbytes;
            int left = pair < share.pairs && slice_nbytes > 0 ? row_nbytes : 0;
            ROLLED for (int step = 0; step < share.steps; ++step) {
                bring_slice(from, least(left, slice_nbytes), has_codes, to, again);
                from += slice_nbytes;
                left = most(left - slice_nbytes, 0);
            }
        }
    }

private:
    // One slice: this lane's part of it.
    DEVICE void bring_slice(
        const unsigned char* from, int nbytes, bool has_codes, int to, bool again) {
        int shift = 0;
        if (ANY_SCALES && !has_codes && nbytes > 0) {
            // whole units of 16 bytes around them
            const int before = misalignment(from);
            from -= before;
            nbytes = up_to(nbytes + before, 16) * 16;
            shift = before;
        }
        const int total = reduce_add(nbytes);
        wait_for(ring.empty[place.slot], place.parity ^ 1);
        // What the warps read of the slot came before their arrivals, and only a fence orders that with
        // copies. Its thread waits for all that it has asked of memory: warps that multiply need not.
        fence_copies();
        if (ANY_SCALES && !has_codes)
            reinterpret_cast<int*>(ring.slots[place.slot] + SHIFTS)[lane % TILE_ROWS] = shift;
        sync_warp();
        if (lane == 0) arrive_expecting(ring.full[place.slot], total);
        sync_warp();
        if (nbytes > 0) {
            unsigned char* const slot = ring.slots[place.slot];
            if constexpr (LEAVE_FIRST)
                copy_bulk(slot + to, from, nbytes, ring.full[place.slot], !again);
            else
                copy_bulk(slot + to, from, nbytes, ring.full[place.slot]);
        }
        place.advance();
    }
};

// A warp's view of the ring, chunk by chunk.
struct Reader {
    Ring& ring;
    RingPlace place, given;  // to take next; to give back next

    DEVICE explicit Reader(Ring& ring) : ring(ring) {}

    // What this lane has of the next chunk, when it is there; its slot is to be given back.
    template <int KIND>
    DEVICE Pieces take(const Worker& me) {
        wait_for(ring.full[place.slot], place.parity);
        const unsigned char* const slot = ring.slots[place.slot];
        const int pair = me.lane / QUARTERS, quarter = me.lane % QUARTERS;
        Pieces pieces;
        UNROLL for (int i = 0; i < 2; ++i) {
            const int number = i * TILE_PAIRS + pair;
            pieces.codes[i] = *reinterpret_cast<const Codes16*>(
                slot + number * SLICE_PITCH + me.warp * CHUNK_NBYTES + quarter * PIECE_NBYTES);
            pieces.scales[i] = 0;
            if constexpr (has_scales(KIND)) {
                const int shift = reinterpret_cast<const int*>(slot + SHIFTS)[number];
                pieces.scales[i] = *reinterpret_cast<const unsigned*>(
                    slot + TILE_ROWS * SLICE_PITCH + number * SCALES_PITCH + shift +
                    me.warp * chunk_scales_nbytes(KIND) + (KIND == INT4_G32 ? quarter * 4 : 0));
                if constexpr (KIND == INT8_G32) pieces.scales[i] >>= quarter / 2 * 16;
            }
        }
        place.advance();
        return pieces;
    }

    // Give back the slots of the last `count` chunks.
    DEVICE void give_back(const Worker& me, int count) {
        sync_warp();
        ROLLED for (int i = 0; i < count; ++i) {
            if (me.lane == 0) arrive(ring.empty[given.slot]);
            given.advance();
        }
    }
};
