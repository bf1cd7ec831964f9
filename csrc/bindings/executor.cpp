// The executor and its KV caches.
#include "../executor.h"

#include <algorithm>
#include <deque>

#include "../dispatch.h"
#include "../plan.h"
#include "arguments.h"
#include "bindings.h"
#include "in_use.h"
#include "sampler.h"

namespace py = pybind11;

namespace mlf {
namespace {

// An executor and the Python arrays that its weights live in.
struct BoundExecutor {
  std::vector<py::object> owners;
  std::unique_ptr<Executor> executor;
};

// A cache, and whether a step or restore() writes to it now.
struct BoundCache {
  KVCache cache;
  InUse in_use{"[forward] a cache must be used by one thread at a time"};

  KVCache& idle() {
    in_use.check();
    return cache;
  }
};

BoundExecutor make_executor(int64_t hidden, int64_t intermediate, int64_t vocab, int heads,
                            int kv_heads, int head_dim, float norm_eps,
                            const std::string& activation, const std::string& kv_format,
                            std::vector<int> schedule, std::vector<py::dict> blocks,
                            py::array final_norm, WeightTuple embedding, WeightTuple head,
                            int threads, const std::string& isa, int64_t cache_nbytes,
                            bool fetch_ahead) {
  if (hidden < 1 || intermediate < 1 || vocab < 1 || kv_heads < 1 || heads < 1 ||
      heads % kv_heads || head_dim < 2 || head_dim % 2)
    throw py::value_error("sizes must be positive, heads a multiple of kv_heads, head_dim even");
  BoundExecutor bound;
  const auto weight = [&](const WeightTuple& tuple, const char* name, int64_t rows, int64_t cols,
                          ActivationKind kind) {
    const Weight w = to_weight(tuple, name);
    if (w.rows != rows || w.cols != cols)
      throw py::value_error(std::string(name) + " must have shape (" + std::to_string(rows) + ", " +
                            std::to_string(cols) + "), got (" + std::to_string(w.rows) + ", " +
                            std::to_string(w.cols) + ")");
    check_activation(w, kind, name);
    bound.owners.push_back(std::get<3>(tuple));
    return w;
  };
  const auto norm = [&](const py::object& array, const char* name) {
    bound.owners.push_back(array);
    return floats(py::cast<py::array>(array), name, {hidden});
  };

  Model model{};
  model.hidden = hidden, model.intermediate = intermediate, model.vocab = vocab;
  model.heads = heads, model.kv_heads = kv_heads, model.head_dim = head_dim;
  model.norm_eps = norm_eps;
  model.activation = to_activation(activation);
  model.kv_kind = to_kv_kind(kv_format);
  const int64_t q_size = static_cast<int64_t>(heads) * head_dim,
                kv_size = static_cast<int64_t>(kv_heads) * head_dim;
  for (const py::dict& block : blocks) {
    const auto named = [&](const char* name, int64_t rows, int64_t cols) {
      return weight(py::cast<WeightTuple>(block[name]), name, rows, cols, model.activation);
    };
    model.blocks.push_back(
        {norm(block["attention_norm"], "attention_norm"), norm(block["ffn_norm"], "ffn_norm"),
         named("q", q_size, hidden), named("k", kv_size, hidden), named("v", kv_size, hidden),
         named("o", hidden, q_size), named("gate", intermediate, hidden),
         named("up", intermediate, hidden), named("down", hidden, intermediate)});
  }
  for (const int index : schedule)
    if (index < 0 || index >= static_cast<int>(blocks.size()))
      throw py::value_error("schedule names block " + std::to_string(index) + " of " +
                            std::to_string(blocks.size()));
  model.schedule = std::move(schedule);
  model.final_norm = norm(final_norm, "final_norm");
  model.embedding = weight(embedding, "embedding", vocab, hidden, model.activation);
  model.head = weight(head, "head", vocab, hidden, model.activation);
  bound.executor = std::make_unique<Executor>(std::move(model), check_threads(threads),
                                              kernel_table(isa), cache_nbytes, fetch_ahead);
  return bound;
}

void check_made_by(const Model& model, const KVCache& cache) {
  if (!cache.fits(static_cast<int>(model.schedule.size()), model.kv_heads, model.head_dim,
                  model.kv_kind))
    throw py::value_error("cache was made by another model");
}

// Tokens of all sequences one after another; counts[i] of them belong to caches[i], and the last
// logit_counts[i] of those want logits.
py::array forward(BoundExecutor& self, const std::vector<BoundCache*>& caches,
                  py::array_t<int32_t, py::array::c_style> tokens,
                  const std::vector<int64_t>& counts, const std::vector<int64_t>& logit_counts,
                  py::array cos, py::array sin) {
  Executor& executor = *self.executor;
  const Model& model = executor.model();
  const int64_t rows = tokens.size(), half = model.head_dim / 2;
  if (tokens.ndim() != 1 || rows < 1) throw py::value_error("tokens must be a non-empty vector");
  if (counts.size() != caches.size() || logit_counts.size() != caches.size())
    throw py::value_error("caches, counts and logit_counts must have one length");
  const float* c = floats(cos, "cos", {rows, half});
  const float* s = floats(sin, "sin", {rows, half});
  // the array may change meanwhile
  const std::vector<int32_t> ids(tokens.data(), tokens.data() + rows);
  for (const int32_t id : ids)
    if (id < 0 || id >= model.vocab)
      throw py::value_error("token ids must be in 0.." + std::to_string(model.vocab - 1) +
                            ", got " + std::to_string(id));
  std::vector<Sequence> sequences;
  std::deque<Using> in_use;
  int64_t first = 0, wanted = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    if (!caches[i]) throw py::value_error("caches must not be None");
    if (std::find(caches.begin(), caches.begin() + i, caches[i]) != caches.begin() + i)
      throw py::value_error("caches must differ from each other");
    in_use.emplace_back(caches[i]->in_use);
    KVCache* cache = &caches[i]->cache;
    check_made_by(model, *cache);
    if (counts[i] < 1 || counts[i] > rows - first || logit_counts[i] < 0 ||
        logit_counts[i] > counts[i])
      throw py::value_error("counts must be positive and sum to the tokens");
    sequences.push_back({cache, ids.data() + first, c + first * half, s + first * half, counts[i],
                         logit_counts[i]});
    first += counts[i], wanted += logit_counts[i];
  }
  if (first != rows) throw py::value_error("counts must be positive and sum to the tokens");
  Floats logits({wanted, model.vocab});
  float* out = logits.mutable_data();
  {
    py::gil_scoped_release release;
    executor.forward(sequences, out);
  }
  return logits;
}

// Append a token to a cache and choose the next one: a step without anything of Python in it. After
// a step's weights nothing of Python is in the processor's caches, and each of its calls takes 5 to
// 20 us. `rotary`: cos and sin (2, tokens, head_dim / 2), of all positions up to the token's.
py::tuple next_token(BoundExecutor& self, BoundCache& bound, int64_t token, const py::array& rotary,
                     BoundSampler& sampler) {
  Executor& executor = *self.executor;
  const Model& model = executor.model();
  const Using using_cache(bound.in_use), using_sampler(sampler.in_use);
  KVCache& cache = bound.cache;
  const int64_t half = model.head_dim / 2, position = cache.length();
  check_made_by(model, cache);
  if (token < 0 || token >= model.vocab)
    throw py::value_error("token must be in 0.." + std::to_string(model.vocab - 1) + ", got " +
                          std::to_string(token));
  if (sampler.sampler.vocab() != model.vocab)
    throw py::value_error("sampler must be for " + std::to_string(model.vocab) +
                          " tokens, got one for " + std::to_string(sampler.sampler.vocab()));
  const float* cos = floats(rotary, "rotary", {2, -1, half});
  const int64_t positions = rotary.shape(1);
  if (position >= positions)
    throw py::value_error("rotary must have more than " + std::to_string(position) +
                          " positions, got " + std::to_string(positions));
  const double uniform = sampler.next_uniform();
  sampler.logits.resize(model.vocab);
  const int32_t id = static_cast<int32_t>(token);
  const float* c = cos + position * half;
  Choice choice;
  {
    py::gil_scoped_release release;
    executor.forward({{&cache, &id, c, c + positions * half, 1, 1}}, sampler.logits.data());
    choice = sampler.sampler.choose(
        sampler.logits.data(), uniform,
        [&executor](int64_t count, const auto& work) { executor.for_shares(count, work); });
  }
  return py::make_tuple(choice.token, choice.logprob);
}

void restore(BoundCache& bound, int64_t length, const std::vector<py::buffer>& pages) {
  const Using in_use(bound.in_use);
  KVCache& cache = bound.cache;
  if (length < 0 || static_cast<int64_t>(pages.size()) != ceil_div(length, kPageTokens))
    throw py::value_error(std::to_string(length) + " tokens must lie in " +
                          std::to_string(ceil_div(length, kPageTokens)) + " pages, got " +
                          std::to_string(pages.size()));
  std::vector<py::buffer_info> given;
  for (const py::buffer& page : pages) {
    const py::buffer_info& info = given.emplace_back(page.request());
    if (!PyBuffer_IsContiguous(info.view(), 'C') ||
        info.size * info.itemsize != cache.page_nbytes())
      throw py::value_error("a page must have " + std::to_string(cache.page_nbytes()) +
                            " contiguous bytes, got " + std::to_string(info.size * info.itemsize));
  }
  py::gil_scoped_release release;
  KVCache fresh = cache;  // so that a failure leaves the cache as it was
  fresh.set_length(0);
  fresh.reserve(length);
  for (size_t i = 0; i < given.size(); ++i) {
    std::copy_n(static_cast<const uint8_t*>(given[i].ptr), cache.page_nbytes(), fresh.page(i));
    if (!fresh.is_sound(i))
      throw py::value_error("page " + std::to_string(i) + " must have " + cache.format() +
                            " codes and scales in their range, got others");
  }
  fresh.set_length(length);
  cache = std::move(fresh);
}

}  // namespace

