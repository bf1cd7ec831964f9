#include "chunk.h"

namespace mlf {
namespace {

void add_tasks(Chunk& chunk, const Span& span, int kv_heads) {
  const int64_t step = span.alone() ? kPageTokens : kAttentionRows;
  const int64_t length = span.alone() ? span.start + 1 : span.rows;
  for (int64_t first = 0; first < length; first += step) {
    const int64_t count = std::min(step, length - first);
    const int64_t cost = span.alone() ? count : count * (span.start + first + count);
    const int64_t part = span.alone() ? first / kPageTokens : first;
    for (int kv_head = 0; kv_head < kv_heads; ++kv_head)
      chunk.tasks.push_back({&span, kv_head, part, cost});
  }
}

// Spans have their final address now.
void finish(Chunk& chunk, int kv_heads) {
  for (Span& span : chunk.spans) {
    span.partials = chunk.partial_pages;
    if (span.alone()) chunk.partial_pages += span.pages();
    else chunk.has_runs = true;
    add_tasks(chunk, span, kv_heads);
  }
  std::stable_sort(chunk.tasks.begin(), chunk.tasks.end(),
                   [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
}

}  // namespace

std::vector<Chunk> cut_into_chunks(const std::vector<Sequence>& sequences, int64_t max_rows,
                                   int kv_heads, int64_t half_dim, int64_t vocab, float* logits) {
  std::vector<Chunk> chunks;
  for (const Sequence& sequence : sequences) {
    const int64_t start = sequence.cache->length();
    for (int64_t done = 0, rows; done < sequence.count; done += rows) {
      if (chunks.empty() || chunks.back().rows == max_rows) {
        chunks.emplace_back();
        chunks.back().logits = logits;
      }
      Chunk& chunk = chunks.back();
      rows = std::min(max_rows - chunk.rows, sequence.count - done);
      chunk.spans.push_back({sequence.cache, sequence.tokens + done, sequence.cos + done * half_dim,
                             sequence.sin + done * half_dim, start + done, chunk.rows, rows, 0});
      const int64_t silent = sequence.count - sequence.logits;  // tokens that want no logits
      for (int64_t i = std::max(done, silent); i < done + rows; ++i, logits += vocab)
        chunk.logit_rows.push_back(chunk.rows + i - done);
      chunk.rows += rows;
    }
  }
  for (Chunk& chunk : chunks) finish(chunk, kv_heads);
  return chunks;
}

}  // namespace mlf
