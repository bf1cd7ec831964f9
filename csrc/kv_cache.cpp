#include "kv_cache.h"

#include <algorithm>
#include <utility>

namespace mlf {

KVCache::KVCache(int positions, int kv_heads, int head_dim, bool half)
    : positions_(positions), kv_heads_(kv_heads), head_dim_(head_dim), half_(half) {}

int64_t KVCache::head_nbytes() const {
  const int64_t element = half_ ? 2 : 4;
  return kPageTokens * (head_dim_ + round_up(head_dim_, 16)) * element;
}

void KVCache::reserve(int64_t tokens) {
  for (int64_t page = length_ / kPageTokens; page < static_cast<int64_t>(pages_.size()); ++page) {
    if (page * kPageTokens >= tokens || pages_[page].use_count() == 1) continue;
    Pages own = allocate_pages(page_nbytes());
    std::copy_n(pages_[page].get(), page_nbytes(), own.get());
    pages_[page] = std::move(own);
  }
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
