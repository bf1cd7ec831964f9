// UTF-8 read character by character, whatever the bytes are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace mlf::tokenizer {

constexpr uint32_t kReplacement = 0xFFFD;  // stands for bytes that are no character
constexpr std::string_view kReplacementUtf8 = "\xEF\xBF\xBD";

struct Character {
  uint32_t code;    // kReplacement for what is not UTF-8
  uint32_t nbytes;  // >= 1
  bool valid;
};

// The character that begins at text[at]; `at` must be inside. Bytes that are not UTF-8 count as one
// character as far as they could have begun one: what Unicode recommends, and what Python's
// "replace" and the tokenizers library do.
Character character_at(std::string_view text, size_t at);

// Where the character that ends at text[end] begins (end > 0); in invalid bytes, a byte before.
size_t character_before(std::string_view text, size_t end);

bool is_valid_utf8(std::string_view text);

// `text` with U+FFFD for everything that is not UTF-8.
std::string to_valid_utf8(std::string_view text);

// Unicode's White_Space property, which has not changed since Unicode 6.3.
bool is_white_space(uint32_t code);

}  // namespace mlf::tokenizer
