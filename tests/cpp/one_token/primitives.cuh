// What kernels/hopper/one_token/ uses of a GPU, on a CPU: ../cuda/scheduler.h runs the threads.
// CLUSTER programs that follow each other are a cluster, and KV_HEADS clusters a sequence.
//
// What goes on by itself there is as late here as it may be: copies come when they are waited for,
// what is sent to another program while somebody waits, in any order. Lengths are others before
// the kernel before has ended, and nothing else may be read until then. Programs that end while
// something is sent to them, and prefetches of what nobody reads, are misuse.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "../cuda/tiles.h"

#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef KV_HEADS
#define KV_HEADS 1
#endif

using Barrier = unsigned long long;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Counted {
  bool made = false, expects = false;
  int nbytes = 0;  // still to come
};
struct Copy {
  void* to;
  const void* from;
};
using Groups = std::deque<std::vector<Copy>>;  // the last one open
struct Store {
  int program;
  char* to;
  float4 value;
};
struct Machine {
  explicit Machine(int programs = 0, unsigned seed = 0)
      : random(seed),
        seed(seed),
        programs(programs),
        ended(static_cast<size_t>(programs) * THREADS),
        copies(ended.size(), Groups(1)),
        memory(static_cast<size_t>(programs)),
        barriers(static_cast<size_t>(programs)),
        started(static_cast<size_t>(programs)),
        has_started(static_cast<size_t>(programs) * THREADS),
        synced(static_cast<size_t>(programs)) {}
  const char* left() const {
    if (!stores.empty()) return "what was sent to them came";
    // lengths are known from the beginning with seed 0 alone
    const bool all = std::includes(read.begin(), read.end(), prefetched.begin(), prefetched.end());
    return seed || all ? nullptr : "anybody read what was prefetched";
  }
  emulator::Random random;
  unsigned seed;
  int programs;
  std::vector<char> ended;     // of each thread: whether it knows that the kernel before has
  std::vector<Groups> copies;  // of each thread
  std::vector<char*> memory;   // of each program, shared
  std::vector<Counted> barriers;
  std::vector<int> started;                // threads of each cluster
  std::vector<char> has_started;           // of each thread: whether it is among them
  std::vector<int> synced;                 // threads of each program
  std::vector<Store> stores;               // sent, but not there yet
  std::set<const char*> prefetched, read;  // pieces of 16 bytes
};
static Machine machine;

DEVICE void changed(Site site) { emulator::scheduler->changed(site); }
DEVICE void check(bool right, const char* otherwise, Site site) {
  if (!right) emulator::scheduler->fail(site, otherwise);
}
DEVICE size_t thread_of_all() {
  return static_cast<size_t>(fiber().program) * THREADS + fiber().thread;
}
DEVICE char& ended() { return machine.ended[thread_of_all()]; }
DEVICE void check_access(const void* place, unsigned nbytes, Site site) {
  check(ended(), "does not wait for the kernel before", site);
  check(reinterpret_cast<uintptr_t>(place) % nbytes == 0, "address is not aligned", site);
}

DEVICE int thread_index() { return fiber().thread; }
DEVICE int program_index() { return fiber().program; }
DEVICE int programs() { return machine.programs; }
DEVICE int cluster_rank() { return fiber().program % CLUSTER; }
DEVICE int kv_head_index() { return fiber().program / CLUSTER % KV_HEADS; }
DEVICE int batch_index() { return fiber().program / CLUSTER / KV_HEADS; }
DEVICE void let_next_start() {}
DEVICE void wait_for_previous() { ended() = 1; }

