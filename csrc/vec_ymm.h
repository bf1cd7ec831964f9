// What the tables of 256-bit registers share: a VecF is two of them. AVX2 + FMA + F16C.
#pragma once

struct VecF {
  __m256 lo, hi;
};
struct VecI {
  __m256i lo, hi;
};

constexpr int kVecRegisters = 4;  // 8 of 16 registers; the rest hold operands

inline VecF splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline VecF load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, VecF v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline VecF div(VecF a, VecF b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline VecF abs(VecF a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline VecF fma(VecF a, VecF b, VecF c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

inline float sum(VecF v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float max_lane(VecF v) {
  const __m256 eight = _mm256_max_ps(v.lo, v.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// All ones in lanes below n, for lanes first..first+7.
inline __m256i lanes_below(int n, int first) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), index);
}
inline VecF keep_first(VecF v, int n, float fill) {
  const __m256 f = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(f, v.lo, _mm256_castsi256_ps(lanes_below(n, 0))),
          _mm256_blendv_ps(f, v.hi, _mm256_castsi256_ps(lanes_below(n, 8)))};
}
inline VecF load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n, 0)), _mm256_maskload_ps(p + 8, lanes_below(n, 8))};
}
inline void store_first(float* p, VecF v, int n) {
  _mm256_maskstore_ps(p, lanes_below(n, 0), v.lo);
  _mm256_maskstore_ps(p + 8, lanes_below(n, 8), v.hi);
}

inline VecF load_half(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
inline void store_half(uint16_t* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline VecF load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

inline VecF to_float(VecI v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
inline VecI round_to_int(VecF v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
inline VecI add(VecI a, VecI b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline VecI shift_left(VecI v, int bits) {
  return {_mm256_slli_epi32(v.lo, bits), _mm256_slli_epi32(v.hi, bits)};
}
inline VecI splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline VecI max(VecI a, VecI b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
inline int32_t max_lane(VecI v) {
  const __m256i eight = _mm256_max_epi32(v.lo, v.hi);
  const __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline VecI abs_bits(VecF v) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(v.lo), mask),
          _mm256_and_si256(_mm256_castps_si256(v.hi), mask)};
}
inline VecI as_int(VecF v) { return {_mm256_castps_si256(v.lo), _mm256_castps_si256(v.hi)}; }
inline VecF as_float(VecI v) { return {_mm256_castsi256_ps(v.lo), _mm256_castsi256_ps(v.hi)}; }
inline int32_t sum(VecI v) {
  const __m256i eight = _mm256_add_epi32(v.lo, v.hi);
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline VecF exp2_int(VecI n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}

inline void store_codes(int8_t* p, VecI v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline VecF nearest(VecF v) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, kMode), _mm256_round_ps(v.hi, kMode)};
}
inline VecF times_exp2(VecF p, VecF n) { return mul(p, exp2_int(round_to_int(n))); }

// --- products of 16-bit codes -------------------------------------------------------------------

struct WordWeights {
  __m256i lo, hi;
};
struct WordInputs {
  __m256i two;
};
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__)
  return _mm256_dpwssd_epi32(sum, a, b);
#elif defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
inline WordWeights load_step_int16(const uint8_t* p) {
  const __m256i* rows = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(rows), _mm256_loadu_si256(rows + 1)};
}
inline WordInputs load_word_inputs(const int16_t* codes) {
  int32_t two;
  memcpy(&two, codes, 4);
  return {_mm256_set1_epi32(two)};
}
inline void dot(VecI& acc, const WordWeights& w, const WordInputs& a) {
  acc = {add_products(acc.lo, w.lo, a.two), add_products(acc.hi, w.hi, a.two)};
}
inline void store_words(int16_t* p, VecI v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}

// A step of 16 rows x 4 bytes as two of 16 rows x 2 words, for bytes that meet 16-bit codes often.
#define MLF_WIDEN
inline void widen_step(const uint8_t* p, int16_t* out) {
  const __m128i* rows = reinterpret_cast<const __m128i*>(p);
  MLF_UNROLL for (int i = 0; i < 2; ++i) {
    const __m256 a = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128(rows + 2 * i))),
                 b = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128(rows + 2 * i + 1)));
    // within halves of the registers, which are put in order behind
    const auto put = [](__m256 v, int16_t* at) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                          _mm256_permute4x64_epi64(_mm256_castps_si256(v), 0xd8));
    };
    put(_mm256_shuffle_ps(a, b, 0x88), out + 16 * i);
    put(_mm256_shuffle_ps(a, b, 0xdd), out + 32 + 16 * i);
  }
}
