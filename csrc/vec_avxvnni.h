// The vector interface for AVX2 with VNNI in 256-bit registers.
//
// Compiled twice: as table avxvnni (VEX encoding, for processors without AVX-512) and as table
// avx512vnni_ymm (the same instructions in EVEX encoding), with which a machine that has AVX-512
// alone can test it.
#pragma once

#include "vec_ymm.h"

// --- integer dot products: VNNI multiplies unsigned by signed bytes ----------------------------
// int8 weights are made unsigned by adding 128; the sum starts from what takes that back.

constexpr int kDotRows = 4;  // 8 integer sums, 2 weights, 1 input; float sums come once per group
constexpr int32_t kInt8Offset = 128;

struct DotWeights {
  __m256i rows[2];
};
struct DotInputs {
  __m256i four;
};
struct DotSum {
  __m256i rows[2];
};

inline __m256i multiply_add(__m256i sum, __m256i bytes, __m256i signed_bytes) {
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(sum, bytes, signed_bytes);
#else
  return _mm256_dpbusd_avx_epi32(sum, bytes, signed_bytes);
#endif
}

inline DotSum dot_begin(int32_t offset) {
  return {{_mm256_set1_epi32(offset), _mm256_set1_epi32(offset)}};
}
inline DotWeights load_step_int8(const uint8_t* p) {
  const __m256i flip = _mm256_set1_epi8(-128);
  const __m256i* rows = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_xor_si256(_mm256_loadu_si256(rows), flip),
           _mm256_xor_si256(_mm256_loadu_si256(rows + 1), flip)}};
}
inline DotInputs load_inputs(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return {_mm256_set1_epi32(four)};
}
inline void dot(DotSum& acc, const DotWeights& w, const DotInputs& a) {
  for (int i = 0; i < 2; ++i) acc.rows[i] = multiply_add(acc.rows[i], w.rows[i], a.four);
}
inline VecI dot_result(const DotSum& acc) { return {acc.rows[0], acc.rows[1]}; }

using NibbleWeights = DotWeights;
using NibbleSum = DotSum;
inline NibbleSum nibble_begin() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline void load_steps_int4(const uint8_t* p, NibbleWeights& low, NibbleWeights& high) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int i = 0; i < 2; ++i) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
    low.rows[i] = _mm256_and_si256(both, mask);
    high.rows[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
}
inline DotInputs load_nibble_inputs(const int8_t* codes) { return load_inputs(codes); }
