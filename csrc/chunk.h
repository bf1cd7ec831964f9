// Tokens that go through the blocks together: which sequences they belong to, and how their
// attention is cut into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kv_cache.h"
#include "threads.h"

namespace mlf {

// New tokens of one sequence.
struct Sequence {
  KVCache* cache;         // of the tokens before; grows by `count`
  const int32_t* tokens;  // (count), each in 0..vocab-1
  const float* cos;       // (count, head_dim / 2): rotate each token's queries and keys
  const float* sin;
  int64_t count;
  int64_t logits;  // how many of the last tokens want logits
};

constexpr int kAttentionRows = 32;  // tokens of a sequence that attend together

// Tokens of one sequence in a chunk, in order.
struct Span {
  const KVCache* cache;
  const int32_t* tokens;  // (rows)
  const float* cos;       // (rows, head_dim / 2)
  const float* sin;
  int64_t start;     // position of the first token in its sequence
  int64_t row;       // of the first token in the chunk
  int64_t rows;      // tokens
  int64_t partials;  // a lone token's first page among the partial results of the chunk

  // A lone token's pages are tasks of their own, so that one long sequence keeps all threads busy.
  bool alone() const { return rows == 1; }
  int64_t pages() const { return ceil_div(start + rows, kPageTokens); }
  // Tokens of a page that the last of these tokens sees.
  int seen(int64_t page) const {
    return static_cast<int>(std::min<int64_t>(start + rows - page * kPageTokens, kPageTokens));
  }
};

// One KV head of one page of a lone token, or of kAttentionRows tokens of a longer span.
struct AttentionTask {
  const Span* span;
  int kv_head;
  int64_t part;  // page, or first row in the span
  int64_t cost;  // tokens to look at
};

struct Chunk {
  std::vector<Span> spans;
  std::vector<AttentionTask> tasks;  // the longest first
  std::vector<int64_t> logit_rows;   // rows that want logits
  float* logits = nullptr;           // (logit_rows, vocab)
  int64_t rows = 0;
  int64_t partial_pages = 0;  // pages of lone tokens
  bool has_runs = false;      // some span is not a lone token

  // Call body(span, index in the span) for some rows.
  template <class Body>
  void for_each_row(Share mine, Body body) const {
    for (const Span& span : spans) {
      const int64_t end = std::min(mine.end, span.row + span.rows);
      for (int64_t row = std::max(mine.begin, span.row); row < end; ++row)
        body(span, row - span.row);
    }
  }
};

// Stack the tokens of all sequences, in order, into chunks of up to `max_rows`. `half_dim` is the
// width of a rotary row. Logits of chunk after chunk follow each other in `logits`.
std::vector<Chunk> cut_into_chunks(const std::vector<Sequence>& sequences, int64_t max_rows,
                                   int kv_heads, int64_t half_dim, int64_t vocab, float* logits);

}  // namespace mlf
