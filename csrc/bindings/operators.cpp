// Stand-alone operators.
#include <algorithm>

#include "../activation_buffer.h"
#include "../dispatch.h"
#include "../gqa_attention.h"
#include "../threads.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace mlf {
namespace {

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

}  // namespace

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

}  // namespace mlf
