// The vector interface for AVX2 + FMA + F16C.
#pragma once

#include "vec_ymm.h"

// --- integer dot products of int8 weights: widened to int16, multiplied and added in pairs ------
// A register holds 4 rows x 4 inputs; each int32 sum holds half of a row's products. (The bytewise
// product saturates on two weights of 8 bits; undoing that costs more than widening.)

constexpr int kDotRows = 2;  // 8 sums, 4 weights, 2 inputs: 14 of 16 registers
constexpr int32_t kInt8Offset = 0;

struct DotWeights {
  __m256i rows[4];
};
struct DotInputs {
  __m256i pairs;
};
struct DotSum {
  __m256i rows[4];
};

inline DotSum dot_begin(int32_t) {
  const __m256i zero = _mm256_setzero_si256();
  return {{zero, zero, zero, zero}};
}
inline DotWeights load_step_int8(const uint8_t* p) {
  DotWeights w;
  for (int i = 0; i < 4; ++i)
    w.rows[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
  return w;
}
inline DotInputs load_inputs(const int8_t* codes) {
  // as a float, because compilers then broadcast while loading
  const __m128 four = _mm_broadcast_ss(reinterpret_cast<const float*>(codes));
  return {_mm256_cvtepi8_epi16(_mm_castps_si128(four))};
}
inline void dot(DotSum& acc, const DotWeights& w, const DotInputs& a) {
  for (int i = 0; i < 4; ++i)
    acc.rows[i] = _mm256_add_epi32(acc.rows[i], _mm256_madd_epi16(w.rows[i], a.pairs));
}
inline VecI dot_result(const DotSum& acc) {
  // hadd leaves rows 0 1 4 5 | 2 3 6 7.
  const __m256i lo = _mm256_hadd_epi32(acc.rows[0], acc.rows[1]);
  const __m256i hi = _mm256_hadd_epi32(acc.rows[2], acc.rows[3]);
  return {_mm256_permute4x64_epi64(lo, 0xd8), _mm256_permute4x64_epi64(hi, 0xd8)};
}

// --- of int4 weights: bytewise products in int16 ------------------------------------------------
// Codes are at most 15, so the 16 products of a group that meet in one int16 cannot overflow it:
// 16 * 15 * 127 = 30480.

struct NibbleWeights {
  __m256i rows[2];
};
struct NibbleInputs {
  __m256i four;
};
struct NibbleSum {
  __m256i pairs[2];
};

inline NibbleSum nibble_begin() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline void load_steps_int4(const uint8_t* p, NibbleWeights& low, NibbleWeights& high) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int i = 0; i < 2; ++i) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
    low.rows[i] = _mm256_and_si256(both, mask);
    high.rows[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
}
inline NibbleInputs load_nibble_inputs(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return {_mm256_set1_epi32(four)};
}
inline void dot(NibbleSum& acc, const NibbleWeights& w, const NibbleInputs& a) {
  for (int i = 0; i < 2; ++i)
    acc.pairs[i] = _mm256_add_epi16(acc.pairs[i], _mm256_maddubs_epi16(w.rows[i], a.four));
}
inline VecI dot_result(const NibbleSum& acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(acc.pairs[0], ones), _mm256_madd_epi16(acc.pairs[1], ones)};
}

// --- many rows: weights and codes as words, rearranged once for a panel -------------------------
// A register holds 8 rows x 2 inputs, so 4 rows of codes have their 8 sums in registers, and
// nothing is widened between products: one multiplication and one addition for 16 products, all
// that is left.

#define MLF_MATRIX
#define MLF_PACKED_INT8
constexpr int kMatrixRows = 4;               // rows of codes at once
constexpr int64_t kPanelRows = kMatrixRows;  // from so many rows on
constexpr int64_t kBlockGroups = 8;          // 8 KB of weights, which stay in the first-level cache
constexpr int64_t kPackedGroupBytes = sizeof(int16_t) * kGroup * kTileRows;

// The codes of a panel's rows as words.
struct PanelInputs {
  static constexpr int64_t kRoom = 3072;  // rows x groups: 192 KB of a thread's stack
  alignas(32) int16_t words[kRoom * kGroup];

