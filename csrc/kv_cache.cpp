#include "kv_cache.h"

#include <algorithm>
#include <utility>

namespace mlf {
namespace {

constexpr int64_t kSlabPages = 16;

}  // namespace

KVCache::KVCache(int positions, int kv_heads, int head_dim, KVKind kind)
    : positions_(positions), kv_heads_(kv_heads), head_dim_(head_dim), kind_(kind) {}

// A copy has a slab of its own for the pages to come.
KVCache::KVCache(const KVCache& other)
    : positions_(other.positions_),
      kv_heads_(other.kv_heads_),
      head_dim_(other.head_dim_),
      kind_(other.kind_),
      length_(other.length_),
      pages_(other.pages_) {}

void KVCache::reserve(int64_t tokens) {
  for (int64_t page = length_ / kPageTokens; page < static_cast<int64_t>(pages_.size()); ++page) {
    if (page * kPageTokens >= tokens || pages_[page].use_count() == 1) continue;
    std::shared_ptr<uint8_t[]> own = new_page();
    if (page * kPageTokens < length_) std::copy_n(pages_[page].get(), page_nbytes(), own.get());
    pages_[page] = std::move(own);
  }
  while (static_cast<int64_t>(pages_.size()) * kPageTokens < tokens) pages_.push_back(new_page());
}

// Zeroed; memory is only taken where it is touched.
std::shared_ptr<uint8_t[]> KVCache::new_page() {
  if (slab_pages_ == 0) {
    slab_ = allocate_pages(kSlabPages * page_nbytes());
    slab_pages_ = kSlabPages;
  }
  uint8_t* page = slab_.get() + (kSlabPages - slab_pages_--) * page_nbytes();
  return {page, [slab = slab_](uint8_t*) {}};  // counted by itself: who shares it may not write
}

PageView KVCache::view(int position, int64_t page, int kv_head) const {
  const int64_t index = static_cast<int64_t>(position) * kv_heads_ + kv_head;
  return {pages_[page].get() + index * head_nbytes(), kind_, head_dim_};
}

}  // namespace mlf
