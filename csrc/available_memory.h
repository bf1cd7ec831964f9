// How much memory is left.
#pragma once

#include <cstdint>
#include <string>

namespace mlf {

// Bytes that the system, and every control group that this process is in, could still give to it.
// What caches files counts as left: it is taken back where somebody wants it. The largest number
// where nobody tells. Files are looked for under `root`.
int64_t available_nbytes(const std::string& root = "");

}  // namespace mlf
