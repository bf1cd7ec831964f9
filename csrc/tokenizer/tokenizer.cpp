#include "tokenizer.h"

#include <stdexcept>

#include "merging.h"
#include "utf8.h"
#include "words.h"

namespace mlf::tokenizer {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581: how SentencePiece writes a space

// Append `text` with spaces for marks. The table writes tokens in this form, too.
void append_unmarked(std::string& out, std::string_view text) {
  for (size_t begin = 0;;) {
    const size_t mark = text.find(kSpaceMark, begin);
    out += text.substr(begin, mark - begin);
    if (mark == std::string_view::npos) return;
    out += ' ';
    begin = mark + kSpaceMark.size();
  }
}

void append(std::vector<int32_t>& ids, const View<uint32_t>& more) {
  for (size_t i = 0; i < more.size(); ++i) ids.push_back(static_cast<int32_t>(more[i]));
}

}  // namespace

Tokenizer::Tokenizer(const uint8_t* data, size_t nbytes)
    : table_(data, nbytes), added_(table_, false), added_to_normalized_(table_, true) {}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  if (text.size() >= size_t{1} << 30) throw std::length_error("text must be shorter than 1 GB");
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 4 + 8);
  if (add_special_tokens) append(ids, table_.prefix());
  Merger merger(table_);
  std::string normalized;
  const auto encode_part = [&](std::string_view part) {
    for_each_word(table_, part, [&](size_t begin, size_t end) {
      merger.encode(part.substr(begin, end - begin), ids);
    });
  };
  added_.split(text, [&](size_t begin, size_t end, uint32_t id) {
    if (id != kNone) {
      ids.push_back(static_cast<int32_t>(id));
      return;
    }
    std::string_view part = text.substr(begin, end - begin);
    if (table_.family() != Family::byte_level) {
      normalized.clear();
      append_unmarked(normalized, part);
      if (adds_space(normalized, begin == 0)) normalized.insert(normalized.begin(), ' ');
      part = normalized;
    }
    added_to_normalized_.split(part, [&](size_t from, size_t to, uint32_t inner) {
      if (inner != kNone) ids.push_back(static_cast<int32_t>(inner));
      else encode_part(part.substr(from, to - from));
    });
  });
  if (add_special_tokens) append(ids, table_.suffix());
  return ids;
}

bool Tokenizer::adds_space(std::string_view part, bool begins_text) const {
  if (part.empty() || (table_.flag(Word::prepend_unless_space) && part[0] == ' ')) return false;
  return table_.prepend() == Prepend::always || (table_.prepend() == Prepend::first && begins_text);
}

std::string Tokenizer::decode(const int32_t* ids, size_t count, bool skip_special_tokens) const {
  const bool runs = table_.flag(Word::decode_byte_runs);
  std::string text, run;
  const auto end_run = [&] {
    if (is_valid_utf8(run)) text += run;
    else
      for (size_t i = 0; i < run.size(); ++i) text += kReplacementUtf8;
    run.clear();
  };
  for (size_t i = 0; i < count; ++i) {
    const uint32_t id = static_cast<uint32_t>(ids[i]);
    if (id >= table_.vocab_size()) continue;
    const uint8_t flags = table_.token_flags(id);
    if (skip_special_tokens && flags & kSpecial) continue;
    if (runs && flags & kByte) {
      run += table_.token(id);
      continue;
    }
    if (!run.empty()) end_run();
    text += table_.token(id);
  }
  if (!run.empty()) end_run();
  if (table_.flag(Word::decode_strip_space) && !text.empty() && text[0] == ' ') text.erase(0, 1);
  return to_valid_utf8(text);
}

std::string_view Tokenizer::bytes_of(int32_t id) const {
  const uint32_t index = static_cast<uint32_t>(id);
  return index < table_.vocab_size() ? table_.token(index) : std::string_view();
}

uint32_t Tokenizer::id_of(std::string_view bytes) const {
  const View<Added> added = table_.added();
  for (size_t i = 0; i < added.size(); ++i)
    if (table_.added_text(added[i]) == bytes) return added[i].id;
  const uint32_t id = table_.find(bytes);
  if (id != kNone || bytes.size() != 1) return id;
  return table_.byte_id(static_cast<uint8_t>(bytes[0]));
}

}  // namespace mlf::tokenizer
