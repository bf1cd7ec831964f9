// Text from tokens as they come: whole characters only.
#pragma once

#include <string>
#include <vector>

#include "tokenizer.h"

namespace mlf::tokenizer {

// The pieces join to the text of all tokens decoded together: mobilellm_fast/text_stream.py states
// the method, this is the same one for programs without Python.
class Detokenizer {
 public:
  // `context`: tokens that the text continues, so that a first word keeps the space before it. The
  // tokenizer must outlive the detokenizer.
  explicit Detokenizer(const Tokenizer& tokenizer, const std::vector<int32_t>& context = {});

  // Take the next token, return the text that is certain now.
  std::string push(int32_t id);
  // Return what was still held back, when no more tokens will come.
  std::string finish() const;

 private:
  std::string decode(const std::vector<int32_t>& ids) const;

  const Tokenizer& tokenizer_;
  // Tokens shown last, beginning with a whole character, then those not shown in full.
  std::vector<int32_t> window_;
  size_t shown_tokens_ = 0;
  size_t shown_characters_ = 0;
};

}  // namespace mlf::tokenizer
