// Where a decode step's weights come from, and what is fetched ahead of time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mlf {

// Bytes of the last-level cache that one core can fill; 0 if the system does not tell.
int64_t last_level_cache_nbytes();

// What the passes of one position of the schedule fetch while they compute.
struct Ahead {
  int block = -1;  // block to fetch, -1 for none
  int passes = 1;  // consecutive passes that share the work
  int pass = 0;    // which of them this position is
};

struct Plan {
  std::vector<Ahead> ahead;  // per position of the schedule
  int64_t memory_nbytes;     // predicted weight bytes per token from memory
  int64_t cache_nbytes;      // ... and from cache

  bool fetches_ahead() const {
    return std::any_of(ahead.begin(), ahead.end(), [](const Ahead& a) { return a.block >= 0; });
  }
};

// A block that runs several times in a row (layer sharing) needs memory once. If it and the next
// block fit the cache together, its passes share the work of fetching the next block, so that
// memory never rests; otherwise, and for schedules that never repeat a block at once, each layer
// just streams. `head_nbytes` is read once per token; `fetches` tells whether the kernels can fetch
// ahead.
Plan make_plan(const std::vector<int>& schedule, const std::vector<int64_t>& block_nbytes,
               int64_t head_nbytes, int64_t cache_nbytes, bool fetches);

}  // namespace mlf
