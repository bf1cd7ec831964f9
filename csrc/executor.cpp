#include "executor.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <utility>

namespace mlf {

// What one thread computes of a chunk. It prepares `prepared` rows; then it multiplies `rows` with
// tiles number `thread` of `threads` shares of every matrix: either all rows with its share, or its
// own rows with all tiles.
struct Executor::Part {
  int thread;
  Share own;       // rows of this thread alone
  Share prepared;  // own, but a single row is prepared by every thread for itself: cheaper than
                   // waiting for another
  Share rows;
  int share, shares;
  bool single;   // the chunk has one row
  bool by_rows;  // threads need not wait for each other between linear layers

  Share of(int64_t tiles) const { return mlf::share(tiles, share, shares); }
  int64_t count() const { return rows.end - rows.begin; }
};

// Buffers of one thread, or of all threads together.
struct Executor::Scratch {
  ActivationBuffer input;            // of a linear layer
  std::vector<float> normed;         // (widest layer input)
  std::vector<float> queries;        // (queries, head_dim)
  std::vector<uint8_t> query_codes;  // Queries of those
  std::vector<float> query_scales;
  std::vector<int32_t> query_offsets;
  std::vector<const Span*> prepared_for;  // of lone tokens: whose queries each KV head's are
  std::vector<int64_t> pages_done;        // of those, see report
  std::vector<int> visible;               // tokens of a page that each query sees
  std::vector<float> state, page_state;   // AttentionState of those queries
  IdleFetch idle;                         // of what this thread reads next

