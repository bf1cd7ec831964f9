// Fetches weights while a thread waits for others: they are read after the barrier, and memory need
// not rest until then.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quant.h"

namespace mlf {

class IdleFetch {
 public:
  void clear() { streams_ = line_ = lines_ = 0; }

  // Tiles [begin, end) of a matrix will be read, in `streams` streams of equally many `unit`s of
  // tiles, as kernels/linear.h does for a single row.
  void add(const Weight& weight, int64_t begin, int64_t end, int64_t unit, int64_t streams) {
    const int64_t nbytes = tile_nbytes(weight.kind, weight.cols);
    const int64_t length = std::max((end - begin) / unit / streams, int64_t{1}) * unit;
    for (int64_t tile = begin; tile + length <= end && streams_ < kMaxStreams; tile += length)
      starts_[streams_++] = weight.data + tile * nbytes;
    lines_ = std::min(std::max(lines_, length * nbytes / kStepBytes), kMaxBytes / kStepBytes);
  }

  // Fetch the next line of each stream; return whether there are more.
  bool step() {
    if (line_ == lines_) return false;
    for (int i = 0; i < streams_; ++i) __builtin_prefetch(starts_[i] + line_ * kStepBytes, 0, 2);
    return ++line_ < lines_;
  }

 private:
  static constexpr int kMaxStreams = 4;
  // Of each stream: all of them are a small part of a second-level cache.
  static constexpr int64_t kMaxBytes = 32 << 10;

  const uint8_t* starts_[kMaxStreams];
  int streams_ = 0;
  int64_t line_ = 0, lines_ = 0;
};

}  // namespace mlf
