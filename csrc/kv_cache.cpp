#include "kv_cache.h"

namespace mlf {

KVCache::KVCache(int positions, int kv_heads, int head_dim, bool half)
    : positions_(positions), kv_heads_(kv_heads), head_dim_(head_dim), half_(half) {}

int64_t KVCache::head_nbytes() const {
  const int64_t element = half_ ? 2 : 4;
  return kPageTokens * (head_dim_ + round_up(head_dim_, 16)) * element;
}

void KVCache::reserve(int64_t tokens) {
  while (static_cast<int64_t>(pages_.size()) * kPageTokens < tokens)
    pages_.push_back(allocate_pages(page_nbytes()));
}

PageView KVCache::view(int position, int64_t page, int kv_head) const {
  const int64_t index = static_cast<int64_t>(position) * kv_heads_ + kv_head;
  uint8_t* keys = pages_[page].get() + index * head_nbytes();
  uint8_t* values = keys + kPageTokens * head_dim_ * (half_ ? 2 : 4);
  return {keys, values, half_, head_dim_};
}

}  // namespace mlf
