#include "kv_cache.h"

#include <algorithm>
#include <utility>

namespace mlf {

KVCache::KVCache(int positions, int kv_heads, int head_dim, KVKind kind)
    : positions_(positions), kv_heads_(kv_heads), head_dim_(head_dim), kind_(kind) {}

void KVCache::reserve(int64_t tokens) {
  for (int64_t page = length_ / kPageTokens; page < static_cast<int64_t>(pages_.size()); ++page) {
    if (page * kPageTokens >= tokens || pages_[page].use_count() == 1) continue;
    Pages own = allocate_pages(page_nbytes());
    if (page * kPageTokens < length_) std::copy_n(pages_[page].get(), page_nbytes(), own.get());
    pages_[page] = std::move(own);
  }
  while (static_cast<int64_t>(pages_.size()) * kPageTokens < tokens)
    pages_.push_back(allocate_pages(page_nbytes()));
}

PageView KVCache::view(int position, int64_t page, int kv_head) const {
  const int64_t index = static_cast<int64_t>(position) * kv_heads_ + kv_head;
  return {pages_[page].get() + index * head_nbytes(), kind_, head_dim_};
}

}  // namespace mlf
