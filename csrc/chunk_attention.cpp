#include "chunk_attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace mlf {

namespace {

// Bytes that attention of a lone token fetches ahead: as few as arrive in time, because the first
// page of a thread and layer has nobody who fetches them.
constexpr int64_t kAttentionAhead = 12 << 10;

// Split one buffer of (queries) x (padded_dim + 2) floats.
AttentionState attention_state(float* buffer, int64_t queries, int64_t padded_dim) {
  float* max = buffer + queries * padded_dim;
  return {buffer, max, max + queries};
}

}  // namespace

// Buffers of one thread.
struct ChunkAttention::Scratch {
  std::vector<float> queries;        // (queries, head_dim)
  std::vector<uint8_t> query_codes;  // Queries of those
  std::vector<float> query_scales;
  std::vector<int32_t> query_offsets;
  std::vector<const Span*> prepared_for;  // of lone tokens: whose queries each KV head's are
  std::vector<int64_t> pages_done;        // of those, see report
  std::vector<float> key;                 // (head_dim): of a lone token
  std::vector<int> visible;               // tokens of a page that each query sees
  std::vector<float> state, page_state;   // AttentionState of those queries

  void forget_queries() { std::fill(prepared_for.begin(), prepared_for.end(), nullptr); }
  // From query number `first` on; codes have the widest distance.
  Queries prepared(int64_t first, int64_t dim, int64_t padded_dim) {
    return {queries.data() + first * dim,
            query_codes.data() + first * padded_dim * static_cast<int64_t>(sizeof(int16_t)),
            query_scales.data() + first, query_offsets.data() + first};
  }
};

ChunkAttention::ChunkAttention(const Model& model, const KernelTable& kernels, int threads,
                               int64_t rows)
    : model_(model),
      kernels_(kernels),
      group_(model.group()),
      padded_dim_(round_up(model.head_dim, 16)),
      scale_(1.0f / std::sqrt(static_cast<float>(model.head_dim))),
      qkv_(rows * model.qkv_size()),
      out_(rows * model.q_size()),
      next_task_(model.schedule.size()),
      scratch_(threads) {
  const int64_t queries = std::max(kAttentionRows, model.kv_heads) * int64_t{group_};
  for (Scratch& scratch : scratch_) {
    scratch.queries.resize(queries * model.head_dim);
    scratch.query_codes.resize(queries * padded_dim_ * sizeof(int16_t));  // at most
    scratch.query_scales.resize(queries);
    scratch.query_offsets.resize(queries);
    scratch.prepared_for.resize(model.kv_heads);
    scratch.pages_done.resize(model.kv_heads);
    scratch.key.resize(model.head_dim);
    scratch.visible.resize(queries);
    scratch.state.resize(queries * (padded_dim_ + 2));
    scratch.page_state.resize(queries * (padded_dim_ + 2));
  }
}

ChunkAttention::~ChunkAttention() = default;

void ChunkAttention::begin(const Chunk& chunk, int threads) {
  threads_ = threads;
  partials_.resize(chunk.partial_pages * model_.heads * (padded_dim_ + 2));
  if (const size_t counters = chunk.partial_pages * model_.kv_heads; counters > pages_done_.size())
    pages_done_ = std::vector<std::atomic<int64_t>>(2 * counters);
  for (auto& done : pages_done_) done.store(0, std::memory_order_relaxed);
  // Each thread begins with the tasks of its own number.
  for (auto& next : next_task_) next.store(threads, std::memory_order_relaxed);
}

void ChunkAttention::store_rotated(Share rows, const Chunk& chunk, int position) {
  const int dim = model_.head_dim;
  chunk.for_each_row(rows, [&](const Span& span, int64_t i) {
    if (span.alone()) return;
    float* q = qkv(span.row + i);
    float* key = q + model_.q_size();
    const float *cos = span.cos + i * dim / 2, *sin = span.sin + i * dim / 2;
    kernels_.rope(q, cos, sin, q, model_.heads, dim);
    kernels_.rope(key, cos, sin, key, model_.kv_heads, dim);
    const int64_t at = span.start + i;
    for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head, key += dim)
      kernels_.kv_store(key, key + model_.kv_size(),
                        span.cache->view(position, at / kPageTokens, kv_head),
                        static_cast<int>(at % kPageTokens));
  });
}

