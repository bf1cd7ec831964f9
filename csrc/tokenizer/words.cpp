#include "words.h"

namespace mlf::tokenizer {
namespace {

constexpr uint8_t kOther = 0;  // neither letter, number nor white space

// Reads a text by the classes of its characters; beyond the end there is `ended`.
class Reader {
 public:
  Reader(const Table& table, std::string_view text) : table_(table), text_(text) {}

  bool ended(size_t at) const { return at >= text_.size(); }
  char byte(size_t at) const { return ended(at) ? '\0' : text_[at]; }
  uint8_t kind(size_t at, uint32_t& nbytes) const {
    const Character c = character_at(text_, at);
    nbytes = c.nbytes;
    return table_.character_class(c.code) & (kLetter | kNumber | kSpace);
  }
  bool is(size_t at, uint8_t wanted) const {
    uint32_t nbytes;
    return !ended(at) && kind(at, nbytes) == wanted;
  }
  // The end of the run of characters of one class, of at most `limit` characters.
  size_t run(size_t at, uint8_t wanted, size_t limit = SIZE_MAX) const {
    for (uint32_t nbytes; limit && !ended(at) && kind(at, nbytes) == wanted; at += nbytes) --limit;
    return at;
  }
  bool is_newline(size_t at) const { return byte(at) == '\r' || byte(at) == '\n'; }
  // The length of 's, 't, 're, 've, 'm, 'll or 'd, else 0.
  size_t contraction(size_t at, bool any_case) const {
    if (byte(at) != '\'') return 0;
    const auto letter = [&](size_t i) {
      const char c = byte(at + i);
      return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    };
    const char first = letter(1), second = letter(2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if ((first == 'r' || first == 'v') && second == 'e') return 3;
    if (first == 'l' && second == 'l') return 3;
    // The long s is an s in another case.
    return any_case && text_.substr(at + 1, 2) == "\xC5\xBF" ? 3 : 0;
  }

  // \s+(?!\S)|\s+ : white space, but for its last character where a word follows it.
  size_t blanks(size_t at) const {
    const size_t end = run(at, kSpace);
    if (end == at || ended(end)) return end;
    const size_t last = character_before(text_.substr(at, end - at), end - at) + at;
    return last > at ? last : end;
  }

 private:
  const Table& table_;
  std::string_view text_;
};

size_t gpt2_end(const Reader& r, size_t at) {
  if (const size_t n = r.contraction(at, false)) return at + n;
  const size_t begin = at + (r.byte(at) == ' ');
  for (const uint8_t wanted : {kLetter, kNumber, kOther})
    if (r.is(begin, wanted)) return r.run(begin, wanted);
  return r.blanks(at);
}

size_t llama3_end(const Reader& r, size_t at, size_t digits) {
  if (const size_t n = r.contraction(at, true)) return at + n;
  uint32_t nbytes;
  const uint8_t first = r.kind(at, nbytes);
  if (first == kLetter) return r.run(at, kLetter);
  if (first == kNumber) return r.run(at, kNumber, digits);
  if (!r.is_newline(at) && r.is(at + nbytes, kLetter)) return r.run(at + nbytes, kLetter);
  const size_t begin = at + (r.byte(at) == ' ');
  if (r.is(begin, kOther)) {
    size_t end = r.run(begin, kOther);
    while (r.is_newline(end)) ++end;
    return end;
  }
  // \s*[\r\n]+ : white space up to its last line end.
  for (size_t end = r.run(at, kSpace); end > at; --end)
    if (r.is_newline(end - 1)) return end;
  return r.blanks(at);
}

}  // namespace

size_t word_end(const Table& table, std::string_view text, size_t at) {
  const Reader reader(table, text);
  size_t end = text.size();
  switch (table.split()) {
    case Split::none:
      break;
    case Split::gpt2:
      end = gpt2_end(reader, at);
      break;
    case Split::llama3:
      end = llama3_end(reader, at, 3);
      break;
    case Split::qwen2:
      end = llama3_end(reader, at, 1);
      break;
  }
  // A damaged table may put a character into two classes at once; words must still advance.
  return end > at ? end : at + character_at(text, at).nbytes;
}

}  // namespace mlf::tokenizer