void bind_executor(py::module_& m) {
  using namespace pybind11::literals;
  py::class_<BoundCache>(m, "KVCache")
      .def_property_readonly("length", [](const BoundCache& self) { return self.cache.length(); })
      .def_property_readonly("nbytes", [](BoundCache& self) { return self.idle().nbytes(); })
      .def_property_readonly("format", [](const BoundCache& self) { return self.cache.format(); })
      .def_property_readonly("page_nbytes",
                             [](const BoundCache& self) { return self.cache.page_nbytes(); })
      .def(
          "copy",
          [](BoundCache& self) { return std::make_unique<BoundCache>(BoundCache{self.idle()}); },
          "The same tokens; pages are shared until one of the two writes to them.")
      .def(
          "pages",
          [](BoundCache& self) {
            const Using in_use(self.in_use);
            KVCache& cache = self.cache;
            py::list pages;
            for (int64_t i = 0; i < cache.pages(); ++i)
              pages.append(
                  py::bytes(reinterpret_cast<const char*>(cache.page(i)), cache.page_nbytes()));
            return pages;
          },
          "The bytes of the pages in use.")
      .def("restore", &restore, "length"_a, "pages"_a, "Take back what pages() gave.")
      .def(
          "truncate",
          [](BoundCache& self, int64_t tokens) {
            KVCache& cache = self.idle();
            if (tokens < 0 || tokens > cache.length())
              throw py::value_error("tokens must be in 0.." + std::to_string(cache.length()) +
                                    ", got " + std::to_string(tokens));
            cache.set_length(tokens);
          },
          "tokens"_a, "Forget all but the first tokens.");
  py::class_<BoundExecutor>(m, "Executor")
      .def(py::init(&make_executor), py::kw_only(), "hidden_size"_a, "intermediate_size"_a,
           "vocab_size"_a, "num_attention_heads"_a, "num_key_value_heads"_a, "head_dim"_a,
           "rms_norm_eps"_a, "activation"_a, "kv_format"_a, "schedule"_a, "blocks"_a,
           "final_norm"_a, "embedding"_a, "head"_a, "threads"_a, "isa"_a, "cache_nbytes"_a,
           "fetch_ahead"_a)
      .def_property_readonly(
          "fetches_ahead",
          [](const BoundExecutor& self) { return self.executor->plan().fetches_ahead(); })
      .def_property_readonly(
          "active_threads",
          [](const BoundExecutor& self) { return self.executor->active_threads(); })
      .def_property_readonly("threads",
                             [](const BoundExecutor& self) { return self.executor->threads(); })
      .def_property_readonly("isa", [](const BoundExecutor& self) { return self.executor->isa(); })
      .def_property_readonly(
          "memory_nbytes_per_token",
          [](const BoundExecutor& self) { return self.executor->plan().memory_nbytes; })
      .def_property_readonly(
          "cache_nbytes_per_token",
          [](const BoundExecutor& self) { return self.executor->plan().cache_nbytes; })
      .def("new_cache",
           [](const BoundExecutor& self) {
             return std::make_unique<BoundCache>(BoundCache{*self.executor->new_cache()});
           })
      .def_property_readonly("chunk_rows",
                             [](const BoundExecutor& self) { return self.executor->chunk_rows(); })
      .def("forward", &forward, "caches"_a, "tokens"_a, "counts"_a, "logit_counts"_a, "cos"_a,
           "sin"_a)
      .def("next_token", &next_token, "cache"_a, "token"_a, "rotary"_a, "sampler"_a);
}

}  // namespace mlf
