// Runs whole decode steps and prefill chunks of a model over its schedule.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "activation_buffer.h"
#include "attendance.h"
#include "chunk.h"
#include "idle_fetch.h"
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

// Rows of a chunk for each thread: enough to reuse each weight from cache many times, few enough
// that their activations (half a megabyte at a width of 576) stay in a second-level cache.
constexpr int64_t kRowsPerThread = 64;
constexpr int64_t kMinChunkRows = 128, kMaxChunkRows = 512;

// From so many rows for each thread on, threads split the rows of a chunk and each reads all
// weights: at 32 rows the arithmetic takes several times as long as reading a block from the shared
// cache, and seven of nine barriers per block are saved. Below, they split the weights.
constexpr int64_t kSplitRows = 32;

// Results do not depend on the thread count, on how tokens are split over calls, on what else is in
// the batch, or on the ISA: every output is computed by one thread in one order.
class Executor {
 public:
  // `model` points to weights that outlive the executor; `cache_nbytes` is the size of the
  // last-level cache; `fetch_ahead` allows the plan to fetch blocks before they are wanted.
  Executor(Model model, int threads, const KernelTable& kernels, int64_t cache_nbytes,
           bool fetch_ahead);
  ~Executor();

  const Model& model() const { return model_; }
  int threads() const { return pool_.size(); }
  // Threads that take part in decode steps at present.
  int active_threads() const { return attendance_.threads(); }
  int64_t chunk_rows() const { return chunk_rows_; }
  const Plan& plan() const { return plan_; }
  const char* isa() const { return kernels_.name; }
  std::unique_ptr<KVCache> new_cache() const;

  // Append the tokens of every sequence to its cache (all different, made by new_cache) and write
  // the logits that they want (all of them, vocab), in order of the sequences. Safe to call from
  // several threads, if their caches are different; calls take turns, chunk by chunk.
  void forward(const std::vector<Sequence>& sequences, float* logits);
  // Share out work that is worth a microsecond on several threads: on those of decode steps, or
  // none but the caller's while another call has them.
  void for_shares(int64_t count, const std::function<void(Share)>& work);

 private:
  struct Part;
  struct Scratch;

  void run_chunk(int thread, const Chunk& chunk);
  bool splits_rows(const Chunk& chunk) const { return chunk.rows >= kSplitRows * pool_.size(); }
  Part part_of(int thread, const Chunk& chunk) const;
  void wait(int thread);
  void sync(const Part& part);
  void expect(const Part& part, std::initializer_list<const Weight*> matrices, int unit = 1);
  void embed(const Part& part, const Chunk& chunk);
  Activations prepare(const Part& part, const float* x, const float* norm, int64_t cols,
                      bool may_be_wide);
  void prepare_row(int thread, const float* x, const float* norm, const Activations& out);
  void project_qkv(const Part& part, const Activations& x, int position);
  void project(const Part& part, const Activations& x, int position,
               const Weight BlockWeights::* weight);
  void head(int thread, const Chunk& chunk);
  Tiles tiles(const Part& part, int position, const Weight BlockWeights::* weight,
              int unit = 1) const;
  void attend(int thread, const Chunk& chunk, int position);
  PageAhead read_after(int thread, const Chunk& chunk, int64_t next, int position) const;
  void attend_one(int thread, const AttentionTask& task, const PageAhead& ahead, int position);
  void report(int thread, int kv_head, int position);
  void merge(const Span& span, int kv_head);
  void attend_many(int thread, const AttentionTask& task, int position);
  void store_rotated(const Part& part, const Chunk& chunk, int position);

  int group() const { return model_.heads / model_.kv_heads; }
  int64_t q_size() const { return static_cast<int64_t>(model_.heads) * model_.head_dim; }
  int64_t kv_size() const { return static_cast<int64_t>(model_.kv_heads) * model_.head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  int64_t padded_dim() const { return round_up(model_.head_dim, 16); }

  const Model model_;
  const KernelTable& kernels_;
  const Plan plan_;
  ThreadPool pool_;
  FairMutex mutex_;
  const int64_t chunk_rows_;
  Attendance attendance_;
  std::vector<float> hidden_;                     // (chunk, hidden): the residual stream
  std::vector<float> qkv_;                        // (chunk, qkv_size)
  std::vector<float> attention_;                  // (chunk, q_size)
  ActivationBuffer ffn_;                          // (chunk, intermediate)
  std::vector<float> partials_;                   // AttentionState per lone token, KV head and page
  std::vector<std::atomic<int64_t>> pages_done_;  // of those, see report
  std::vector<std::atomic<int64_t>> next_task_;   // per position: see attend
  std::vector<Scratch> scratch_;  // one per thread, and one shared by all at the end
};

}  // namespace mlf
