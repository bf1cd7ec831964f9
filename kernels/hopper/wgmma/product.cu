// W8A8 product (INT8) or SwiGLU by Hopper's tensor cores, as large as registers allow.
//
// Two programs of a cluster have tiles of the result below each other. Each loads half of the
// weights that both need and sends it to both, which halves what they read of the L2 cache. Of a
// program's twelve warps one thread loads, and two groups of four multiply 64 rows each. Programs
// take tiles in turn: the next tile's factors come while a result is scaled and stored.
//
// Constants: THREADS, 384; INT8; HALF_IS_BF16, of the result and of SwiGLU's factors, else float16.
#include <primitives.cuh>
#include <instructions.cuh>

#if INT8
using Sum = int;
constexpr int WIDTH = 192, FACTORS = WIDTH, ELEMENT = 1;
#else
using Sum = float;
constexpr int WIDTH = 128, FACTORS = 2 * WIDTH, ELEMENT = 2;  // of the gate, and of up behind it
#endif
constexpr int ROWS = 128;             // of a program's tile
constexpr int STEP = 128;             // bytes of inputs at a time: the widest that are swizzled
constexpr int INSTRUCTION_STEP = 32;  // of them by one instruction
constexpr int GROUPS = 2, GROUP_ROWS = ROWS / GROUPS, GROUP_WARPS = 4;
constexpr int LEFT = ROWS * STEP, RIGHT = FACTORS * STEP, STAGE = LEFT + RIGHT;
constexpr int STAGES = 4;
constexpr int STRIP = 64, STRIP_NBYTES = GROUP_ROWS * STRIP * 2;  // columns of a box of the result
constexpr int STAGED = WIDTH / STRIP * STRIP_NBYTES;              // a group's part of the result
constexpr int SUMS = GROUP_ROWS * FACTORS / 128;                  // of a thread
constexpr int BAND = 4;  // pairs of tile rows worked on together, so that inputs stay in L2

struct Arguments {
    TensorMap x, weight, second, out;  // second: SwiGLU's up projection, where `weight` is the gate
    const float *x_scales, *weight_scales;  // of INT8
    int rows, outputs, cols;
};
DYNAMIC_SHARED(product, 1024 + STAGES * STAGE + GROUPS * STAGED + 2 * 8 * STAGES)

struct Place {
    int row, col;
};
// Bands of tile rows, column by column, so that neighbours share inputs; cf. kernels/tiles.py.
DEVICE Place place_of(int tile, int down, int across, int rank) {
    const int first = tile / (BAND * across) * BAND, height = smaller(down - first, BAND);
    const int within = tile % (BAND * across);
    return {(2 * (first + within % height) + rank) * ROWS, within / height * WIDTH};
}

DEVICE float scaled(int sum, float row_scale, float col_scale) {
    return multiply_rounded(multiply_rounded(to_float(sum), row_scale), col_scale);
}
DEVICE float gated(float gate, float up) {
    return fast_quotient(gate, 1.0f + fast_exp(-gate)) * up;
}

// The ring of stages, of which both sides know the same.
struct Ring {
    unsigned stages, full, empty;
    int slot = 0;
    unsigned parity = 0;

    DEVICE unsigned stage() const { return stages + slot * STAGE; }
    DEVICE unsigned is_full() const { return full + 8 * slot; }
    DEVICE unsigned is_empty() const { return empty + 8 * slot; }
    DEVICE void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

KERNEL(product, Arguments) {
    const Arguments& a = arguments;
    const unsigned start = (dynamic_shared() + 1023) & ~1023u;  // tiles are swizzled by address
    const unsigned staged = start + STAGES * STAGE, barriers = staged + GROUPS * STAGED;
    Ring ring{start, barriers, barriers + 8 * STAGES};
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    const int rank = cluster_rank();
    if (thread == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(ring.full + 8 * i, 1);
            // by every warp that multiplies, of both programs
            init_barrier(ring.empty + 8 * i, 2 * GROUPS * GROUP_WARPS);
        }
        barriers_are_made();
    }
    sync_cluster();
    let_next_start();
    wait_for_previous();

