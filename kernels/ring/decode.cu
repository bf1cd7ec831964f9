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
// It gets its inputs by polling the vectors of the stage before (`vectors.cuh`); until they are
// there, its next weights travel to its shared memory (`matrices.cuh`). All programs meet at one
// barrier per token, which makes the new keys and values safe to read. The grid must be on the GPU
// all at once, hence the cooperative launch.
//
// Constants, given by the compiler's command line: PROGRAMS, WARPS, THREADS, RING_DEPTH, VECTORS,
// SHARED_LIMIT, HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, CACHE, and the kinds of matrices:
// BODY_KIND, EMBEDDING_KIND, HEAD_KIND. TENSOR_CORES says how weights are multiplied: by tensor cores
// (`tiles.cuh`), or by fused multiply-adds (`pairs.cuh`).
#include "next_token.cuh"

// The vectors, one behind the other.
constexpr int X = 0;
constexpr int MIDDLE = X + HIDDEN;
constexpr int QKV = MIDDLE + HIDDEN;
constexpr int ATTENDED = QKV + QKV_ROWS;
constexpr int GATED = ATTENDED + QUERIES;
constexpr int PARTIAL = GATED + INNER;
static_assert(
    shape_of(QUERY).most_pairs() <= THREADS && shape_of(OUTPUT).most_pairs() <= THREADS &&
        shape_of(GATE_UP).most_pairs() <= THREADS,
    "a thread finishes one pair");
static_assert(PARTIAL + HEADS * MOST_PARTS * (HEAD_DIM + 1) <= VECTORS, "vectors overlap");
constexpr int EPOCHS = 5;  // of a layer

static_assert(VOCAB % 2 == 0 && HIDDEN % 2 == 0, "rows are computed in pairs");

