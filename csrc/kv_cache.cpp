#include "kv_cache.h"

#include <algorithm>
#include <utility>

namespace mlf {
namespace {

// Of a slab: as much as is worth a few huge pages, up to this many pages.
constexpr int64_t kSlabNbytes = int64_t{32} << 20;
constexpr int64_t kMaxSlabPages = 16;

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
  const int64_t nbytes = page_nbytes();
  if (slab_left_ == 0) {
    const int64_t pages = std::clamp<int64_t>(kSlabNbytes / nbytes, 1, kMaxSlabPages);
    slab_ = allocate_pages(pages * nbytes);
    slab_next_ = slab_.get();
    slab_left_ = pages;
  }
  uint8_t* page = std::exchange(slab_next_, slab_next_ + nbytes);
  --slab_left_;
  // counted by itself: who shares it may not write; the others of its slab may live on without it
  return {page, [slab = slab_, nbytes](uint8_t* dead) { release_memory(dead, nbytes); }};
}

PageView KVCache::view(int position, int64_t page, int kv_head) const {
  const int64_t index = static_cast<int64_t>(position) * kv_heads_ + kv_head;
  return {pages_[page].get() + index * head_nbytes(), kind_, head_dim_};
}

}  // namespace mlf
