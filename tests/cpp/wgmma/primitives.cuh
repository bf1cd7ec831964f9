// What kernels/hopper/wgmma/ uses of a GPU, on a CPU: ../cuda/scheduler.h runs the threads; two
// programs that follow each other are a cluster.
//
// What goes on by itself there is as late here as it may be: copies come while somebody waits for
// them, in any order; products and stores read shared memory when their thread waits for them; and
// the copy engine sees what a thread wrote once that is shown to it.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "../cuda/tiles.h"

// As the test writes it: a row-major matrix, and boxes of it.
struct alignas(64) TensorMap {
  unsigned long long address, rows, cols, box_rows, box_cols, nbytes, unused[10];
};

using TileAddress = unsigned long long;
constexpr unsigned kStart = 48;  // of shared memory, which the kernel has to align itself

struct Barrier {
  int arrivals = 0, missing = 0, nbytes = 0;
  unsigned phase = 0;

  void check() {
    if (missing == 0 && nbytes == 0) ++phase, missing = arrivals;
  }
};
struct Load {
  int program, programs;  // the first that it goes to, and how many
  unsigned to, barrier;
  const TensorMap* map;
  int row, col;
};
struct Product {
  void* sums;
  TileAddress left, right;
  bool add;
};
struct Store {
  const TensorMap* map;
  int row, col;
  unsigned from;
};
struct Thread {
  std::vector<std::vector<Product>> products{{}};  // in groups, the last one open
  std::vector<Store> stores;
  std::vector<std::pair<unsigned, unsigned>> hidden;  // that the copy engine does not see yet
};
struct Meeting {  // of threads that wait for each other
  unsigned arrived = 0, times = 0;
};
struct Machine {
  explicit Machine(int programs = 0, unsigned seed = 0)
      : random(seed), threads(static_cast<size_t>(programs) * THREADS) {}
  const char* left() const { return loads.empty() ? nullptr : "loads came"; }
  emulator::Random random;
  std::map<std::pair<int, unsigned>, Barrier> barriers;
  std::map<std::pair<int, int>, Meeting> meetings;
  std::vector<Load> loads;
  std::vector<Thread> threads;
};
static Machine machine;

DEVICE Thread& self() {
  return machine.threads[static_cast<size_t>(fiber().program) * THREADS + fiber().thread];
}
DEVICE void changed(Site site) { emulator::scheduler->changed(site); }

DEVICE int thread_index() { return fiber().thread; }
DEVICE int program_index() { return fiber().program; }
DEVICE int programs() { return static_cast<int>(machine.threads.size() / THREADS); }
DEVICE int cluster_rank() { return fiber().program % 2; }
DEVICE unsigned dynamic_shared() { return kStart; }

static char* memory_of_program[64];
DEVICE Barrier& barrier_at(int program, unsigned address) {
  if (emulator::scheduler->has_ended(program)) {
    emulator::scheduler->fail(emulator::kMisuse, "or later: uses a program that has ended");
  }
  return machine.barriers[{program, address}];
}
DEVICE char* shared_at(int program, unsigned address, unsigned nbytes) {
  if (address < kStart || address - kStart + nbytes > emulator::scheduler->shared_nbytes) {
    emulator::scheduler->fail(emulator::kMisuse, "or later: outside of shared memory");
  }
  return memory_of_program[program] + address - kStart;
}
// Where 16-byte pieces of rows of 128 bytes lie.
DEVICE unsigned swizzled(unsigned address) { return address ^ ((address >> 7 & 7) << 4); }

DEVICE void meet(std::pair<int, int> key, unsigned threads, Site site) {
  Meeting& meeting = machine.meetings[key];
  const unsigned times = meeting.times;
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.times;
  changed(site);
  while (meeting.times == times) emulator::scheduler->pass(site);
}
DEVICE void sync_warp(Site site = Site::here()) { emulator::scheduler->shuffle(0, 0, site); }
DEVICE void sync_cluster(Site site = Site::here()) {
  memory_of_program[fiber().program] = emulator::scheduler->program().shared_memory;
  meet({fiber().program / 2, -1}, 2 * THREADS, site);
}
DEVICE void sync_group(int group, Site site = Site::here()) {
  meet({fiber().program, group}, 128, site);
}
DEVICE void let_next_start() {}
DEVICE void wait_for_previous() {}
DEVICE void keep_few_registers() {}
DEVICE void take_many_registers() {}

DEVICE void init_barrier(unsigned barrier, int arrivals) {
  machine.barriers[{fiber().program, barrier}] = {arrivals, arrivals};
}
DEVICE void barriers_are_made() {}

