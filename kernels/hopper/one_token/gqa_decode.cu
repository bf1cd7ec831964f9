// Attention of one token to a KV cache. A cluster of programs takes a sequence and a key/value head:
// the keys are cut into PARTS of whole tiles, and each warp attends one part (or several, one after
// the other) and sends what it found to the shared memory of those who merge it. Parts and the order
// in which they are merged depend on the length alone, so that results are the same bits by clusters
// of any size.
//
// Scores are K q^T by tensor cores, keys as rows and the query heads of the group as the 8 columns;
// results are V^T w^T, dimensions as rows. In which order dimensions are summed, and which rows they
// are, is free: it is chosen so that a lane loads 16 bytes of a key or value straight into the
// registers that it multiplies with.
//
// Constants: CLUSTER (programs), THREADS, GROUP (query heads), HALF_IS_BF16, IN_ONE_PIECE (rows of
// keys and of values lie one behind the other), RESIDENT (programs of a multiprocessor).
#include <primitives.cuh>

constexpr int DIM = 64, ROW_NBYTES = 2 * DIM;
constexpr int WARPS = THREADS / 32;
constexpr int PARTS = 64, OWN_PARTS = PARTS / (CLUSTER * WARPS);  // of a warp
constexpr int TILE = 16, TILES = 2;  // keys, and tiles that are asked for together
constexpr int STEP = TILE * TILES;
constexpr int OWN_DIMS = DIM / CLUSTER;  // of each head, which a program merges
constexpr int QUADS = GROUP * OWN_DIMS / 4;
constexpr int MERGERS = 16;  // lanes that merge four results
static_assert(OWN_PARTS * CLUSTER * WARPS == PARTS && OWN_DIMS % 4 == 0 && GROUP <= 8, "sizes");

struct Arguments {
    const char *q, *k, *v;
    const int* lengths;
    char* out;
    // in bytes
    long long q_batch, q_head, k_batch, k_head, k_seq, v_batch, v_head, v_seq, out_batch, out_head;
    float scale;  // of scores, times log2(e); positive
    int capacity;
};

// What warps send, for each part: sums of values times weights, four of the program's results in
// each; largest score and sum of weights, of two heads in each.
struct Merge {
    float4 sums[PARTS][QUADS];
    float4 stats[PARTS][4];
    Barrier sent;
};
constexpr int PART_NBYTES = (QUADS + 4) * 16;
SHARED(gqa_decode, Merge)

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int bounded(int length, int capacity) { return length < 0 ? 0 : smaller(length, capacity); }
DEVICE int part_of(int length) { return (length + TILE * PARTS - 1) / (TILE * PARTS) * TILE; }

struct Keys {
    int first, end, part;  // keys of all of the warp's parts, and of one
};
DEVICE Keys keys_of(int length, int warp_of_cluster) {
    const int part = part_of(length), first = warp_of_cluster * OWN_PARTS * part;
    return {first, smaller(first + OWN_PARTS * part, length), part};
}

// `rows` is where the lane's share of key `first` lies; what is not before `stop` is not read.
DEVICE void load_keys(
    uint4 (&k)[TILES][4], const char* rows, long long stride, int first, int stop, int lane) {
    UNROLL for (int t = 0; t < TILES; ++t) {
        UNROLL for (int half = 0; half < 2; ++half) {
            const int key = first + TILE * t + 8 * half + lane / 4;
            const char* row = rows + (TILE * t + 8 * half) * stride;
            k[t][2 * half] = load_16(row, key < stop);
            k[t][2 * half + 1] = load_16(row + 64, key < stop);
        }
    }
}
DEVICE void load_values(
    uint4 (&v)[TILES][4], const char* rows, long long stride, int first, int stop, int lane) {
    UNROLL for (int t = 0; t < TILES; ++t) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const int row = TILE * t + i % 2 + i / 2 * 8;
            v[t][i] = load_16(rows + row * stride, first + row + 2 * (lane % 4) < stop);
        }
    }
}

// What a lane knows of the heads 2 c and 2 c + 1, for c = lane % 4.
struct Found {
    float peak[2] = {NOTHING, NOTHING}, total[2] = {0, 0};
    float sums[4][4] = {};  // of dimension 8 (lane / 4) + 2 i; [2] and [3]: of the one behind it

