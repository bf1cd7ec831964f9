// Any number of decode steps of one sequence in one launch, by programs that stay.
//
// A program, one per multiprocessor, keeps its share of every matrix and takes part in every stage:
//
//     query     norm + query, key and value, rotated; stores  -> qkv, KV cache
//     attend    attention; few programs                       -> attended, or partial results
//     output    output projection, + x                        -> middle
//     gate_up   norm + gate and up projections, SiLU * up     -> inner
//     down      down projection, + middle                     -> x
//
// Its warps get their inputs by polling the vectors of the stage before (`vectors.cuh`); meanwhile one
// warp brings the next weights to its shared memory (`ring.cuh`). Products are by tensor cores (`weights.cuh`, `products.cuh`). All programs meet at one barrier per token, which makes the
// new keys and values safe to read. The grid must be on the GPU all at once, hence the cooperative
// launch.
//
// Constants, given by the compiler's command line: PROGRAMS, WARPS, THREADS, RING_SLOTS, WINDOW,
// TAKEN_EARLY, SPREAD, VECTORS, SHARED_LIMIT, HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, CACHE, and the kinds of
// matrices: BODY_KIND, EMBEDDING_KIND, HEAD_KIND.
#include "next_token.cuh"

// The vectors, one behind the other: those of words, then those of values.
constexpr int ATTENDED = 0;
constexpr int PARTIAL = ATTENDED + QUERIES;
constexpr int WORDS = PARTIAL + HEADS * MOST_PARTS * PART_WORDS;
constexpr int length_of(int size) { return up_to(size, 8) * 8 * SPREAD; }
constexpr int X = 0;
constexpr int MIDDLE = X + length_of(HIDDEN);
constexpr int QKV = MIDDLE + length_of(HIDDEN);
constexpr int GATED = QKV + length_of(QKV_ROWS);
constexpr int VALUES = GATED + length_of(INNER);
static_assert(WORDS % 2 == 0 && WORDS + up_to(VALUES, 2) <= VECTORS, "vectors overlap");
constexpr int EPOCHS = 5;  // of a layer

static_assert(VOCAB % 2 == 0 && HIDDEN % 2 == 0 && INNER % 2 == 0, "rows are computed in pairs");

struct alignas(16) Shared {
    Ring ring;
    WarpInputs inputs[WARPS];
    unsigned char zeros[DIGITS_NBYTES];  // digits of other lanes' inputs
    float parts[2][PARTS];               // of one stage, and of the next
    float squares[WARPS];
    Candidate candidates[WARPS];
    AttentionShared attention;
};

static_assert(sizeof(WarpInputs) % 16 == 0 && DIGITS_NBYTES % 16 == 0, "digits are loaded by 16 bytes");
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

