// What the kernels of kernels/ring/ use of a GPU, on a CPU: scheduler.h runs the
// threads.
//
// Beside each kernel, KERNEL defines `emulate_<kernel>`, which runs it and returns an
// emulator::Status, and `arguments_nbytes_<kernel>`; `emulation_error` has the last run's text.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define DEVICE inline
#define UNROLL
#define ROLLED
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define KERNEL(name, Arguments)                                                                \
  static void name(const Arguments& arguments);                                                \
  EXPORTED unsigned arguments_nbytes_##name() { return sizeof(Arguments); }                    \
  EXPORTED int emulate_##name(const Arguments* arguments, int programs, unsigned seed,         \
                              unsigned shared_nbytes) {                                        \
    return emulator::run([](const void* each) { name(*static_cast<const Arguments*>(each)); }, \
                         arguments, programs, seed, shared_nbytes);                            \
  }                                                                                            \
  static void name(const Arguments& arguments)

#define SHARED(name, T) EXPORTED unsigned name##_shared_nbytes = sizeof(T);

EXPORTED const char* emulation_error() { return emulator::error.c_str(); }

DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Numbers

DEVICE float as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DEVICE unsigned as_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

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

DEVICE float half_to_float(unsigned short half) {
  unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023u;
  if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return as_float(sign | as_bits(magnitude));
}

DEVICE unsigned short float_to_half(float value) {  // to nearest, ties to even
  unsigned bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520, the middle between the largest and infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: rounded by an addition, to multiples of 2^-24
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    half -= 112u << 10;
  }
  return static_cast<unsigned short>(sign | half);
}

DEVICE unsigned short float_to_bf16(float value) {  // to nearest, ties to even
  unsigned bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DEVICE unsigned pack_bf16(float first, float second) {
  return float_to_bf16(first) | static_cast<unsigned>(float_to_bf16(second)) << 16;
}

DEVICE int to_int(float value) {  // to nearest, ties to even; 0 of NaN
  return value != value ? 0 : static_cast<int>(std::nearbyint(value));
}

// The lower or the upper half of a word.
DEVICE float bf16_of(unsigned word, int half) {
  return as_float(half ? word & 0xffff0000u : word << 16);
}

DEVICE float fma_(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float exp_(float x) { return std::exp(x); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float log_(float x) { return std::log(x); }
DEVICE float exp2_(float x) { return std::exp2(x); }
DEVICE float log2_(float x) { return std::log2(x); }
DEVICE float rsqrt_(float x) { return 1.0f / std::sqrt(x); }
DEVICE unsigned mul_high(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
DEVICE long long clock_ns() { return 0; }
DEVICE void forget(int&) {}

// Threads

DEVICE int thread_id() { return emulator::scheduler->current().thread; }
DEVICE int program_id() { return emulator::scheduler->current().program; }

DEVICE void sync_program(emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->join_barrier(THREADS, site);
}

template <int THREADS_>
DEVICE void sync_threads(emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->join_barrier(THREADS_, site);
}

using emulator::Barrier;

DEVICE void init_barrier(Barrier& barrier, int count) { barrier = {count, count, 0, 0}; }
DEVICE void publish_barriers() {}
DEVICE void fence_copies() {}

DEVICE void arrive(Barrier& barrier, emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->arrive_at(barrier, 0, site);
}

DEVICE void arrive_expecting(Barrier& barrier, int nbytes,
                             emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->arrive_at(barrier, nbytes, site);
}

DEVICE void wait_for(Barrier& barrier, unsigned parity,
                     emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->wait_at(barrier, parity, site);
}

// It happens while somebody waits; until then its place holds NaN.
DEVICE void copy_bulk(void* to, const void* from, int nbytes, Barrier& barrier,
                      emulator::Site site = emulator::Site::here()) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | nbytes) % 16) {
    emulator::scheduler->fail(site, "copies from, to or in what is no multiple of 16 bytes");
  }
  std::memset(to, 0xFF, nbytes);
  emulator::scheduler->copy_bulk({to, from, nbytes}, barrier, site);
}

DEVICE unsigned shuffle_xor(unsigned v, int mask, emulator::Site site = emulator::Site::here()) {
  return emulator::scheduler->shuffle(v, mask, site);
}

DEVICE float shuffle_xor(float v, int mask, emulator::Site site = emulator::Site::here()) {
  return as_float(emulator::scheduler->shuffle(as_bits(v), mask, site));
}

DEVICE bool any_of_warp(bool value, emulator::Site site = emulator::Site::here()) {
  unsigned any = value;
  for (int mask = 16; mask; mask /= 2) any |= emulator::scheduler->shuffle(any, mask, site);
  return any;
}

DEVICE int reduce_add(int value, emulator::Site site = emulator::Site::here()) {
  for (int mask = 16; mask; mask /= 2) value += emulator::scheduler->shuffle(value, mask, site);
  return value;
}

DEVICE unsigned reduce_max(unsigned value, emulator::Site site = emulator::Site::here()) {
  for (int mask = 16; mask; mask /= 2) {
    unsigned other = emulator::scheduler->shuffle(value, mask, site);
    value = other > value ? other : value;
  }
  return value;
}

DEVICE int same_for_warp(int value) { return value; }

DEVICE int byte_of(unsigned word, int byte) { return static_cast<signed char>(word >> 8 * byte); }

// A product of matrices by a warp, as primitives.cuh of the kernels says; Sum is of float for inputs
// in bf16, of int for bytes.
template <class Sum>
struct TileOperands {
  Sum* sums;
  unsigned a[4], b[2];
};

template <class Sum>
DEVICE void multiply_tile_of_warp(void* const* lanes) {
  constexpr bool kBytes = std::is_integral_v<Sum>;
  constexpr int kEach = kBytes ? 4 : 2;  // inputs in a word
  auto of = [&](int lane) { return static_cast<const TileOperands<Sum>*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      Sum sum = of(lane)->sums[i];
      for (int k = 0; k < 8 * kEach; ++k) {
        int half = k / (4 * kEach), quarter = k / kEach % 4, place = k % kEach;
        unsigned left = of(row % 8 * 4 + quarter)->a[row / 8 + half * 2];
        unsigned right = of(column * 4 + quarter)->b[half];
        if constexpr (kBytes) {
          sum += byte_of(left, place) * byte_of(right, place);
        } else {
          sum += bf16_of(left, place) * bf16_of(right, place);
        }
      }
      of(lane)->sums[i] = sum;
    }
  }
}

