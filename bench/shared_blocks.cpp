// The least that layer sharing costs on a machine: reads of 30 blocks of 3.5 MB, once and twice in
// a row, and ways to fetch the next block meanwhile. Linux, GCC or Clang.
//   g++ -O3 -march=native -pthread bench/shared_blocks.cpp -o shared_blocks
//   ./shared_blocks THREADS MICROSECONDS
// MICROSECONDS of arithmetic go with each pass of each block: what a position does beside its
// weights.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLine = 64, kBlock = 3456 << 10, kBlocks = 30, kStreams = 4;
constexpr int kRounds = 41, kMatrices = 4;
constexpr int kParts[kMatrices] = {15, 9, 48, 24};  // of 96: queries to values, output, up, down
constexpr int kChain = 3;  // multiplications between two lines of arithmetic that fetches: 2 ns

int threads = 1;
double multiplications = 0;  // per microsecond
std::atomic<int> arrived{0};
std::atomic<uint32_t> passed{0};
using Line = uint8_t __attribute__((vector_size(kLine)));
thread_local Line sink;

double now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(time).count();
}

void barrier() {
  const uint32_t seen = passed.load();
  if (arrived.fetch_add(1) == threads - 1) {
    arrived.store(0);
    passed.fetch_add(1);
  }
  while (passed.load() == seen) {
  }
}

uint8_t* allocate(int64_t nbytes) {
  void* memory =
      mmap(nullptr, nbytes + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::exit(1);
  auto* begin = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + (2 << 20) - 1) &
                                           ~uintptr_t{(2 << 20) - 1});
  madvise(begin, nbytes, MADV_HUGEPAGE);
  std::memset(begin, 1, nbytes);
  return begin;
}

// What is fetched, line by line: through the first-level cache, which waits for a free buffer, or
// into the second-level cache, which drops the line if there is none.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  void first_level() {
    if (at < end) __builtin_prefetch(at, 0, 3), at += kLine;
  }
  void second_level() {
    if (at < end) __builtin_prefetch(at, 0, 2), at += kLine;
  }
};

// Read a matrix in four streams; for each line of all four fetch `Lines`.
template <int Lines>
void read(const uint8_t* matrix, int64_t nbytes, Ahead& ahead) {
  const int64_t length = nbytes / kStreams / kLine * kLine;
  Line sums[kStreams] = {sink, sink, sink, sink};
  for (int64_t i = 0; i < length; i += kLine) {
    for (int s = 0; s < kStreams; ++s)
      sums[s] += *reinterpret_cast<const Line*>(matrix + s * length + i);
    for (int line = 0; line < Lines; ++line) ahead.second_level();
  }
  sink = sums[0] + sums[1] + sums[2] + sums[3];
}

void multiply(int count, uint64_t& product) {
  for (int i = 0; i < count; ++i) {
    product *= product;
    asm volatile("" : "+r"(product));  // each for itself
  }
}

void compute(double microseconds, Ahead* ahead) {
  const int64_t steps = static_cast<int64_t>(microseconds * multiplications / kChain);
  uint64_t product = 3;
  for (int64_t i = 0; i < steps; ++i) {
    multiply(kChain, product);
    if (ahead) ahead->first_level();
  }
}

// One thread's share of all blocks, `passes` times each in a row.
template <int Lines>
void run(const uint8_t* memory, int thread, int passes, double microseconds, bool computing) {
  const int64_t share = kBlock / threads;
  for (int64_t block = 0; block < kBlocks; ++block) {
    const uint8_t* mine = memory + block * kBlock + thread * share;
    const uint8_t* next = memory + (block + 1) % kBlocks * kBlock + thread * share;
    Ahead ahead{next, next + share};
    for (int pass = 0; pass < passes; ++pass) {
      const uint8_t* matrix = mine;
      for (const int part : kParts) {
        const int64_t nbytes = share * part / 96 / kLine * kLine;
        read<Lines>(matrix, nbytes, ahead);
        matrix += nbytes;
        barrier();
        compute(microseconds / kMatrices, computing ? &ahead : nullptr);
      }
    }
  }
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: shared_blocks THREADS MICROSECONDS\n"), 2;
  threads = std::atoi(arguments[1]);
  const double microseconds = std::atof(arguments[2]);
  if (threads < 1 || microseconds < 0) return 2;
  uint64_t product = 3;
  const double begin = now();
  multiply(1 << 24, product);
  multiplications = (1 << 24) / (now() - begin);
  const uint8_t* memory = allocate(kBlocks * kBlock);
  struct Way {
    const char* name;
    std::function<void(int)> run;
    std::vector<double> times;
  };
  const auto way = [&](auto lines, int passes, bool computing) {
    return [=](int thread) {
      run<decltype(lines)::value>(memory, thread, passes, microseconds, computing);
    };
  };
  using None = std::integral_constant<int, 0>;
  using Quarter = std::integral_constant<int, 1>;
  using Half = std::integral_constant<int, 2>;
  Way ways[] = {
      {"once", way(None(), 1, false), {}},
      {"twice", way(None(), 2, false), {}},
      {"twice, half fetched by each pass", way(Half(), 2, false), {}},
      {"twice, fetched beside arithmetic alone", way(None(), 2, true), {}},
      {"twice, a quarter by each pass and beside arithmetic", way(Quarter(), 2, true), {}}};
  std::vector<std::thread> others;
  const auto all = [&](int thread) {
    for (int round = 0; round < kRounds; ++round)
      for (Way& each : ways) {
        barrier();
        const double started = now();
        each.run(thread);
        barrier();
        if (thread == 0) each.times.push_back((now() - started) / kBlocks);
      }
  };
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(all, thread);
  all(0);
  for (std::thread& other : others) other.join();
  std::printf("%d threads, %.0f us of arithmetic per pass; us per block, ratio to once\n", threads,
              microseconds);
  for (const Way& each : ways) {
    std::vector<double> ratios;
    for (int round = 0; round < kRounds; ++round)
      ratios.push_back(each.times[round] / ways[0].times[round]);
    std::printf("  %6.1f  %.3f  %s\n", median(each.times), median(ratios), each.name);
  }
}
