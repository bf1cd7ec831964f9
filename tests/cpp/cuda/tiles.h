// Numbers of 16 bits, and what a warp does with tiles of them.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernel.h"

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

DEVICE unsigned low_halves(unsigned a, unsigned b) { return (a & 0xffff) | b << 16; }
DEVICE unsigned high_halves(unsigned a, unsigned b) { return a >> 16 | (b & 0xffff0000u); }

// The lower or the upper half of a word.
DEVICE float fp16_of(unsigned word, int half) {
  return half_to_float(static_cast<unsigned short>(word >> 16 * half));
}
DEVICE float bf16_of(unsigned word, int half) {
  return as_float(half ? word & 0xffff0000u : word << 16);
}

DEVICE int byte_of(unsigned word, int byte) { return static_cast<signed char>(word >> 8 * byte); }

// A product of matrices by a warp, as primitives.cuh of ring/ says; Sum is of float for
// inputs in bf16 or fp16, of int for bytes, of which the left ones have a sign or not.
template <class Sum>
struct TileOperands {
  Sum* sums;
  unsigned a[4], b[2];
};

template <class Sum, bool kLeftSigned, bool kFp16 = false>
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
          int code = byte_of(left, place);
          sum += (kLeftSigned ? code : code & 255) * byte_of(right, place);
        } else if constexpr (kFp16) {
          sum += fp16_of(left, place) * fp16_of(right, place);
        } else {
          sum += bf16_of(left, place) * bf16_of(right, place);
        }
      }
      of(lane)->sums[i] = sum;
    }
  }
}

template <class Sum, bool kLeftSigned = true>
DEVICE void multiply_tile(Sum (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                          unsigned b0, unsigned b1, Site site = Site::here()) {
  TileOperands<Sum> operands = {sums, {a0, a1, a2, a3}, {b0, b1}};
  emulator::scheduler->together(&operands, multiply_tile_of_warp<Sum, kLeftSigned>, site);
}

DEVICE void transpose(void* const* lanes) {
  unsigned given[32];
  for (int lane = 0; lane < 32; ++lane) given[lane] = *static_cast<unsigned*>(lanes[lane]);
  for (int lane = 0; lane < 32; ++lane) {
    int row = lane / 4, column = lane % 4 * 2;
    unsigned first = given[column * 4 + row / 2], second = given[(column + 1) * 4 + row / 2];
    *static_cast<unsigned*>(lanes[lane]) =
        row % 2 ? high_halves(first, second) : low_halves(first, second);
  }
}

DEVICE unsigned transposed(unsigned value, Site site = Site::here()) {
  emulator::scheduler->together(&value, transpose, site);
  return value;
}
