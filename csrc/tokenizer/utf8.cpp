#include "utf8.h"

namespace mlf::tokenizer {

Character character_at(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) -> uint32_t {
    return at + i < text.size() ? static_cast<uint8_t>(text[at + i]) : 0;  // 0 continues nothing
  };
  const uint32_t first = byte(0);
  if (first < 0x80) return {first, 1, true};
  const uint32_t length = first < 0xC2   ? 0
                          : first < 0xE0 ? 2
                          : first < 0xF0 ? 3
                          : first < 0xF5 ? 4
                                         : 0;
  // The second byte excludes overlong forms, surrogates and what lies beyond U+10FFFF.
  const uint32_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const uint32_t high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  if (!length || byte(1) < low || byte(1) > high) return {kReplacement, 1, false};
  uint32_t code = (first & (0x7Fu >> length)) << 6 | (byte(1) & 0x3F);
  for (uint32_t i = 2; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return {kReplacement, i, false};
    code = code << 6 | (byte(i) & 0x3F);
  }
  return {code, length, true};
}

size_t character_before(std::string_view text, size_t end) {
  for (size_t back = 1; back <= 4 && back <= end; ++back) {
    const Character c = character_at(text, end - back);
    if (c.valid && c.nbytes == back) return end - back;
  }
  return end - 1;
}

bool is_valid_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const Character c = character_at(text, at);
    if (!c.valid) return false;
    at += c.nbytes;
  }
  return true;
}

std::string to_valid_utf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Character c = character_at(text, at);
    valid += c.valid ? text.substr(at, c.nbytes) : kReplacementUtf8;
    at += c.nbytes;
  }
  return valid;
}

bool is_white_space(uint32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

}  // namespace mlf::tokenizer
