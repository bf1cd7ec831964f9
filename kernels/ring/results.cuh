// From the sums of a stage's products to its results, which the next stage reads.
//
// The first of the threads that multiply make them, when all have stored their sums; or, with
// FINISHERS, warps that do nothing else. Then the others go on to their next weights meanwhile, and
// where they store the sums of a stage, those of two stages before have been read.
#pragma once
#include "program.cuh"

constexpr int FINISHING_THREADS = FINISHERS > 0 ? FINISHERS * LANES : WORKERS;
// Pairs of rows of a thread.
constexpr int ROUNDS = up_to(most_body_pairs(), FINISHING_THREADS);

struct Finisher {
    const Arguments& arguments;
    Shared& shared;
    int thread;               // among those that finish
    float2 residual[ROUNDS];  // of the rows to which products are added
    // of the stage that is under way
    float scales[ROUNDS][2], cos[ROUNDS], sin[ROUNDS];

    DEVICE Finisher(const Arguments& arguments, Shared& shared, int thread)
        : arguments(arguments), shared(shared), thread(thread), residual{} {}

    // Publish the token's embedding, with which the residual begins.
    DEVICE void begin_token(int token, unsigned epoch) {
        const Share& share = shared.ring.shares[OUTPUT];
        UNROLL for (int i = 0; i < ROUNDS; ++i) {
            if (!has(share, i)) break;
            const int row = share.first_row(OUTPUT, pair(i));
            residual[i].x = embedded(token, row);
            residual[i].y = embedded(token, row + 1);
            publish_pair(X + row, 1, residual[i].x, residual[i].y, epoch);
        }
    }

    // Whether this thread has a pair of rows.
    DEVICE bool has(const Share& share, int i) const { return pair(i) < share.pairs; }

    // Load what results need beside sums.
    DEVICE void prepare(const Share& share, int stage, int block, int position) {
        UNROLL for (int i = 0; i < ROUNDS; ++i) {
            scales[i][0] = scales[i][1] = cos[i] = 1;
            sin[i] = 0;
            if (!has(share, i)) continue;
            const int row = share.first_row(stage, pair(i));
            if (BODY_KIND == INT8) {
                const float* const of_rows = reinterpret_cast<const float*>(
                    share.matrix.scales + block * share.block_scales_nbytes);
                scales[i][0] = of_rows[row];
                scales[i][1] = of_rows[row + share.distance];
            }
            if (stage == QUERY && row < (HEADS + KV_HEADS) * HEAD_DIM) {
                const int place = position * (HEAD_DIM / 2) + row % HEAD_DIM;
                cos[i] = arguments.cos[place];
                sin[i] = arguments.sin[place];
                if (BY_TILES && row < QUERIES) {  // with it the query is handed over
                    cos[i] *= arguments.scale * LOG2_E;
                    sin[i] *= arguments.scale * LOG2_E;
                }
            }
        }
    }

    // Publish the results of a stage of the layer that began with `epoch`, from the sums of all warps.
    DEVICE void finish(
        const Share& share, int stage, int position, const CacheSlot& cache, unsigned epoch) {
        const float* const parts = shared.parts[stage % 2];
        UNROLL for (int i = 0; i < ROUNDS; ++i) {
            if (!has(share, i)) break;
            const int row = share.first_row(stage, pair(i));
            float2 sums = joined(parts, pair(i));
            const float factor =
                is_normed(stage) ? norm_factor(shared.squares, arguments.eps) : 1;
            sums.x *= factor * scales[i][0];
            sums.y *= factor * scales[i][1];
            if (stage == QUERY) {
                finish_query(row, sums, cos[i], sin[i], position, cache, epoch + 1);
            } else if (stage == GATE_UP) {
                store_value(
                    vectors() + GATED + row, divide(sums.x, 1 + exp_(-sums.x)) * sums.y, epoch + 4);
            } else {
                residual[i].x += sums.x;
                residual[i].y += sums.y;
                publish_pair(
                    (stage == OUTPUT ? MIDDLE : X) + row, 1, residual[i].x, residual[i].y,
                    epoch + (stage == OUTPUT ? 3 : 5));
            }
        }
    }

private:
    DEVICE int pair(int i) const { return i * FINISHING_THREADS + thread; }
    DEVICE unsigned* vectors() const { return reinterpret_cast<unsigned*>(arguments.vectors); }

    DEVICE void publish_pair(int place, int distance, float first, float second, unsigned epoch) {
        store_value(vectors() + place, first, epoch);
        store_value(vectors() + place + distance, second, epoch);
    }

    DEVICE float embedded(int token, int k) const {
        return weight_at<EMBEDDING_KIND, HIDDEN>(
            arguments.embedding.codes, arguments.embedding.scales, token, k);
    }

    // Turn a pair of a new query, key or value; publish it, and keep keys and values.
    DEVICE void finish_query(
        int row, float2 sums, float cos, float sin, int position, const CacheSlot& cache,
        unsigned epoch) {
        constexpr int HALF = HEAD_DIM / 2;
        const int head = row / HEAD_DIM, dim = row % HEAD_DIM;
        const float low = sums.x * cos - sums.y * sin, high = sums.y * cos + sums.x * sin;
        unsigned kept = 0;
        if constexpr (BY_TILES)
            kept = hand_over(
                arguments.vectors + HANDED, head * HALF + dim, low, high, epoch);
        else
            publish_pair(QKV + row, HALF, low, high, epoch);
        if (head >= HEADS) {
            const int is_value = head >= HEADS + KV_HEADS;
            unsigned char* place =
                cache.place(is_value, head - HEADS - is_value * KV_HEADS, position);
            if constexpr (BY_TILES) {
                reinterpret_cast<unsigned short*>(place)[dim] = kept & 0xFFFF;
                reinterpret_cast<unsigned short*>(place)[dim + HALF] = kept >> 16;
            } else {
                store_element(place, dim, low);
                store_element(place, dim + HALF, high);
            }
        }
    }
};

// A warp that does nothing but publish what the others' sums make.
DEVICE void finish(const Arguments& arguments, Shared& shared, Worker me) {
    Finisher finisher(arguments, shared, me.thread - WORKERS);
    unsigned epoch = arguments.first_epoch;
    ROLLED for (int step = 0; step < arguments.steps; ++step) {
        const int position = arguments.position + step;
        if (step > 0) wait_for(shared.token_known, (step - 1) % 2);
        finisher.begin_token(step > 0 ? shared.token : arguments.token, epoch);
        ROLLED for (int slot = 0; slot < arguments.length; ++slot, epoch += EPOCHS) {
            const int block = arguments.schedule[slot];
            const CacheSlot cache = cache_slot(arguments, slot);
            ROLLED for (int stage = QUERY; stage <= DOWN; ++stage) {
                forget(finisher.thread);
                const Share& share = shared.ring.shares[stage];
                finisher.prepare(share, stage, block, position);
                wait_for(shared.sums_stored[stage % 2], stage / 2);
                finisher.finish(share, stage, position, cache, epoch);
                sync_warp();
                if (me.lane == 0) arrive(shared.sums_read[stage % 2]);
            }
        }
        ++epoch;
    }
}
