#include "gqa_attention.h"

#include <algorithm>
#include <vector>

#include "kv_cache.h"

namespace mlf {

void gqa_attention(const KernelTable& kernels, const float* q, const float* k, const float* v,
                   float* out, int64_t rows, int64_t tokens, int64_t heads, int64_t kv_heads,
                   int64_t dim, float scale, KVKind kind) {
  KVCache cache(1, static_cast<int>(kv_heads), static_cast<int>(dim), kind);
  cache.reserve(tokens);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t at = (t * kv_heads + head) * dim;
      kernels.kv_store(k + at, v + at, cache.view(0, t / kPageTokens, static_cast<int>(head)),
                       static_cast<int>(t % kPageTokens));
    }
  const int64_t group = heads / kv_heads, padded = round_up(dim, 16);
  std::vector<float> state(group * (padded + 2)), page_state(state.size());
  const auto view = [&](std::vector<float>& buffer) {
    return AttentionState{buffer.data(), buffer.data() + group * padded,
                          buffer.data() + group * (padded + 1)};
  };
  std::vector<int> visible(group);
  std::vector<uint8_t> codes(group * padded * sizeof(int16_t));
  std::vector<float> scales(group);
  std::vector<int32_t> offsets(group);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t seen = tokens - rows + row + 1;
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t at = (row * heads + head * group) * dim;
      const Queries queries{q + at, codes.data(), scales.data(), offsets.data()};
      kernels.attend_prepare(queries, kind, group, dim);
      for (int64_t page = 0; page * kPageTokens < seen; ++page) {
        std::fill(visible.begin(), visible.end(),
                  static_cast<int>(std::min<int64_t>(seen - page * kPageTokens, kPageTokens)));
        kernels.attend_page(queries, cache.view(0, page, static_cast<int>(head)), visible.data(),
                            view(page ? page_state : state), group, scale);
        if (page) kernels.attend_merge(view(state), view(page_state), 1, 0, group, padded);
      }
      kernels.attend_finish(view(state), out + at, group, dim);
    }
  }
}

}  // namespace mlf
