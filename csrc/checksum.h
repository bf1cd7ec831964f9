// A checksum as fast as memory, to tell a whole file from a damaged one.
#pragma once

#include <cstdint>

namespace mlf {

// 64 bits that any one changed word changes for certain, and other damage all but certainly. Not
// cryptographic. The result does not
// depend on the thread count.
uint64_t checksum(const uint8_t* data, int64_t nbytes, int threads);

}  // namespace mlf