  static int64_t most_rows(int64_t groups) { return kRoom / groups / kMatrixRows * kMatrixRows; }
  void take(const Activations& x, int64_t rows) {
    if (rows < kPanelRows || x.kind == ActivationKind::floating) return;
    for (int64_t i = 0; i < rows * x.padded_cols(); i += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x.codes + i));
      _mm256_store_si256(reinterpret_cast<__m256i*>(words + i), _mm256_cvtepi8_epi16(codes));
    }
  }
};

// Rows 0 to 7 and 8 to 15 of inputs 0 and 1, then of inputs 2 and 3, and so on.
inline void panel_pack(const uint8_t* lines, uint8_t* out) {
  const __m128i halves = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  for (int step = 0; step < kStepsPerGroup; ++step) {
    __m256i rows[4];  // 4 rows of inputs 0 and 1, and of inputs 2 and 3
    MLF_UNROLL for (int i = 0; i < 4; ++i) {
      const __m128i codes =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + step * kStepBytes + 16 * i));
      rows[i] = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(codes, halves));
    }
    __m256i* to = reinterpret_cast<__m256i*>(out) + 4 * step;
    MLF_UNROLL for (int i = 0; i < 2; ++i) {
      _mm256_store_si256(to + i, _mm256_permute2x128_si256(rows[2 * i], rows[2 * i + 1], 0x20));
      _mm256_store_si256(to + 2 + i, _mm256_permute2x128_si256(rows[2 * i], rows[2 * i + 1], 0x31));
    }
  }
}
inline void panel_pack_int4(const uint8_t* lines, uint8_t* out) {
  for (int i = 0; i < kStepsPerGroup / 2; ++i) {
    NibbleWeights low, high;
    load_steps_int4(lines + i * kStepBytes, low, high);
    __m256i* to = reinterpret_cast<__m256i*>(out);
    MLF_UNROLL for (int j = 0; j < 2; ++j) {
      _mm256_store_si256(to + 2 * i + j, low.rows[j]);
      _mm256_store_si256(to + 2 * i + j + kStepsPerGroup, high.rows[j]);
    }
  }
}

// sums[r] += row r of words . one group of weights, exactly; rows are `stride` words apart.
template <int M>
MLF_INLINE void panel_products(const uint8_t* group, const int16_t* words, int64_t stride,
                               VecI* sums) {
  const __m256i* weights = reinterpret_cast<const __m256i*>(group);
  MLF_UNROLL for (int i = 0; i < kGroup / 2; ++i) {
    const WordWeights w{_mm256_load_si256(weights + 2 * i), _mm256_load_si256(weights + 2 * i + 1)};
    MLF_UNROLL for (int r = 0; r < M; ++r)
        dot(sums[r], w, load_word_inputs(words + r * stride + 2 * i));
  }
}
// sums[r] = row r of codes . one group of 4-bit weights.
template <int M>
MLF_INLINE void panel_products_int4(const uint8_t* group, const int8_t* codes, int64_t stride,
                                    VecI* sums) {
  const __m256i* weights = reinterpret_cast<const __m256i*>(group);
  NibbleSum acc[M];
  MLF_UNROLL for (int r = 0; r < M; ++r) acc[r] = nibble_begin();
  MLF_UNROLL for (int i = 0; i < kStepsPerGroup; ++i) {
    const NibbleWeights w{
        {_mm256_load_si256(weights + 2 * i), _mm256_load_si256(weights + 2 * i + 1)}};
    MLF_UNROLL for (int r = 0; r < M; ++r)
        dot(acc[r], w, load_nibble_inputs(codes + r * stride + kStep * i));
  }
  MLF_UNROLL for (int r = 0; r < M; ++r) sums[r] = dot_result(acc[r]);
}

// --- the fastest dot product there is, for kernels/peak.h: bytes in pairs, pairs in pairs ------

#define MLF_PEAK_DOT
constexpr int kPeakProducts = 32;
constexpr int kPeakChains = 8;
struct PeakSum {
  __m256i v;
};
inline PeakSum peak_zero() { return {_mm256_setzero_si256()}; }
inline void peak_dot_step(PeakSum& sum, const uint8_t* codes) {
  __m256i ones = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
  asm volatile("" : "+x"(ones));  // or the products, always the same, would be computed once
  const __m256i pairs = _mm256_maddubs_epi16(ones, ones);
  sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline int32_t peak_value(const PeakSum& sum) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum.v);
  int32_t total = 0;
  for (int32_t lane : lanes) total ^= lane;
  return total;
}
