// What attention fetches while it reads a page of the KV cache.

// The lines of a page that attention to its first tokens reads, in that order, in ranges.
struct PageRanges {
  const PageView& page;
  int tokens;

  struct Range {
    const uint8_t *begin, *end;
  };
  // Scales and keys, then scales and values: of coded pages by 16 outputs, which lie a whole page
  // of tokens apart.
  int64_t count() const {
    if (tokens == kPageTokens) return 1;
    return is_coded(page.kind) ? 1 + page.padded_dim() / 16 : 2;
  }
  Range operator[](int64_t i) const {
    if (tokens == kPageTokens) return {page.data, page.data + page.nbytes()};
    if (i == 0) return {page.data, page.keys() + ceil_div(tokens, 16) * page.key_tile_nbytes()};
    const int64_t element = page.element_nbytes(), in_step = kStep / element;
    if (!is_coded(page.kind))
      return {page.value_part(), page.values() + tokens * page.padded_dim() * element};
    const uint8_t* tile = page.values() + (i - 1) * 16 * kPageTokens * element;
    return {i == 1 ? page.value_part() : tile, tile + ceil_div(tokens, in_step) * kStepBytes};
  }
};

// Fetches what is read `distance` bytes later: it is elsewhere than where hardware prefetchers
// look, or beyond the 4 KB at whose end they stop. All along the page, some lines at a time,
// because more than a few at once keep its loads waiting (measured: 14 instead of 23 GB/s of one
// core). Into the second-level cache: two pages do not fit the first.
class AheadOfPage {
 public:
  explicit AheadOfPage(const PageView& page)
      : page_(page),
        skip_(page.ahead.distance),
        left_(page.ahead.distance),
        more_(page.ahead.distance > 0) {}

  // Fetch some lines; return whether there were any.
  template <int Lines>
  MLF_INLINE bool fetch() {
    if (at_ >= end_ && !(more_ && go_on())) return false;
    MLF_UNROLL for (int i = 0; i < Lines; ++i) __builtin_prefetch(at_ + i * kStepBytes, 0, 2);
    at_ += Lines * kStepBytes;
    return true;
  }
  void fetch_rest() {
    while (fetch<4>()) {
    }
  }

 private:
  // To the next range that has lines: what the first `distance` bytes of this page leave, then as
  // many of the next.
  __attribute__((noinline)) bool go_on() {
    const PageAhead& ahead = page_.ahead;
    for (const PageRanges own{page_, ahead.tokens}; range_ < own.count();) {
      const PageRanges::Range range = own[range_++];
      const int64_t skipped = skip_ < range.end - range.begin ? skip_ : range.end - range.begin;
      skip_ -= skipped;
      if (take(range.begin + skipped, range.end)) return true;
    }
    const PageView next{const_cast<uint8_t*>(ahead.next), page_.kind, page_.head_dim};
    for (const PageRanges there{next, ahead.next_tokens};
         ahead.next && next_range_ < there.count();) {
      const PageRanges::Range range = there[next_range_++];
      const int64_t length = left_ < range.end - range.begin ? left_ : range.end - range.begin;
      left_ -= length;
      if (take(range.begin, range.begin + length)) return true;
    }
    more_ = false;
    return false;
  }
  bool take(const uint8_t* begin, const uint8_t* end) {
    at_ = begin, end_ = end;
    return begin < end;
  }

  const PageView& page_;
  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int64_t skip_, left_;  // bytes of this page and of the next
  int64_t range_ = 0, next_range_ = 0;
  bool more_;
};

// For loops that fetch nothing.
struct NothingAhead {
  template <int>
  MLF_INLINE void fetch() {}
};
