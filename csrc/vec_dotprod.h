// The vector interface for ARM's dot product instructions (SDOT).
#pragma once

#include "vec_q.h"

constexpr int kDotRows = 4;  // 16 integer sums, 4 inputs, 4 weights and their successors

struct DotWeights {
  int8x16_t rows[4];
};
struct DotInputs {
  int8x16_t four;
};
struct DotSum {
  int32x4_t rows[4];
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
  MLF_EACH_Q acc.rows[i] = vdotq_s32(acc.rows[i], w.rows[i], a.four);
}
inline VecI dot_result(const DotSum& acc) {
  return {{acc.rows[0], acc.rows[1], acc.rows[2], acc.rows[3]}};
}

// sum + w . lane of a. As assembly, because GCC moves the sums of the intrinsic between registers.
template <int Lane>
MLF_INLINE int32x4_t dot_lane(int32x4_t sum, int8x16_t w, int8x16_t a) {
#if defined(__clang__)
  return vdotq_laneq_s32(sum, w, a, Lane);
#else
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(w), "w"(a), "i"(Lane));
  return sum;
#endif
}

// One group alone, see kFloatBias.
using NibbleSum = DotSum;
inline DotSum group_begin() {
  const int32x4_t v = vdupq_n_s32(kFloatBias);
  return {{v, v, v, v}};
}
inline NibbleSum nibble_begin() { return group_begin(); }
inline VecF group_value(const DotSum& acc) {
  VecF r;
  MLF_EACH_Q r.q[i] = unbiased(acc.rows[i]);
  return r;
}

// acc[r * T + t] += one group of tile t . codes[r]; lines[t] is its first line. By lane, so that
// one load serves four steps.
template <int R, int T>
MLF_INLINE void dot_group(const uint8_t* const* lines, const int8_t* const* codes, DotSum* acc) {
  constexpr int W = R * T <= kDotRows ? T : R < kDotRows ? kDotRows / R : 1;  // tiles at a time
  MLF_UNROLL for (int first = 0; first < T; first += W) {
    MLF_UNROLL for (int half = 0; half < 2; ++half) {
      int8x16_t a[R];
      MLF_UNROLL for (int r = 0; r < R; ++r) a[r] = vld1q_s8(codes[r] + 16 * half);
      for_constants<4>([&](auto lane) {
        constexpr int kLane = decltype(lane)::value;
        MLF_UNROLL for (int t = first; t < first + W; ++t) {
          const DotWeights w = load_step_int8(lines[t] + (4 * half + kLane) * 64);
          MLF_UNROLL for (int r = 0; r < R; ++r) MLF_EACH_Q acc[r * T + t].rows[i] =
              dot_lane<kLane>(acc[r * T + t].rows[i], w.rows[i], a[r]);
        }
      });
    }
  }
}

// The same with 4-bit weights.
template <int R, int T>
MLF_INLINE void dot_group_int4(const uint8_t* const* lines, const int8_t* const* codes,
                               NibbleSum* acc) {
  constexpr int W = R * T <= kDotRows ? T : R < kDotRows ? kDotRows / R : 1;
  MLF_UNROLL for (int first = 0; first < T; first += W) {
    int8x16_t a[R], b[R];
    MLF_UNROLL for (int r = 0; r < R; ++r) {
      a[r] = vld1q_s8(codes[r]);
      b[r] = vld1q_s8(codes[r] + 16);
    }
    for_constants<4>([&](auto lane) {
      constexpr int kLane = decltype(lane)::value;
      MLF_UNROLL for (int t = first; t < first + W; ++t) {
        const DotWeights line = load_step_int8(lines[t] + 64 * kLane);
        MLF_EACH_Q {
          const uint8x16_t both = vreinterpretq_u8_s8(line.rows[i]);
          const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
          const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
          MLF_UNROLL for (int r = 0; r < R; ++r) {
            int32x4_t& sum = acc[r * T + t].rows[i];
            sum = dot_lane<kLane>(dot_lane<kLane>(sum, low, a[r]), high, b[r]);
          }
        }
      }
    });
  }
}
