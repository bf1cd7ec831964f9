// Text to token ids and back, from a table (table.h) alone: neither Python nor a library.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.h"
#include "table.h"

namespace mlf::tokenizer {

class Tokenizer {
 public:
  // Throws std::invalid_argument if the bytes are no table. They must outlive the tokenizer.
  Tokenizer(const uint8_t* data, size_t nbytes);
  Tokenizer(const Tokenizer&) = delete;  // parts refer to the table
  Tokenizer& operator=(const Tokenizer&) = delete;

  const Table& table() const { return table_; }
  // The ids of a text; the text of an added token becomes that token. `add_special_tokens`: with
  // what the model expects around a text. Bytes that are not UTF-8 do no harm. Throws
  // std::length_error for a text of 1 GB or more.
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens) const;
  // How many ids that would be.
  size_t count(std::string_view text, bool add_special_tokens) const {
    return encode(text, add_special_tokens).size();
  }
  // The text of ids, always valid UTF-8: U+FFFD stands for what is not. Ids that are no token have
  // no text.
  std::string decode(const int32_t* ids, size_t count, bool skip_special_tokens) const;
  // The bytes of one token, and the id of the token that bytes stand for (kNone: of none).
  std::string_view bytes_of(int32_t id) const;
  uint32_t id_of(std::string_view bytes) const;

 private:
  bool adds_space(std::string_view part, bool begins_text) const;

  Table table_;
  AddedTokens added_, added_to_normalized_;
};

}  // namespace mlf::tokenizer