template <class T>
DEVICE T& shared_memory(Site site = Site::here()) {
  check(sizeof(T) <= emulator::scheduler->shared_nbytes, "has less shared memory", site);
  char*& memory = machine.memory[fiber().program];
  memory = emulator::scheduler->program().shared_memory;
  return *reinterpret_cast<T*>(memory);
}
DEVICE void sync_warp(Site site = Site::here()) { emulator::scheduler->shuffle(0, 0, site); }
DEVICE void sync_program(Site site = Site::here()) {
  int& arrived = machine.synced[fiber().program];
  const int all = (arrived / THREADS + 1) * THREADS;
  ++arrived;
  changed(site);
  while (arrived < all) emulator::scheduler->pass(site);
}
DEVICE void started_in_cluster(Site site = Site::here()) {
  sync_warp(site);
  machine.has_started[thread_of_all()] = 1;
  ++machine.started[fiber().program / CLUSTER];
  changed(site);
}
DEVICE void wait_for_cluster(Site site = Site::here()) {
  while (machine.started[fiber().program / CLUSTER] < CLUSTER * THREADS) {
    emulator::scheduler->pass(site);
  }
}

DEVICE void init_barrier(Barrier*, Site site = Site::here()) {
  check(!machine.has_started[thread_of_all()], "has said before that this is made", site);
  machine.barriers[fiber().program].made = true;
}
DEVICE void expect_bytes(Barrier*, int nbytes, Site site = Site::here()) {
  Counted& barrier = machine.barriers[fiber().program];
  check(barrier.made && !barrier.expects, "expects bytes twice", site);
  barrier.expects = true;
  barrier.nbytes += nbytes;
  changed(site);
}
DEVICE void store_counted(float4* place, Barrier*, int rank, float4 value,
                          Site site = Site::here()) {
  const int to = fiber().program / CLUSTER * CLUSTER + rank;
  check(rank >= 0 && rank < CLUSTER && machine.barriers[to].made, "sends to nobody", site);
  const auto offset = reinterpret_cast<char*>(place) - machine.memory[fiber().program];
  check(offset >= 0 && offset % 16 == 0 && offset + 16 <= emulator::scheduler->shared_nbytes,
        "sends to no place of shared memory", site);
  machine.stores.push_back({to, machine.memory[to] + offset, value});
}
DEVICE void wait_for_bytes(Barrier*, Site site = Site::here()) {
  Counted& barrier = machine.barriers[fiber().program];
  auto& stores = machine.stores;
  while (!barrier.expects || barrier.nbytes) {
    if (stores.empty() || machine.random.below(4)) {
      emulator::scheduler->pass(site);
      continue;
    }
    for (unsigned i = 0; i < 64 && !stores.empty(); ++i) {
      std::swap(stores[machine.random.below(static_cast<unsigned>(stores.size()))], stores.back());
      const Store store = stores.back();
      stores.pop_back();
      const bool waits = !emulator::scheduler->has_ended(store.program);
      check(waits, "a program ended before this came to it", site);
      std::memcpy(store.to, &store.value, sizeof store.value);
      machine.barriers[store.program].nbytes -= static_cast<int>(sizeof store.value);
    }
    changed(site);
  }
}

DEVICE int load_length(const int* place) {
  if (ended() || !machine.seed) return *place;
  return static_cast<int>(machine.random.below(static_cast<unsigned>(*place) * 2 + 70)) - 3;
}
DEVICE uint4 load_16(const void* place, bool live, Site site = Site::here()) {
  uint4 v = {0, 0, 0, 0};
  if (live) {
    check_access(place, 16, site);
    std::memcpy(&v, place, 16);
    machine.read.insert(static_cast<const char*>(place));
  }
  return v;
}
DEVICE void store_8(void* place, unsigned low, unsigned high, Site site = Site::here()) {
  check_access(place, 8, site);
  const unsigned words[2] = {low, high};
  std::memcpy(place, words, 8);
}
DEVICE void prefetch_line(const void* place) {
  machine.prefetched.insert(static_cast<const char*>(place));
}
DEVICE void prefetch_bytes(const void* place, int nbytes, Site site = Site::here()) {
  check(reinterpret_cast<uintptr_t>(place) % 16 == 0 && nbytes > 0 && nbytes % 16 == 0,
        "prefetches no multiple of 16 bytes", site);
  for (int i = 0; i < nbytes; i += 16) prefetch_line(static_cast<const char*>(place) + i);
}

