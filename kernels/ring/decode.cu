// Any number of decode steps of one sequence in one launch, by programs that stay.
//
// A program, one per multiprocessor, keeps its share of every matrix and takes part in every stage:
//
//     query     norm + query, key and value, rotated; stores  -> qkv, KV cache
//     attend    attention; few programs                       -> attended
//     output    output projection, + x                        -> middle
//     gate_up   norm + gate and up projections, SiLU * up     -> inner
//     down      down projection, + middle                     -> x
//
// Its warps get their inputs by polling the vectors of the stage before (`vectors.cuh`); meanwhile one
// warp brings the next weights to its shared memory (`ring.cuh`). Products are by tensor cores
// (`weights.cuh`, `products.cuh`). All programs meet at one barrier per token, which makes the new
// keys and values safe to read. The grid must be on the GPU all at once, hence the cooperative launch.
//
// All stages of a layer go through the same instructions: those of four products, each with its own,
// would not fit into the cache of instructions, and take longer to come than the products.
//
// Constants, given by the compiler's command line: PROGRAMS, WARPS, THREADS, RING_SLOTS,
// VECTORS, SHARED_LIMIT, HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, CACHE, and the kinds of
// matrices: BODY_KIND, EMBEDDING_KIND, HEAD_KIND.
#include "next_token.cuh"

// The vectors, one behind the other: values, then words.
constexpr int X = 0;
constexpr int MIDDLE = X + HIDDEN;
constexpr int QKV = MIDDLE + HIDDEN;
constexpr int ATTENDED = QKV + QKV_ROWS;
constexpr int GATED = ATTENDED + QUERIES;
constexpr int VALUES = up_to(GATED + INNER, 2);  // in words
constexpr int PARTIAL = VALUES;
static_assert(PARTIAL + HEADS * MANY_PARTS * PART_WORDS <= VECTORS, "vectors overlap");
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

// What a stage of a layer reads: its input in the vectors, and the epoch of that in the layer.
DEVICE int input_of(int stage) {
    return stage == QUERY ? X : stage == OUTPUT ? ATTENDED : stage == GATE_UP ? MIDDLE : GATED;
}
DEVICE unsigned epoch_of(int stage) { return stage == QUERY ? 0 : stage + 1; }

DEVICE float embedded(const Arguments& arguments, int token, int k) {
    return weight_at<EMBEDDING_KIND, HIDDEN>(
        arguments.embedding.codes, arguments.embedding.scales, token, k);
}

// Turn a pair of a new query, key or value; publish it, and keep keys and values.
DEVICE void finish_query(
    int row, float2 sums, float cos, float sin, int position, const CacheSlot& cache, unsigned* qkv,
    unsigned epoch) {
    constexpr int HALF = HEAD_DIM / 2;
    const int head = row / HEAD_DIM, dim = row % HEAD_DIM;
    const float low = sums.x * cos - sums.y * sin, high = sums.y * cos + sums.x * sin;
    store_value(qkv + row, low, epoch);
    store_value(qkv + row + HALF, high, epoch);
    if (head >= HEADS) {
        const int is_value = head >= HEADS + KV_HEADS;
        unsigned char* place =
            cache.place(is_value, head - HEADS - is_value * KV_HEADS, position);
        store_element(place, dim, low);
        store_element(place, dim + HALF, high);
    }
}

// The warp that brings the weights; norms, keys and values come to the L2 cache.
DEVICE void carry(Ring& ring, const Arguments& arguments, int program, int lane) {
    constexpr int LINES = up_to(HIDDEN * 4, LINE_NBYTES);
    const long long slot_nbytes =
        2ll * KV_HEADS * arguments.capacity * HEAD_DIM * ELEMENT_NBYTES;
    Carrier carrier(ring, lane);
    ROLLED for (int step = 0; step < arguments.steps; ++step) {
        const int position = arguments.position + step;
        const Plan plan = plan_for(position);
        ROLLED for (int slot = 0; slot < arguments.length; ++slot) {
            const int block = arguments.schedule[slot];
            if (program == slot % PROGRAMS) {  // for all
                ROLLED for (int i = lane; i < LINES; i += LANES) {
                    const int at = block * HIDDEN + i * (LINE_NBYTES / 4);
                    prefetch_line(arguments.attention_norms + at);
                    prefetch_line(arguments.ffn_norms + at);
                }
            }
            prefetch_cache(
                program, lane, plan, {arguments.cache + slot * slot_nbytes, arguments.capacity},
                position);
            ROLLED for (int stage = QUERY; stage <= DOWN; ++stage) carrier.bring(stage, block);
        }
        carrier.bring(HEAD, 0);
    }
}