    // Products of tiles of keys with the queries.
    DEVICE static void multiply(
        float (&scores)[TILES][4], const uint4 (&q)[2], const uint4 (&k)[TILES][4]) {
        UNROLL for (int t = 0; t < TILES; ++t) {
            const uint4 *low = &k[t][0], *high = &k[t][2];
            multiply_tile(scores[t], low[0].x, high[0].x, low[0].y, high[0].y, q[0].x, q[0].y);
            multiply_tile(scores[t], low[0].z, high[0].z, low[0].w, high[0].w, q[0].z, q[0].w);
            multiply_tile(scores[t], low[1].x, high[1].x, low[1].y, high[1].y, q[1].x, q[1].y);
            multiply_tile(scores[t], low[1].z, high[1].z, low[1].w, high[1].w, q[1].z, q[1].w);
        }
    }
    // Add the values of tiles that begin at key `first`, by their scores.
    DEVICE void add(
        float (&scores)[TILES][4], const uint4 (&v)[TILES][4], float scale, int first, int stop,
        int lane) {
        float largest[2] = {NOTHING, NOTHING};
        UNROLL for (int t = 0; t < TILES; ++t) {
            UNROLL for (int i = 0; i < 4; ++i) {
                const bool exists = first + TILE * t + lane / 4 + i / 2 * 8 < stop;
                scores[t][i] = exists ? scores[t][i] * scale : NOTHING;
                largest[i % 2] = larger(largest[i % 2], scores[t][i]);
            }
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int mask = 4; mask < 32; mask *= 2) {
                largest[i] = larger(largest[i], shuffle_xor(largest[i], mask));
            }
            largest[i] = larger(largest[i], peak[i]);
            const float shrink = exp2_(peak[i] - largest[i]);
            peak[i] = largest[i];
            total[i] *= shrink;
            UNROLL for (int d = 0; d < 4; ++d) {
                sums[d][i] *= shrink;
                sums[d][2 + i] *= shrink;
            }
        }
        UNROLL for (int t = 0; t < TILES; ++t) {
            float w[4];
            UNROLL for (int i = 0; i < 4; ++i) {
                w[i] = exp2_(scores[t][i] - peak[i % 2]);
                total[i % 2] += w[i];
            }
            const unsigned low = transposed(to_halves(w[0], w[1]));
            const unsigned high = transposed(to_halves(w[2], w[3]));
            add_product(sums[0], v[t][0].x, v[t][1].x, v[t][2].x, v[t][3].x, low, high);
            add_product(sums[1], v[t][0].y, v[t][1].y, v[t][2].y, v[t][3].y, low, high);
            add_product(sums[2], v[t][0].z, v[t][1].z, v[t][2].z, v[t][3].z, low, high);
            add_product(sums[3], v[t][0].w, v[t][1].w, v[t][2].w, v[t][3].w, low, high);
        }
    }
    // Of two dimensions of four values, which are neighbours in each word.
    DEVICE static void add_product(
        float (&sums)[4], unsigned v0, unsigned v1, unsigned v2, unsigned v3, unsigned low,
        unsigned high) {
        multiply_tile(sums, low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3),
                      high_halves(v2, v3), low, high);
    }

    // Send all to those who merge it.
    DEVICE void send(Merge& merge, int part, int lane) {
        const int group = lane / 4, column = lane % 4;
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int mask = 4; mask < 32; mask *= 2) total[i] += shuffle_xor(total[i], mask);
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            const int head = 2 * column + i;
            UNROLL for (int d = 0; d < 4; d += 2) {  // four neighbouring dimensions
                const int dim = 8 * group + 2 * d;
                const int quad = (head * OWN_DIMS + dim % OWN_DIMS) / 4;
                if (head < GROUP) {
                    store_counted(&merge.sums[part][quad], &merge.sent, dim / OWN_DIMS,
                                  make_float4(sums[d][i], sums[d][2 + i], sums[d + 1][i],
                                              sums[d + 1][2 + i]));
                }
            }
        }
        UNROLL for (int rank = group; rank < CLUSTER; rank += 8) {
            store_counted(&merge.stats[part][column], &merge.sent, rank,
                          make_float4(peak[0], total[0], peak[1], total[1]));
        }
    }
};

// Merge four results of a head, sixteen lanes together; the first of them stores.
DEVICE void merge_quad(const Merge& merge, int quad, int parts, int merger, char* out, bool stores) {
    const int head = quad * 4 / OWN_DIMS;
    float peaks[PARTS / MERGERS], highest = NOTHING;
    UNROLL for (int i = 0; i < PARTS / MERGERS; ++i) {
        const int part = i * MERGERS + merger;
        const bool exists = part < parts;
        const float4 stats = merge.stats[exists ? part : 0][head / 2];
        peaks[i] = !exists ? NOTHING : head % 2 ? stats.z : stats.x;
        highest = larger(highest, peaks[i]);
    }
    UNROLL for (int mask = 1; mask < MERGERS; mask *= 2) {
        highest = larger(highest, shuffle_xor(highest, mask));
    }
    float total = 0;
    float4 sum = make_float4(0, 0, 0, 0);
    UNROLL for (int i = 0; i < PARTS / MERGERS; ++i) {
        const int part = i * MERGERS + merger;
        if (part < parts) {
            const float4 stats = merge.stats[part][head / 2], its = merge.sums[part][quad];
            const float weight = exp2_(peaks[i] - highest);
            total += weight * (head % 2 ? stats.w : stats.y);
            sum.x += weight * its.x;
            sum.y += weight * its.y;
            sum.z += weight * its.z;
            sum.w += weight * its.w;
        }
    }
    UNROLL for (int mask = 1; mask < MERGERS; mask *= 2) {
        total += shuffle_xor(total, mask);
        sum.x += shuffle_xor(sum.x, mask);
        sum.y += shuffle_xor(sum.y, mask);
        sum.z += shuffle_xor(sum.z, mask);
        sum.w += shuffle_xor(sum.w, mask);
    }
    if (stores) {
        const float factor = parts ? 1 / total : 0;
        store_8(out, to_halves(sum.x * factor, sum.y * factor),
                to_halves(sum.z * factor, sum.w * factor));
    }
}

