#include "added_tokens.h"

#include "utf8.h"

namespace mlf::tokenizer {

AddedTokens::AddedTokens(const Table& table, bool normalized) : table_(table) {
  const View<Added> tokens = table.added();
  while (end_ < tokens.size() && !(tokens[end_].flags & kNormalized)) ++end_;
  if (normalized) {
    begin_ = end_;
    end_ = tokens.size();
  }
  for (size_t i = begin_; i < end_; ++i)
    first_[static_cast<uint8_t>(table.added_text(tokens[i])[0])] = true;
}

// Tokens are sorted, so those that begin with the same bytes are neighbours: each further byte of
// the text narrows the range, and a token that ends there is its first.
bool AddedTokens::longest_at(std::string_view text, size_t at, Added& found) const {
  const View<Added> tokens = table_.added();
  bool any = false;
  size_t low = begin_, high = end_;
  for (size_t depth = 0; at + depth < text.size() && low < high; ++depth) {
    const int wanted = static_cast<uint8_t>(text[at + depth]);
    const auto byte_of = [&](size_t i) {  // -1: ended before
      const std::string_view token = table_.added_text(tokens[i]);
      return depth < token.size() ? static_cast<int>(static_cast<uint8_t>(token[depth])) : -1;
    };
    const auto first_not_below = [&](int byte) {
      size_t a = low, b = high;
      while (a < b) {
        const size_t middle = a + (b - a) / 2;
        if (byte_of(middle) < byte) a = middle + 1;
        else b = middle;
      }
      return a;
    };
    const size_t first = first_not_below(wanted), last = first_not_below(wanted + 1);
    low = first;
    high = last;
    if (low < high && tokens[low].nbytes == depth + 1) {
      found = tokens[low];
      any = true;
    }
  }
  return any;
}

size_t AddedTokens::strip_left(std::string_view text, size_t begin, size_t end) {
  while (end > begin) {
    const size_t before = character_before(text, end);
    if (before < begin || !is_white_space(character_at(text, before).code)) break;
    end = before;
  }
  return end;
}

size_t AddedTokens::strip_right(std::string_view text, size_t at) {
  while (at < text.size()) {
    const Character c = character_at(text, at);
    if (!is_white_space(c.code)) break;
    at += c.nbytes;
  }
  return at;
}

}  // namespace mlf::tokenizer
