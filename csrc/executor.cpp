#include "executor.h"

#include <algorithm>
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
  ActivationBuffer input;     // of a linear layer
  std::vector<float> normed;  // (widest layer input)
  IdleFetch idle;             // of what this thread reads next
};

namespace {

Plan plan_of(const Model& model, int64_t cache_nbytes, bool fetch_ahead) {
  std::vector<int64_t> block_nbytes;
  for (const BlockWeights& block : model.blocks) block_nbytes.push_back(block.nbytes());
  // float kernels do not fetch
  const bool fetches = fetch_ahead && model.activation != ActivationKind::floating;
  return make_plan(model.schedule, block_nbytes, model.head.nbytes(), cache_nbytes, fetches);
}

// Are the inputs of some matrices rounded more finely in wide groups? Weights of 4 bits take it:
// without, predictions of some tokens change visibly. Weights of 8 bits do without (measured, see
// docs/performance-decisions.md) and save a sixth of a prompt's time.
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
      attention_(model_, kernels, threads, chunk_rows_),
      scratch_(threads + 1) {
  const int64_t widest = std::max({model_.hidden, model_.q_size(), model_.intermediate});
  ffn_.resize(chunk_rows_, model_.intermediate);
  for (Scratch& scratch : scratch_) {
    scratch.input.resize(&scratch == &scratch_.back() ? chunk_rows_ : 1, widest);
    scratch.normed.resize(widest);
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
    const bool by_rows = splits_rows(chunk);
    const int threads = by_rows ? pool_.size() : attendance_.threads();
    attention_.begin(chunk, threads);
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
// Of four streams, although decode reads two to six: what is fetched lies in the share anyway,
// and fetching the very streams was no faster (docs/performance-decisions.md).
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

// Where the thread begins to read a matrix, if the chunk has a single row; else null.
const uint8_t* Executor::first_read(const Part& part, const Weight& matrix) const {
  if (!part.single || model_.activation == ActivationKind::floating) return nullptr;
  return matrix.data + part.of(matrix.tiles()).begin * tile_nbytes(matrix.kind, matrix.cols);
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
    attention_.store_rotated(part.own, chunk, position);
    if (part.by_rows || chunk.has_runs) wait(thread);
    attention_.attend(thread, chunk, position, first_read(part, block.o));
    wait(thread);
    const Activations attention_out =
        prepare(part, attention_.out(), nullptr, model_.q_size(), wide_before({&block.o}));
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
  float* out = attention_.qkv(part.rows.begin);
  int64_t before = 0;  // tiles of the matrices so far
  for (const auto weight : {&BlockWeights::q, &BlockWeights::k, &BlockWeights::v}) {
    const Weight& matrix = block.*weight;
    Tiles some = tiles(part, position, weight);
    some.begin = std::max<int64_t>(mine.begin - before, 0);
    some.end = std::min(mine.end - before, matrix.tiles());
    if (some.begin < some.end)
      kernels_.linear(x, matrix, out, part.count(), model_.qkv_size(), some, false);
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

}  // namespace mlf
