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

// One group alone, see kFloatBias. Sums start by loads, each anew: pipes of loads are free where
// those of products are busy, and a move between registers would take one of the latter.
alignas(16) constexpr int32_t kFloatBiases[8] = {kFloatBias, kFloatBias, kFloatBias, kFloatBias,
                                                 kFloatBias, kFloatBias, kFloatBias, kFloatBias};
using NibbleSum = DotSum;
MLF_INLINE DotSum group_begin() {
  DotSum sum;
  MLF_EACH_Q asm volatile("ldr %q0, %1" : "=w"(sum.rows[i]) : "m"(*kFloatBiases));
  return sum;
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

// --- tiles times many rows (kernels/panel_dot.h) -------------------------------------------------

#include "panel_q.h"
#define MLF_PANEL_HALVES

#if !defined(MLF_PAIRED_PANELS)
// clang-format off
#define MLF_SDOT2(x, y, a, lane, v, w)              \
  "sdot v" #x ".4s, v" #v ".16b, v" #a ".4b[" #lane \
  "]\n"                                             \
  "sdot v" #y ".4s, v" #w ".16b, v" #a ".4b[" #lane "]\n"
#define MLF_SDOT8(lane, v, w)    \
  MLF_SDOT2(0, 1, 8, lane, v, w) \
  MLF_SDOT2(2, 3, 9, lane, v, w) MLF_SDOT2(4, 5, 10, lane, v, w) MLF_SDOT2(6, 7, 11, lane, v, w)
// v0-v7 = 8 outputs, whose codes are at these offsets, of rows 0, 0, 1, 1, 2, 2, 3, 3.
#define MLF_HALF_DOT(o0, o1, o2, o3, o4, o5, o6, o7) \
  "ldp q12, q13, [x17, #" #o0 "]\n"                                       \
  "ldr q8, [x5]\n"                                                        \
  "ldr q9, [x6]\n" MLF_PANEL_BIAS                                         \
  "ldr q10, [x7]\n"                                                       \
  "ldr q11, [x8]\n"                                                       \
  "ldp q14, q15, [x17, #" #o1 "]\n" MLF_SDOT8(0, 12, 13)                  \
  "ldp q12, q13, [x17, #" #o2 "]\n" MLF_SDOT8(1, 14, 15)                  \
  "ldp q14, q15, [x17, #" #o3 "]\n" MLF_SDOT8(2, 12, 13)                  \
  "ldp q12, q13, [x17, #" #o4 "]\n" MLF_SDOT2(0, 1, 8, 3, 14, 15)         \
  "ldr q8, [x5, #16]\n" MLF_SDOT2(2, 3, 9, 3, 14, 15)                     \
  "ldr q9, [x6, #16]\n" MLF_SDOT2(4, 5, 10, 3, 14, 15)                    \
  "ldr q10, [x7, #16]\n" MLF_SDOT2(6, 7, 11, 3, 14, 15)                   \
  "ldr q11, [x8, #16]\n"                                                  \
  "ldp q14, q15, [x17, #" #o5 "]\n" MLF_SDOT8(0, 12, 13)                  \
  "ldp q12, q13, [x17, #" #o6 "]\n" MLF_SDOT8(1, 14, 15)                  \
  "ldp q14, q15, [x17, #" #o7 "]\n" MLF_SDOT8(2, 12, 13)                  \
  MLF_SDOT8(3, 14, 15) MLF_PANEL_UNBIAS
#define MLF_FIRST_DOT MLF_HALF_DOT(0, 64, 128, 192, 256, 320, 384, 448)
#define MLF_SECOND_DOT MLF_HALF_DOT(32, 96, 160, 224, 288, 352, 416, 480)
// v8-v11 = a number of each row.
#define MLF_ROWS(x, y, z, t) \
  "ldr s8, [x" #x            \
  "]\n"                      \
  "ldr s9, [x" #y            \
  "]\n"                      \
  "ldr s10, [x" #z           \
  "]\n"                      \
  "ldr s11, [x" #t "]\n"
// The totals of a half: two of each row; and where the numbers of its outputs lie.
#define MLF_FIRST(use) use(16, 17, 20, 21, 24, 25, 28, 29, 0)
#define MLF_SECOND(use) use(18, 19, 22, 23, 26, 27, 30, 31, 32)
#define MLF_ADD(a, b, c, d, e, f, g, h, at) \
  MLF_ROWS(9, 10, 11, 12) MLF_FMLA(a, 0, 8.s[0]) MLF_FMLA(b, 1, 8.s[0]) \
  MLF_FMLA(c, 2, 9.s[0]) MLF_FMLA(d, 3, 9.s[0]) MLF_FMLA(e, 4, 10.s[0]) \
  MLF_FMLA(f, 5, 10.s[0]) MLF_FMLA(g, 6, 11.s[0]) MLF_FMLA(h, 7, 11.s[0])
#define MLF_ADD_SCALED(a, b, c, d, e, f, g, h, at) \
  MLF_ROWS(9, 10, 11, 12) "ldp q12, q13, [x2, #" #at "]\n" MLF_FMUL(0, 8.s[0]) \
  MLF_FMUL(1, 8.s[0]) MLF_FMUL(2, 9.s[0]) MLF_FMUL(3, 9.s[0]) MLF_FMUL(4, 10.s[0]) \
  MLF_FMUL(5, 10.s[0]) MLF_FMUL(6, 11.s[0]) MLF_FMUL(7, 11.s[0]) MLF_FMLA(a, 0, 12.4s) \
  MLF_FMLA(b, 1, 13.4s) MLF_FMLA(c, 2, 12.4s) MLF_FMLA(d, 3, 13.4s) MLF_FMLA(e, 4, 12.4s) \
  MLF_FMLA(f, 5, 13.4s) MLF_FMLA(g, 6, 12.4s) MLF_FMLA(h, 7, 13.4s)
#define MLF_ADD_MINS(a, b, c, d, e, f, g, h, at) \
  MLF_ROWS(13, 14, 15, 16) "ldp q14, q15, [x3, #" #at "]\n" MLF_FMLA(a, 14, 8.s[0]) \
  MLF_FMLA(b, 15, 8.s[0]) MLF_FMLA(c, 14, 9.s[0]) MLF_FMLA(d, 15, 9.s[0]) \
  MLF_FMLA(e, 14, 10.s[0]) MLF_FMLA(f, 15, 10.s[0]) MLF_FMLA(g, 14, 11.s[0]) \
  MLF_FMLA(h, 15, 11.s[0])
#define MLF_NEXT(size, x, y, z, t) \
  "add x" #x ", x" #x ", #" #size  \
  "\n"                             \
  "add x" #y ", x" #y ", #" #size  \
  "\n"                             \
  "add x" #z ", x" #z ", #" #size  \
  "\n"                             \
  "add x" #t ", x" #t ", #" #size "\n"
#define MLF_NEXT_UNITS MLF_NEXT(32, 5, 6, 7, 8) MLF_NEXT(4, 9, 10, 11, 12)
#define MLF_NEXT_SCALES "add x2, x2, #64\n"
#define MLF_NEXT_MINS "add x3, x3, #64\n" MLF_NEXT(4, 13, 14, 15, 16)
// clang-format on
#endif