// Tasks differ in length and threads in luck, so whoever is free takes the next ones: all KV heads
// of a page, which lie behind each other, but towards the end one by one. Those of lone tokens are
// short, and are taken before the ones at hand are done: what a thread fetches meanwhile is then
// what it comes to.
void ChunkAttention::attend(int thread, const Chunk& chunk, int position, const uint8_t* after) {
  const int64_t tasks = chunk.tasks.size(), run = model_.kv_heads, active = threads_;
  const int64_t runs = std::max<int64_t>(tasks / run / active - 1, 0) * active;
  const bool early = !chunk.has_runs;
  const auto first_of = [&](int64_t taken) {
    return taken < runs ? taken * run : std::min(runs * run + taken - runs, tasks);
  };
  std::atomic<int64_t>& next = next_task_[position];
  const auto take = [&next] { return next.fetch_add(1, std::memory_order_relaxed); };
  Scratch& scratch = scratch_[thread];
  scratch.forget_queries();
  // of a step that a fork() cut short
  std::fill(scratch.pages_done.begin(), scratch.pages_done.end(), 0);
  for (int64_t taken = thread, following; first_of(taken) < tasks; taken = following) {
    following = early ? take() : taken + active;
    const int64_t end = first_of(taken + 1);
    for (int64_t i = first_of(taken); i < end; ++i) {
      const AttentionTask& task = chunk.tasks[i];
      if (!task.span->alone()) {
        attend_many(thread, task, position);
        continue;
      }
      const int64_t likely = i + 1 < end ? i + 1 : first_of(following);
      attend_one(thread, task, read_after(chunk, likely, position, after), position);
      if (!early || taken >= runs) report(thread, task.kv_head, position);
    }
    if (!early) following = take();
  }
  for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head) report(thread, kv_head, position);
}

// What a thread reads after a page of a lone token: task number `next` if there is one, else
// `after`. Nothing where nobody knows.
PageAhead ChunkAttention::read_after(const Chunk& chunk, int64_t next, int position,
                                     const uint8_t* after) const {
  PageAhead ahead{kAttentionAhead};
  if (next >= static_cast<int64_t>(chunk.tasks.size())) {
    ahead.next = after;
    return ahead;
  }
  const AttentionTask& task = chunk.tasks[next];
  if (!task.span->alone()) return ahead;
  ahead.next = task.span->cache->view(position, task.part, task.kv_head).data;
  ahead.next_tokens = task.span->seen(task.part);
  return ahead;
}

// A lone token, one KV head and page. Each thread rotates the queries for itself, and whoever has
// the last page stores the new key and value, so no stage of its own is needed for it.
// `ahead` says what this thread is likely to read next.
void ChunkAttention::attend_one(int thread, const AttentionTask& task, const PageAhead& ahead,
                                int position) {
  Scratch& scratch = scratch_[thread];
  const Span& span = *task.span;
  const int dim = model_.head_dim, kv_head = task.kv_head;
  const int64_t page = task.part, pages = span.pages(), state_size = group_ * (padded_dim_ + 2);
  const int tokens = span.seen(page);
  PageView view = span.cache->view(position, page, kv_head);
  view.ahead = ahead;
  view.ahead.tokens = tokens;
  const float* query = qkv(span.row);
  if (page == pages - 1) {
    const float* key = query + model_.q_size() + kv_head * dim;
    kernels_.rope(key, span.cos, span.sin, scratch.key.data(), 1, dim);
    kernels_.kv_store(scratch.key.data(), key + model_.kv_size(), view, tokens - 1);
  }
  const int64_t first = static_cast<int64_t>(kv_head) * group_;
  const Queries queries = scratch.prepared(first, dim, padded_dim_);
  if (scratch.prepared_for[kv_head] != &span) {
    report(thread, kv_head, position);
    scratch.prepared_for[kv_head] = &span;
    kernels_.rope(query + first * dim, span.cos, span.sin, scratch.queries.data() + first * dim,
                  group_, dim);
    kernels_.attend_prepare(queries, model_.kv_kind, group_, dim);
  }
  std::fill_n(scratch.visible.begin(), group_, tokens);
  float* state =
      partials_.data() + (span.partials * model_.kv_heads + kv_head * pages + page) * state_size;
  kernels_.attend_page(queries, view, scratch.visible.data(),
                       attention_state(state, group_, padded_dim_), group_, scale_);
  ++scratch.pages_done[kv_head];
}