    const int steps = (a.cols * ELEMENT + STEP - 1) / STEP;
    const int down = (a.rows + 2 * ROWS - 1) / (2 * ROWS), across = (a.outputs + WIDTH - 1) / WIDTH;
    const int first_tile = program_index() / 2, apart = programs() / 2;
    if (warp >= GROUPS * GROUP_WARPS) {
        keep_few_registers();
        if (warp == GROUPS * GROUP_WARPS && lane == 0) {
            for (int tile = first_tile; tile < down * across; tile += apart) {
                const auto [row, col] = place_of(tile, down, across, rank);
                for (int step = 0; step < steps; ++step) {
                    wait_for_phase(ring.is_empty(), ring.parity ^ 1);
                    const unsigned to = ring.stage(), done = ring.is_full();
                    arrive_expecting(done, STAGE);
                    const int k = step * (STEP / ELEMENT);
                    load(to, a.x, row, k, done);
                    const unsigned half = to + LEFT + rank * (RIGHT / 2);
#if INT8
                    load_for_both(half, a.weight, col + rank * (WIDTH / 2), k, done);
#else
                    load_for_both(half, rank ? a.second : a.weight, col, k, done);
#endif
                    ring.advance();
                }
            }
        }
        sync_warp();
    } else {
        take_many_registers();
        const int group = warp / GROUP_WARPS, r = warp % GROUP_WARPS * 16 + lane / 4;
        const unsigned mine = staged + group * STAGED;
        const bool first_thread = thread % (32 * GROUP_WARPS) == 0;
        Sum sums[SUMS];
        for (int tile = first_tile; tile < down * across; tile += apart) {
            const auto [tile_row, col] = place_of(tile, down, across, rank);
            const int row = tile_row + group * GROUP_ROWS;
#if INT8
            // asked for before the products, which hide how long that takes
            const int upper = row + r, lower = upper + 8;
            const float upper_scale = upper < a.rows ? read(a.x_scales + upper) : 0;
            const float lower_scale = lower < a.rows ? read(a.x_scales + lower) : 0;
            float2 scales[WIDTH / 8];
            UNROLL for (int i = 0; i < WIDTH / 8; ++i) {
                const int c = col + 8 * i + lane % 4 * 2;  // outputs is even
                scales[i] = c < a.outputs ? read_pair(a.weight_scales + c) : float2{0, 0};
            }
#endif
            unsigned last = ring.is_empty();
            ROLLED for (int step = 0; step < steps; ++step) {
                wait_for_phase(ring.is_full(), ring.parity);
                const TileAddress left = tile_at(ring.stage() + group * (GROUP_ROWS * STEP));
                const TileAddress right = tile_at(ring.stage() + LEFT);
                hold(sums);
                open_products();
                UNROLL for (int i = 0; i < STEP / INSTRUCTION_STEP; ++i) {
                    const int ahead = i * INSTRUCTION_STEP / 16;
                    multiply(sums, left + ahead, right + ahead, step + i > 0);
                }
                close_products();
                hold(sums);
                // one step's products stay under way while the step before is given back
                wait_for_products<1>();
                if (step > 0 && lane < 2) arrive_at(last, lane);
                last = ring.is_empty();
                ring.advance();
            }
            wait_for_products<0>();
            hold(sums);
            if (lane < 2) arrive_at(last, lane);
            // the store of the tile before has read what this one overwrites
            if (first_thread) wait_for_stores_to_read();
            sync_group(group);
            UNROLL for (int i = 0; i < WIDTH / 8; ++i) {
                const int j = 4 * i;
#if INT8
                const float2 s = scales[i];
                const unsigned above = to_halves(scaled(sums[j], upper_scale, s.x),
                                                 scaled(sums[j + 1], upper_scale, s.y));
                const unsigned below = to_halves(scaled(sums[j + 2], lower_scale, s.x),
                                                 scaled(sums[j + 3], lower_scale, s.y));
#else
                const int up = j + 4 * WIDTH / 8;
                const unsigned above =
                    to_halves(gated(sums[j], sums[up]), gated(sums[j + 1], sums[up + 1]));
                const unsigned below =
                    to_halves(gated(sums[j + 2], sums[up + 2]), gated(sums[j + 3], sums[up + 3]));
#endif
                // strips of rows of 128 bytes, in which pieces of 16 are swizzled: row r + 8 as r
                const unsigned piece = ((i % 8) ^ (r & 7)) * 16 + lane % 4 * 4;
                const unsigned to = mine + i / 8 * STRIP_NBYTES + r * 128 + piece;
                put(to, above);
                put(to + 8 * 128, below);
            }
            show_to_copy_engine();
            sync_group(group);
            if (first_thread) {
                for (int i = 0; i < WIDTH / STRIP; ++i)
                    if (col + STRIP * i < a.outputs && row < a.rows)
                        store(a.out, row, col + STRIP * i, mine + i * STRIP_NBYTES);
                close_stores();
            }
        }
        if (first_thread) wait_for_stores_to_read();
        sync_warp();
    }
    sync_cluster();  // the other program may still arrive at barriers here
}
