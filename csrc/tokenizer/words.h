// Cuts a text into the words that are merged on their own.
#pragma once

#include "table.h"
#include "utf8.h"

namespace mlf::tokenizer {

// The end of the word that begins at text[at] (at < text.size()), as the regular expressions of
// the model families cut; `text` ends where the expression would see its end. Every character
// belongs to a word. In order of preference:
//   gpt2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   llama3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
//           | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   qwen2   as llama3, with \p{N} for \p{N}{1,3}
size_t word_end(const Table& table, std::string_view text, size_t at);

// Call word(begin, end) for each word of the text, digits cut out first if the table says so.
template <class Use>
void for_each_word(const Table& table, std::string_view text, Use word) {
  const bool cut_digits = table.flag(Word::cut_digits);
  for (size_t at = 0; at < text.size();) {
    size_t end = text.size(), digit_nbytes = 0;
    if (cut_digits)
      for (end = at; end < text.size();) {
        const Character c = character_at(text, end);
        if (table.character_class(c.code) & kCutDigit) {
          digit_nbytes = c.nbytes;
          break;
        }
        end += c.nbytes;
      }
    const std::string_view part = text.substr(0, end);
    while (at < end) {
      const size_t next = word_end(table, part, at);
      word(at, next);
      at = next;
    }
    if (digit_nbytes) word(end, end + digit_nbytes);
    at = end + digit_nbytes;
  }
}

}  // namespace mlf::tokenizer
