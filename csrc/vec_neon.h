// The vector interface for plain NEON: bytes are multiplied to 16 bits, two products are added
// there (2 * 127 * 127 fits), and pairs of those to 32 bits.
#pragma once

#include "vec_q.h"

constexpr int kDotRows = 2;  // 16 integer sums, each of two rows of weights

struct DotWeights {
  int8x16_t rows[4];
};
struct DotInputs {
  int8x16_t four;
};
// Registers of 2 rows x 2 sums of every second input pair.
struct DotSum {
  int32x4_t pairs[8];
};

inline DotSum dot_begin(int32_t) { return {}; }
inline DotWeights load_step_int8(const uint8_t* p) {
  DotWeights w;
  MLF_EACH_Q w.rows[i] = vreinterpretq_s8_u8(vld1q_u8(p + 16 * i));
  return w;
}
inline DotInputs load_inputs(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}
inline void dot(DotSum& acc, const DotWeights& w, const DotInputs& a) {
  MLF_EACH_Q {
    acc.pairs[2 * i] =
        vpadalq_s16(acc.pairs[2 * i], vmull_s8(vget_low_s8(w.rows[i]), vget_low_s8(a.four)));
    acc.pairs[2 * i + 1] = vpadalq_s16(acc.pairs[2 * i + 1], vmull_high_s8(w.rows[i], a.four));
  }
}
inline VecI dot_result(const DotSum& acc) {
  VecI r;
  MLF_EACH_Q r.q[i] = vpaddq_s32(acc.pairs[2 * i], acc.pairs[2 * i + 1]);
  return r;
}
inline DotSum group_begin() { return dot_begin(0); }
inline VecF group_value(const DotSum& acc) { return to_float(dot_result(acc)); }

// acc[r * T + t] += one group of tile t . codes[r]; lines[t] is its first line.
template <int R, int T>
MLF_INLINE void dot_group(const uint8_t* const* lines, const int8_t* const* codes, DotSum* acc) {
  MLF_UNROLL for (int t = 0; t < T; ++t) {
    MLF_UNROLL for (int step = 0; step < 8; step += 2) {
      const DotWeights w = load_step_int8(lines[t] + 64 * step);
      const DotWeights v = load_step_int8(lines[t] + 64 * (step + 1));
      MLF_UNROLL for (int r = 0; r < R; ++r) {
        const int8x16_t a = load_inputs(codes[r] + 4 * step).four;
        const int8x16_t b = load_inputs(codes[r] + 4 * step + 4).four;
        int32x4_t* pairs = acc[r * T + t].pairs;
        MLF_EACH_Q {
          const int16x8_t first = vmull_s8(vget_low_s8(w.rows[i]), vget_low_s8(a));
          const int16x8_t second = vmull_high_s8(w.rows[i], a);
          pairs[2 * i] =
              vpadalq_s16(pairs[2 * i], vmlal_s8(first, vget_low_s8(v.rows[i]), vget_low_s8(b)));
          pairs[2 * i + 1] = vpadalq_s16(pairs[2 * i + 1], vmlal_high_s8(second, v.rows[i], b));
        }
      }
    }
  }
}

// 4-bit weights: the 8 products of a group that meet in one int16 fit it, 8 * 15 * 127 = 15240.
struct NibbleSum {
  int16x8_t pairs[8];
};
inline NibbleSum nibble_begin() { return {}; }
inline VecF group_value(const NibbleSum& acc) {
  VecF r;
  MLF_EACH_Q r.q[i] =
      vcvtq_f32_s32(vpaddq_s32(vpaddlq_s16(acc.pairs[2 * i]), vpaddlq_s16(acc.pairs[2 * i + 1])));
  return r;
}
template <int R, int T>
MLF_INLINE void dot_group_int4(const uint8_t* const* lines, const int8_t* const* codes,
                               NibbleSum* acc) {
  MLF_UNROLL for (int t = 0; t < T; ++t) {
    MLF_UNROLL for (int step = 0; step < 4; ++step) {
      MLF_UNROLL for (int r = 0; r < R; ++r) {
        const int8x16_t a = load_inputs(codes[r] + 4 * step).four;
        const int8x16_t b = load_inputs(codes[r] + 4 * step + 16).four;
        int16x8_t* pairs = acc[r * T + t].pairs;
        MLF_EACH_Q {
          const uint8x16_t both = vld1q_u8(lines[t] + 64 * step + 16 * i);
          const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
          const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
          pairs[2 * i] = vmlal_s8(pairs[2 * i], vget_low_s8(low), vget_low_s8(a));
          pairs[2 * i] = vmlal_s8(pairs[2 * i], vget_low_s8(high), vget_low_s8(b));
          pairs[2 * i + 1] = vmlal_high_s8(pairs[2 * i + 1], low, a);
          pairs[2 * i + 1] = vmlal_high_s8(pairs[2 * i + 1], high, b);
        }
      }
    }
  }
}
