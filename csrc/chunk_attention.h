// Attention of the tokens of a chunk, shared out among threads task by task.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "chunk.h"
#include "kernels.h"
#include "model.h"
#include "threads.h"

namespace mlf {

// A lone token attends page by page: its pages and KV heads are tasks, and whoever has done the
// last page of a KV head merges them. Of longer spans a few tokens and a KV head are a task.
class ChunkAttention {
 public:
  // For chunks of up to `rows` tokens. `model` and `kernels` outlive it.
  ChunkAttention(const Model& model, const KernelTable& kernels, int threads, int64_t rows);
  ~ChunkAttention();

  // Before a chunk that `threads` threads share.
  void begin(const Chunk& chunk, int threads);

  // Where queries, keys and values of a row are put, side by side: (qkv_size) each.
  float* qkv(int64_t row) { return qkv_.data() + row * model_.qkv_size(); }
  // What came of it: (rows, q_size).
  const float* out() const { return out_.data(); }

  // Some rows of spans that are no lone tokens: rotate queries in place, rotate and store keys,
  // store values. Wherever there are such, a barrier comes next.
  void store_rotated(Share rows, const Chunk& chunk, int position);
  // Take tasks until there are none; a barrier comes next. `after` is what this thread reads then,
  // null if nobody knows.
  void attend(int thread, const Chunk& chunk, int position, const uint8_t* after);

 private:
  struct Scratch;

  PageAhead read_after(const Chunk& chunk, int64_t next, int position, const uint8_t* after) const;
  void attend_one(int thread, const AttentionTask& task, const PageAhead& ahead, int position);
  void report(int thread, int kv_head, int position);
  void merge(const Span& span, int kv_head);
  void attend_many(int thread, const AttentionTask& task, int position);

  const Model& model_;
  const KernelTable& kernels_;
  const int group_;  // query heads of a KV head
  const int64_t padded_dim_;
  const float scale_;                             // of scores
  int threads_ = 1;                               // of this chunk
  std::vector<float> qkv_;                        // (chunk, qkv_size)
  std::vector<float> out_;                        // (chunk, q_size)
  std::vector<float> partials_;                   // AttentionState per lone token, KV head and page
  std::vector<std::atomic<int64_t>> pages_done_;  // of those, see report
  std::vector<std::atomic<int64_t>> next_task_;   // per position: see attend
  std::vector<Scratch> scratch_;                  // one per thread
};

}  // namespace mlf
