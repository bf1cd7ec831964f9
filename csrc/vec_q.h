// What the tables of ARM's 128-bit registers share: a VecF is four of them. Armv8-A with NEON.
#pragma once

#define MLF_EACH_Q MLF_UNROLL for (int i = 0; i < 4; ++i)

struct VecF {
  float32x4_t q[4];
};
struct VecI {
  int32x4_t q[4];
};

constexpr int kVecRegisters = 6;  // 24 of 32 registers; the rest hold operands

inline VecF splat(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {{v, v, v, v}};
}
inline VecF load(const float* p) {
  VecF r;
  MLF_EACH_Q r.q[i] = vld1q_f32(p + 4 * i);
  return r;
}
inline void store(float* p, VecF v) { MLF_EACH_Q vst1q_f32(p + 4 * i, v.q[i]); }
inline VecF add(VecF a, VecF b) {
  MLF_EACH_Q a.q[i] = vaddq_f32(a.q[i], b.q[i]);
  return a;
}
inline VecF sub(VecF a, VecF b) {
  MLF_EACH_Q a.q[i] = vsubq_f32(a.q[i], b.q[i]);
  return a;
}
inline VecF mul(VecF a, VecF b) {
  MLF_EACH_Q a.q[i] = vmulq_f32(a.q[i], b.q[i]);
  return a;
}
inline VecF div(VecF a, VecF b) {
  MLF_EACH_Q a.q[i] = vdivq_f32(a.q[i], b.q[i]);
  return a;
}
// Not FMAX and FMIN, which return NaN where an operand is one: here it is the second operand.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline VecF max(VecF a, VecF b) {
  MLF_EACH_Q a.q[i] = larger(a.q[i], b.q[i]);
  return a;
}
inline VecF min(VecF a, VecF b) {
  MLF_EACH_Q a.q[i] = vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]);
  return a;
}
inline VecF abs(VecF a) {
  MLF_EACH_Q a.q[i] = vabsq_f32(a.q[i]);
  return a;
}
inline VecF fma(VecF a, VecF b, VecF c) {
  MLF_EACH_Q c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
  return c;
}

inline float sum(VecF v) {
  const float32x4_t four = vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
inline float max_lane(VecF v) {
  const float32x4_t four = larger(larger(v.q[0], v.q[2]), larger(v.q[1], v.q[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger(two, vextq_f32(two, two, 1)), 0);
}

inline VecF keep_first(VecF v, int n, float fill) {
  const int32x4_t index = {0, 1, 2, 3};
  MLF_EACH_Q v.q[i] =
      vbslq_f32(vcgtq_s32(vdupq_n_s32(n - 4 * i), index), v.q[i], vdupq_n_f32(fill));
  return v;
}
inline VecF load_first(const float* p, int n) {
  float lanes[16] = {};
  memcpy(lanes, p, sizeof(float) * n);
  return load(lanes);
}
inline void store_first(float* p, VecF v, int n) {
  float lanes[16];
  store(lanes, v);
  memcpy(p, lanes, sizeof(float) * n);
}

inline VecF load_half(const uint16_t* p) {
  const float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p));
  const float16x8_t hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
  return {{vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo), vcvt_f32_f16(vget_low_f16(hi)),
           vcvt_high_f32_f16(hi)}};
}
inline void store_half(uint16_t* p, VecF v) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.q[0]), v.q[1])));
  vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.q[2]), v.q[3])));
}
inline VecF load_bf16(const uint16_t* p) {
  const uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
  const auto widen = [](uint16x4_t half) { return vreinterpretq_f32_u32(vshll_n_u16(half, 16)); };
  return {{widen(vget_low_u16(lo)), widen(vget_high_u16(lo)), widen(vget_low_u16(hi)),
           widen(vget_high_u16(hi))}};
}

