// Runs whole decode steps and prefill chunks of a model over its schedule.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "activation_buffer.h"
#include "kernels.h"
#include "kv_cache.h"
#include "plan.h"
#include "threads.h"

namespace mlf {

struct BlockWeights {
  const float* attention_norm;  // (hidden)
  const float* ffn_norm;        // (hidden)
  Weight q, k, v, o, gate, up, down;

  int64_t nbytes() const {
    return q.nbytes() + k.nbytes() + v.nbytes() + o.nbytes() + gate.nbytes() + up.nbytes() +
           down.nbytes();
  }
};

struct Model {
  int64_t hidden, intermediate, vocab;
  int heads, kv_heads, head_dim;
  float norm_eps;
  ActivationKind activation;
  KVKind kv_kind;
  std::vector<int> schedule;  // block of each position
  std::vector<BlockWeights> blocks;
  const float* final_norm;  // (hidden)
  Weight embedding, head;   // (vocab, hidden)
};

// Tokens of a prompt that go through the blocks together: enough to reuse each weight from cache
// many times, few enough that their activations stay in a second-level cache.
constexpr int64_t kChunkTokens = 128;

// Results do not depend on the thread count, on how tokens are split over calls, or on the ISA:
// every output is computed by one thread in one order.
class Executor {
 public:
  // `model` points to weights that outlive the executor; `cache_nbytes` is the size of the
  // last-level cache.
  Executor(Model model, int threads, const KernelTable& kernels, int64_t cache_nbytes);
  ~Executor();

  const Model& model() const { return model_; }
  int threads() const { return pool_.size(); }
  const Plan& plan() const { return plan_; }
  const char* isa() const { return kernels_.name; }
  std::unique_ptr<KVCache> new_cache() const;

  // Append `tokens` (each in 0..vocab-1) to `cache` and write the logits of the last one, or of
  // all (count, vocab). cos, sin (count, head_dim / 2) rotate each token's queries and keys.
  // Safe to call from several threads; calls take turns.
  void forward(KVCache& cache, const int32_t* tokens, int64_t count, const float* cos,
               const float* sin, bool all_logits, float* logits);

 private:
  struct Chunk;
  struct Scratch;

  void run_chunk(int thread, const Chunk& chunk);
  Activations prepare(int thread, const float* x, const float* norm, int64_t cols, int64_t rows);
  void project_qkv(int thread, const Activations& x, int position, int64_t rows);
  Tiles tiles(int thread, int position, const Weight BlockWeights::* weight, int unit = 1) const;
  void attend_one(int thread, const Chunk& chunk, int position);
  const float* merge_one(int thread, const Chunk& chunk);
  void attend_many(int thread, const Chunk& chunk, int position);
  void store_rotated(int thread, const Chunk& chunk, int position);

  int group() const { return model_.heads / model_.kv_heads; }
  int64_t q_size() const { return static_cast<int64_t>(model_.heads) * model_.head_dim; }
  int64_t kv_size() const { return static_cast<int64_t>(model_.kv_heads) * model_.head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  int64_t padded_dim() const { return round_up(model_.head_dim, 16); }

  const Model model_;
  const KernelTable& kernels_;
  const Plan plan_;
  ThreadPool pool_;
  ForkSafeMutex mutex_;
  std::vector<float> hidden_;          // (chunk, hidden): the residual stream
  std::vector<float> qkv_;             // (chunk, qkv_size)
  std::vector<float> attention_;       // (chunk, q_size)
  ActivationBuffer ffn_;               // (chunk, intermediate)
  std::vector<float> partials_;        // one token's AttentionState per KV head and page
  std::vector<int64_t> merged_pages_;  // per KV head, how many are merged into the first of those
  std::vector<Scratch> scratch_;       // one per thread, and one shared by all at the end
};

}  // namespace mlf