KERNEL(gqa_decode, Arguments) {
    const Arguments& a = arguments;
    Merge& merge = shared_memory<Merge>();
    let_next_start();
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    const int rank = cluster_rank(), warp_of_cluster = rank * WARPS + warp;
    const long long batch = batch_index(), kv_head = kv_head_index();
    const long long k_seq = IN_ONE_PIECE ? ROW_NBYTES : a.k_seq;
    const long long v_seq = IN_ONE_PIECE ? ROW_NBYTES : a.v_seq;
    const char* all_keys = a.k + batch * a.k_batch + kv_head * a.k_head;
    const char* all_values = a.v + batch * a.v_batch + kv_head * a.v_head;
    if (thread == 0) init_barrier(&merge.sent);
    started_in_cluster();

    // By the length as it is: if the kernel before changes it, this was in vain.
    const int guess = bounded(load_length(a.lengths + batch), a.capacity);
    Keys mine = keys_of(guess, warp_of_cluster);
    if (IN_ONE_PIECE) {
        if (lane == 0 && mine.first < mine.end) {
            const int nbytes = (mine.end - mine.first) * ROW_NBYTES;
            prefetch_bytes(all_keys + mine.first * k_seq, nbytes);
            prefetch_bytes(all_values + mine.first * v_seq, nbytes);
        }
    } else {
        for (int key = mine.first + lane; key < mine.end; key += 32) {
            prefetch_line(all_keys + key * k_seq);
            prefetch_line(all_values + key * v_seq);
        }
    }
    all_keys += lane / 4 * k_seq + lane % 4 * 16;
    all_values += 2 * (lane % 4) * v_seq + lane / 4 * 16;
    const char* query = a.q + batch * a.q_batch + (kv_head * GROUP + lane / 4) * a.q_head;
    query += lane % 4 * 16;
    wait_for_cluster();  // all have made what is sent to
    wait_for_previous();

    const int length = bounded(load_length(a.lengths + batch), a.capacity);
    const bool asks = lane / 4 < GROUP;
    const uint4 q[2] = {load_16(query, asks), load_16(query + 64, asks)};
    uint4 k[TILES][4], v[TILES][4];
    const char *keys, *values;
    const auto load_first = [&] {
        const int stop = smaller(mine.first + mine.part, mine.end);
        keys = all_keys + mine.first * k_seq;
        values = all_values + mine.first * v_seq;
        load_keys(k, keys, k_seq, mine.first, stop, lane);
        load_values(v, values, v_seq, mine.first, stop, lane);
    };
    load_first();  // as guessed, so that they do not wait for the length
    if (length != guess) {
        mine = keys_of(length, warp_of_cluster);
        load_first();
    }
    const int parts = length ? (length + mine.part - 1) / mine.part : 0;
    if (thread == 0) expect_bytes(&merge.sent, parts * PART_NBYTES);

    Found found;
    int part = warp_of_cluster * OWN_PARTS, stop = smaller(mine.first + mine.part, mine.end);
    ROLLED for (int first = mine.first; first < mine.end;) {
        float scores[TILES][4] = {};
        found.multiply(scores, q, k);
        const bool last = first + STEP >= stop;
        const int next = OWN_PARTS > 1 && last ? stop : first + STEP;
        const int next_stop = OWN_PARTS > 1 && last ? smaller(stop + mine.part, mine.end) : stop;
        keys += (next - first) * k_seq;
        load_keys(k, keys, k_seq, next, next_stop, lane);
        found.add(scores, v, a.scale, first, stop, lane);
        values += (next - first) * v_seq;
        load_values(v, values, v_seq, next, next_stop, lane);
        if (last) {
            found.send(merge, part++, lane);
            found = Found();
        }
        first = next, stop = next_stop;
    }

    if (warp * 32 / MERGERS >= QUADS) return;
    wait_for_bytes(&merge.sent);
    char* out = a.out + batch * a.out_batch + kv_head * GROUP * a.out_head + rank * OWN_DIMS * 2;
    // whole warps go on together: they exchange
    for (int first = warp * 32 / MERGERS; first < QUADS; first += THREADS / MERGERS) {
        const int quad = smaller(first + lane / MERGERS, QUADS - 1);
        const bool stores = lane % MERGERS == 0 && first + lane / MERGERS < QUADS;
        const int head = quad * 4 / OWN_DIMS, dim = quad * 4 % OWN_DIMS;
        merge_quad(merge, quad, parts, lane % MERGERS, out + head * a.out_head + dim * 2, stores);
    }
}
