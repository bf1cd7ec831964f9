// Finds the added tokens, such as "<|im_start|>", in a text.
#pragma once

#include <array>

#include "table.h"

namespace mlf::tokenizer {

// The tokens of one phase: those looked for in the text as it is, or in the normalized text.
class AddedTokens {
 public:
  AddedTokens(const Table& table, bool normalized);

  // Call use(begin, end, id) for each part of the text in order: a token, or with kNone the text
  // between; the first token that begins wins, of those that begin there the longest.
  template <class Use>
  void split(std::string_view text, Use use) const {
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
      Added token;
      if (!first_[static_cast<uint8_t>(text[at])] || !longest_at(text, at, token)) {
        ++at;
        continue;
      }
      const size_t start = token.flags & kLeftStrip ? strip_left(text, begin, at) : at;
      const size_t found_end = at + token.nbytes;
      at = token.flags & kRightStrip ? strip_right(text, found_end) : found_end;
      if (begin < start) use(begin, start, kNone);
      use(start, at, token.id);
      begin = at;
    }
    if (begin < text.size()) use(begin, text.size(), kNone);
  }

 private:
  bool longest_at(std::string_view text, size_t at, Added& found) const;
  static size_t strip_left(std::string_view text, size_t begin, size_t end);
  static size_t strip_right(std::string_view text, size_t at);

  const Table& table_;
  size_t begin_ = 0, end_ = 0;     // of the phase, in table.added()
  std::array<bool, 256> first_{};  // bytes that begin a token
};

}  // namespace mlf::tokenizer
