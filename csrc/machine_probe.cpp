#include "machine_probe.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "memory.h"
#include "plan.h"
#include "threads.h"

namespace mlf {
namespace {

constexpr int64_t kMemoryBytes = int64_t{1} << 28;  // 256 MB: several times most last-level caches
constexpr int64_t kPage = 4096;
constexpr int kPasses = 4;
constexpr double kPassSeconds = 2e-3;  // long beside waking threads, short beside being preempted

template <class Body>
double seconds_of(Body body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Best rate of `work(repeats)`, which does `amount` per repeat, in passes of about kPassSeconds.
template <class Work>
double best_rate(double amount, Work work) {
  int64_t repeats = 1;
  double seconds = seconds_of([&] { work(repeats); });
  while (seconds < kPassSeconds && repeats < (int64_t{1} << 40)) {
    repeats *= 4;
    seconds = seconds_of([&] { work(repeats); });
  }
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass)
    best = std::max(best, amount * repeats / seconds_of([&] { work(repeats); }));
  return best;
}

// Reads `nbytes` (split over the threads, a multiple of a page each) `repeats` times.
double stream_rate(const KernelTable& kernels, int threads, int64_t nbytes) {
  const Pages memory = allocate_pages(nbytes);
  float* values = reinterpret_cast<float*>(memory.get());
  ThreadPool pool(threads);
  const auto part = [&](int thread) {
    const Share mine = share(nbytes / kPage, thread, threads);
    return Share{mine.begin * kPage / 4, mine.end * kPage / 4};
  };
  pool.run([&](int thread) {  // each page is first touched by the thread that will read it
    std::fill(values + part(thread).begin, values + part(thread).end, 1.0f);
  });
  std::atomic<bool> right{true};
  const double rate = best_rate(nbytes / kPage * kPage, [&](int64_t repeats) {
    pool.run([&](int thread) {
      const Share mine = part(thread);
      for (int64_t i = 0; i < repeats; ++i) {
        const double total = kernels.read_sum(values + mine.begin, mine.end - mine.begin);
        // Every value is 1, so a wrong sum means a broken probe; asking for it keeps the reads.
        if (total != static_cast<double>(mine.end - mine.begin)) right = false;
      }
    });
  });
  return right ? rate : 0;
}

// One pass of `peak` (a kernel that does rounds of operations) on all threads.
template <class Sink>
double peak_rate(int64_t (*peak)(int64_t, Sink*), int threads) {
  constexpr int64_t kRounds = 1000;
  ThreadPool pool(threads);
  Sink probe_sink;
  const double amount = 2.0 * threads * peak(kRounds, &probe_sink);
  return best_rate(amount, [&](int64_t repeats) {
    pool.run([&](int) {
      Sink sink;
      peak(repeats * kRounds, &sink);
    });
  });
}

}  // namespace

double read_bandwidth(const KernelTable& kernels, int threads) {
  return stream_rate(kernels, threads, std::max(kMemoryBytes, 4 * last_level_cache_nbytes()));
}

double cache_bandwidth(const KernelTable& kernels, int threads, int64_t nbytes_per_thread) {
  return stream_rate(kernels, threads, threads * round_up(nbytes_per_thread, kPage));
}

double int8_peak(const KernelTable& kernels, int threads) {
  return peak_rate(kernels.peak_dot, threads);
}

double fp32_peak(const KernelTable& kernels, int threads) {
  return peak_rate(kernels.peak_fma, threads);
}

double barrier_seconds(int threads) {
  ThreadPool pool(threads);
  return 1 / best_rate(1, [&](int64_t repeats) {
           pool.run([&](int) {
             for (int64_t i = 0; i < repeats; ++i) pool.barrier();
           });
         });
}

int64_t l2_cache_nbytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long nbytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (nbytes > 0) return nbytes;
#endif
  return int64_t{512} << 10;
}

}  // namespace mlf
