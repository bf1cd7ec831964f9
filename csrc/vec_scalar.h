// The vector interface in plain C++: the contract that every other vec_*.h meets bit for bit, and
// the table that runs anywhere.
//
// VecF and VecI are 16 lanes on every ISA. All float operations are single IEEE operations, and
// sum() adds in one fixed tree, so a kernel written on them gives the same bits everywhere.
#pragma once

struct VecF {
  float lane[16];
};
struct VecI {
  int32_t lane[16];
};

constexpr int kVecRegisters = 4;  // VecF values that a kernel may keep live as accumulators

#define MLF_EACH_LANE for (int i = 0; i < 16; ++i)

inline VecF splat(float x) {
  VecF r;
  MLF_EACH_LANE r.lane[i] = x;
  return r;
}
inline VecF load(const float* p) {
  VecF r;
  memcpy(r.lane, p, sizeof r);
  return r;
}
inline void store(float* p, VecF v) { memcpy(p, v.lane, sizeof v); }
inline VecF add(VecF a, VecF b) {
  MLF_EACH_LANE a.lane[i] += b.lane[i];
  return a;
}
inline VecF sub(VecF a, VecF b) {
  MLF_EACH_LANE a.lane[i] -= b.lane[i];
  return a;
}
inline VecF mul(VecF a, VecF b) {
  MLF_EACH_LANE a.lane[i] *= b.lane[i];
  return a;
}
inline VecF div(VecF a, VecF b) {
  MLF_EACH_LANE a.lane[i] /= b.lane[i];
  return a;
}
inline VecF max(VecF a, VecF b) {
  MLF_EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline VecF min(VecF a, VecF b) {
  MLF_EACH_LANE a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline VecF abs(VecF a) {
  MLF_EACH_LANE a.lane[i] = fabsf(a.lane[i]);
  return a;
}
// a * b + c, rounded once.
inline VecF fma(VecF a, VecF b, VecF c) {
  MLF_EACH_LANE c.lane[i] = fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}

// ((l0+l8)+(l4+l12)) + ((l2+l10)+(l6+l14)) and so on: halves are added until one lane is left.
inline float sum(VecF v) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}
inline float max_lane(VecF v) {
  for (int i = 1; i < 16; ++i) v.lane[0] = v.lane[i] > v.lane[0] ? v.lane[i] : v.lane[0];
  return v.lane[0];
}

// Lanes n..15 replaced by fill; n in 0..16.
inline VecF keep_first(VecF v, int n, float fill) {
  for (int i = n; i < 16; ++i) v.lane[i] = fill;
  return v;
}
// The first n floats, zeros behind them; reads nothing beyond p[n - 1].
inline VecF load_first(const float* p, int n) {
  VecF r = splat(0.0f);
  memcpy(r.lane, p, sizeof(float) * n);
  return r;
}
inline void store_first(float* p, VecF v, int n) { memcpy(p, v.lane, sizeof(float) * n); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: exact in float32
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
// Round to nearest, ties to even, as the F16C and NEON instructions do.
inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 aligns the mantissa and rounds it
    float value;
    memcpy(&value, &bits, 4);
    value += 0.5f;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
}
inline VecF load_half(const uint16_t* p) {
  VecF r;
  MLF_EACH_LANE r.lane[i] = half_to_float(p[i]);
  return r;
}
inline void store_half(uint16_t* p, VecF v) { MLF_EACH_LANE p[i] = float_to_half(v.lane[i]); }
inline VecF load_bf16(const uint16_t* p) {
  VecF r;
  MLF_EACH_LANE {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    memcpy(&r.lane[i], &bits, 4);
  }
  return r;
}

inline VecF to_float(VecI v) {
  VecF r;
  MLF_EACH_LANE r.lane[i] = static_cast<float>(v.lane[i]);
  return r;
}
// Nearest integer, ties to even; any integer for NaN and for what does not fit.
inline VecI round_to_int(VecF v) {
  VecI r;
  MLF_EACH_LANE r.lane[i] =
      fabsf(v.lane[i]) < 0x1p31f ? static_cast<int32_t>(nearbyintf(v.lane[i])) : 0;
  return r;
}
inline VecI add(VecI a, VecI b) {
  MLF_EACH_LANE a.lane[i] += b.lane[i];
  return a;
}
inline VecI shift_left(VecI a, int bits) {
  MLF_EACH_LANE a.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << bits);
  return a;
}
inline VecI splat_int(int32_t x) {
  VecI r;
  MLF_EACH_LANE r.lane[i] = x;
  return r;
}
inline VecI max(VecI a, VecI b) {
  MLF_EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline int32_t max_lane(VecI v) {
  for (int i = 1; i < 16; ++i) v.lane[0] = v.lane[i] > v.lane[0] ? v.lane[i] : v.lane[0];
  return v.lane[0];
}
// The bits of |v|, which are in the order of the numbers; infinity and NaN are the largest.
inline VecI abs_bits(VecF v) {
  VecI r;
  memcpy(r.lane, v.lane, sizeof r);
  MLF_EACH_LANE r.lane[i] &= 0x7fffffff;
  return r;
}
// The same bits.
inline VecI as_int(VecF v) {
  VecI r;
  memcpy(r.lane, v.lane, sizeof r);
  return r;
}
inline VecF as_float(VecI v) {
  VecF r;
  memcpy(r.lane, v.lane, sizeof r);
  return r;
}
inline int32_t sum(VecI v) {
  int32_t s = 0;
  MLF_EACH_LANE s += v.lane[i];
  return s;
}
// 2^n as a float, n in -126..127.
inline VecF exp2_int(VecI n) {
  VecF r;
  MLF_EACH_LANE {
    const uint32_t bits = static_cast<uint32_t>(n.lane[i] + 127) << 23;
    memcpy(&r.lane[i], &bits, 4);
  }
  return r;
}
// The nearest integer as a float, ties to even.
inline VecF nearest(VecF v) {
  MLF_EACH_LANE v.lane[i] = nearbyintf(v.lane[i]);
  return v;
}
// p * 2^n for an integer n in -126..127; NaN where p is.
inline VecF times_exp2(VecF p, VecF n) { return mul(p, exp2_int(round_to_int(n))); }

// --- products of 16-bit codes: one step is 16 rows x 2 inputs of a tile, added up in int32 ------

struct WordWeights {
  int16_t code[16][2];
};
struct WordInputs {
  int16_t code[2];
};
inline WordWeights load_step_int16(const uint8_t* p) {
  WordWeights w;
  memcpy(w.code, p, sizeof w.code);
  return w;
}
inline WordInputs load_word_inputs(const int16_t* codes) {
  WordInputs a;
  memcpy(a.code, codes, sizeof a.code);
  return a;
}
inline void dot(VecI& acc, const WordWeights& w, const WordInputs& a) {
  MLF_EACH_LANE for (int k = 0; k < 2; ++k) acc.lane[i] += w.code[i][k] * a.code[k];
}
inline void store_words(int16_t* p, VecI v) {
  MLF_EACH_LANE p[i] = static_cast<int16_t>(v.lane[i]);
}

// --- integer dot products: one step is 16 rows x 4 inputs of a weight tile -------------------

constexpr int kDotRows = 1;         // activation rows per register tile
constexpr int32_t kInt8Offset = 0;  // what load_step_int8 adds to each code

struct DotWeights {
  int8_t code[16][4];
};
struct DotInputs {
  int8_t code[4];
};
struct DotSum {
  int32_t lane[16];
};

// Sums of 8-bit weights; `offset` takes back what kInt8Offset adds.
inline DotSum dot_begin(int32_t) { return DotSum{}; }
inline DotWeights load_step_int8(const uint8_t* p) {
  DotWeights w;
  memcpy(w.code, p, 64);
  return w;
}
inline DotInputs load_inputs(const int8_t* codes) {
  DotInputs a;
  memcpy(a.code, codes, 4);
  return a;
}
inline void dot(DotSum& acc, const DotWeights& w, const DotInputs& a) {
  MLF_EACH_LANE for (int k = 0; k < 4; ++k) acc.lane[i] += w.code[i][k] * a.code[k];
}
inline VecI dot_result(const DotSum& acc) {
  VecI r;
  memcpy(r.lane, acc.lane, sizeof r);
  return r;
}

// Sums of 4-bit weights, over one group at most. 64 bytes hold two steps: one in the low nibbles,
// one in the high ones.
using NibbleWeights = DotWeights;
using NibbleSum = DotSum;
inline NibbleSum nibble_begin() { return DotSum{}; }
inline void load_steps_int4(const uint8_t* p, NibbleWeights& low, NibbleWeights& high) {
  for (int i = 0; i < 64; ++i) {
    low.code[i / 4][i % 4] = static_cast<int8_t>(p[i] & 15);
    high.code[i / 4][i % 4] = static_cast<int8_t>(p[i] >> 4);
  }
}
inline DotInputs load_nibble_inputs(const int8_t* codes) { return load_inputs(codes); }

inline void store_codes(int8_t* p, VecI v) { MLF_EACH_LANE p[i] = static_cast<int8_t>(v.lane[i]); }
