// The Python module mobilellm_fast._C: checks shapes and lifetimes, releases the GIL, calls C++.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "bindings_tokenizer.h"
#include "checksum.h"
#include "dispatch.h"
#include "activation_buffer.h"
#include "executor.h"
#include "gqa_attention.h"
#include "machine_probe.h"
#include "memory.h"
#include "plan.h"
#include "sampling.h"

namespace py = pybind11;
using namespace mlf;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using WeightTuple = std::tuple<std::string, int64_t, int64_t, py::array>;

std::string shape_text(const py::array& a) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + ")";
}

// `a` as a pointer, if it is C-contiguous float32 of this shape (-1: any).
const float* floats(const py::array& a, const char* name, std::vector<int64_t> shape) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.data()) % alignof(float) == 0;
  bool ok =
      aligned && py::isinstance<Floats>(a) && a.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; ok && i < shape.size(); ++i) ok = shape[i] < 0 || a.shape(i) == shape[i];
  if (ok) return static_cast<const float*>(a.data());
  std::string want = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    want += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  throw py::value_error(std::string(name) + " must be C-contiguous float32 of shape " + want +
                        "), got " + std::string(py::str(a.dtype())) + " " + shape_text(a));
}
float* output(py::array& a, const char* name, std::vector<int64_t> shape) {
  floats(a, name, std::move(shape));
  return static_cast<float*>(a.mutable_data());  // throws if read-only
}

WeightKind to_kind(const std::string& kind_name, const char* name) {
  const std::map<std::string, WeightKind> kinds = {
      {"fp32", WeightKind::fp32},         {"bf16", WeightKind::bf16},
      {"int8", WeightKind::int8},         {"int8_g32", WeightKind::int8_g32},
      {"int4_g32", WeightKind::int4_g32}, {"int4_sym_g32", WeightKind::int4_sym_g32}};
  const auto kind = kinds.find(kind_name);
  if (kind == kinds.end())
    throw py::value_error(std::string(name) + ": unknown weight kind " + kind_name);
  return kind->second;
}

Weight to_weight(const WeightTuple& tuple, const char* name) {
  const auto& [kind_name, rows, cols, data] = tuple;
  const py::ssize_t item = kind_name == "fp32" ? 4 : kind_name == "bf16" ? 2 : 1;
  const bool contiguous =
      (data.flags() & py::array::c_style) && data.itemsize() == item &&
      reinterpret_cast<uintptr_t>(data.data()) % (kind_name == "bf16" ? 2 : 4) == 0;
  if (rows > (int64_t{1} << 31) || cols > (int64_t{1} << 24))
    throw py::value_error(std::string(name) + " is too large");
  const Weight weight{to_kind(kind_name, name), rows, cols,
                      static_cast<const uint8_t*>(data.data())};
  if (cols > kMaxCols)
    throw py::value_error(std::string(name) + " must have at most " + std::to_string(kMaxCols) +
                          " columns, got " + std::to_string(cols));
  if (rows < 1 || cols < 1 || !contiguous || data.nbytes() != weight.nbytes())
    throw py::value_error(std::string(name) + " must hold " + std::to_string(weight.nbytes()) +
                          " contiguous, aligned bytes for " + kind_name + " (" +
                          std::to_string(rows) + ", " + std::to_string(cols) + "), got " +
                          std::to_string(data.nbytes()));
  return weight;
}

const char* const kNeverWide = "int8_g32_plain";  // int8_g32 without wide groups

ActivationKind to_activation(const std::string& name) {
  if (name == "float") return ActivationKind::floating;
  if (name == "int8") return ActivationKind::int8;
  if (name == "int8_g32" || name == kNeverWide) return ActivationKind::int8_g32;
  throw py::value_error("activation must be float, int8, int8_g32 or int8_g32_plain, got " + name);
}

KVKind to_kv_kind(const std::string& name) {
  KVKind kind;
  if (find_kv_kind(name.c_str(), kind)) return kind;
  throw py::value_error("kv_format must be fp16, fp32, int16 or int8, got " + name);
}