// Count the pages of a lone token and KV head that this thread has done since it last did; whoever
// counts the last one merges. Not page by page: threads would wait for each other's counts.
void ChunkAttention::report(int thread, int kv_head, int position) {
  const int64_t mine = std::exchange(scratch_[thread].pages_done[kv_head], 0);
  if (mine == 0) return;
  const Span& span = *scratch_[thread].prepared_for[kv_head];
  // The counter goes on from position to position.
  std::atomic<int64_t>& done = pages_done_[span.partials * model_.kv_heads + kv_head];
  if (done.fetch_add(mine, std::memory_order_acq_rel) + mine == span.pages() * (position + 1))
    merge(span, kv_head);
}

// The pages of a lone token and KV head together, in order.
void ChunkAttention::merge(const Span& span, int kv_head) {
  const int64_t pages = span.pages(), state_size = group_ * (padded_dim_ + 2);
  float* partial =
      partials_.data() + (span.partials * model_.kv_heads + kv_head * pages) * state_size;
  const AttentionState state = attention_state(partial, group_, padded_dim_);
  kernels_.attend_merge(state, attention_state(partial + state_size, group_, padded_dim_),
                        pages - 1, state_size, group_, padded_dim_);
  kernels_.attend_finish(
      state, out_.data() + span.row * model_.q_size() + kv_head * group_ * model_.head_dim, group_,
      model_.head_dim);
}

// A KV head and a few tokens of a longer span: walks the pages that the last of them sees.
void ChunkAttention::attend_many(int thread, const AttentionTask& task, int position) {
  Scratch& scratch = scratch_[thread];
  const Span& span = *task.span;
  const int dim = model_.head_dim, kv_head = task.kv_head;
  const int64_t first = task.part, rows = std::min<int64_t>(kAttentionRows, span.rows - first);
  scratch.forget_queries();
  const int64_t queries = rows * group_, start = span.start + first;
  for (int64_t row = 0; row < rows; ++row)
    std::copy_n(qkv(span.row + first + row) + kv_head * group_ * dim, group_ * dim,
                scratch.queries.data() + row * group_ * dim);
  const Queries prepared = scratch.prepared(0, dim, padded_dim_);
  kernels_.attend_prepare(prepared, model_.kv_kind, queries, dim);

  const AttentionState state = attention_state(scratch.state.data(), queries, padded_dim_);
  const AttentionState page_state =
      attention_state(scratch.page_state.data(), queries, padded_dim_);
  const int64_t pages = ceil_div(start + rows, kPageTokens);
  for (int64_t page = 0; page < pages; ++page) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t seen = start + i / group_ + 1 - page * kPageTokens;
      scratch.visible[i] = static_cast<int>(std::clamp<int64_t>(seen, 0, kPageTokens));
    }
    PageView view = span.cache->view(position, page, kv_head);
    view.ahead.distance = view.nbytes();
    if (page + 1 < pages) view.ahead.next = span.cache->view(position, page + 1, kv_head).data;
    kernels_.attend_page(prepared, view, scratch.visible.data(), page ? page_state : state, queries,
                         scale_);
    if (page) kernels_.attend_merge(state, page_state, 1, 0, queries, padded_dim_);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row * group_;
    const AttentionState one{state.values + i * padded_dim_, state.max + i, state.sum + i};
    kernels_.attend_finish(
        one, out_.data() + (span.row + first + row) * model_.q_size() + kv_head * group_ * dim,
        group_, dim);
  }
}

}  // namespace mlf
