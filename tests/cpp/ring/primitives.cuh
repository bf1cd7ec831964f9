// What the kernels of kernels/ring/ use of a GPU, on a CPU: ../cuda/scheduler.h runs the threads,
// copies.h has what copies do to shared memory.
#pragma once

#include <cmath>
#include <vector>

#include "../cuda/tiles.h"
#include "copies.h"

struct Machine {
  explicit Machine(int programs = 0, unsigned seed = 0)
      : random(seed), copies(static_cast<size_t>(programs)) {}
  const char* left() const {
    for (const emulator::Copies& each : copies) {
      if (!each.empty()) return "copies came that they had started";
    }
    return nullptr;
  }
  emulator::Random random;
  std::vector<emulator::Copies> copies;  // of each program
};
static Machine machine;

DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Numbers

DEVICE unsigned byte_perm(unsigned a, unsigned b, unsigned selector) {
  if (selector & ~0x7777u) {  // what __byte_perm does with those is nowhere said
    emulator::scheduler->fail(emulator::kMisuse, "or later: byte_perm selects bytes 0..7");
  }
  uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}

// What is larger than the largest becomes that.
DEVICE unsigned pack_fp16(float first, float second) {
  auto finite = [](float value) {
    constexpr float kLargest = 65504;
    return value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  };
  return float_to_half(finite(first)) | static_cast<unsigned>(float_to_half(finite(second))) << 16;
}

