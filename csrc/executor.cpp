#include "executor.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <utility>

namespace mlf {

// One run of up to kChunkTokens tokens through all blocks.
struct Executor::Chunk {
  KVCache& cache;
  const int32_t* tokens;
  const float* cos;  // (rows, head_dim / 2)
  const float* sin;
  int64_t start;       // position of the first token in the sequence
  int64_t rows;        // tokens
  int64_t logit_rows;  // how many of the last tokens want logits
  float* logits;       // (logit_rows, vocab)

  int64_t pages() const { return ceil_div(start + rows, kPageTokens); }
};

// Buffers of one thread, or of all threads together.
struct Executor::Scratch {
  ActivationBuffer input;           // of a linear layer
  std::vector<float> queries;       // (queries, head_dim)
  std::vector<int8_t> query_codes;  // Queries of those
  std::vector<float> query_scales;
  std::vector<int32_t> query_offsets;
  std::vector<int> visible;              // tokens of a page that each query sees
  std::vector<float> state, page_state;  // AttentionState of those queries

  Queries prepared() {
    return {queries.data(), query_codes.data(), query_scales.data(), query_offsets.data()};
  }
};

namespace {

constexpr int kAttentionRows = 16;  // tokens of a prompt that attend together

// Split one buffer of (queries) x (padded_dim + 2) floats.
AttentionState attention_state(float* buffer, int64_t queries, int64_t padded_dim) {
  float* max = buffer + queries * padded_dim;
  return {buffer, max, max + queries};
}

Plan plan_of(const Model& model, int64_t cache_nbytes) {
  std::vector<int64_t> block_nbytes;
  for (const BlockWeights& block : model.blocks) block_nbytes.push_back(block.nbytes());
  const bool fetches = model.activation != ActivationKind::floating;  // float kernels do not
  return make_plan(model.schedule, block_nbytes, model.head.nbytes(), cache_nbytes, fetches);
}

}  // namespace

Executor::Executor(Model model, int threads, const KernelTable& kernels, int64_t cache_nbytes)
    : model_(std::move(model)),
      kernels_(kernels),
      plan_(plan_of(model_, cache_nbytes)),
      pool_(threads),
      hidden_(kChunkTokens * model_.hidden),
      qkv_(kChunkTokens * qkv_size()),
      attention_(kChunkTokens * q_size()),
      merged_pages_(model_.kv_heads),
      scratch_(threads + 1) {
  const int64_t widest = std::max({model_.hidden, q_size(), model_.intermediate});
  const int64_t queries = static_cast<int64_t>(kAttentionRows) * group();
  ffn_.resize(kChunkTokens, model_.intermediate);
  for (Scratch& scratch : scratch_) {
    const int64_t rows = &scratch == &scratch_.back() ? kChunkTokens : 1;
    scratch.input.resize(rows, widest);
    scratch.queries.resize(queries * model_.head_dim);
    scratch.query_codes.resize(queries * 2 * padded_dim());
    scratch.query_scales.resize(queries);
    scratch.query_offsets.resize(2 * queries);
    scratch.visible.resize(queries);
    scratch.state.resize(queries * (padded_dim() + 2));
    scratch.page_state.resize(queries * (padded_dim() + 2));
  }
}

Executor::~Executor() = default;

std::unique_ptr<KVCache> Executor::new_cache() const {
  return std::make_unique<KVCache>(static_cast<int>(model_.schedule.size()), model_.kv_heads,
                                   model_.head_dim, model_.kv_kind);
}

void Executor::forward(KVCache& cache, const int32_t* tokens, int64_t count, const float* cos,
                       const float* sin, bool all_logits, float* logits) {
  std::lock_guard<ForkSafeMutex> lock(mutex_);
  const int64_t start = cache.length(), half = model_.head_dim / 2;
  cache.reserve(start + count);
  partials_.resize(ceil_div(start + count, kPageTokens) * model_.heads * (padded_dim() + 2));
  for (int64_t done = 0; done < count; done += kChunkTokens) {
    const int64_t rows = std::min(kChunkTokens, count - done);
    const bool last = done + rows == count;
    const Chunk chunk{cache,
                      tokens + done,
                      cos + done * half,
                      sin + done * half,
                      start + done,
                      rows,
                      all_logits ? rows
                      : last     ? 1
                                 : 0,
                      logits + (all_logits ? done * model_.vocab : 0)};
    pool_.run([&](int thread) { run_chunk(thread, chunk); });
  }
  cache.set_length(start + count);
}

// The whole model, as one thread sees it. Linear layers are split by output rows; a barrier follows
// wherever the next stage reads what other threads have written.
void Executor::run_chunk(int thread, const Chunk& chunk) {
  const int64_t rows = chunk.rows, hidden = model_.hidden;
  const Share mine = share(rows, thread, pool_.size());
  for (int64_t row = mine.begin; row < mine.end; ++row)
    kernels_.embed(model_.embedding, chunk.tokens[row], hidden_.data() + row * hidden);
  pool_.barrier();

  for (int position = 0; position < static_cast<int>(model_.schedule.size()); ++position) {
    const BlockWeights& block = model_.blocks[model_.schedule[position]];

    const Activations attention_in =
        prepare(thread, hidden_.data(), block.attention_norm, hidden, rows);
    project_qkv(thread, attention_in, position, rows);
    pool_.barrier();

    const float* attended = attention_.data();
    if (rows == 1) {
      attend_one(thread, chunk, position);
      pool_.barrier();
      attended = merge_one(thread, chunk);
    } else {
      store_rotated(thread, chunk, position);
      pool_.barrier();
      attend_many(thread, chunk, position);
      pool_.barrier();
    }
    const Activations attention_out = prepare(thread, attended, nullptr, q_size(), rows);
    kernels_.linear(attention_out, block.o, hidden_.data(), rows, hidden,
                    tiles(thread, position, &BlockWeights::o), true);
    pool_.barrier();

    const Activations ffn_in = prepare(thread, hidden_.data(), block.ffn_norm, hidden, rows);
    Activations ffn_out = ffn_.view(model_.activation, model_.intermediate);
    kernels_.swiglu(ffn_in, block.gate, block.up, ffn_out, rows,
                    tiles(thread, position, &BlockWeights::gate, kTilesPerGroup));
    pool_.barrier();

    if (model_.activation == ActivationKind::int8)  // one scale for what all threads wrote
      ffn_out = prepare(thread, ffn_out.values, nullptr, model_.intermediate, rows);
    kernels_.linear(ffn_out, block.down, hidden_.data(), rows, hidden,
                    tiles(thread, position, &BlockWeights::down), true);
    pool_.barrier();
  }

  if (chunk.logit_rows == 0) return;
  const float* last = hidden_.data() + (rows - chunk.logit_rows) * hidden;
  const Activations head_in = prepare(thread, last, model_.final_norm, hidden, chunk.logit_rows);
  const Share head = share(model_.head.tiles(), thread, pool_.size());
  kernels_.linear(head_in, model_.head, chunk.logits, chunk.logit_rows, model_.vocab,
                  {head.begin, head.end}, false);
}

// The thread's share of a block's matrix, and how much of the same matrix in a later block to fetch
// meanwhile. In one buffer, blocks lie alike and one distance serves gate and up; elsewhere the
// fetch may miss what it is for, and harms nothing. `unit` tiles stay together.
Tiles Executor::tiles(int thread, int position, const Weight BlockWeights::* weight,
                      int unit) const {
  const Weight& here = model_.blocks[model_.schedule[position]].*weight;
  const Share mine = share(ceil_div(here.tiles(), unit), thread, pool_.size());
  Tiles tiles{mine.begin * unit, std::min(mine.end * unit, here.tiles())};
  const Ahead& ahead = plan_.ahead[position];
  if (ahead.block >= 0) {
    const Weight& there = model_.blocks[ahead.block].*weight;
    tiles.ahead = reinterpret_cast<intptr_t>(there.data) - reinterpret_cast<intptr_t>(here.data);
    tiles.stride = ahead.passes;
    tiles.phase = ahead.pass;
  }
  return tiles;
}

// The input of a linear layer: normalised if `norm` is given, rounded if the weights are integers.
// A single row is prepared by every thread for itself, which is cheaper than waiting for another.
Activations Executor::prepare(int thread, const float* x, const float* norm, int64_t cols,
                              int64_t rows) {
  const bool shared = rows > 1;
  Activations out = scratch_[shared ? pool_.size() : thread].input.view(model_.activation, cols);
  const Share mine = shared ? share(rows, thread, pool_.size()) : Share{0, 1};
  const int64_t count = mine.end - mine.begin;
  if (norm) {
    kernels_.rms_norm(x + mine.begin * cols, norm, out.values + mine.begin * cols, count, cols,
                      model_.norm_eps);
  } else {
    out.values = const_cast<float*>(x);
  }
  if (model_.activation != ActivationKind::floating)
    kernels_.quantize_activations(out.values + mine.begin * cols, out.from_row(mine.begin), count);
  if (shared) pool_.barrier();
  return out;
}

// Queries, keys and values side by side; the threads share the tiles of all three evenly.
void Executor::project_qkv(int thread, const Activations& x, int position, int64_t rows) {
  const BlockWeights& block = model_.blocks[model_.schedule[position]];
  const Share mine =
      share(block.q.tiles() + block.k.tiles() + block.v.tiles(), thread, pool_.size());
  float* out = qkv_.data();
  int64_t before = 0;  // tiles of the matrices so far
  for (const auto weight : {&BlockWeights::q, &BlockWeights::k, &BlockWeights::v}) {
    const Weight& matrix = block.*weight;
    Tiles part = tiles(thread, position, weight);
    part.begin = std::max<int64_t>(mine.begin - before, 0);
    part.end = std::min(mine.end - before, matrix.tiles());
    if (part.begin < part.end) kernels_.linear(x, matrix, out, rows, qkv_size(), part, false);
    before += matrix.tiles();
    out += matrix.rows;
  }
}

// Decode: each KV head and page is one task. A thread's run of pages that begins with a head's
// first is merged at once, in order; what other threads have of that head is left to merge_one.
// Threads rotate the queries of their heads for themselves, and the task of a last page stores the
// new key and value, so no stage of its own is needed for it.
void Executor::attend_one(int thread, const Chunk& chunk, int position) {
  Scratch& scratch = scratch_[thread];
  const int dim = model_.head_dim;
  const int64_t pages = chunk.pages(), state_size = group() * (padded_dim() + 2);
  const int in_last = static_cast<int>(chunk.start % kPageTokens) + 1;
  const Share mine = share(pages * model_.kv_heads, thread, pool_.size());
  const auto page_of = [&](int64_t task) {
    return chunk.cache.view(position, task % pages, static_cast<int>(task / pages));
  };
  for (int64_t task = mine.begin; task < mine.end; ++task) {
    const int kv_head = static_cast<int>(task / pages);
    const int64_t page = task % pages;
    PageView view = page_of(task);
    if (task + 1 < mine.end) view.ahead = page_of(task + 1).data - view.data;
    const Queries queries = scratch.prepared();
    if (page == 0 || task == mine.begin) {
      kernels_.rope(qkv_.data() + static_cast<int64_t>(kv_head) * group() * dim, chunk.cos,
                    chunk.sin, scratch.queries.data(), group(), dim);
      if (model_.kv_kind == KVKind::int8) kernels_.attend_prepare(queries, group(), dim);
    }
    const bool last = page == pages - 1;
    if (last) {
      float* key = qkv_.data() + q_size() + kv_head * dim;
      kernels_.rope(key, chunk.cos, chunk.sin, key, 1, dim);
      kernels_.kv_store(key, key + kv_size(), view, in_last - 1);
    }
    std::fill_n(scratch.visible.begin(), group(), last ? in_last : kPageTokens);
    const auto state_of = [&](int64_t at) {
      return attention_state(partials_.data() + at * state_size, group(), padded_dim());
    };
    const int64_t first = kv_head * pages;
    const bool merge = page > 0 && first >= mine.begin;
    const AttentionState state =
        merge ? attention_state(scratch.page_state.data(), group(), padded_dim()) : state_of(task);
    kernels_.attend_page(queries, view, scratch.visible.data(), state, group(),
                         1.0f / std::sqrt(static_cast<float>(dim)));
    if (merge) kernels_.attend_merge(state_of(first), state, group(), padded_dim());
    if (first >= mine.begin) merged_pages_[kv_head] = page + 1;
  }
}

// Every thread merges what is left for itself: all heads of one token are a few kilobytes.
const float* Executor::merge_one(int thread, const Chunk& chunk) {
  Scratch& scratch = scratch_[thread];
  const int64_t pages = chunk.pages(), state_size = group() * (padded_dim() + 2);
  const AttentionState state = attention_state(scratch.state.data(), group(), padded_dim());
  float* out = scratch.input.view(ActivationKind::floating, q_size()).values;
  for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head) {
    float* partial = partials_.data() + kv_head * pages * state_size;
    std::copy_n(partial, state_size, scratch.state.data());
    for (int64_t page = merged_pages_[kv_head]; page < pages; ++page)
      kernels_.attend_merge(state,
                            attention_state(partial + page * state_size, group(), padded_dim()),
                            group(), padded_dim());
    kernels_.attend_finish(state, out + kv_head * group() * model_.head_dim, group(),
                           model_.head_dim);
  }
  return out;
}