struct Shared {
    float4 inputs[inputs_before(STAGES) / 4];
    Ring rings[WARPS];
    float2 parts[parts_before(STAGES)];
    float residual[HIDDEN];
    float squares[WARPS];
    Layout layouts[STAGES];
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

template <int VALUE_>
struct Constant {
    static constexpr int VALUE = VALUE_;
};

// The norms of a block that comes next: one program brings them for all.
DEVICE void prefetch_norms(const Worker& me, const Arguments& arguments, int slot, int block) {
    constexpr int LINES = up_to(HIDDEN * 4, LINE_NBYTES);
    if (me.program != slot % PROGRAMS || me.thread >= 2 * LINES) return;
    const float* norms =
        me.thread < LINES ? arguments.attention_norms : arguments.ffn_norms;
    prefetch_line(norms + block * HIDDEN + me.thread % LINES * (LINE_NBYTES / 4));
}

// Turn a pair of a new query, key or value; publish it, and keep keys and values.
DEVICE void finish_query(
    int row, float2 sums, float cos, float sin, int position, const CacheSlot& cache, uint2* qkv,
    unsigned epoch) {
    constexpr int HALF = HEAD_DIM / 2;
    const int head = row / HEAD_DIM, dim = row % HEAD_DIM;
    const float low = sums.x * cos - sums.y * sin, high = sums.y * cos + sums.x * sin;
    store_word(qkv + row, low, epoch);
    store_word(qkv + row + HALF, high, epoch);
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
    Worker me;
    Shared& shared = shared_memory<Shared>();
    // what lies beyond the inputs is multiplied, too
    float* everything = reinterpret_cast<float*>(&shared);
    ROLLED for (int i = me.thread; i < static_cast<int>(sizeof(Shared) / 4); i += THREADS)
        everything[i] = 0;
    sync_program();
    set_layout<QUERY>(me, arguments.matrices[QUERY], shared.layouts[QUERY]);
    set_layout<OUTPUT>(me, arguments.matrices[OUTPUT], shared.layouts[OUTPUT]);
    set_layout<GATE_UP>(me, arguments.matrices[GATE_UP], shared.layouts[GATE_UP]);
    set_layout<DOWN>(me, arguments.matrices[DOWN], shared.layouts[DOWN]);
    set_layout<HEAD>(me, arguments.matrices[HEAD], shared.layouts[HEAD]);
    sync_program();
    Source source(
        me, shared.layouts, arguments.schedule, arguments.length, &shared.rings[me.warp()]);

    uint2* const vectors = arguments.vectors;
    const long long slot_nbytes =
        2ll * KV_HEADS * arguments.capacity * HEAD_DIM * ELEMENT_NBYTES;
    int token = arguments.token;
    int position = arguments.position;
    unsigned epoch = arguments.first_epoch;
#ifdef CLOCKED
    int marks = 0;
#endif

    // The input of a norm, and then of a matrix; `inputs` gets it times the weights of the norm.
    const auto take_normed = [&](auto kind, const float* weights, float* inputs,
                                 const auto& receive_all) {
        const Norm<decltype(kind)::VALUE> norm(me, weights);
        float square = 0;
        receive_all([&](int i, int k, float value) {
            square = fma_(value, value, square);
            shared.residual[k] = value;
            store_input<decltype(kind)::VALUE>(inputs, k, value * norm.weights[i]);
        });
        store_squares(me, shared.squares, square);
    };

    // Until the inputs are there that this warp multiplies: its own, or those of all warps.
    const auto sync_inputs = [&](bool are_mixed) {
        if (!TENSOR_CORES || are_mixed)
            sync_program();
        else
            sync_warp();
    };

    ROLLED for (int step = 0; step < arguments.steps; ++step) {
        const Plan plan = plan_for(position);
        ROLLED for (int slot = 0; slot < arguments.length; ++slot) {
            const int block = arguments.schedule[slot];
            const CacheSlot cache = {arguments.cache + slot * slot_nbytes, arguments.capacity};
            ROLLED for (int stage = QUERY; stage <= DOWN; ++stage) {
                me.begin_stage();
                if (stage == QUERY) {
                    const int next = slot + 1 == arguments.length ? slot : slot + 1;
                    prefetch_norms(me, arguments, slot, arguments.schedule[next]);
                    prefetch_cache(me, plan, cache, position);
                }
                const Layout& layout = shared.layouts[stage];
                float* const inputs = reinterpret_cast<float*>(shared.inputs) + layout.inputs;
                float2* const parts = shared.parts + layout.first_part;
                const auto take = [&](int, int k, float value) {
                    store_input<BODY_KIND>(inputs, k, value);
                };
                if (stage == QUERY || stage == GATE_UP) {
                    const float* norms =
                        stage == QUERY ? arguments.attention_norms : arguments.ffn_norms;
                    const uint2* vector = vectors + (stage == QUERY ? X : MIDDLE);
                    const unsigned wanted = stage == QUERY ? epoch : epoch + 3;
                    take_normed(
                        Constant<BODY_KIND>(), norms + block * HIDDEN, inputs, [&](const auto& use) {
                            if (stage == QUERY && slot == 0)
                                for_mine<HIDDEN, BODY_KIND>(me, [&](int i, int k) {
                                    use(i, k, weight_at<EMBEDDING_KIND, HIDDEN>(
                                                  arguments.embedding.codes,
                                                  arguments.embedding.scales, token, k));
                                });
                            else
                                receive<HIDDEN, BODY_KIND>(me, vector, wanted, use);
                        });
                } else if (stage == OUTPUT) {
                    ROLLED for (int task = me.program; task < HEADS * plan.parts; task += PROGRAMS)
                        attend(
                            me, task, plan, vectors + QKV, cache, position, arguments.scale,
                            vectors + PARTIAL, vectors + ATTENDED, epoch + 2, shared.attention);
                    if (plan.is_joined)
                        ROLLED for (int i = PROGRAMS - 1 - me.program; i < HEADS; i += PROGRAMS)
                            join_parts(
                                me, i, plan.parts, vectors + PARTIAL, vectors + ATTENDED,
                                epoch + 2, shared.attention);
                    MARK();
                    if (plan.parts == 1 || plan.is_joined)
                        receive<QUERIES, BODY_KIND>(me, vectors + ATTENDED, epoch + 2, take);
                    else
                        receive_parts(me, vectors + PARTIAL, plan.parts, epoch + 2, take);
                } else {
                    receive<INNER, BODY_KIND>(me, vectors + GATED, epoch + 4, take);
                }
                sync_inputs(stage == OUTPUT && plan.parts > 1 && !plan.is_joined);
                MARK();
                // one thread finishes a pair: what it needs comes while it multiplies
                const bool finishes = me.thread < layout.pairs;
                const int row = row_of(stage, layout.first_pair + me.thread);
                const int other = row + row_distance(stage);
                float scales[2] = {1, 1}, cos = 1, sin = 0;
                if (finishes) {
                    scales[0] = row_scale<BODY_KIND>(layout, block, row);
                    scales[1] = row_scale<BODY_KIND>(layout, block, other);
                    if (stage == QUERY && row < (HEADS + KV_HEADS) * HEAD_DIM) {
                        const int place = position * (HEAD_DIM / 2) + row % HEAD_DIM;
                        cos = arguments.cos[place];
                        sin = arguments.sin[place];
                    }
                }
                multiply<BODY_KIND>(me, layout, source, inputs, parts);
                const auto apply_norm = [&] {
                    if (finishes && (stage == QUERY || stage == GATE_UP)) {
                        const float factor = norm_factor(shared.squares, arguments.eps);
                        scales[0] *= factor;
                        scales[1] *= factor;
                    }
                };
                if (!TENSOR_CORES) apply_norm();
                sync_program();
                if (TENSOR_CORES) apply_norm();
                MARK();
                if (finishes) {
                    float2 sums = joined(parts, layout, me.thread);
                    sums.x *= scales[0];
                    sums.y *= scales[1];
                    if (stage == QUERY) {
                        finish_query(
                            row, sums, cos, sin, position, cache, vectors + QKV, epoch + 1);
                    } else if (stage == GATE_UP) {
                        store_word(
                            vectors + GATED + row, divide(sums.x, 1 + exp_(-sums.x)) * sums.y,
                            epoch + 4);
                    } else {
                        uint2* const out = vectors + (stage == OUTPUT ? MIDDLE : X);
                        const unsigned written = stage == OUTPUT ? epoch + 3 : epoch + 5;
                        store_word(out + row, sums.x + shared.residual[row], written);
                        store_word(out + other, sums.y + shared.residual[other], written);
                    }
                }
                MARK();
            }
            epoch += EPOCHS;
        }

        me.begin_stage();
        const Layout& layout = shared.layouts[HEAD];
        float* const inputs = reinterpret_cast<float*>(shared.inputs) + layout.inputs;
        take_normed(
            Constant<HEAD_KIND>(), arguments.final_norm, inputs,
            [&](const auto& use) { receive<HIDDEN, HEAD_KIND>(me, vectors + X, epoch, use); });
        sync_inputs(false);
        float2* const parts = shared.parts + layout.first_part;
        multiply<HEAD_KIND>(me, layout, source, inputs, parts);
        sync_program();
        Candidate best = no_candidate();
        ROLLED for (int pair = me.thread; pair < layout.pairs; pair += THREADS) {
            const int row = row_of(HEAD, layout.first_pair + pair);
            const float factor = norm_factor(shared.squares, arguments.eps);
            const float2 sums = joined(parts, layout, pair);
            ROLLED for (int i = 0; i < 2; ++i) {
                const float logit =
                    (i ? sums.y : sums.x) * factor * row_scale<HEAD_KIND>(layout, 0, row + i);
                arguments.logits[row + i] = logit;
                best = better(
                    best, candidate_of(
                              row + i, logit, arguments.temperature, arguments.seed, position));
            }
        }
        best = best_of_program(me, best, shared.candidates);
        if (me.thread == 0) {
            arguments.candidates[me.program] = best;
            arrive(arguments.counter);
            while (static_cast<int>(load_acquire(arguments.counter) - (step + 1) * PROGRAMS) < 0) {
            }
        }
        sync_program();
        best = no_candidate();
        ROLLED for (int other = me.thread; other < PROGRAMS; other += THREADS)
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
    source.finish();  // requested for a step that does not come
}