// Have one of the loads that are under way come.
DEVICE void one_comes() {
  const size_t i = machine.random.below(static_cast<unsigned>(machine.loads.size()));
  const Load load = machine.loads[i];
  machine.loads.erase(machine.loads.begin() + static_cast<long>(i));
  const TensorMap& map = *load.map;
  const auto from = reinterpret_cast<const char*>(map.address);
  const unsigned width = static_cast<unsigned>(map.box_cols * map.nbytes);
  for (int p = load.program; p < load.program + load.programs; ++p) {
    for (unsigned r = 0; r < map.box_rows; ++r) {
      for (unsigned c = 0; c < width; ++c) {
        const auto row = load.row + static_cast<long long>(r);
        const auto col = static_cast<long long>(load.col * map.nbytes) + c;
        const bool inside = row < static_cast<long long>(map.rows) &&
                            col < static_cast<long long>(map.cols * map.nbytes);
        *shared_at(p, swizzled(load.to + r * width + c), 1) =
            inside ? from[row * static_cast<long long>(map.cols * map.nbytes) + col] : 0;
      }
    }
    Barrier& barrier = barrier_at(p, load.barrier);
    barrier.nbytes -= static_cast<int>(map.box_rows * width);
    barrier.check();
  }
}
DEVICE void wait_for_phase(unsigned at, unsigned parity, Site site = Site::here()) {
  Barrier& barrier = barrier_at(fiber().program, at);
  while ((barrier.phase & 1) == parity) {
    if (!machine.loads.empty() && machine.random.below(4) == 0) {
      one_comes();
      changed(site);
    } else {
      emulator::scheduler->pass(site);
    }
  }
}
DEVICE void arrive_expecting(unsigned at, int nbytes, Site site = Site::here()) {
  Barrier& barrier = barrier_at(fiber().program, at);
  barrier.nbytes += nbytes, --barrier.missing;
  barrier.check();
  changed(site);
}
DEVICE void arrive_at(unsigned at, int rank, Site site = Site::here()) {
  Barrier& barrier = barrier_at(fiber().program / 2 * 2 + rank, at);
  --barrier.missing;
  barrier.check();
  changed(site);
}
DEVICE void load(unsigned to, const TensorMap& map, int row, int col, unsigned barrier) {
  machine.loads.push_back({fiber().program, 1, to, barrier, &map, row, col});
}
DEVICE void load_for_both(unsigned to, const TensorMap& map, int row, int col, unsigned barrier) {
  machine.loads.push_back({fiber().program / 2 * 2, 2, to, barrier, &map, row, col});
}

DEVICE void put(unsigned to, unsigned value) { self().hidden.push_back({to, value}); }
DEVICE void show_to_copy_engine() {
  for (const auto& [to, value] : self().hidden) {
    std::memcpy(shared_at(fiber().program, to, 4), &value, 4);
  }
  self().hidden.clear();
}
DEVICE void store(const TensorMap& map, int row, int col, unsigned from) {
  self().stores.push_back({&map, row, col, from});
}
DEVICE void close_stores() {}
DEVICE void wait_for_stores_to_read(Site site = Site::here()) {
  changed(site);
  for (const Store& each : self().stores) {
    const TensorMap& map = *each.map;
    const auto to = reinterpret_cast<char*>(map.address);
    const auto width = map.box_cols * map.nbytes;
    for (unsigned r = 0; r < map.box_rows && each.row + r < map.rows; ++r) {
      for (unsigned c = 0; c < width; ++c) {
        const auto col = each.col * map.nbytes + c;
        if (col >= map.cols * map.nbytes) break;
        const unsigned at = each.from + static_cast<unsigned>(r * width + c);
        to[(each.row + r) * map.cols * map.nbytes + col] =
            *shared_at(fiber().program, swizzled(at), 1);
      }
    }
  }
  self().stores.clear();
}

DEVICE float half_at(unsigned address) {
  unsigned short bits;
  std::memcpy(&bits, shared_at(fiber().program, swizzled(address), 2), 2);
  return bf16_of(bits, 0);
}
DEVICE int code_at(unsigned address) {
  return static_cast<signed char>(*shared_at(fiber().program, swizzled(address), 1));
}
// A thread's part of a product of 64 rows with 32 bytes of inputs.
DEVICE void finish(const Product& product) {
  const int lane = fiber().thread % 32, first = fiber().thread / 32 % 4 * 16 + lane / 4;
  const unsigned left = static_cast<unsigned>(product.left) * 16;
  const unsigned right = static_cast<unsigned>(product.right) * 16;
#if INT8
  constexpr int kSums = 96, kNbytes = 1;
  int* sums = static_cast<int*>(product.sums);
#else
  constexpr int kSums = 128, kNbytes = 2;
  float* sums = static_cast<float*>(product.sums);
#endif
  for (int i = 0; i < kSums; ++i) {
    const unsigned row = static_cast<unsigned>(first + i / 2 % 2 * 8) * 128;
    const unsigned col = static_cast<unsigned>(i / 4 * 8 + lane % 4 * 2 + i % 2) * 128;
    auto sum = product.add ? sums[i] : 0;
    for (unsigned k = 0; k < 32; k += kNbytes) {
#if INT8
      sum += code_at(left + row + k) * code_at(right + col + k);
#else
      sum += half_at(left + row + k) * half_at(right + col + k);
#endif
    }
    sums[i] = sum;
  }
}
DEVICE TileAddress tile_at(unsigned address) {
  if (address % 1024 && (address - kStart) % 16) {
    emulator::scheduler->fail(emulator::kMisuse, "or later: a factor is not aligned");
  }
  return address / 16;
}
template <class T, int N>
void multiply(T (&sums)[N], TileAddress left, TileAddress right, bool add) {
  self().products.back().push_back({sums, left, right, add});
}
DEVICE void open_products() {}
DEVICE void close_products() { self().products.emplace_back(); }
template <int LEFT>
void wait_for_products(Site site = Site::here()) {
  emulator::scheduler->pass(site);
  auto& groups = self().products;
  while (groups.size() > LEFT + 1) {
    for (const Product& product : groups.front()) finish(product);
    groups.erase(groups.begin());
  }
  emulator::scheduler->shuffle(0, 0, site);  // lanes wait as one
}
template <class T, int N>
void hold(T (&)[N]) {}

DEVICE float read(const float* place) { return *place; }
DEVICE float2 read_pair(const float* place) { return {place[0], place[1]}; }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE float to_float(int number) { return static_cast<float>(number); }
DEVICE float multiply_rounded(float a, float b) { return a * b; }
DEVICE float fast_exp(float x) { return std::exp(x); }
DEVICE float fast_quotient(float a, float b) { return a / b; }
static_assert(HALF_IS_BF16, "float16 is not emulated");
DEVICE unsigned to_halves(float low, float high) { return pack_bf16(low, high); }