DEVICE float fma_(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float exp_(float x) { return std::exp(x); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE float log_(float x) { return std::log(x); }
DEVICE float exp2_(float x) { return std::exp2(x); }
DEVICE float log2_(float x) { return std::log2(x); }
DEVICE float rsqrt_(float x) { return 1.0f / std::sqrt(x); }
DEVICE unsigned mul_high(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
DEVICE long long clock_ns() { return 0; }
DEVICE void forget(int&) {}
DEVICE void have_ready(unsigned (&)[4], bool) {}

// Threads

DEVICE int thread_id() { return fiber().thread; }
DEVICE int program_id() { return fiber().program; }

DEVICE emulator::Copies& copies() { return machine.copies[fiber().program]; }

template <int THREADS_>
DEVICE void sync_threads(Site site = Site::here()) {
  emulator::scheduler->join_barrier(THREADS_, site, &copies().observer(), emulator::meet);
}

DEVICE void sync_program(Site site = Site::here()) { sync_threads<THREADS>(site); }

DEVICE void sync_warp(Site site = Site::here()) {
  emulator::scheduler->together(
      &copies().observer(), [](void* const* lanes) { emulator::meet(lanes, 32); }, site);
}

using emulator::Barrier;

DEVICE void init_barrier(Barrier& barrier, int count, Site site = Site::here()) {
  copies().make(barrier, count, site);
}
DEVICE void publish_barriers() { copies().observer().fence(); }
DEVICE void fence_copies() { copies().observer().fence(); }

DEVICE void arrive(Barrier& barrier, Site site = Site::here()) {
  copies().arrive(barrier, 0, site);
}

DEVICE void arrive_expecting(Barrier& barrier, int nbytes, Site site = Site::here()) {
  copies().arrive(barrier, nbytes, site);
}

DEVICE void wait_for(Barrier& barrier, unsigned parity, Site site = Site::here()) {
  copies().wait(barrier, parity, machine.random, site);
}

DEVICE void copy_bulk(void* to, const void* from, int nbytes, Barrier& barrier,
                      Site site = Site::here()) {
  copies().start(to, from, nbytes, barrier, site);
}

DEVICE void copy_bulk(void* to, const void* from, int nbytes, Barrier& barrier, bool,
                      Site site = Site::here()) {
  copy_bulk(to, from, nbytes, barrier, site);
}

DEVICE unsigned shuffle_xor(unsigned v, int mask, Site site = Site::here()) {
  return emulator::scheduler->shuffle(v, mask, site);
}

DEVICE float shuffle_xor(float v, int mask, Site site = Site::here()) {
  return as_float(emulator::scheduler->shuffle(as_bits(v), mask, site));
}

DEVICE bool any_of_warp(bool value, Site site = Site::here()) {
  unsigned any = value;
  for (int mask = 16; mask; mask /= 2) any |= emulator::scheduler->shuffle(any, mask, site);
  return any;
}

DEVICE int reduce_add(int value, Site site = Site::here()) {
  for (int mask = 16; mask; mask /= 2) value += emulator::scheduler->shuffle(value, mask, site);
  return value;
}

DEVICE unsigned reduce_max(unsigned value, Site site = Site::here()) {
  for (int mask = 16; mask; mask /= 2) {
    unsigned other = emulator::scheduler->shuffle(value, mask, site);
    value = other > value ? other : value;
  }
  return value;
}

DEVICE int same_for_warp(int value) { return value; }

DEVICE void multiply_half_tile(float (&sums)[4], unsigned a0, unsigned a1, unsigned b0,
                               Site site = Site::here()) {
  multiply_tile(sums, a0, a1, 0, 0, b0, 0, site);
}

DEVICE void multiply_half_tile_fp16(float (&sums)[4], unsigned a0, unsigned a1, unsigned b0,
                                    Site site = Site::here()) {
  TileOperands<float> operands = {sums, {a0, a1, 0, 0}, {b0, 0}};
  emulator::scheduler->together(&operands, multiply_tile_of_warp<float, true, true>, site);
}

DEVICE void multiply_tile_unsigned(int (&sums)[4], unsigned a0, unsigned a1, unsigned a2,
                                   unsigned a3, unsigned b0, unsigned b1,
                                   Site site = Site::here()) {
  multiply_tile<int, false>(sums, a0, a1, a2, a3, b0, b1, site);
}

// Memory

template <class T>
DEVICE T& shared_memory(Site site = Site::here()) {
  static_assert(alignof(T) <= 16, "shared memory is aligned to 16 bytes");
  if (sizeof(T) > emulator::scheduler->shared_nbytes) {
    emulator::scheduler->fail(site, "wants " + std::to_string(sizeof(T)) +
                                        " bytes of shared memory, has " +
                                        std::to_string(emulator::scheduler->shared_nbytes));
  }
  return *reinterpret_cast<T*>(emulator::scheduler->program().shared_memory);
}

DEVICE int misalignment(const void* place) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(place) % 16);
}

DEVICE void prefetch_line(const void*) {}
constexpr int LINE_NBYTES = 128;

DEVICE uint2 load_word(const uint2* address, Site site = Site::here()) {
  return emulator::scheduler->load(address, site);
}

DEVICE void store_word(uint2* address, float value, unsigned epoch, Site site = Site::here()) {
  emulator::scheduler->store(address, {as_bits(value), epoch}, site);
}

DEVICE void store_word(uint2* address, unsigned value, unsigned epoch, Site site = Site::here()) {
  emulator::scheduler->store(address, {value, epoch}, site);
}

// The two may be of different times.
DEVICE uint4 load_2_words(const uint2* address, Site site = Site::here()) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    emulator::scheduler->fail(site, "loads two words from an address that is no multiple of 16");
  }
  const uint2 first = emulator::scheduler->load(address, site);
  const uint2 second = emulator::scheduler->load(address + 1, site);
  return {first.x, first.y, second.x, second.y};
}

DEVICE void store_relaxed(unsigned* address, unsigned value, Site site = Site::here()) {
  emulator::scheduler->store(address, value, site);
}

DEVICE unsigned load_relaxed(const unsigned* address, Site site = Site::here()) {
  return emulator::scheduler->load(address, site);
}

// The four may be of different times.
DEVICE uint4 load_relaxed_4(const unsigned* address, Site site = Site::here()) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    emulator::scheduler->fail(site, "loads four numbers from an address that is no multiple of 16");
  }
  unsigned found[4];
  for (int i = 0; i < 4; ++i) found[i] = emulator::scheduler->load(address + i, site);
  return {found[0], found[1], found[2], found[3]};
}

DEVICE void arrive(unsigned* counter, Site site = Site::here()) {
  emulator::scheduler->arrive(counter, site);
}

DEVICE unsigned load_acquire(const unsigned* address, Site site = Site::here()) {
  emulator::scheduler->pass(site);
  return *address;
}
