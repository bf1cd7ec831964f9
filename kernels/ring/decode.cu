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
// matrices: BODY_KIND, EMBEDDING_KIND, HEAD_KIND. Three are to be measured (docs/gpu.md): FINISHERS, 0
// or more warps that do nothing but publish results (`results.cuh`); LEAVE_FIRST, 1 if weights that
// are not read again by the next layer leave the L2 cache first; and ATTEND_BY_TILES, 1 if attention
// to a cache of 16 bits is by tensor cores (`attention_by_tiles.cuh`).
#include "results.cuh"

// What a stage of a layer reads: its input in the vectors, and the epoch of that in the layer.
DEVICE int input_of(int stage) {
    return stage == QUERY ? X : stage == OUTPUT ? ATTENDED : stage == GATE_UP ? MIDDLE : GATED;
}
DEVICE unsigned epoch_of(int stage) { return stage == QUERY ? 0 : stage + 1; }

// The warp that brings the weights; norms, keys and values come to the L2 cache.
DEVICE void carry(Ring& ring, const Arguments& arguments, int program, int lane) {
    constexpr int LINES = up_to(HIDDEN * 4, LINE_NBYTES);
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
            prefetch_cache(program, lane, plan, cache_slot(arguments, slot), position);
            const bool again =
                slot + 1 < arguments.length && arguments.schedule[slot + 1] == block;
            ROLLED for (int stage = QUERY; stage <= DOWN; ++stage)
                carrier.bring(stage, block, again);
        }
        carrier.bring(HEAD, 0, false);
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
        for (int i = 0; i < 2; ++i) {
            init_barrier(shared.sums_stored[i], WARPS);
            init_barrier(shared.sums_read[i], most(FINISHERS, 1));
        }
        init_barrier(shared.token_known, 1);
        publish_barriers();
    }
    sync_program();
    if (me.warp == CARRIER) return carry(shared.ring, arguments, me.program, me.lane);
    if (FINISHERS > 0 && me.warp >= WARPS) return finish(arguments, shared, me);

    WarpInputs& my_inputs = shared.inputs[me.warp];
    Reader reader(shared.ring);
    Finisher finisher(arguments, shared, me.thread);  // unless others are
    unsigned* const vectors = reinterpret_cast<unsigned*>(arguments.vectors);
    uint2* const partial = arguments.vectors + PARTIAL;
    int token = arguments.token;
    int position = arguments.position;
    unsigned epoch = arguments.first_epoch;
#ifdef CLOCKED
    int marks = 0;
#endif

    ROLLED for (int step = 0; step < arguments.steps; ++step) {
        const Plan plan = plan_for(position);
        if (FINISHERS == 0) finisher.begin_token(token, epoch);
        ROLLED for (int slot = 0; slot < arguments.length; ++slot) {
            const int block = arguments.schedule[slot];
            const CacheSlot cache = cache_slot(arguments, slot);
            ROLLED for (int stage = QUERY; stage <= DOWN; ++stage) {
                me.begin_stage();
                if (stage == OUTPUT) {
                    ROLLED for (int task = me.program; task < HEADS * plan.parts; task += PROGRAMS)
                        if constexpr (BY_TILES)
                            attend_by_tiles(
                                me, task, plan, arguments.vectors + HANDED, cache, position, partial,
                                vectors + ATTENDED, epoch + epoch_of(OUTPUT), shared.attention);
                        else
                            attend(
                                me, task, plan, vectors + QKV, cache, position, arguments.scale,
                                partial, vectors + ATTENDED, epoch + epoch_of(OUTPUT),
                                shared.attention);
                    if (plan.parts > 1)
                        ROLLED for (int i = PROGRAMS - 1 - me.program; i < HEADS; i += PROGRAMS)
                            join_parts(
                                me, i, plan.parts, partial, vectors + ATTENDED,
                                epoch + epoch_of(OUTPUT), shared.attention);
                    MARK();
                }
                // what needs no inputs comes first
                const Share& share = shared.ring.shares[stage];
                if (FINISHERS == 0) {
                    finisher.thread = me.thread;
                    finisher.prepare(share, stage, block, position);
                }
                const float* const norms =
                    stage == QUERY ? arguments.attention_norms : arguments.ffn_norms;
                const Norm<BODY_KIND, BODY_FOURS> norm(
                    me, is_normed(stage) ? norms + block * HIDDEN : nullptr);
                const Inputs<BODY_KIND> inputs(me, my_inputs, shared.zeros);
                float* const parts = shared.parts[stage % 2];
                float square = 0;
                multiply(
                    me, reader, share.tiles, share.steps, share.row_nbytes, inputs, parts, [&] {
                        // of two stages before
                        if (FINISHERS > 0) wait_for(shared.sums_read[stage % 2], stage / 2 ^ 1);
                        Four values[BODY_FOURS];
                        receive<BODY_KIND>(
                            me, vectors + input_of(stage), share.cols, epoch + epoch_of(stage),
                            values);
                        MARK();
                        if (is_normed(stage)) square = norm.apply(values);
                        inputs.store(me, share.fours, values);
                    });
                if (is_normed(stage)) store_squares(me, square, shared.squares);
                if (FINISHERS == 0) {
                    sync_workers();
                    MARK();
                    finisher.finish(share, stage, position, cache, epoch);
                } else {
                    sync_warp();
                    if (me.lane == 0) arrive(shared.sums_stored[stage % 2]);
                    MARK();
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
                    // the last stage's sums are read last
                    if (FINISHERS > 0) wait_for(shared.sums_read[DOWN % 2], DOWN / 2);
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
        if (FINISHERS > 0 && me.thread == 0) {
            shared.token = token;
            arrive(shared.token_known);
        }
        if (me.program == 0 && me.thread == 0) {
            arguments.tokens[step] = token;
            arguments.logprobs[step] = best.logit - best.largest - log_(best.total);
        }
        ++position;
        ++epoch;
    }
}
