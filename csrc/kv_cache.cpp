#include "kv_cache.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

namespace mlf {
namespace {

// Of a slab: as much as is worth a few huge pages, up to this many pages.
constexpr int64_t kSlabNbytes = int64_t{32} << 20;
constexpr int64_t kMaxSlabPages = 16;

// The system finds and clears memory where it is first touched. In a step that takes as long as
// half of it, more if threads come there together, and more again where a hypervisor has to find it
// first; so one thread touches it before, and while tokens come one by one, each of the last ones
// of a page a part of the next.
constexpr int64_t kTouchingTokens = 32;
constexpr int64_t kTouchStep = 4096;  // no system has smaller pages

void touch(uint8_t* page, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kTouchStep)
    *const_cast<volatile uint8_t*>(page + at) = 0;
}

}  // namespace

bool find_kv_kind(const char* name, KVKind& kind) {
  for (const KVKind each : {KVKind::fp32, KVKind::fp16, KVKind::int16, KVKind::int8}) {
    if (std::strcmp(name, name_of(each)) != 0) continue;
    kind = each;
    return true;
  }
  return false;
}

KVCache::KVCache(int positions, int kv_heads, int head_dim, KVKind kind)
    : positions_(positions), kv_heads_(kv_heads), head_dim_(head_dim), kind_(kind) {}

// A copy has a slab of its own for the pages to come, and none that is not in use.
KVCache::KVCache(const KVCache& other)
    : positions_(other.positions_),
      kv_heads_(other.kv_heads_),
      head_dim_(other.head_dim_),
      kind_(other.kind_),
      length_(other.length_),
      pages_(other.pages_.begin(), other.pages_.begin() + other.pages()),
      touched_(other.pages() * other.page_nbytes()) {}

void KVCache::reserve(int64_t tokens) {
  for (int64_t page = length_ / kPageTokens; page < static_cast<int64_t>(pages_.size()); ++page) {
    if (page * kPageTokens >= tokens || pages_[page].use_count() == 1) continue;
    std::shared_ptr<uint8_t[]> own = new_page();
    if (page * kPageTokens < length_) std::copy_n(pages_[page].get(), page_nbytes(), own.get());
    else touch(own.get(), 0, page_nbytes());
    pages_[page] = std::move(own);
  }
  const int64_t needed = ceil_div(tokens, kPageTokens) * page_nbytes();
  int64_t wanted = needed;
  if (tokens == length_ + 1) {
    const int64_t left = ceil_div(tokens, kPageTokens) * kPageTokens - tokens;
    const int64_t parts = std::max<int64_t>(kTouchingTokens - left, 0);
    wanted += page_nbytes() * parts / kTouchingTokens;
  }
  while (touched_ < wanted) {
    const int64_t page = touched_ / page_nbytes(), begin = touched_ % page_nbytes();
    const int64_t end = std::min(wanted - page * page_nbytes(), page_nbytes());
    if (page == static_cast<int64_t>(pages_.size())) {
      try {
        pages_.push_back(new_page());
      } catch (const std::bad_alloc&) {
        if (touched_ < needed) throw;
        return;  // a page for later; then there may be memory again
      }
    }
    touch(pages_[page].get(), begin, end);
    touched_ += end - begin;
  }
}

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

bool KVCache::is_sound(int64_t page) const {
  if (!is_coded(kind_)) return true;
  const auto scales = [](const float* begin) {
    return std::all_of(begin, begin + kPageTokens, [](float scale) {
      // where a key or value was not finite, and no other NaN: the softmax takes it by its bits
      const float broken = NAN;
      return (scale >= 0 && scale <= FLT_MAX) || std::memcmp(&scale, &broken, sizeof scale) == 0;
    });
  };
  const auto words = [this](const uint8_t* begin, int64_t nbytes, int64_t products) {
    const auto* codes = reinterpret_cast<const int16_t*>(begin);
    return kind_ == KVKind::int8 ||
           std::all_of(codes, codes + nbytes / 2, [products](int64_t code) {
             return code * code <= ((int64_t{1} << 31) - 1) / products;
           });
  };
  for (int position = 0; position < positions_; ++position)
    for (int kv_head = 0; kv_head < kv_heads_; ++kv_head) {
      const PageView all = view(position, page, kv_head);
      if (!scales(all.key_scales()) || !scales(all.value_scales()) ||
          !words(all.keys(), all.value_part() - all.keys(), head_dim_) ||
          !words(all.values(), all.data + all.nbytes() - all.values(), kPageTokens))
        return false;
    }
  return true;
}

PageView KVCache::view(int position, int64_t page, int kv_head) const {
  const int64_t index = static_cast<int64_t>(position) * kv_heads_ + kv_head;
  return {pages_[page].get() + index * head_nbytes(), kind_, head_dim_};
}

}  // namespace mlf
