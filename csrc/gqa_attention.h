// Grouped-query attention over plain arrays, through the same kernels as the executor.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace mlf {

// q, out (rows, heads, dim); k, v (tokens, kv_heads, dim). Causal and aligned at the end: query i
// sees keys 0..tokens - rows + i. Keys and values are kept as `kind` says.
void gqa_attention(const KernelTable& kernels, const float* q, const float* k, const float* v,
                   float* out, int64_t rows, int64_t tokens, int64_t heads, int64_t kv_heads,
                   int64_t dim, float scale, KVKind kind);

}  // namespace mlf