void check_activation(const Weight& weight, ActivationKind activation, const char* name) {
  if (is_quantized(weight.kind) != (activation != ActivationKind::floating))
    throw py::value_error(std::string(name) +
                          ": integer weights need integer activations, float weights float ones");
  // one sum over all inputs must fit int32
  constexpr int64_t kMost = (int64_t{1} << 31) / (128 * kMaxCode);
  if (activation == ActivationKind::int8 && weight.cols > kMost)
    throw py::value_error(std::string(name) + " must have at most " + std::to_string(kMost) +
                          " columns for int8 activations, got " + std::to_string(weight.cols));
}

int check_threads(int threads) {
  if (threads < 1 || threads > 1024)
    throw py::value_error("threads must be in 1..1024, got " + std::to_string(threads));
  return threads;
}

py::array_t<uint8_t> as_array(Pages pages, int64_t nbytes) {
  auto memory = std::make_unique<Pages>(std::move(pages));
  uint8_t* data = memory->get();
  py::capsule owner(memory.release(), [](void* p) { delete static_cast<Pages*>(p); });
  return py::array_t<uint8_t>(nbytes, data, owner);
}

// An executor and the Python arrays that its weights live in.
struct BoundExecutor {
  std::vector<py::object> owners;
  std::unique_ptr<Executor> executor;
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

// Tokens of all sequences one after another; counts[i] of them belong to caches[i], and the last
// logit_counts[i] of those want logits.
py::array forward(BoundExecutor& self, const std::vector<KVCache*>& caches,
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
  int64_t first = 0, wanted = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    KVCache* cache = caches[i];
    if (!cache || !cache->fits(static_cast<int>(model.schedule.size()), model.kv_heads,
                               model.head_dim, model.kv_kind))
      throw py::value_error("cache was made by another model");
    if (std::find(caches.begin(), caches.begin() + i, cache) != caches.begin() + i)
      throw py::value_error("caches must differ from each other");
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

// Input rows of a stand-alone linear layer, prepared as the executor would.
struct PreparedRows {
  ActivationBuffer buffer;
  Activations activations;

  PreparedRows(const KernelTable& kernels, const float* x, int64_t rows, int64_t cols,
               const std::string& activation) {
    const ActivationKind kind = to_activation(activation);
    buffer.resize(rows, cols);
    activations = buffer.view(kind, cols);
    activations.may_be_wide = activation != kNeverWide;
    activations.values = const_cast<float*>(x);
    if (kind != ActivationKind::floating) kernels.quantize_activations(x, activations, rows);
  }
};

// Split `tiles` over threads. A pool of its own per call: these operators serve training and tests,
// not the decode loop.
template <class Body>
void over_tiles(int64_t tiles, int threads, Body body) {
  ThreadPool pool(static_cast<int>(std::min<int64_t>(threads, tiles)));
  pool.run([&](int thread) {
    const Share mine = share(tiles, thread, pool.size());
    body(mine.begin, mine.end);
  });
}

void bind_operators(py::module_& m) {
  using namespace pybind11::literals;

  m.def(
      "rms_norm",
      [](py::array x, py::array weight, float eps, py::array out, const std::string& isa) {
        const float* in = floats(x, "x", {-1, -1});
        const int64_t rows = x.shape(0), cols = x.shape(1);
        const float* w = floats(weight, "weight", {cols});
        float* y = output(out, "out", {rows, cols});
        const KernelTable& kernels = kernel_table(isa);
        py::gil_scoped_release release;
        kernels.rms_norm(in, w, y, rows, cols, eps);
      },
      "x"_a, "weight"_a, "eps"_a, "out"_a, "isa"_a = "");

  m.def(
      "rope",
      [](py::array x, py::array cos, py::array sin, py::array out, const std::string& isa) {
        const float* in = floats(x, "x", {-1, -1, -1});
        const int64_t tokens = x.shape(0), heads = x.shape(1), dim = x.shape(2);
        if (dim % 2)
          throw py::value_error("x must have an even head_dim, got " + std::to_string(dim));
        const float *c = floats(cos, "cos", {tokens, dim / 2}),
                    *s = floats(sin, "sin", {tokens, dim / 2});
        float* y = output(out, "out", {tokens, heads, dim});
        const KernelTable& kernels = kernel_table(isa);
        py::gil_scoped_release release;
        for (int64_t t = 0; t < tokens; ++t)
          kernels.rope(in + t * heads * dim, c + t * dim / 2, s + t * dim / 2, y + t * heads * dim,
                       heads, dim);
      },
      "x"_a, "cos"_a, "sin"_a, "out"_a, "isa"_a = "");

  m.def(
      "gqa_attention",
      [](py::array q, py::array k, py::array v, float scale, py::array out, const std::string& isa,
         const std::string& kv_format) {
        const float* queries = floats(q, "q", {-1, -1, -1});
        const int64_t rows = q.shape(0), heads = q.shape(1), dim = q.shape(2);
        const float* keys = floats(k, "k", {-1, -1, dim});
        const int64_t tokens = k.shape(0), kv_heads = k.shape(1);
        const float* values = floats(v, "v", {tokens, kv_heads, dim});
        float* y = output(out, "out", {rows, heads, dim});
        if (kv_heads < 1 || heads % kv_heads)
          throw py::value_error("heads of q must be a multiple of heads of k");
        if (tokens < rows) throw py::value_error("k must hold at least as many tokens as q");
        const KernelTable& kernels = kernel_table(isa);
        const KVKind kind = to_kv_kind(kv_format);
        py::gil_scoped_release release;
        gqa_attention(kernels, queries, keys, values, y, rows, tokens, heads, kv_heads, dim, scale,
                      kind);
      },
      "q"_a, "k"_a, "v"_a, "scale"_a, "out"_a, "isa"_a = "", "kv_format"_a = "fp32");

  m.def(
      "linear",
      [](py::array x, WeightTuple weight, py::array out, const std::string& activation,
         const std::string& isa, int threads) {
        const Weight w = to_weight(weight, "weight");
        const float* in = floats(x, "x", {-1, w.cols});
        const int64_t rows = x.shape(0);
        float* y = output(out, "out", {rows, w.rows});
        check_activation(w, to_activation(activation), "weight");
        const KernelTable& kernels = kernel_table(isa);
        check_threads(threads);
        py::gil_scoped_release release;
        const PreparedRows prepared(kernels, in, rows, w.cols, activation);
        over_tiles(w.tiles(), threads, [&](int64_t begin, int64_t end) {
          kernels.linear(prepared.activations, w, y, rows, w.rows, {begin, end}, false);
        });
      },
      "x"_a, "weight"_a, "out"_a, "activation"_a, "isa"_a = "", "threads"_a = 1);

  m.def(
      "swiglu",
      [](py::array x, WeightTuple gate, WeightTuple up, py::array out,
         const std::string& activation, const std::string& isa, int threads) {
        const Weight g = to_weight(gate, "gate"), u = to_weight(up, "up");
        if (g.rows != u.rows || g.cols != u.cols || is_quantized(g.kind) != is_quantized(u.kind))
          throw py::value_error(
              "gate and up must have one shape, and both be integer or both be float");
        const float* in = floats(x, "x", {-1, g.cols});
        const int64_t rows = x.shape(0);
        float* y = output(out, "out", {rows, g.rows});
        check_activation(g, to_activation(activation), "gate");
        const KernelTable& kernels = kernel_table(isa);
        check_threads(threads);
        py::gil_scoped_release release;
        const PreparedRows prepared(kernels, in, rows, g.cols, activation);
        Activations result{};  // as values
        result.cols = g.rows, result.values = y;
        over_tiles(ceil_div(g.tiles(), kTilesPerGroup), threads, [&](int64_t begin, int64_t end) {
          kernels.swiglu(prepared.activations, g, u, result, rows,
                         {begin * kTilesPerGroup, std::min(end * kTilesPerGroup, g.tiles())});
        });
      },
      "x"_a, "gate"_a, "up"_a, "out"_a, "activation"_a, "isa"_a = "", "threads"_a = 1);

  m.def(
      "quantize_per_token",
      [](py::array x, py::array_t<int8_t, py::array::c_style> q, py::array scale,
         const std::string& isa) {
        const float* in = floats(x, "x", {-1, -1});
        const int64_t rows = x.shape(0), cols = x.shape(1);
        if (q.ndim() != 2 || q.shape(0) != rows || q.shape(1) != cols)
          throw py::value_error("q must have the shape of x, got " + shape_text(q));
        float* s = output(scale, "scale", {rows});
        int8_t* codes = q.mutable_data();
        const KernelTable& kernels = kernel_table(isa);
        py::gil_scoped_release release;
        kernels.quantize_per_token(in, codes, s, rows, cols);
      },
      "x"_a, py::arg("q").noconvert(), "scale"_a, "isa"_a = "");
}

void bind_sampling(py::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "logprob",
      [](const py::array& logits, float max, int64_t token, const std::string& isa) {
        const float* x = floats(logits, "logits", {-1});
        const int64_t vocab = logits.shape(0);
        if (token < 0 || token >= vocab)
          throw py::value_error("token must be in 0.." + std::to_string(vocab - 1) + ", got " +
                                std::to_string(token));
        const KernelTable& kernels = kernel_table(isa);
        py::gil_scoped_release release;
        return logprob(kernels, x, vocab, max, token);
      },
      "logits"_a, "max"_a, "token"_a, "isa"_a = "");
  m.def(
      "draw",
      [](const py::array& logits, float max, double temperature, int64_t top_k, double top_p,
         double min_p, double uniform, const std::string& isa) {
        const float* x = floats(logits, "logits", {-1});
        if (!(temperature > 0) || top_k < 0 || !(top_p > 0) || !(min_p >= 0) || !(min_p <= 1) ||
            !(uniform >= 0) || !(uniform < 1) || !std::isfinite(max) || logits.shape(0) < 1)
          throw py::value_error("draw: an argument is out of range");
        const KernelTable& kernels = kernel_table(isa);
        py::gil_scoped_release release;
        return draw(kernels, x, logits.shape(0), max, {temperature, top_k, top_p, min_p}, uniform);
      },
      "logits"_a, "max"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a,
      "isa"_a = "");
}

void restore(KVCache& cache, int64_t length, const std::vector<py::buffer>& pages) {
  if (length < 0 || static_cast<int64_t>(pages.size()) != ceil_div(length, kPageTokens))
    throw py::value_error(std::to_string(length) + " tokens must lie in " +
                          std::to_string(ceil_div(length, kPageTokens)) + " pages, got " +
                          std::to_string(pages.size()));
  for (const py::buffer& page : pages) {
    const py::buffer_info info = page.request();
    if (!PyBuffer_IsContiguous(info.view(), 'C') ||
        info.size * info.itemsize != cache.page_nbytes())
      throw py::value_error("a page must have " + std::to_string(cache.page_nbytes()) +
                            " contiguous bytes, got " + std::to_string(info.size * info.itemsize));
  }
  KVCache fresh = cache;  // so that a failure leaves the cache as it was
  fresh.set_length(0);
  fresh.reserve(length);
  for (size_t i = 0; i < pages.size(); ++i)
    std::copy_n(static_cast<const uint8_t*>(pages[i].request().ptr), cache.page_nbytes(),
                fresh.page(i));
  fresh.set_length(length);
  cache = std::move(fresh);
}

void bind_cache(py::module_& m) {
  using namespace pybind11::literals;
  py::class_<KVCache>(m, "KVCache")
      .def_property_readonly("length", &KVCache::length)
      .def_property_readonly("nbytes", &KVCache::nbytes)
      .def_property_readonly("format", &KVCache::format)
      .def_property_readonly("page_nbytes", &KVCache::page_nbytes)
      .def(
          "copy", [](const KVCache& self) { return std::make_unique<KVCache>(self); },
          "The same tokens; pages are shared until one of the two writes to them.")
      .def(
          "pages",
          [](KVCache& self) {
            py::list pages;
            for (int64_t i = 0; i < self.pages(); ++i)
              pages.append(
                  py::bytes(reinterpret_cast<const char*>(self.page(i)), self.page_nbytes()));
            return pages;
          },
          "The bytes of the pages in use.")
      .def("restore", &restore, "length"_a, "pages"_a, "Take back what pages() gave.")
      .def(
          "truncate",
          [](KVCache& self, int64_t tokens) {
            if (tokens < 0 || tokens > self.length())
              throw py::value_error("tokens must be in 0.." + std::to_string(self.length()) +
                                    ", got " + std::to_string(tokens));
            self.set_length(tokens);
          },
          "tokens"_a, "Forget all but the first tokens.");
}

// Probes of csrc/machine_probe.h: each measures for some milliseconds, without the GIL.
void bind_machine_probe(py::module_& m) {
  using namespace pybind11::literals;
  const auto probe = [&m](const char* name, double (*measure)(const KernelTable&, int),
                          const char* doc) {
    m.def(
        name,
        [measure](int threads, const std::string& isa) {
          const KernelTable& kernels = kernel_table(isa);
          check_threads(threads);
          py::gil_scoped_release release;
          return measure(kernels, threads);
        },
        "threads"_a, "isa"_a = "", doc);
  };
  probe("read_bandwidth", read_bandwidth,
        "Bytes per second that `threads` threads read from memory together.");
  probe("int8_peak", int8_peak, "int8 operations per second of registers alone (a product is 2).");
  probe("fp32_peak", fp32_peak, "fp32 operations per second of registers alone (an fma is 2).");
  m.def(
      "cache_bandwidth",
      [](int threads, int64_t nbytes_per_thread, const std::string& isa) {
        const KernelTable& kernels = kernel_table(isa);
        check_threads(threads);
        if (nbytes_per_thread < 1 || nbytes_per_thread > (int64_t{1} << 32))
          throw py::value_error("nbytes_per_thread must be in 1..2^32, got " +
                                std::to_string(nbytes_per_thread));
        py::gil_scoped_release release;
        return cache_bandwidth(kernels, threads, nbytes_per_thread);
      },
      "threads"_a, "nbytes_per_thread"_a, "isa"_a = "",
      "Bytes per second that threads read from caches, each again and again its own buffer.");
  m.def(
      "barrier_seconds",
      [](int threads) {
        check_threads(threads);
        py::gil_scoped_release release;
        return barrier_seconds(threads);
      },
      "threads"_a, "Seconds that a barrier of `threads` running threads takes.");
  m.def("l2_cache_nbytes", &l2_cache_nbytes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  m.doc() = "C++ kernels and executor of mobilellm_fast";
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("tile_nbytes", [](const std::string& kind, int64_t cols) {
    return tile_nbytes(to_kind(kind, "weight"), cols);
  });
  bind_machine_probe(m);
  m.def(
      "allocate",
      [](int64_t nbytes) {
        if (nbytes < 0)
          throw py::value_error("nbytes must not be negative, got " + std::to_string(nbytes));
        return as_array(allocate_pages(nbytes), nbytes);
      },
      "nbytes"_a, "A zeroed uint8 array in huge pages where the system gives them.");
  m.def(
      "map_file",
      [](const py::bytes& path) {
        int64_t nbytes = 0;
        try {
          Pages pages = map_file(std::string(path).c_str(), nbytes);
          return as_array(std::move(pages), nbytes);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path.ptr());
          throw py::error_already_set();
        }
      },
      "path"_a, "A file as uint8 array, in huge pages likewise; changes stay in this process.");
  m.def(
      "checksum",
      [](const py::buffer& data, int threads) {
        const py::buffer_info info = data.request();
        check_threads(threads);
        if (!PyBuffer_IsContiguous(info.view(), 'C'))
          throw py::value_error("data must be contiguous");
        py::gil_scoped_release release;
        return checksum(static_cast<const uint8_t*>(info.ptr), info.size * info.itemsize, threads);
      },
      "data"_a, "threads"_a = 1, "64 bits that tell whether any byte changed; not cryptographic.");
  m.def("last_level_cache_nbytes", &last_level_cache_nbytes);
  bind_operators(m);
  bind_tokenizer(m);

  bind_sampling(m);
  bind_cache(m);
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
      .def("new_cache", [](const BoundExecutor& self) { return self.executor->new_cache(); })
      .def_property_readonly("chunk_rows",
                             [](const BoundExecutor& self) { return self.executor->chunk_rows(); })
      .def("forward", &forward, "caches"_a, "tokens"_a, "counts"_a, "logit_counts"_a, "cos"_a,
           "sin"_a);
}
