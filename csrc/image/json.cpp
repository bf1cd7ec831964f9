#include "json.h"

#include <cerrno>
#include <cstdlib>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace mlf::image {

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json json = value(0);
    skip_space();
    if (at_ != text_.size()) fail();
    return json;
  }

 private:
  static constexpr int kMaxDepth = 64;

  [[noreturn]] static void fail() { throw std::invalid_argument("is not JSON"); }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char c) {
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }
  void expect(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail();
    at_ += word.size();
  }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string::npos)
      ++at_;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail();
    skip_space();
    Json json;
    switch (peek()) {
      case '{':
        json.value_ = object(depth);
        break;
      case '[':
        json.value_ = array(depth);
        break;
      case '"':
        json.value_ = string();
        break;
      case 't':
        expect("true");
        json.value_ = true;
        break;
      case 'f':
        expect("false");
        json.value_ = false;
        break;
      case 'n':
        expect("null");
        break;
      default:
        json.value_ = number();
    }
    return json;
  }

  Json::Object object(int depth) {
    Json::Object members;
    expect("{");
    skip_space();
    if (take('}')) return members;
    do {
      skip_space();
      std::string name = string();
      skip_space();
      expect(":");
      members.emplace_back(std::move(name), value(depth + 1));
      skip_space();
    } while (take(','));
    expect("}");
    return members;
  }

  Json::Array array(int depth) {
    Json::Array items;
    expect("[");
    skip_space();
    if (take(']')) return items;
    do {
      items.push_back(value(depth + 1));
      skip_space();
    } while (take(','));
    expect("]");
    return items;
  }

  Json::Value number() {
    const size_t begin = at_;
    take('-');
    const size_t digits = at_;
    while (is_digit()) ++at_;
    if (at_ == digits || (text_[digits] == '0' && at_ > digits + 1)) fail();
    bool whole = true;
    if (take('.')) {
      whole = false;
      if (!is_digit()) fail();
      while (is_digit()) ++at_;
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (!take('+')) take('-');
      if (!is_digit()) fail();
      while (is_digit()) ++at_;
    }
    const std::string token(text_.substr(begin, at_ - begin));
    if (whole) {
      errno = 0;
      const int64_t n = std::strtoll(token.c_str(), nullptr, 10);
      if (!errno) return n;
      errno = 0;
      const uint64_t large = std::strtoull(token.c_str(), nullptr, 10);
      if (errno || token[0] == '-') fail();
      return large;
    }
    std::istringstream in(token);  // strtod would obey the locale of the program
    in.imbue(std::locale::classic());
    double number = 0;
    if (!(in >> number)) fail();
    return number;
  }
  bool is_digit() const { return peek() >= '0' && peek() <= '9'; }

  std::string string() {
    std::string out;
    expect("\"");
    while (at_ < text_.size()) {
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail();
      if (c != '\\') {
        out += c;
        continue;
      }
      const size_t found = std::string_view("\"\\/bfnrtu").find(peek());
      if (at_ >= text_.size() || found == std::string::npos) fail();
      ++at_;
      if (found == 8) append_utf8(out, escaped_character());
      else out += "\"\\/\b\f\n\r\t"[found];
    }
    fail();
  }

  uint32_t four_digits() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail();
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    return code;
  }
  uint32_t escaped_character() {
    const uint32_t code = four_digits();
    if (code < 0xD800 || code >= 0xE000) return code;
    if (code >= 0xDC00 || text_.substr(at_, 2) != "\\u") fail();  // half of a pair
    at_ += 2;
    const uint32_t low = four_digits();
    if (low < 0xDC00 || low >= 0xE000) fail();
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  static void append_utf8(std::string& out, uint32_t code) {
    const auto add = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) return add(code);
    if (code < 0x800) {
      add(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        add(0xE0 | code >> 12);
      } else {
        add(0xF0 | code >> 18);
        add(0x80 | (code >> 12 & 0x3F));
      }
      add(0x80 | (code >> 6 & 0x3F));
    }
    add(0x80 | (code & 0x3F));
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

const Json* Json::find(std::string_view name) const {
  const Json* found = nullptr;
  if (const Object* members = as<Object>())
    for (const auto& [key, value] : *members)
      if (key == name) found = &value;
  return found;
}

}  // namespace mlf::image