  void forget_queries() { std::fill(prepared_for.begin(), prepared_for.end(), nullptr); }
  // From query number `first` on; codes have the widest distance.
  Queries prepared(int64_t first, int64_t dim, int64_t padded_dim) {
    return {queries.data() + first * dim,
            query_codes.data() + first * padded_dim * static_cast<int64_t>(sizeof(int16_t)),
            query_scales.data() + first, query_offsets.data() + first};
  }
};

namespace {

// Bytes that attention of a lone token fetches ahead: as few as arrive in time, because the first
// page of a thread and layer has nobody who fetches them.
constexpr int64_t kAttentionAhead = 12 << 10;

// Split one buffer of (queries) x (padded_dim + 2) floats.
AttentionState attention_state(float* buffer, int64_t queries, int64_t padded_dim) {
  float* max = buffer + queries * padded_dim;
  return {buffer, max, max + queries};
}

Plan plan_of(const Model& model, int64_t cache_nbytes, bool fetch_ahead) {
  std::vector<int64_t> block_nbytes;
  for (const BlockWeights& block : model.blocks) block_nbytes.push_back(block.nbytes());
  // float kernels do not fetch
  const bool fetches = fetch_ahead && model.activation != ActivationKind::floating;
  return make_plan(model.schedule, block_nbytes, model.head.nbytes(), cache_nbytes, fetches);
}

// Are the inputs of some matrices rounded more finely in wide groups? Weights of 4 bits take it:
// without, predictions of some tokens change visibly. Weights of 8 bits do without (measured, see
// docs/performance.md) and save a sixth of a prompt's time.
bool wide_before(std::initializer_list<const Weight*> matrices) {
  return std::any_of(matrices.begin(), matrices.end(),
                     [](const Weight* matrix) { return is_int4(matrix->kind); });
}

// Queries, keys and values as one matrix where they lie one behind the other, as in one buffer they
// do: threads then read longer streams.
Model with_joined_qkv(Model model) {
  for (BlockWeights& block : model.blocks) {
    Weight *q = &block.q, *k = &block.k, *v = &block.v;
    const auto follows = [q](const Weight* next, const Weight* before) {
      return next->kind == q->kind && before->rows % kTileRows == 0 &&
             next->data == before->data + before->nbytes();
    };
    if (!follows(k, q) || !follows(v, k)) continue;
    q->rows += k->rows + v->rows;
    k->rows = v->rows = 0;
  }
  return model;
}

}  // namespace

Executor::Executor(Model model, int threads, const KernelTable& kernels, int64_t cache_nbytes,
                   bool fetch_ahead)
    : model_(with_joined_qkv(std::move(model))),
      kernels_(kernels),
      plan_(plan_of(model_, cache_nbytes, fetch_ahead)),
      pool_(threads),
      chunk_rows_(std::clamp(kRowsPerThread * threads, kMinChunkRows, kMaxChunkRows)),
      attendance_(threads),
      hidden_(chunk_rows_ * model_.hidden),
      qkv_(chunk_rows_ * qkv_size()),
      attention_(chunk_rows_ * q_size()),
      next_task_(model_.schedule.size()),
      scratch_(threads + 1) {
  const int64_t widest = std::max({model_.hidden, q_size(), model_.intermediate});
  const int64_t queries = std::max(kAttentionRows, model_.kv_heads) * int64_t{group()};
  ffn_.resize(chunk_rows_, model_.intermediate);
  for (Scratch& scratch : scratch_) {
    scratch.input.resize(&scratch == &scratch_.back() ? chunk_rows_ : 1, widest);
    scratch.normed.resize(widest);
    scratch.queries.resize(queries * model_.head_dim);
    scratch.query_codes.resize(queries * padded_dim() * sizeof(int16_t));  // at most
    scratch.query_scales.resize(queries);
    scratch.query_offsets.resize(queries);
    scratch.prepared_for.resize(model_.kv_heads);
    scratch.pages_done.resize(model_.kv_heads);
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

void Executor::forward(const std::vector<Sequence>& sequences, float* logits) {
  std::unique_lock<FairMutex> lock(mutex_);
  for (const Sequence& sequence : sequences)
    sequence.cache->reserve(sequence.cache->length() + sequence.count);
  const std::vector<Chunk> chunks = cut_into_chunks(sequences, chunk_rows_, model_.kv_heads,
                                                    model_.head_dim / 2, model_.vocab, logits);
  for (const Chunk& chunk : chunks) {
    if (&chunk != &chunks.front()) {  // a token of another call need not wait for a whole prompt
      lock.unlock();
      lock.lock();
    }
    partials_.resize(chunk.partial_pages * model_.heads * (padded_dim() + 2));
    if (const size_t counters = chunk.partial_pages * model_.kv_heads;
        counters > pages_done_.size())
      pages_done_ = std::vector<std::atomic<int64_t>>(2 * counters);
    for (auto& done : pages_done_) done.store(0, std::memory_order_relaxed);
    const bool by_rows = splits_rows(chunk);
    const int threads = by_rows ? pool_.size() : attendance_.threads();
    // Each thread begins with the tasks of its own number.
    for (auto& next : next_task_) next.store(threads, std::memory_order_relaxed);
    const bool late = pool_.run(threads, [&](int thread) { run_chunk(thread, chunk); });
    if (!by_rows) attendance_.note(late);
  }
  for (const Sequence& sequence : sequences)
    sequence.cache->set_length(sequence.cache->length() + sequence.count);
}

void Executor::for_shares(int64_t count, const std::function<void(Share)>& work) {
  const std::unique_lock<FairMutex> lock(mutex_, std::try_to_lock);
  const int threads = lock ? attendance_.threads() : 1;
  if (threads == 1) return work({0, count});
  pool_.run(threads, [&](int thread) { work(share(count, thread, threads)); });
}

Executor::Part Executor::part_of(int thread, const Chunk& chunk) const {
  const int threads = pool_.active();
  const Share own = share(chunk.rows, thread, threads), all{0, chunk.rows};
  const bool single = chunk.rows == 1;
  if (splits_rows(chunk)) return {thread, own, own, own, 0, 1, single, true};
  return {thread, own, single ? all : own, all, thread, threads, single, false};
}

// Wait for other threads, and fetch meanwhile what is read next.
void Executor::wait(int thread) {
  IdleFetch& idle = scratch_[thread].idle;
  pool_.barrier([&idle] { return idle.step(); });
}

// Wait for the rows or tiles of other threads, where they are needed.
void Executor::sync(const Part& part) {
  if (!part.by_rows) wait(part.thread);
}

// Have waits from here on fetch the thread's share of some matrices, which are read next.
// Of four streams, although decode reads three to six: what is fetched lies in the share anyway,
// and fetching the very streams was no faster (docs/performance.md).
void Executor::expect(const Part& part, std::initializer_list<const Weight*> matrices, int unit) {
  IdleFetch& idle = scratch_[part.thread].idle;
  constexpr int64_t kStreams = 4;
  idle.clear();
  if (part.by_rows || model_.activation == ActivationKind::floating) return;
  for (const Weight* matrix : matrices) {
    const Share mine = part.of(ceil_div(matrix->tiles(), unit));
    idle.add(*matrix, mine.begin * unit, std::min(mine.end * unit, matrix->tiles()), unit,
             kStreams / matrices.size());
  }
}

// The whole model, as one thread sees it. A barrier follows wherever the next stage reads what
// other threads have written: around attention always, elsewhere where threads split the weights.
void Executor::run_chunk(int thread, const Chunk& chunk) {
  const int64_t hidden = model_.hidden;
  const int positions = static_cast<int>(model_.schedule.size());
  const Part part = part_of(thread, chunk);
  embed(part, chunk);
  expect(part, {&model_.blocks[model_.schedule[0]].q});
  sync(part);

  for (int position = 0; position < positions; ++position) {
    const BlockWeights& block = model_.blocks[model_.schedule[position]];

    const Activations attention_in = prepare(part, hidden_.data(), block.attention_norm, hidden,
                                             wide_before({&block.q, &block.k, &block.v}));
    project_qkv(part, attention_in, position);
    expect(part, {&block.o});
    sync(part);
    store_rotated(part, chunk, position);
    if (part.by_rows || chunk.has_runs) wait(thread);
    attend(thread, chunk, position);
    wait(thread);
    const Activations attention_out =
        prepare(part, attention_.data(), nullptr, q_size(), wide_before({&block.o}));
    project(part, attention_out, position, &BlockWeights::o);
    expect(part, {&block.gate, &block.up}, kTilesPerGroup);
    sync(part);

    const Activations ffn_in = prepare(part, hidden_.data(), block.ffn_norm, hidden,
                                       wide_before({&block.gate, &block.up}));
    Activations ffn_out = ffn_.view(model_.activation, model_.intermediate, part.rows.begin);
    ffn_out.may_be_wide = wide_before({&block.down});
    kernels_.swiglu(ffn_in, block.gate, block.up, ffn_out, part.count(),
                    tiles(part, position, &BlockWeights::gate, kTilesPerGroup));
    expect(part, {&block.down});
    sync(part);

    if (model_.activation == ActivationKind::int8)  // one scale for what all threads wrote
      ffn_out = prepare(part, ffn_.values(), nullptr, model_.intermediate, false);
    project(part, ffn_out, position, &BlockWeights::down);
    const bool last = position + 1 == positions;
    expect(part, {last ? &model_.head : &model_.blocks[model_.schedule[position + 1]].q});
    sync(part);
  }
  if (chunk.logit_rows.empty()) return;
  if (part.by_rows) pool_.barrier();
  head(thread, chunk);
}

void Executor::embed(const Part& part, const Chunk& chunk) {
  chunk.for_each_row(part.own, [&](const Span& span, int64_t i) {
    kernels_.embed(model_.embedding, span.tokens[i],
                   hidden_.data() + (span.row + i) * model_.hidden);
  });
}

// The thread's share of a block's matrix, and how much of the same matrix in a later block to fetch
// meanwhile. In one buffer, blocks lie alike and one distance serves gate and up; elsewhere the
// fetch may miss what it is for, and harms nothing. `unit` tiles stay together.
Tiles Executor::tiles(const Part& part, int position, const Weight BlockWeights::* weight,
                      int unit) const {
  const Weight& here = model_.blocks[model_.schedule[position]].*weight;
  const Share mine = part.of(ceil_div(here.tiles(), unit));
  Tiles tiles{mine.begin * unit, std::min(mine.end * unit, here.tiles())};
  const Ahead& ahead = plan_.ahead[position];
  if (ahead.block >= 0) {
    const Weight& there = model_.blocks[ahead.block].*weight;
    tiles.ahead = reinterpret_cast<intptr_t>(there.data) - reinterpret_cast<intptr_t>(here.data);
    tiles.ahead -= tiles.ahead % kStepBytes;
    tiles.stride = ahead.passes;
    tiles.phase = ahead.pass;
  }
  return tiles;
}

// The input of a linear layer, from `part.rows` on: normalised if `norm` is given, rounded if the
// weights are integers.
Activations Executor::prepare(const Part& part, const float* x, const float* norm, int64_t cols,
                              bool may_be_wide) {
  const int64_t first = part.rows.begin;
  ActivationBuffer& buffer = scratch_[part.single ? part.thread : pool_.size()].input;
  Activations out = buffer.view(model_.activation, cols, first);
  out.may_be_wide = may_be_wide;
  if (!norm) out.values = const_cast<float*>(x) + first * cols;
  for (int64_t row = part.prepared.begin; row < part.prepared.end; ++row)
    prepare_row(part.thread, x + row * cols, norm, out.from_row(row - first));
  if (!part.single) sync(part);
  return out;
}

// Row by row, so that a row is rounded while it lies in the first-level cache.
void Executor::prepare_row(int thread, const float* x, const float* norm, const Activations& out) {
  const bool floating = model_.activation == ActivationKind::floating;
  if (norm) {
    float* normed = floating ? out.values : scratch_[thread].normed.data();
    kernels_.rms_norm(x, norm, normed, 1, out.cols, model_.norm_eps);
    x = normed;
  }
  if (!floating) kernels_.quantize_activations(x, out, 1);
}

// Queries, keys and values side by side; the threads share the tiles of all three evenly.
void Executor::project_qkv(const Part& part, const Activations& x, int position) {
  const BlockWeights& block = model_.blocks[model_.schedule[position]];
  const Share mine = part.of(block.q.tiles() + block.k.tiles() + block.v.tiles());
  float* out = qkv_.data() + part.rows.begin * qkv_size();
  int64_t before = 0;  // tiles of the matrices so far
  for (const auto weight : {&BlockWeights::q, &BlockWeights::k, &BlockWeights::v}) {
    const Weight& matrix = block.*weight;
    Tiles some = tiles(part, position, weight);
    some.begin = std::max<int64_t>(mine.begin - before, 0);
    some.end = std::min(mine.end - before, matrix.tiles());
    if (some.begin < some.end)
      kernels_.linear(x, matrix, out, part.count(), qkv_size(), some, false);
    before += matrix.tiles();
    out += matrix.rows;
  }
}

// Back to the residual stream, and added to it.
void Executor::project(const Part& part, const Activations& x, int position,
                       const Weight BlockWeights::* weight) {
  kernels_.linear(x, model_.blocks[model_.schedule[position]].*weight,
                  hidden_.data() + part.rows.begin * model_.hidden, part.count(), model_.hidden,
                  tiles(part, position, weight), true);
}

// The head is many times larger than a block: threads always split its tiles.
void Executor::head(int thread, const Chunk& chunk) {
  const int64_t rows = chunk.logit_rows.size();
  const bool single = rows == 1;
  ActivationBuffer& buffer = scratch_[single ? thread : pool_.size()].input;
  // With wide groups for every kind of weights: of a prompt, this is one row.
  const Activations in = buffer.view(model_.activation, model_.hidden);
  const Share mine = single ? Share{0, 1} : share(rows, thread, pool_.active());
  for (int64_t row = mine.begin; row < mine.end; ++row)
    prepare_row(thread, hidden_.data() + chunk.logit_rows[row] * model_.hidden, model_.final_norm,
                in.from_row(row));
  if (!single) pool_.barrier();
  const Share tiles = share(model_.head.tiles(), thread, pool_.active());
  kernels_.linear(in, model_.head, chunk.logits, rows, model_.vocab, {tiles.begin, tiles.end},
                  false);
}

// Tasks differ in length and threads in luck, so whoever is free takes the next ones: all KV heads
// of a page, which lie behind each other, but towards the end one by one. Those of lone tokens are
// short, and are taken before the ones at hand are done: what a thread fetches meanwhile is then
// what it comes to.
void Executor::attend(int thread, const Chunk& chunk, int position) {
  const int64_t tasks = chunk.tasks.size(), run = model_.kv_heads, active = pool_.active();
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
      attend_one(thread, task, read_after(thread, chunk, likely, position), position);
      if (!early || taken >= runs) report(thread, task.kv_head, position);
    }
    if (!early) following = take();
  }
  for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head) report(thread, kv_head, position);
}

