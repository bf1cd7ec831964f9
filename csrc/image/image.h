// A packed image (.mlf) in memory: mobilellm_fast/image.py writes it and states its layout.
//
// Nothing in it is trusted. What does not agree with the configuration or the checksums is refused,
// so a checked image is safe to run.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../executor.h"
#include "../tokenizer/tokenizer.h"
#include "rope.h"

namespace mlf::image {

constexpr std::string_view kMagic = "MLFIMAGE";  // its first bytes

struct Image {
  Model model;  // points into the bytes of the image
  Rope rope;
  std::string name;
  int64_t context_length = 0;                       // most tokens of a sequence
  std::vector<int32_t> end_ids;                     // tokens that end a text
  std::unique_ptr<tokenizer::Tokenizer> tokenizer;  // null: it has none that C++ can read
};

// Read and check the image in `data`, aligned to 64 bytes, which must outlive the result; `threads`
// compute checksums. Throws std::invalid_argument, or std::bad_alloc.
Image read_image(const uint8_t* data, int64_t nbytes, int threads);

}  // namespace mlf::image