// The norms of a block that comes next: one program brings them for all.
DEVICE void prefetch_norms(const Worker& me, const Arguments& arguments, int slot, int block) {
    constexpr int LINES = up_to(HIDDEN * 4, LINE_NBYTES);
    if (me.program != slot % PROGRAMS || me.thread >= 2 * LINES) return;
    const float* norms =
        me.thread < LINES ? arguments.attention_norms : arguments.ffn_norms;
    prefetch_line(norms + block * HIDDEN + me.thread % LINES * (LINE_NBYTES / 4));
}

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
    store_value(qkv, row, low, epoch);
    store_value(qkv, row + HALF, high, epoch);
    if (head >= HEADS) {
        const int is_value = head >= HEADS + KV_HEADS;
        unsigned char* place =
            cache.place(is_value, head - HEADS - is_value * KV_HEADS, position);
        store_element(place, dim, low);
        store_element(place, dim + HALF, high);
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
        prepare(shared.ring, me, arguments.matrices);
        publish_barriers();
    }
    sync_program();

    if (me.warp == WARPS) {
        Carrier carrier(shared.ring, me.lane);
        ROLLED for (int step = 0; step < arguments.steps; ++step) {
            ROLLED for (int slot = 0; slot < arguments.length; ++slot)
                ROLLED for (int stage = QUERY; stage <= DOWN; ++stage)
                    carrier.bring(stage, arguments.schedule[slot]);
            carrier.bring(HEAD, 0);
        }
        return;
    }

    WarpInputs& my_inputs = shared.inputs[me.warp];
    Reader reader(shared.ring);
    uint2* const words = arguments.vectors;
    unsigned* const vectors = reinterpret_cast<unsigned*>(words + WORDS);
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
        const bool has_rows = me.thread < me.pairs[OUTPUT];
        float2 residual = make_float2(0, 0);  // of this thread's rows, to which products are added
        if (has_rows) {
            const int row = row_of(OUTPUT, me.first_pair[OUTPUT] + me.thread);
            residual = make_float2(embedded(arguments, token, row), embedded(arguments, token, row + 1));
        }
        ROLLED for (int slot = 0; slot < arguments.length; ++slot) {
            const int block = arguments.schedule[slot];
            const CacheSlot cache = {arguments.cache + slot * slot_nbytes, arguments.capacity};
            // Multiply a stage's inputs, which `take(inputs)` waits for; `finish(row, sums)` gets the
            // sums of this thread's pair, if it has one.
            const auto run = [&](auto stage, const auto& take, const auto& finish) {
                constexpr int STAGE = decltype(stage)::VALUE;
                const FirstPieces<STAGE> first(me, reader, block);
                Four inputs[Mine<STAGE>::FOURS];
                take(inputs);
                MARK();
                const Inputs<STAGE> digits(me, inputs, my_inputs, shared.zeros);
                float* const parts = shared.parts[STAGE % 2];
                multiply<STAGE>(me, reader, block, first, digits, parts);
                sync_workers();
                MARK();
                if (me.thread < me.pairs[STAGE]) finish(joined(parts, me.thread));
                MARK();
            };
            // The first row of this thread's pair, and the scales of both.
            const auto row_in = [&](auto stage) {
                constexpr int STAGE = decltype(stage)::VALUE;
                return row_of(STAGE, me.first_pair[STAGE] + me.thread);
            };
            const auto scales_in = [&](auto stage) {
                constexpr int STAGE = decltype(stage)::VALUE;
                const int row = row_in(stage);
                const Codes& matrix = arguments.matrices[STAGE];
                if (BODY_KIND != INT8 || me.thread >= me.pairs[STAGE]) return make_float2(1, 1);
                return make_float2(
                    row_scale<STAGE>(matrix, block, row),
                    row_scale<STAGE>(matrix, block, row + row_distance(STAGE)));
            };

            me.begin_stage();
            {
                prefetch_norms(
                    me, arguments, slot, arguments.schedule[slot + 1 == arguments.length ? 0 : slot + 1]);
                prefetch_cache(me, plan, cache, position);
                constexpr Constant<QUERY> STAGE{};
                const int row = row_in(STAGE);
                float2 scales = scales_in(STAGE);
                float cos = 1, sin = 0;
                if (me.thread < me.pairs[QUERY] && row < (HEADS + KV_HEADS) * HEAD_DIM) {
                    const int place = position * (HEAD_DIM / 2) + row % HEAD_DIM;
                    cos = arguments.cos[place];
                    sin = arguments.sin[place];
                }
                const Norm<QUERY> norm(me, arguments.attention_norms + block * HIDDEN);
                run(STAGE,
                    [&](Four(&inputs)[Mine<QUERY>::FOURS]) {
                        if (slot > 0) {
                            receive<QUERY>(me, vectors + X, epoch, inputs);
                        } else {
                            UNROLL for (int i = 0; i < Mine<QUERY>::FOURS; ++i) {
                                const int k = Mine<QUERY>::input(me, i);
                                UNROLL for (int j = 0; j < EACH; ++j)
                                    inputs[i].values[j] =
                                        k < HIDDEN ? embedded(arguments, token, k + j) : 0;
                            }
                        }
                        norm.apply(me, inputs, shared.squares);
                    },
                    [&](float2 sums) {
                        const float factor = norm_factor(shared.squares, arguments.eps);
                        sums.x *= factor * scales.x;
                        sums.y *= factor * scales.y;
                        finish_query(row, sums, cos, sin, position, cache, vectors + QKV, epoch + 1);
                    });
            }

            ROLLED for (int task = me.program; task < HEADS * plan.parts; task += PROGRAMS)
                attend(
                    me, task, plan, vectors + QKV, cache, position, arguments.scale,
                    words + PARTIAL, words + ATTENDED, epoch + 2, shared.attention);
            if (plan.is_joined)
                ROLLED for (int i = PROGRAMS - 1 - me.program; i < HEADS; i += PROGRAMS)
                    join_parts(
                        me, i, plan.parts, words + PARTIAL, words + ATTENDED, epoch + 2,
                        shared.attention);
            MARK();

            me.begin_stage();
            const auto add_to_residual = [&](auto stage, unsigned* vector, unsigned written) {
                const float2 scales = scales_in(stage);
                return [&, scales, vector, written](float2 sums) {
                    const int row = row_in(Constant<OUTPUT>());
                    residual.x = fma_(sums.x, scales.x, residual.x);
                    residual.y = fma_(sums.y, scales.y, residual.y);
                    store_value(vector, row, residual.x, written);
                    store_value(vector, row + 1, residual.y, written);
                };
            };
            run(Constant<OUTPUT>(),
                [&](Four(&inputs)[Mine<OUTPUT>::FOURS]) {
                    if (plan.parts == 1 || plan.is_joined)
                        receive_words<OUTPUT>(me, words + ATTENDED, epoch + 2, inputs);
                    else
                        receive_parts(me, words + PARTIAL, plan.parts, epoch + 2, inputs);
                },
                add_to_residual(Constant<OUTPUT>(), vectors + MIDDLE, epoch + 3));

            me.begin_stage();
            {
                constexpr Constant<GATE_UP> STAGE{};
                const float2 scales = scales_in(STAGE);
                const Norm<GATE_UP> norm(me, arguments.ffn_norms + block * HIDDEN);
                run(STAGE,
                    [&](Four(&inputs)[Mine<GATE_UP>::FOURS]) {
                        receive<GATE_UP>(me, vectors + MIDDLE, epoch + 3, inputs);
                        norm.apply(me, inputs, shared.squares);
                    },
                    [&](float2 sums) {
                        const float factor = norm_factor(shared.squares, arguments.eps);
                        const float gate = sums.x * (factor * scales.x);
                        const float up = sums.y * (factor * scales.y);
                        store_value(
                            vectors + GATED, row_in(STAGE), divide(gate, 1 + exp_(-gate)) * up,
                            epoch + 4);
                    });
            }

            me.begin_stage();
            run(Constant<DOWN>(),
                [&](Four(&inputs)[Mine<DOWN>::FOURS]) {
                    receive<DOWN>(me, vectors + GATED, epoch + 4, inputs);
                },
                add_to_residual(Constant<DOWN>(), vectors + X, epoch + 5));
            epoch += EPOCHS;
        }

        me.begin_stage();
        const Norm<HEAD> norm(me, arguments.final_norm);
        Four inputs[Mine<HEAD>::FOURS];
        receive<HEAD>(me, vectors + X, epoch, inputs);
        norm.apply(me, inputs, shared.squares);
        const Inputs<HEAD> digits(me, inputs, my_inputs, shared.zeros);
        constexpr Shape SHAPE = shape_of(HEAD);
        constexpr int TILES = SHAPE.tiles(), STEPS = SHAPE.steps();
        Candidate best = no_candidate();
        ROLLED for (int begin = 0; begin < TILES; begin += HEAD_TILES) {
            float* const parts = shared.parts[begin / HEAD_TILES % 2];
            ROLLED for (int tile = begin; tile < least(begin + HEAD_TILES, TILES); ++tile) {
                TileSums<HEAD_KIND> sums;
                for_each<0, STEPS>([&](auto number) {
                    constexpr int STEP = decltype(number)::VALUE;
                    digits.template multiply<STEP>(reader.take<HEAD, STEP>(me, 0, tile), sums);
                });
                store_sums(me, sums, tile - begin, parts);
            }
            sync_workers();
            ROLLED for (int i = me.thread; i < HEAD_TILES * TILE_PAIRS; i += WORKERS) {
                const int pair = begin * TILE_PAIRS + i;
                if (pair >= me.pairs[HEAD]) continue;
                const int row = row_of(HEAD, me.first_pair[HEAD] + pair);
                const float factor = norm_factor(shared.squares, arguments.eps);
                const float2 sums = joined(parts, i);
                ROLLED for (int j = 0; j < 2; ++j) {
                    const float logit = (j ? sums.y : sums.x) * factor *
                                        row_scale<HEAD>(arguments.matrices[HEAD], 0, row + j);
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
