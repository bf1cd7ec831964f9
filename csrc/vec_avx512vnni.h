// The vector interface for AVX-512 (F, BW, DQ, VL) with VNNI: a VecF is one 512-bit register.
#pragma once

struct VecF {
  __m512 v;
};
struct VecI {
  __m512i v;
};

constexpr int kVecRegisters = 16;  // of 32; the rest hold operands

inline VecF splat(float x) { return {_mm512_set1_ps(x)}; }
inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
inline VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecF div(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

inline __m256 add_halves(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
inline float sum(VecF a) {
  const __m256 eight = add_halves(a.v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float max_lane(VecF a) { return _mm512_reduce_max_ps(a.v); }

inline __mmask16 lanes_below(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline VecF keep_first(VecF a, int n, float fill) {
  return {_mm512_mask_blend_ps(lanes_below(n), _mm512_set1_ps(fill), a.v)};
}
inline VecF load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
inline void store_first(float* p, VecF a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a.v); }

inline VecF load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_half(uint16_t* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline VecF load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}

inline VecF to_float(VecI a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline VecI round_to_int(VecF a) { return {_mm512_cvtps_epi32(a.v)}; }
inline VecI add(VecI a, VecI b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline VecI shift_left(VecI a, int bits) { return {_mm512_slli_epi32(a.v, bits)}; }
inline VecI splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline VecI max(VecI a, VecI b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t max_lane(VecI a) { return _mm512_reduce_max_epi32(a.v); }
inline VecI abs_bits(VecF a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
inline VecI as_int(VecF a) { return {_mm512_castps_si512(a.v)}; }
inline VecF as_float(VecI a) { return {_mm512_castsi512_ps(a.v)}; }
inline int32_t sum(VecI a) { return _mm512_reduce_add_epi32(a.v); }
inline VecF exp2_int(VecI n) {
  const __m512i biased = _mm512_add_epi32(n.v, _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
inline VecF nearest(VecF a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline VecF times_exp2(VecF p, VecF n) { return {_mm512_scalef_ps(p.v, n.v)}; }

// --- products of 16-bit codes -------------------------------------------------------------------

struct WordWeights {
  __m512i rows;
};
struct WordInputs {
  __m512i two;
};
inline WordWeights load_step_int16(const uint8_t* p) {
  __m512i rows = _mm512_loadu_si512(p);
  asm("" : "+v"(rows));  // or GCC loads anew for each product
  return {rows};
}
inline WordInputs load_word_inputs(const int16_t* codes) {
  int32_t two;
  memcpy(&two, codes, 4);
  return {_mm512_set1_epi32(two)};
}
inline void dot(VecI& acc, const WordWeights& w, const WordInputs& a) {
  acc.v = _mm512_dpwssd_epi32(acc.v, w.rows, a.two);
}
inline void store_words(int16_t* p, VecI a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

// A step of 16 rows x 4 bytes as two of 16 rows x 2 words: worth it for bytes that meet 16-bit
// codes often, because a product of words does the work of two of bytes.
#define MLF_WIDEN
inline void widen_step(const uint8_t* p, int16_t* out) {
  const __m256i* rows = reinterpret_cast<const __m256i*>(p);
  const __m512i low = _mm512_cvtepi8_epi16(_mm256_loadu_si256(rows)),
                high = _mm512_cvtepi8_epi16(_mm256_loadu_si256(rows + 1));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi32(low, even, high));
  _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi32(low, odd, high));
}

// --- integer dot products: VNNI multiplies unsigned by signed bytes ----------------------------
// int8 weights are made unsigned by adding 128; the sum starts from what takes that back.

constexpr int kDotRows = 8;  // 8 integer and 8 float sums; weights and inputs in other registers
constexpr int32_t kInt8Offset = 128;

// 12 integer and 12 float sums. One tile alone would need as many loads of inputs as there are
// products, and loads of 64 bytes are as rare as those.
#define MLF_BLOCK
constexpr int kBlockRows = 6, kBlockTiles = 2;

struct DotWeights {
  __m512i rows;
};
struct DotInputs {
  __m512i four;
};
struct DotSum {
  __m512i rows;
};

inline DotSum dot_begin(int32_t offset) { return {_mm512_set1_epi32(offset)}; }
inline DotWeights load_step_int8(const uint8_t* p) {
  return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
inline DotInputs load_inputs(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return {_mm512_set1_epi32(four)};
}
inline void dot(DotSum& acc, const DotWeights& w, const DotInputs& a) {
  acc.rows = _mm512_dpbusd_epi32(acc.rows, w.rows, a.four);
}
inline VecI dot_result(const DotSum& acc) { return {acc.rows}; }

using NibbleWeights = DotWeights;
using NibbleSum = DotSum;
inline NibbleSum nibble_begin() { return {_mm512_setzero_si512()}; }
inline void load_steps_int4(const uint8_t* p, NibbleWeights& low, NibbleWeights& high) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i both = _mm512_loadu_si512(p);
  low.rows = _mm512_and_si512(both, mask);
  high.rows = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline DotInputs load_nibble_inputs(const int8_t* codes) { return load_inputs(codes); }

inline void store_codes(int8_t* p, VecI a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// --- the fastest dot product there is, for kernels/peak.h: one VNNI product -------------------

#define MLF_PEAK_DOT
constexpr int kPeakProducts = 64;
constexpr int kPeakChains = 12;
struct PeakSum {
  __m512i v;
};
inline PeakSum peak_zero() { return {_mm512_setzero_si512()}; }
inline void peak_dot_step(PeakSum& sum, const uint8_t* codes) {
  __m512i ones = _mm512_load_si512(codes);
  asm volatile("" : "+v"(ones));  // or equal chains would be computed once
  sum.v = _mm512_dpbusd_epi32(sum.v, ones, ones);
}
inline int32_t peak_value(const PeakSum& sum) { return _mm512_reduce_add_epi32(sum.v); }
