// THE list of kernels. Each ISA's translation unit fills one table of these function pointers.
// To add a kernel: its signature here, its body in kernels/<name>.h, its include in isa.cpp.
#pragma once

#include <cstdint>

#include "quant.h"

namespace mlf {

// Tokens in a page of the KV cache. Attention reduces each page on its own and then merges pages in
// order, so its result depends neither on how a prompt was chunked nor on the thread count.
constexpr int kPageTokens = 128;

constexpr int kSoftmaxBlock = 64;  // logits of a vocabulary that are reduced together

// How keys and values are stored. `int16`, `int8`: symmetric codes with one float scale for each
// key and one for each value; see kernels/coded_page.h for the largest code.
enum class KVKind : int32_t { fp32, fp16, int16, int8 };
MLF_INLINE constexpr const char* name_of(KVKind kind) {
  constexpr const char* kNames[] = {"fp32", "fp16", "int16", "int8"};
  return kNames[static_cast<int>(kind)];
}
MLF_INLINE constexpr bool is_coded(KVKind kind) { return kind >= KVKind::int16; }

// What attention fetches while it reads a page: what it reads so many bytes later, of the same page
// and of what follows it.
struct PageAhead {
  int64_t distance = 0;           // 0 to fetch nothing
  int tokens = kPageTokens;       // of this page, which are read
  const uint8_t* next = nullptr;  // a page of the same kind, or weights; null if nobody knows
  int next_tokens = kPageTokens;  // of that page; all for weights
};

// One KV head of one page: keys, then values.
//   fp32, fp16  keys in tiles of 16 tokens, [tile][head_dim][16], so that a vector of scores needs
//               no horizontal sum; values as rows, [token][padded_dim]
//   int8        both as the tiles of a weight matrix: float scale[128 tokens], then keys
//               [tile of 16 tokens][head_dim / 4][16][4 inputs]; float scale[128 tokens], then
//               values [tile of 16 outputs][32][16][4 tokens]
//   int16       the same with 2 inputs or tokens instead of 4
struct PageView {
  uint8_t* data;
  KVKind kind;
  int head_dim;
  PageAhead ahead{};

  MLF_INLINE int64_t padded_dim() const { return round_up(head_dim, 16); }
  MLF_INLINE int64_t scales_nbytes() const { return is_coded(kind) ? 4 * kPageTokens : 0; }
  MLF_INLINE int64_t element_nbytes() const {
    return kind == KVKind::fp32 ? 4 : kind == KVKind::int8 ? 1 : 2;
  }
  MLF_INLINE int64_t key_tile_nbytes() const {
    const int64_t nbytes = head_dim * element_nbytes();
    return 16 * (is_coded(kind) ? round_up(nbytes, 4) : nbytes);
  }
  MLF_INLINE float* key_scales() const { return reinterpret_cast<float*>(data); }
  MLF_INLINE uint8_t* keys() const { return data + scales_nbytes(); }
  MLF_INLINE uint8_t* value_part() const { return keys() + kPageTokens / 16 * key_tile_nbytes(); }
  MLF_INLINE float* value_scales() const { return reinterpret_cast<float*>(value_part()); }
  MLF_INLINE uint8_t* values() const { return value_part() + scales_nbytes(); }
  MLF_INLINE int64_t nbytes() const {
    return 2 * scales_nbytes() + kPageTokens / 16 * key_tile_nbytes() +
           kPageTokens * padded_dim() * element_nbytes();
  }
};

// Some queries of one KV head: floats, and what attend_prepare makes of them for keys that are
// codes.
struct Queries {
  const float* values;  // (queries, head_dim)
  uint8_t* codes;       // (queries, padded head_dim), each of as many bytes as a code of a key
  float* scales;        // (queries): value = scale * code
  int32_t* offsets;     // (queries): what the sums of products start from
};

// Softmax-weighted values of some queries over some keys, not yet normalised.
struct AttentionState {
  float* values;  // (queries, padded head_dim)
  float* max;     // (queries): largest score, times log2(e)
  float* sum;     // (queries): sum of exp(score - max)
};

// The part of a weight matrix that one thread multiplies, and what it fetches meanwhile.
struct Tiles {
  int64_t begin, end;  // tiles [begin, end)
  int64_t ahead = 0;   // distance in bytes to weights wanted later, 0 for none: whole lines
  int stride = 1;      // so many calls, each with its `phase`, fetch all of the same tiles there
  int phase = 0;
};

// clang-format off
//   name                 signature
#define MLF_KERNELS(X)                                                                              \
  /* out = x / sqrt(mean(x^2) + eps) * weight; x, out (rows, cols) */                               \
  X(rms_norm,            void(const float* x, const float* weight, float* out, int64_t rows,        \
                              int64_t cols, float eps))                                             \
  /* Rows of x (rows, out.cols) as codes of out.kind; out.values is not touched. */                 \
  X(quantize_activations, void(const float* x, const Activations& out, int64_t rows))               \
  /* q = round(x * 127 / max|x|), scale = max|x| / 127, per row */                                  \
  X(quantize_per_token,  void(const float* x, int8_t* q, float* scale, int64_t rows, int64_t cols)) \
  /* out[m][n] = (+=, if accumulate) x[m] . w[n], for the weight rows of some tiles */               \
  X(linear,              void(const Activations& x, const Weight& weight, float* out, int64_t rows, \
                              int64_t out_stride, const Tiles& tiles, bool accumulate))             \
  /* out[m][n] = silu(x[m] . gate[n]) * (x[m] . up[n]), for the weight rows of some tiles. Codes if \
     out.kind is int8_g32, else values; tiles.begin is a multiple of kTilesPerGroup. */             \
  X(swiglu,              void(const Activations& x, const Weight& gate, const Weight& up,           \
                              const Activations& out, int64_t rows, const Tiles& tiles))            \
  /* out = one row of an embedding table, as floats */                                              \
  X(embed,               void(const Weight& table, int64_t row, float* out))                        \
  /* Rotate the two halves of each head: x, out (heads, head_dim); cos, sin (head_dim / 2). */      \
  X(rope,                void(const float* x, const float* cos, const float* sin, float* out,       \
                              int64_t heads, int64_t head_dim))                                     \
  /* Put one token's key and value (head_dim) at slot of a page. */                                 \
  X(kv_store,            void(const float* key, const float* value, const PageView& page, int slot)) \
  /* Round queries to the codes that attend_page reads, where keys are codes. */                    \
  X(attend_prepare,      void(const Queries& q, KVKind kind, int64_t queries, int64_t head_dim))    \
  /* Attend to the first tokens[i] >= 0 tokens of a page, per query. */                             \
  X(attend_page,         void(const Queries& q, const PageView& page, const int* tokens,            \
                              const AttentionState& out, int64_t queries, float scale))             \
  /* into = into and `count` states from `from` on, `stride` floats apart, together, in that order. */ \
  X(attend_merge,        void(const AttentionState& into, const AttentionState& from,               \
                              int64_t count, int64_t stride, int64_t queries, int64_t padded_dim))  \
  /* out (queries, head_dim) = values / sum */                                                      \
  X(attend_finish,       void(const AttentionState& state, float* out, int64_t queries,             \
                              int64_t head_dim))                                                    \
  /* out[b] = the largest of block b of x (n) */                                                    \
  X(block_max,           void(const float* x, float* out, int64_t n))                               \
  /* out = exp((x - max) / temperature), unless null; sums[b] = sum of block b; x, out (n) */       \
  X(softmax_weights,     void(const float* x, float* out, float* sums, int64_t n, float max,        \
                              float temperature))                                                     \
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