// Copies happen when they are waited for; until then their place holds NaN.
DEVICE void copy_16_later(void* to, const void* from, Site site = Site::here()) {
  check_access(from, 16, site);
  const auto offset = static_cast<char*>(to) - machine.memory[fiber().program];
  check(offset >= 0 && offset % 16 == 0 && offset + 16 <= emulator::scheduler->shared_nbytes,
        "copies to no place of shared memory", site);
  std::memset(to, 0xff, 16);
  machine.copies[thread_of_all()].back().push_back({to, from});
  machine.read.insert(static_cast<const char*>(from));
}
DEVICE void close_copies() { machine.copies[thread_of_all()].emplace_back(); }
template <int LEFT>
DEVICE void wait_for_copies() {
  auto& groups = machine.copies[thread_of_all()];
  for (; groups.size() > LEFT + 1u; groups.pop_front()) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
  }
}
DEVICE uint4 read_copied(const void* place) {
  uint4 v;
  std::memcpy(&v, place, sizeof v);
  return v;
}

DEVICE void publish(float4* place, float4 value, Site site = Site::here()) {
  check_access(place, 16, site);
  uint2 words[2];
  std::memcpy(words, &value, sizeof value);
  for (int i = 0; i < 2; ++i) {
    emulator::scheduler->store(reinterpret_cast<uint2*>(place) + i, words[i], site);
  }
}
DEVICE float4 read_published(const float4* place, Site site = Site::here()) {
  uint2 words[2];
  for (int i = 0; i < 2; ++i) {
    words[i] = emulator::scheduler->load(reinterpret_cast<const uint2*>(place) + i, site);
  }
  float4 value;
  std::memcpy(&value, words, sizeof value);
  return value;
}
DEVICE int arrive_at(int* counter, Site site = Site::here()) {
  check_access(counter, 4, site);
  const int before = *counter;
  emulator::scheduler->arrive(reinterpret_cast<unsigned*>(counter), site);
  return before;
}

DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE int float_bits(float x) { return static_cast<int>(as_bits(x)); }
DEVICE float bits_float(int bits) { return as_float(static_cast<unsigned>(bits)); }
DEVICE int shuffle_xor(int value, int mask, Site site = Site::here()) {
  return static_cast<int>(emulator::scheduler->shuffle(static_cast<unsigned>(value), mask, site));
}
DEVICE float shuffle_xor(float value, int mask, Site site = Site::here()) {
  return bits_float(shuffle_xor(float_bits(value), mask, site));
}
struct Request {
  int value, lane;
};
DEVICE void exchange(void* const* lanes) {
  int values[32];
  for (int i = 0; i < 32; ++i) values[i] = static_cast<Request*>(lanes[i])->value;
  for (int i = 0; i < 32; ++i) {
    auto* mine = static_cast<Request*>(lanes[i]);
    mine->value = values[mine->lane];
  }
}
DEVICE int shuffle_from(int value, int lane, Site site = Site::here()) {
  Request mine = {value, lane};
  emulator::scheduler->together(&mine, exchange, site);
  return mine.value;
}
DEVICE float shuffle_from(float value, int lane, Site site = Site::here()) {
  return bits_float(shuffle_from(float_bits(value), lane, site));
}

static_assert(HALF_IS_BF16, "float16 is not emulated");
DEVICE float low_half(unsigned v) { return bf16_of(v, 0); }
DEVICE float high_half(unsigned v) { return bf16_of(v, 1); }
DEVICE unsigned to_halves(float low, float high) { return pack_bf16(low, high); }

DEVICE unsigned high_product(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
DEVICE float larger(float a, float b) { return std::fmax(a, b); }
DEVICE float exp2_(float x) { return std::exp2(x); }
DEVICE float log_(float x) { return std::log(x); }