#ifdef CLOCKED
#define MARK()                                                              \
    if (me.thread == 0 && me.program == 0 && marks < CLOCKED)           \
        arguments.clock[marks++] = clock_ns();
#else
#define MARK()
#endif

KERNEL(decode, Arguments) {
    Shared& shared = shared_memory<Shared>();
    // what lies beyond the inputs is multiplied, too
    float* everything = reinterpret_cast<float*>(&shared);
    ROLLED for (int i = thread_id(); i < static_cast<int>(sizeof(Shared) / 4); i += THREADS)
        everything[i] = 0;
    sync_program();
    Worker me;
    if (me.thread == 0) {
        prepare(shared.ring, me.program, arguments.matrices);
        publish_barriers();
    }
    sync_program();
    if (me.warp == WARPS) {
        carry(shared.ring, arguments, me.program, me.lane);
        return;
    }

    WarpInputs& my_inputs = shared.inputs[me.warp];
    Reader reader(shared.ring);
    unsigned* const vectors = reinterpret_cast<unsigned*>(arguments.vectors);
    uint2* const partial = arguments.vectors + PARTIAL;
    const long long slot_nbytes =
        2ll * KV_HEADS * arguments.capacity * HEAD_DIM * ELEMENT_NBYTES;
    int token = arguments.token;
    int position = arguments.position;
    unsigned epoch = arguments.first_epoch;
#ifdef CLOCKED
    int marks = 0;
#endif

    ROLLED for (int step = 0; step < arguments.steps; ++step) {
        const Plan plan = plan_for(position);
        // The residual's rows that this thread adds products to; at first the token's embedding.
        float2 residual = make_float2(0, 0);
        {
            const Share& share = shared.ring.shares[OUTPUT];
            if (me.thread < share.pairs) {
                const int row = share.first_row(OUTPUT, me.thread);
                residual.x = embedded(arguments, token, row);
                residual.y = embedded(arguments, token, row + 1);
                store_value(vectors + X + row, residual.x, epoch);
                store_value(vectors + X + row + 1, residual.y, epoch);
            }
        }
        ROLLED for (int slot = 0; slot < arguments.length; ++slot) {
            const int block = arguments.schedule[slot];
            const CacheSlot cache = {arguments.cache + slot * slot_nbytes, arguments.capacity};
            ROLLED for (int stage = QUERY; stage <= DOWN; ++stage) {
                me.begin_stage();
                if (stage == OUTPUT) {
                    ROLLED for (int task = me.program; task < HEADS * plan.parts; task += PROGRAMS)
                        attend(
                            me, task, plan, vectors + QKV, cache, position, arguments.scale, partial,
                            vectors + ATTENDED, epoch + epoch_of(OUTPUT), shared.attention);
                    if (plan.parts > 1)
                        ROLLED for (int i = PROGRAMS - 1 - me.program; i < HEADS; i += PROGRAMS)
                            join_parts(
                                me, i, plan.parts, partial, vectors + ATTENDED,
                                epoch + epoch_of(OUTPUT), shared.attention);
                    MARK();
                }
                // what needs no inputs comes first
                const Share& share = shared.ring.shares[stage];
                const bool finishes = me.thread < share.pairs;
                const int row = share.first_row(stage, me.thread);
                float scales[2] = {1, 1}, cos = 1, sin = 0;
                if (finishes) {
                    if (BODY_KIND == INT8) {
                        const float* const of_rows = reinterpret_cast<const float*>(
                            share.matrix.scales + block * share.block_scales_nbytes);
                        scales[0] = of_rows[row];
                        scales[1] = of_rows[row + share.distance];
                    }
                    if (stage == QUERY && row < (HEADS + KV_HEADS) * HEAD_DIM) {
                        const int place = position * (HEAD_DIM / 2) + row % HEAD_DIM;
                        cos = arguments.cos[place];
                        sin = arguments.sin[place];
                    }
                }
                const bool is_normed = stage == QUERY || stage == GATE_UP;
                const float* const norms =
                    stage == QUERY ? arguments.attention_norms : arguments.ffn_norms;
                const Norm<BODY_KIND, BODY_FOURS> norm(
                    me, is_normed ? norms + block * HIDDEN : nullptr);
                const Inputs<BODY_KIND> inputs(me, my_inputs, shared.zeros);
                float* const parts = shared.parts[stage % 2];
                float square = 0;
                multiply(
                    me, reader, share.tiles, share.steps, share.row_nbytes, inputs, parts, [&] {
                        Four values[BODY_FOURS];
                        receive<BODY_KIND>(
                            me, vectors + input_of(stage), share.cols, epoch + epoch_of(stage),
                            values);
                        MARK();
                        if (is_normed) square = norm.apply(values);
                        inputs.store(me, share.fours, values);
                    });
                if (is_normed) store_squares(me, square, shared.squares);
                sync_workers();
                MARK();
                if (!finishes) continue;
                float2 sums = joined(parts, me.thread);
                const float factor = is_normed ? norm_factor(shared.squares, arguments.eps) : 1;
                sums.x *= factor * scales[0];
                sums.y *= factor * scales[1];
                if (stage == QUERY) {
                    finish_query(row, sums, cos, sin, position, cache, vectors + QKV, epoch + 1);
                } else if (stage == GATE_UP) {
                    store_value(
                        vectors + GATED + row, divide(sums.x, 1 + exp_(-sums.x)) * sums.y, epoch + 4);
                } else {
                    residual.x += sums.x;
                    residual.y += sums.y;
                    unsigned* const out = vectors + (stage == OUTPUT ? MIDDLE : X) + row;
                    const unsigned written = epoch + (stage == OUTPUT ? 3 : 5);
                    store_value(out, residual.x, written);
                    store_value(out + 1, residual.y, written);
                }
                MARK();
            }
            epoch += EPOCHS;
        }

        me.begin_stage();
        const Share& share = shared.ring.shares[HEAD];
        const Norm<HEAD_KIND, HEAD_FOURS> norm(me, arguments.final_norm);
        const Inputs<HEAD_KIND> inputs(me, my_inputs, shared.zeros);
        Candidate best = no_candidate();
        ROLLED for (int begin = 0; begin < share.tiles; begin += HEAD_TILES) {
            float* const parts = shared.parts[begin / HEAD_TILES % 2];
            const int tiles = least(HEAD_TILES, share.tiles - begin);
            multiply(
                me, reader, tiles, share.steps, share.row_nbytes, inputs, parts, [&] {
                    if (begin > 0) return;
                    Four values[HEAD_FOURS];
                    receive<HEAD_KIND>(me, vectors + X, HIDDEN, epoch, values);
                    const float square = norm.apply(values);
                    inputs.store(me, HEAD_FOURS, values);
                    store_squares(me, square, shared.squares);
                });
            sync_workers();
            ROLLED for (int i = me.thread; i < tiles * TILE_PAIRS; i += WORKERS) {
                const int pair = begin * TILE_PAIRS + i;
                if (pair >= share.pairs) continue;
                const int row = share.first_row(HEAD, pair);
                const float factor = norm_factor(shared.squares, arguments.eps);
                const float2 sums = joined(parts, i);
                ROLLED for (int j = 0; j < 2; ++j) {
                    const float scale =
                        HEAD_KIND == INT8
                            ? reinterpret_cast<const float*>(share.matrix.scales)[row + j]
                            : 1;
                    const float logit = (j ? sums.y : sums.x) * factor * scale;
                    arguments.logits[row + j] = logit;
                    best = better(
                        best, candidate_of(
                                  row + j, logit, arguments.temperature, arguments.seed, position));
                }
            }
        }
        best = best_of_program(me, best, shared.candidates);
        if (me.thread == 0) {
            arguments.candidates[me.program] = best;
            arrive(arguments.counter);
            while (static_cast<int>(load_acquire(arguments.counter) - (step + 1) * PROGRAMS) < 0) {
            }
        }
        sync_workers();
        best = no_candidate();
        ROLLED for (int other = me.thread; other < PROGRAMS; other += WORKERS)
            best = better(best, arguments.candidates[other]);
        best = best_of_program(me, best, shared.candidates);
        token = least(best.token, VOCAB - 1);
        if (me.program == 0 && me.thread == 0) {
            arguments.tokens[step] = token;
            arguments.logprobs[step] = best.logit - best.largest - log_(best.total);
        }
        ++position;
        ++epoch;
    }
}