// What a thread reads after a page of a lone token: task number `next` if there is one, else its
// share of the output projection. Nothing where nobody knows.
PageAhead Executor::read_after(int thread, const Chunk& chunk, int64_t next, int position) const {
  PageAhead ahead{kAttentionAhead};
  if (next < static_cast<int64_t>(chunk.tasks.size())) {
    const AttentionTask& task = chunk.tasks[next];
    if (!task.span->alone()) return ahead;
    ahead.next = task.span->cache->view(position, task.part, task.kv_head).data;
    ahead.next_tokens = task.span->seen(task.part);
  } else if (chunk.rows == 1 && model_.activation != ActivationKind::floating) {
    const Weight& o = model_.blocks[model_.schedule[position]].o;
    ahead.next =
        o.data + share(o.tiles(), thread, pool_.active()).begin * tile_nbytes(o.kind, o.cols);
  }
  return ahead;
}

// A lone token, one KV head and page. Each thread rotates the queries for itself, and whoever has
// the last page stores the new key and value, so no stage of its own is needed for it.
// `ahead` says what this thread is likely to read next.
void Executor::attend_one(int thread, const AttentionTask& task, const PageAhead& ahead,
                          int position) {
  Scratch& scratch = scratch_[thread];
  const Span& span = *task.span;
  const int dim = model_.head_dim, kv_head = task.kv_head;
  const int64_t page = task.part, pages = span.pages(), state_size = group() * (padded_dim() + 2);
  const int tokens = span.seen(page);
  PageView view = span.cache->view(position, page, kv_head);
  view.ahead = ahead;
  view.ahead.tokens = tokens;
  const float* qkv = qkv_.data() + span.row * qkv_size();
  if (page == pages - 1) {
    const float* key = qkv + q_size() + kv_head * dim;
    kernels_.rope(key, span.cos, span.sin, scratch.normed.data(), 1, dim);
    kernels_.kv_store(scratch.normed.data(), key + kv_size(), view, tokens - 1);
  }
  const int64_t first = static_cast<int64_t>(kv_head) * group();
  const Queries queries = scratch.prepared(first, dim, padded_dim());
  if (scratch.prepared_for[kv_head] != &span) {
    report(thread, kv_head, position);
    scratch.prepared_for[kv_head] = &span;
    kernels_.rope(qkv + first * dim, span.cos, span.sin, scratch.queries.data() + first * dim,
                  group(), dim);
    kernels_.attend_prepare(queries, model_.kv_kind, group(), dim);
  }
  std::fill_n(scratch.visible.begin(), group(), tokens);
  float* state =
      partials_.data() + (span.partials * model_.kv_heads + kv_head * pages + page) * state_size;
  kernels_.attend_page(queries, view, scratch.visible.data(),
                       attention_state(state, group(), padded_dim()), group(),
                       1.0f / std::sqrt(static_cast<float>(dim)));
  ++scratch.pages_done[kv_head];
}