// Prefill: rotate queries in place, rotate and store keys, store values.
void Executor::store_rotated(int thread, const Chunk& chunk, int position) {
  const int dim = model_.head_dim;
  const Share mine = share(chunk.rows, thread, pool_.size());
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    float* q = qkv_.data() + row * qkv_size();
    float* key = q + q_size();
    const float *cos = chunk.cos + row * dim / 2, *sin = chunk.sin + row * dim / 2;
    kernels_.rope(q, cos, sin, q, model_.heads, dim);
    kernels_.rope(key, cos, sin, key, model_.kv_heads, dim);
    const int64_t at = chunk.start + row;
    for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head, key += dim)
      kernels_.kv_store(key, key + kv_size(), chunk.cache.view(position, at / kPageTokens, kv_head),
                        static_cast<int>(at % kPageTokens));
  }
}

// Prefill: a KV head and a few tokens are one task; it walks the pages that its last token sees.
void Executor::attend_many(int thread, const Chunk& chunk, int position) {
  Scratch& scratch = scratch_[thread];
  const int dim = model_.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const int64_t blocks = ceil_div(chunk.rows, kAttentionRows);
  for (int64_t task = thread; task < blocks * model_.kv_heads; task += pool_.size()) {
    // Head by head, whose keys and values then come from the second-level cache.
    const int kv_head = static_cast<int>(task / blocks);
    const int64_t first = task % blocks * kAttentionRows;
    const int64_t rows = std::min<int64_t>(kAttentionRows, chunk.rows - first);
    const int64_t queries = rows * group();
    for (int64_t row = 0; row < rows; ++row)
      std::copy_n(qkv_.data() + (first + row) * qkv_size() + kv_head * group() * dim, group() * dim,
                  scratch.queries.data() + row * group() * dim);
    const Queries prepared = scratch.prepared();
    if (model_.kv_kind == KVKind::int8) kernels_.attend_prepare(prepared, queries, dim);

    const AttentionState state = attention_state(scratch.state.data(), queries, padded_dim());
    const AttentionState page_state =
        attention_state(scratch.page_state.data(), queries, padded_dim());
    const int64_t pages = ceil_div(chunk.start + first + rows, kPageTokens);
    for (int64_t page = 0; page < pages; ++page) {
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t seen = chunk.start + first + i / group() + 1 - page * kPageTokens;
        scratch.visible[i] = static_cast<int>(std::clamp<int64_t>(seen, 0, kPageTokens));
      }
      const PageView view = chunk.cache.view(position, page, kv_head);
      kernels_.attend_page(prepared, view, scratch.visible.data(), page ? page_state : state,
                           queries, scale);
      if (page) kernels_.attend_merge(state, page_state, queries, padded_dim());
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i = row * group();
      const AttentionState one{state.values + i * padded_dim(), state.max + i, state.sum + i};
      kernels_.attend_finish(one,
                             attention_.data() + (first + row) * q_size() + kv_head * group() * dim,
                             group(), dim);
    }
  }
}

}  // namespace mlf
