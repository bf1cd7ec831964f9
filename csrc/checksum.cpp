#include "checksum.h"

#include <cstring>
#include <vector>

#include "quant.h"
#include "threads.h"

namespace mlf {
namespace {

constexpr int64_t kBlock = 1 << 20;                      // bytes hashed on their own, then combined
constexpr int kLanes = 8;                                // independent chains: one 64-byte line
constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15ull;  // odd, so multiplying loses nothing

// One step of every chain is a bijection of its state, so a single changed word always shows.
uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kMultiplier;
  return state ^ (state >> 29);
}

uint64_t hash_block(const uint8_t* data, int64_t nbytes) {
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint64_t>(nbytes) + i;
  int64_t at = 0;
  for (; at + 8 * kLanes <= nbytes; at += 8 * kLanes) {
    uint64_t words[kLanes];
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  uint64_t hash = 0;
  for (uint64_t lane : lanes) hash = mix(hash, lane);
  for (; at < nbytes; ++at) hash = mix(hash, data[at]);
  return hash;
}

}  // namespace

uint64_t checksum(const uint8_t* data, int64_t nbytes, int threads) {
  const int64_t blocks = ceil_div(nbytes, kBlock);
  std::vector<uint64_t> hashes(blocks);
  ThreadPool pool(threads);
  pool.run([&](int thread) {
    const Share mine = share(blocks, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      const int64_t begin = block * kBlock, left = nbytes - begin;
      hashes[block] = hash_block(data + begin, left < kBlock ? left : kBlock);
    }
  });
  uint64_t hash = static_cast<uint64_t>(nbytes);
  for (uint64_t block : hashes) hash = mix(hash, block);
  return hash;
}

}  // namespace mlf