// Count the pages of a lone token and KV head that this thread has done since it last did; whoever
// counts the last one merges. Not page by page: threads would wait for each other's counts.
void Executor::report(int thread, int kv_head, int position) {
  const int64_t mine = std::exchange(scratch_[thread].pages_done[kv_head], 0);
  if (mine == 0) return;
  const Span& span = *scratch_[thread].prepared_for[kv_head];
  // The counter goes on from position to position.
  std::atomic<int64_t>& done = pages_done_[span.partials * model_.kv_heads + kv_head];
  if (done.fetch_add(mine, std::memory_order_acq_rel) + mine == span.pages() * (position + 1))
    merge(span, kv_head);
}

// The pages of a lone token and KV head together, in order.
void Executor::merge(const Span& span, int kv_head) {
  const int64_t pages = span.pages(), state_size = group() * (padded_dim() + 2);
  float* partial =
      partials_.data() + (span.partials * model_.kv_heads + kv_head * pages) * state_size;
  const AttentionState state = attention_state(partial, group(), padded_dim());
  kernels_.attend_merge(state, attention_state(partial + state_size, group(), padded_dim()),
                        pages - 1, state_size, group(), padded_dim());
  kernels_.attend_finish(
      state, attention_.data() + span.row * q_size() + kv_head * group() * model_.head_dim, group(),
      model_.head_dim);
}

