// THE list of kernels. Each ISA's translation unit fills one table of these function pointers.
// To add a kernel: its signature here, its body in kernels/<name>.h, its include in isa.cpp.
#pragma once

#include <cstdint>

#include "quant.h"

namespace mlf {

// Tokens in a page of the KV cache. Attention reduces each page on its own and then merges pages in
// order, so its result depends neither on how a prompt was chunked nor on the thread count.
constexpr int kPageTokens = 128;

// One KV head of one page. Keys lie in tiles of 16 tokens, [tile][head_dim][16], so that a vector
// of scores needs no horizontal sum; values are rows, [token][head_dim padded to 16].
struct PageView {
  void* keys;
  void* values;
  bool half;  // fp16, else float
  int head_dim;

  MLF_INLINE int padded_dim() const { return static_cast<int>(round_up(head_dim, 16)); }
};

// Softmax-weighted values of some queries over some keys, not yet normalised.
struct AttentionState {
  float* values;  // (queries, padded head_dim)
  float* max;     // (queries): largest score
  float* sum;     // (queries): sum of exp(score - max)
};

// The part of a weight matrix that one thread multiplies, and what it fetches meanwhile.
struct Tiles {
  int64_t begin, end;  // tiles [begin, end)
  int64_t ahead = 0;   // distance in bytes to weights wanted later, 0 for none; every `stride`th
  int stride = 1;      // tile, those with index `phase`, fetches the same tile there
  int phase = 0;
};

// clang-format off
//   name                 signature
#define MLF_KERNELS(X)                                                                              \
  /* out = x / sqrt(mean(x^2) + eps) * weight; x, out (rows, cols) */                               \
  X(rms_norm,            void(const float* x, const float* weight, float* out, int64_t rows,        \
                              int64_t cols, float eps))                                             \
  /* Rows of x as integer codes: scale = max|x| / max_code; out.values is not touched. */           \
  X(quantize_activations, void(const float* x, const Activations& out, int64_t first_row,           \
                              int64_t rows, int32_t max_code))                                      \
  /* q = round(x * 127 / max|x|), scale = max|x| / 127, per row */                                  \
  X(quantize_per_token,  void(const float* x, int8_t* q, float* scale, int64_t rows, int64_t cols)) \
  /* out[m][n] = (+=, if accumulate) x[m] . w[n], for the weight rows of some tiles */               \
  X(linear,              void(const Activations& x, const Weight& weight, float* out, int64_t rows, \
                              int64_t out_stride, const Tiles& tiles, bool accumulate))             \
  /* out[m][n] = silu(x[m] . gate[n]) * (x[m] . up[n]), for the weight rows of some tiles */        \
  X(swiglu,              void(const Activations& x, const Weight& gate, const Weight& up,           \
                              float* out, int64_t rows, int64_t out_stride, const Tiles& tiles))    \
  /* out = one row of an embedding table, as floats */                                              \
  X(embed,               void(const Weight& table, int64_t row, float* out))                        \
  /* Rotate the two halves of each head: x, out (heads, head_dim); cos, sin (head_dim / 2). */      \
  X(rope,                void(const float* x, const float* cos, const float* sin, float* out,       \
                              int64_t heads, int64_t head_dim))                                     \
  /* Put one token's key and value (head_dim) at slot of a page. */                                 \
  X(kv_store,            void(const float* key, const float* value, const PageView& page, int slot)) \
  /* Attend to the first tokens[i] >= 0 tokens of a page, per query; q (queries, head_dim). */      \
  X(attend_page,         void(const float* q, const PageView& page, const int* tokens,              \
                              const AttentionState& out, int64_t queries, float scale))             \
  /* into = into and from together, in that order. */                                               \
  X(attend_merge,        void(const AttentionState& into, const AttentionState& from,               \
                              int64_t queries, int64_t padded_dim))                                 \
  /* out (queries, head_dim) = values / sum */                                                      \
  X(attend_finish,       void(const AttentionState& state, float* out, int64_t queries,             \
                              int64_t head_dim))                                                    \
  /* The table's limits, for machine_probe.h: products done in `rounds`; the sum of values. */      \
  X(peak_dot,            int64_t(int64_t rounds, int32_t* sink))                                    \
  X(peak_fma,            int64_t(int64_t rounds, float* sink))                                      \
  X(read_sum,            double(const float* values, int64_t count))
// clang-format on

template <class Signature>
using KernelPointer = Signature*;

struct KernelTable {
  const char* name;
#define X(kernel, ...) KernelPointer<__VA_ARGS__> kernel;
  MLF_KERNELS(X)
#undef X
};

}  // namespace mlf
