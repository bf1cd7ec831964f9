// Keys and values of the tokens seen so far, in pages of kPageTokens tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace mlf {

// Find the kind of that name. Returns false if there is none.
bool find_kv_kind(const char* name, KVKind& kind);

// A page holds its tokens for every position of the schedule and every KV head, so growing never
// moves what is stored. Copies share pages until one of them writes to them.
class KVCache {
 public:
  KVCache(int positions, int kv_heads, int head_dim, KVKind kind);

  KVCache(const KVCache& other);
  KVCache& operator=(KVCache&&) = default;

  int64_t length() const { return length_; }
  // Make room for `tokens` tokens in all, those from length() on in pages of this cache alone; if
  // they are one more, perhaps also for a part of the next page. Throws std::bad_alloc.
  void reserve(int64_t tokens);
  // Declare that the first `tokens` tokens are valid; fewer than length() forgets the rest.
  void set_length(int64_t tokens) { length_ = tokens; }
  int64_t nbytes() const { return static_cast<int64_t>(pages_.size()) * page_nbytes(); }

  // Raw bytes of a page, to be kept and given back.
  int64_t pages() const { return ceil_div(length_, kPageTokens); }
  int64_t page_nbytes() const { return head_nbytes() * positions_ * kv_heads_; }
  uint8_t* page(int64_t index) { return pages_[index].get(); }
  const char* format() const { return name_of(kind_); }

  PageView view(int position, int64_t page, int kv_head) const;
  // Could kv_store have written these codes and scales? Kernels rely on it: sums of products of
  // larger codes would not fit int32.
  bool is_sound(int64_t page) const;

  // Was this cache made for a model of these sizes?
  bool fits(int positions, int kv_heads, int head_dim, KVKind kind) const {
    return positions == positions_ && kv_heads == kv_heads_ && head_dim == head_dim_ &&
           kind == kind_;
  }

 private:
  std::shared_ptr<uint8_t[]> new_page();
  // Keys and values of one position and KV head in one page.
  int64_t head_nbytes() const { return PageView{nullptr, kind_, head_dim_}.nbytes(); }

  int positions_, kv_heads_, head_dim_;
  KVKind kind_;
  int64_t length_ = 0;
  std::vector<std::shared_ptr<uint8_t[]>> pages_;
  int64_t touched_ = 0;  // bytes of pages_, from the first page on, that memory is there for
  // Memory for some pages behind each other, whose addresses are freed with the last of them: one
  // page alone would end in the middle of a huge page.
  std::shared_ptr<uint8_t[]> slab_;
  uint8_t* slab_next_ = nullptr;  // of its pages, the first that is not yet taken
  int64_t slab_left_ = 0;         // how many are not
};

}  // namespace mlf