inline VecF to_float(VecI v) {
  VecF r;
  MLF_EACH_Q r.q[i] = vcvtq_f32_s32(v.q[i]);
  return r;
}
inline VecI round_to_int(VecF v) {
  VecI r;
  MLF_EACH_Q r.q[i] = vcvtnq_s32_f32(v.q[i]);
  return r;
}
inline VecI add(VecI a, VecI b) {
  MLF_EACH_Q a.q[i] = vaddq_s32(a.q[i], b.q[i]);
  return a;
}
inline VecI shift_left(VecI a, int bits) {
  MLF_EACH_Q a.q[i] = vshlq_s32(a.q[i], vdupq_n_s32(bits));
  return a;
}
inline VecI splat_int(int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {{v, v, v, v}};
}
inline VecI max(VecI a, VecI b) {
  MLF_EACH_Q a.q[i] = vmaxq_s32(a.q[i], b.q[i]);
  return a;
}
inline int32_t max_lane(VecI v) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(v.q[0], v.q[1]), vmaxq_s32(v.q[2], v.q[3])));
}
inline VecI abs_bits(VecF v) {
  VecI r;
  MLF_EACH_Q r.q[i] = vreinterpretq_s32_f32(vabsq_f32(v.q[i]));
  return r;
}
inline VecI as_int(VecF v) {
  VecI r;
  MLF_EACH_Q r.q[i] = vreinterpretq_s32_f32(v.q[i]);
  return r;
}
inline VecF as_float(VecI v) {
  VecF r;
  MLF_EACH_Q r.q[i] = vreinterpretq_f32_s32(v.q[i]);
  return r;
}
inline int32_t sum(VecI v) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(v.q[0], v.q[1]), vaddq_s32(v.q[2], v.q[3])));
}
inline VecF exp2_int(VecI n) {
  VecF r;
  MLF_EACH_Q r.q[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.q[i], vdupq_n_s32(127)), 23));
  return r;
}

// Codes fit a byte: their low bytes are they.
inline void store_codes(int8_t* p, VecI v) {
  const auto low_halves = [](int32x4_t a, int32x4_t b) {
    return vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
  };
  vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low_halves(v.q[0], v.q[1])),
                        vreinterpretq_s8_s16(low_halves(v.q[2], v.q[3]))));
}
inline VecF nearest(VecF v) {
  MLF_EACH_Q v.q[i] = vrndnq_f32(v.q[i]);
  return v;
}
inline VecF times_exp2(VecF p, VecF n) { return mul(p, exp2_int(round_to_int(n))); }

// --- products of 16-bit codes -------------------------------------------------------------------
// First and second inputs of 8 rows each: products are added to the sums of 4 rows at once.

struct WordWeights {
  int16x8_t first[2], second[2];
};
struct WordInputs {
  int16x4_t two;
};
inline WordWeights load_step_int16(const uint8_t* p) {
  WordWeights w;
  MLF_UNROLL for (int i = 0; i < 2; ++i) {
    const int16x8_t a = vreinterpretq_s16_u8(vld1q_u8(p + 32 * i)),
                    b = vreinterpretq_s16_u8(vld1q_u8(p + 32 * i + 16));
    w.first[i] = vuzp1q_s16(a, b);
    w.second[i] = vuzp2q_s16(a, b);
  }
  return w;
}
inline WordInputs load_word_inputs(const int16_t* codes) {
  int32_t two;
  memcpy(&two, codes, 4);
  return {vreinterpret_s16_s32(vdup_n_s32(two))};
}
inline void dot(VecI& acc, const WordWeights& w, const WordInputs& a) {
  MLF_UNROLL for (int i = 0; i < 2; ++i) {
    int32x4_t &low = acc.q[2 * i], &high = acc.q[2 * i + 1];
    low = vmlal_lane_s16(low, vget_low_s16(w.first[i]), a.two, 0);
    low = vmlal_lane_s16(low, vget_low_s16(w.second[i]), a.two, 1);
    high = vmlal_high_lane_s16(high, w.first[i], a.two, 0);
    high = vmlal_high_lane_s16(high, w.second[i], a.two, 1);
  }
}
inline void store_words(int16_t* p, VecI v) {
  for (int i = 0; i < 4; i += 2)
    vst1q_s16(p + 4 * i, vcombine_s16(vmovn_s32(v.q[i]), vmovn_s32(v.q[i + 1])));
}

// --- integer dot products, of whole groups -----------------------------------------------------
// A line of a tile is four registers of 4 rows x 4 inputs. ARM's products take signed bytes and
// add up without saturation, so nothing is offset.

constexpr int32_t kInt8Offset = 0;
#define MLF_OWN_GROUP_DOT

// Call body(Constant<0>()) to body(Constant<N - 1>()): for instructions with a constant lane.
template <int N, class Body>
MLF_INLINE void for_constants(Body body) {
  if constexpr (N > 1) for_constants<N - 1>(body);
  body(Constant<N - 1>());
}

// A sum of products of one group, at most 32 * 128 * 127 < 2^22, may be kept as the low bits of the
// float 1.5 * 2^23 plus that sum: subtracting gives the exact float in one instruction that every
// pipe has, where the conversion of an integer takes the only pipe of two or four for two cycles.
constexpr int32_t kFloatBias = 0x4B400000;
inline float32x4_t unbiased(int32x4_t sum) {
  return vsubq_f32(vreinterpretq_f32_s32(sum), vdupq_n_f32(12582912.0f));
}
