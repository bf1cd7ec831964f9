// Runs whole decode steps and prefill chunks of a model over its schedule.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "activation_buffer.h"
#include "attendance.h"
#include "chunk.h"
#include "chunk_attention.h"
#include "idle_fetch.h"
#include "kernels.h"
#include "kv_cache.h"
#include "model.h"
#include "plan.h"
#include "threads.h"

namespace mlf {

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
  const uint8_t* first_read(const Part& part, const Weight& matrix) const;
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

  const Model model_;
  const KernelTable& kernels_;
  const Plan plan_;
  ThreadPool pool_;
  FairMutex mutex_;
  const int64_t chunk_rows_;
  Attendance attendance_;
  std::vector<float> hidden_;  // (chunk, hidden): the residual stream
  ChunkAttention attention_;
  ActivationBuffer ffn_;          // (chunk, intermediate)
  std::vector<Scratch> scratch_;  // one per thread, and one shared by all at the end
};

}  // namespace mlf
