#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "memory.h"
#include "threads.h"

namespace mlf {
namespace {

constexpr int64_t kBytes = int64_t{1} << 28;  // 256 MB: several times any last-level cache share
constexpr int kStreams = 4;                   // one stream leaves a core's line buffers half idle
constexpr int kPasses = 4;

uint64_t read_all(const uint64_t* words, int64_t count) {
  const int64_t part = count / kStreams;
  uint64_t sums[kStreams][8] = {};
  for (int64_t i = 0; i < part; i += 8)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < 8; ++j) sums[s][j] += words[s * part + i + j];
  uint64_t total = 0;
  for (auto& sum : sums)
    for (uint64_t word : sum) total += word;
  return total;
}

}  // namespace

double read_bandwidth(int threads) {
  const Pages memory = allocate_pages(kBytes);
  uint64_t* words = reinterpret_cast<uint64_t*>(memory.get());
  std::fill_n(words, kBytes / 8, 1);
  ThreadPool pool(threads);
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      const Share mine = share(kBytes / 4096, thread, threads);
      total += read_all(words + mine.begin * 512, (mine.end - mine.begin) * 512);
    });
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, kBytes / seconds);
  }
  // Using the sum keeps the reads: every word is 1, so a wrong total means a broken probe.
  return total == uint64_t{kPasses} * (kBytes / 8) ? best : 0;
}

}  // namespace mlf