// Longer spans: rotate queries in place, rotate and store keys, store values.
void Executor::store_rotated(const Part& part, const Chunk& chunk, int position) {
  const int dim = model_.head_dim;
  chunk.for_each_row(part.own, [&](const Span& span, int64_t i) {
    if (span.alone()) return;
    float* q = qkv_.data() + (span.row + i) * qkv_size();
    float* key = q + q_size();
    const float *cos = span.cos + i * dim / 2, *sin = span.sin + i * dim / 2;
    kernels_.rope(q, cos, sin, q, model_.heads, dim);
    kernels_.rope(key, cos, sin, key, model_.kv_heads, dim);
    const int64_t at = span.start + i;
    for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head, key += dim)
      kernels_.kv_store(key, key + kv_size(), span.cache->view(position, at / kPageTokens, kv_head),
                        static_cast<int>(at % kPageTokens));
  });
}

// A KV head and a few tokens of a longer span: walks the pages that the last of them sees.
void Executor::attend_many(int thread, const AttentionTask& task, int position) {
  Scratch& scratch = scratch_[thread];
  const Span& span = *task.span;
  const int dim = model_.head_dim, kv_head = task.kv_head;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const int64_t first = task.part, rows = std::min<int64_t>(kAttentionRows, span.rows - first);
  scratch.forget_queries();
  const int64_t queries = rows * group(), start = span.start + first;
  for (int64_t row = 0; row < rows; ++row)
    std::copy_n(qkv_.data() + (span.row + first + row) * qkv_size() + kv_head * group() * dim,
                group() * dim, scratch.queries.data() + row * group() * dim);
  const Queries prepared = scratch.prepared(0, dim, padded_dim());
  kernels_.attend_prepare(prepared, model_.kv_kind, queries, dim);

  const AttentionState state = attention_state(scratch.state.data(), queries, padded_dim());
  const AttentionState page_state =
      attention_state(scratch.page_state.data(), queries, padded_dim());
  const int64_t pages = ceil_div(start + rows, kPageTokens);
  for (int64_t page = 0; page < pages; ++page) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t seen = start + i / group() + 1 - page * kPageTokens;
      scratch.visible[i] = static_cast<int>(std::clamp<int64_t>(seen, 0, kPageTokens));
    }
    PageView view = span.cache->view(position, page, kv_head);
    view.ahead.distance = view.nbytes();
    if (page + 1 < pages) view.ahead.next = span.cache->view(position, page + 1, kv_head).data;
    kernels_.attend_page(prepared, view, scratch.visible.data(), page ? page_state : state, queries,
                         scale);
    if (page) kernels_.attend_merge(state, page_state, 1, 0, queries, padded_dim());
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row * group();
    const AttentionState one{state.values + i * padded_dim(), state.max + i, state.sum + i};
    kernels_.attend_finish(
        one, attention_.data() + (span.row + first + row) * q_size() + kv_head * group() * dim,
        group(), dim);
  }
}

}  // namespace mlf