template <class Sum>
DEVICE void multiply_tile(Sum (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                          unsigned b0, unsigned b1,
                          emulator::Site site = emulator::Site::here()) {
  TileOperands<Sum> operands = {sums, {a0, a1, a2, a3}, {b0, b1}};
  emulator::scheduler->together(&operands, multiply_tile_of_warp<Sum>, site);
}

// Memory

template <class T>
DEVICE T& shared_memory(emulator::Site site = emulator::Site::here()) {
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

DEVICE void sync_warp(emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->shuffle(0, 0, site);
}

DEVICE void prefetch_line(const void*) {}
constexpr int LINE_NBYTES = 128;

DEVICE uint2 load_word(const uint2* address, emulator::Site site = emulator::Site::here()) {
  return emulator::scheduler->load(address, site);
}

DEVICE void store_word(uint2* address, float value, unsigned epoch,
                       emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->store(address, {as_bits(value), epoch}, site);
}

DEVICE void store_relaxed(unsigned* address, unsigned value,
                          emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->store(address, value, site);
}

DEVICE unsigned load_relaxed(const unsigned* address,
                             emulator::Site site = emulator::Site::here()) {
  return emulator::scheduler->load(address, site);
}

// The four may be of different times.
DEVICE uint4 load_relaxed_4(const unsigned* address,
                            emulator::Site site = emulator::Site::here()) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    emulator::scheduler->fail(site, "loads four numbers from an address that is no multiple of 16");
  }
  unsigned found[4];
  for (int i = 0; i < 4; ++i) found[i] = emulator::scheduler->load(address + i, site);
  return {found[0], found[1], found[2], found[3]};
}

DEVICE void arrive(unsigned* counter, emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->arrive(counter, site);
}

DEVICE unsigned load_acquire(const unsigned* address,
                             emulator::Site site = emulator::Site::here()) {
  emulator::scheduler->pass(site);
  return *address;
}
