#include "detokenizer.h"

#include "utf8.h"

namespace mlf::tokenizer {
namespace {

constexpr size_t kContextTokens = 16;  // as CONTEXT_TOKENS in text_stream.py

bool ends_open(std::string_view text) {
  return text.size() >= kReplacementUtf8.size() &&
         text.substr(text.size() - kReplacementUtf8.size()) == kReplacementUtf8;
}

size_t count_characters(std::string_view text) {
  size_t count = 0;
  for (const char c : text) count += (static_cast<uint8_t>(c) & 0xC0) != 0x80;
  return count;
}

// A valid text without its first characters.
std::string after(std::string_view text, size_t characters) {
  size_t at = 0;
  while (characters-- && at < text.size()) at += character_at(text, at).nbytes;
  return std::string(text.substr(at));
}

}  // namespace

Detokenizer::Detokenizer(const Tokenizer& tokenizer, const std::vector<int32_t>& context)
    : tokenizer_(tokenizer) {
  for (size_t length = 1; length <= context.size() && length <= kContextTokens; ++length) {
    const std::vector<int32_t> last(context.end() - length, context.end());
    const std::string text = decode(last);
    if (text.empty() || text.find(kReplacementUtf8) != std::string::npos) continue;
    window_ = last;
    shown_tokens_ = length;
    shown_characters_ = count_characters(text);
    return;
  }
}

std::string Detokenizer::push(int32_t id) {
  window_.push_back(id);
  const std::string text = decode(window_);
  std::string_view certain = text;
  while (ends_open(certain)) certain.remove_suffix(kReplacementUtf8.size());
  const std::string shown = after(certain, shown_characters_);
  shown_characters_ += count_characters(shown);
  // Where no character is open the window moves on, unless to invisible tokens only: they would
  // make the next word the first of its text.
  if (!shown.empty() && !ends_open(text)) {
    window_.erase(window_.begin(), window_.begin() + shown_tokens_);
    shown_tokens_ = window_.size();
    shown_characters_ = count_characters(decode(window_));
  }
  return shown;
}

std::string Detokenizer::finish() const { return after(decode(window_), shown_characters_); }

std::string Detokenizer::decode(const std::vector<int32_t>& ids) const {
  return tokenizer_.decode(ids.data(), ids.size(), true);
}

}  // namespace mlf::tokenizer
