// The vector interface for ARM's matrix products (SMMLA), which take 2 rows x 8 inputs of both
// sides and add 2 x 2 sums: for many activation rows; few are multiplied as in vec_dotprod.h.
#pragma once

// Tiles for many rows (kernels/panel_dot.h) are rearranged: registers of 2 weight rows x 8 inputs.
// A pair of activation rows has its sums in registers of 2 x 2, outputs 0..7 of both rows in the
// first DotSum or VecF, outputs 8..15 in the second.
#define MLF_PAIRED_PANELS
#define MLF_PACKED_INT8
#include "vec_dotprod.h"

constexpr int kPanelRows = 8;
constexpr int kPanelStep = 2;

inline void panel_pack_steps(const int8x16_t* even, const int8x16_t* odd, uint8_t* out) {
  MLF_EACH_Q {
    const int32x4_t a = vreinterpretq_s32_s8(even[i]), b = vreinterpretq_s32_s8(odd[i]);
    vst1q_u8(out + 32 * i, vreinterpretq_u8_s32(vzip1q_s32(a, b)));
    vst1q_u8(out + 32 * i + 16, vreinterpretq_u8_s32(vzip2q_s32(a, b)));
  }
}
inline void panel_pack(const uint8_t* lines, uint8_t* out) {
  MLF_UNROLL for (int step = 0; step < 8; step += 2)
      panel_pack_steps(load_step_int8(lines + 64 * step).rows,
                       load_step_int8(lines + 64 * (step + 1)).rows, out + 64 * step);
}
inline void panel_pack_int4(const uint8_t* lines, uint8_t* out) {
  MLF_UNROLL for (int step = 0; step < 4; step += 2) {
    int8x16_t low[2][4], high[2][4];
    MLF_UNROLL for (int s = 0; s < 2; ++s) MLF_EACH_Q {
      const uint8x16_t both = vld1q_u8(lines + 64 * (step + s) + 16 * i);
      low[s][i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      high[s][i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
    panel_pack_steps(low[0], low[1], out + 64 * step);
    panel_pack_steps(high[0], high[1], out + 64 * (step + 4));
  }
}

// As dot_lane in vec_dotprod.h.
MLF_INLINE int32x4_t dot_pairs(int32x4_t sum, int8x16_t a, int8x16_t w) {
#if defined(__clang__)
  return vmmlaq_s32(sum, a, w);
#else
  asm("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(w));
  return sum;
#endif
}

// acc[m] += one rearranged group . codes of M rows, in pairs.
template <int M>
MLF_INLINE void panel_dot_group(const uint8_t* group, const int8_t* const* codes, DotSum* acc) {
  static_assert(M % 2 == 0, "rows come in pairs");
  MLF_UNROLL for (int eight = 0; eight < 4; ++eight) {
    int8x16_t a[M / 2];
    MLF_UNROLL for (int p = 0; p < M / 2; ++p) a[p] = vld1q_s8(codes[p] + 16 * eight);
    MLF_UNROLL for (int j = 0; j < 8; j += 2) {
      const uint8_t* at = group + 128 * eight + 16 * j;
      const int8x16_t w[2] = {vreinterpretq_s8_u8(vld1q_u8(at)),
                              vreinterpretq_s8_u8(vld1q_u8(at + 16))};  // one LDP
      MLF_UNROLL for (int i = 0; i < 2; ++i) MLF_UNROLL for (int p = 0; p < M / 2; ++p) {
        int32x4_t& sum = acc[2 * p + (j + i) / 4].rows[(j + i) % 4];
        sum = dot_pairs(sum, a[p], w[i]);
      }
    }
  }
}

// clang-format off
#define MLF_SMMLA4(x, y, z, t, a) \
  "smmla v" #x ".4s, v" #a        \
  ".16b, v12.16b\n"               \
  "smmla v" #y ".4s, v" #a        \
  ".16b, v13.16b\n"               \
  "smmla v" #z ".4s, v" #a        \
  ".16b, v14.16b\n"               \
  "smmla v" #t ".4s, v" #a ".16b, v15.16b\n"
#define MLF_SMMLA8(a, b) MLF_SMMLA4(0, 1, 2, 3, a) MLF_SMMLA4(4, 5, 6, 7, b)
#define MLF_LOAD4(from, first, second) \
  "ldp q12, q13, [" #from ", #" #first \
  "]\n"                                \
  "ldp q14, q15, [" #from ", #" #second "]\n"
// v0-v7 = 8 outputs, whose codes are at these offsets: 4 registers of one pair, 4 of the other.
#define MLF_HALF_DOT(o0, o1, o2, o3, o4, o5, o6, o7)                                           \
  MLF_LOAD4(x17, o0, o1)                                                                       \
  "ldp q8, q9, [x5]\n"                                                                         \
  "ldp q10, q11, [x6]\n" MLF_PANEL_BIAS MLF_SMMLA8(8, 10) MLF_LOAD4(x17, o2, o3)               \
      MLF_SMMLA4(0, 1, 2, 3, 9) "ldp q8, q9, [x5, #32]\n" MLF_SMMLA4(                          \
          4, 5, 6, 7, 11) "ldp q10, q11, [x6, #32]\n" MLF_LOAD4(x17, o4, o5) MLF_SMMLA8(8, 10) \
          MLF_LOAD4(x17, o6, o7) MLF_SMMLA8(9, 11) MLF_PANEL_UNBIAS
#define MLF_FIRST_DOT MLF_HALF_DOT(0, 32, 128, 160, 256, 288, 384, 416)
#define MLF_SECOND_DOT MLF_HALF_DOT(64, 96, 192, 224, 320, 352, 448, 480)
// v8 and v9 = the numbers of both pairs.
#define MLF_PAIRS(x, y) \
  "ldr q8, [x" #x       \
  "]\n"                 \
  "ldr q9, [x" #y "]\n"
// The totals of a half: four of each pair; and where the numbers of its outputs lie.
#define MLF_FIRST(use) use(16, 17, 18, 19, 24, 25, 26, 27, 0, 32)
#define MLF_SECOND(use) use(20, 21, 22, 23, 28, 29, 30, 31, 64, 96)
#define MLF_ADD(a, b, c, d, e, f, g, h, at, then) \
  MLF_PAIRS(9, 10) MLF_FMLA(a, 0, 8.4s) MLF_FMLA(b, 1, 8.4s) MLF_FMLA(c, 2, 8.4s) \
  MLF_FMLA(d, 3, 8.4s) MLF_FMLA(e, 4, 9.4s) MLF_FMLA(f, 5, 9.4s) MLF_FMLA(g, 6, 9.4s) \
  MLF_FMLA(h, 7, 9.4s)
#define MLF_ADD_SCALED(a, b, c, d, e, f, g, h, at, then) \
  MLF_PAIRS(9, 10) MLF_LOAD4(x2, at, then) MLF_FMUL(0, 8.4s) MLF_FMUL(1, 8.4s) \
  MLF_FMUL(2, 8.4s) MLF_FMUL(3, 8.4s) MLF_FMUL(4, 9.4s) MLF_FMUL(5, 9.4s) MLF_FMUL(6, 9.4s) \
  MLF_FMUL(7, 9.4s) MLF_FMLA(a, 0, 12.4s) MLF_FMLA(b, 1, 13.4s) MLF_FMLA(c, 2, 14.4s) \
  MLF_FMLA(d, 3, 15.4s) MLF_FMLA(e, 4, 12.4s) MLF_FMLA(f, 5, 13.4s) MLF_FMLA(g, 6, 14.4s) \
  MLF_FMLA(h, 7, 15.4s)
#define MLF_ADD_MINS(a, b, c, d, e, f, g, h, at, then) \
  MLF_PAIRS(13, 14) MLF_LOAD4(x3, at, then) MLF_FMLA(a, 12, 8.4s) MLF_FMLA(b, 13, 8.4s) \
  MLF_FMLA(c, 14, 8.4s) MLF_FMLA(d, 15, 8.4s) MLF_FMLA(e, 12, 9.4s) MLF_FMLA(f, 13, 9.4s) \
  MLF_FMLA(g, 14, 9.4s) MLF_FMLA(h, 15, 9.4s)
#define MLF_NEXT(size, x, y)      \
  "add x" #x ", x" #x ", #" #size \
  "\n"                            \
  "add x" #y ", x" #y ", #" #size "\n"
#define MLF_NEXT_UNITS MLF_NEXT(64, 5, 6) MLF_NEXT(16, 9, 10)
#define MLF_NEXT_SCALES "add x2, x2, #128\n"
#define MLF_NEXT_MINS "add x3, x3, #128\n" MLF_NEXT(16, 13, 14)
// clang-format on

// The rows of a panel in pairs, rearranged once for all tiles: for each pair and group, 4 registers
// of 2 rows x 8 inputs. The last of an odd number of rows is its own partner.
struct PanelInputs {
  static constexpr int kFloats = 4;       // two of each row
  static constexpr int64_t kRoom = 2048;  // pairs x groups: 192 KB of a thread's stack
  int64_t groups;
  alignas(64) int8_t codes[kRoom * 2 * kGroup];
  float scales[kRoom * kFloats], group_sums[kRoom * kFloats];

  static int64_t most_rows(int64_t groups) { return kRoom / groups * 2; }
  void take(const Activations& x, int64_t rows) {
    groups = x.groups();
    if (rows < kPanelRows || x.kind == ActivationKind::floating) return;
    for (int64_t row = 0; row < rows; row += 2) {
      const int64_t other = row + 1 < rows ? row + 1 : row;
      const Activations a = x.from_row(row), b = x.from_row(other);
      int8_t* out = codes + row * x.padded_cols();
      for (int64_t i = 0; i < x.padded_cols(); i += 16) {
        const int64x2_t both[2] = {vreinterpretq_s64_s8(vld1q_s8(a.codes + i)),
                                   vreinterpretq_s64_s8(vld1q_s8(b.codes + i))};
        vst1q_s8(out + 2 * i, vreinterpretq_s8_s64(vzip1q_s64(both[0], both[1])));
        vst1q_s8(out + 2 * i + 16, vreinterpretq_s8_s64(vzip2q_s64(both[0], both[1])));
      }
      const auto pair = [&](const float* of_a, const float* of_b, float* to) {
        for (int64_t group = 0; group < groups; ++group)
          vst1q_f32(to + 4 * group, vcombine_f32(vdup_n_f32(of_a[group]), vdup_n_f32(of_b[group])));
      };
      pair(a.scales, b.scales, scales + row / 2 * groups * kFloats);
      pair(a.group_sums, b.group_sums, group_sums + row / 2 * groups * kFloats);
    }
  }
};
MLF_INLINE float32x4_t unit_fma(float32x4_t a, const float* b, float32x4_t sum) {
  return vfmaq_f32(sum, a, vld1q_f32(b));
}
MLF_INLINE float32x4_t unit_mul(float32x4_t a, const float* b) {
  return vmulq_f32(a, vld1q_f32(b));
}

// One number per output, where the sums of a pair are: 2 x 16 floats.
inline void panel_store_outputs(float* p, VecF v) {
  MLF_EACH_Q {
    const float64x2_t both = vreinterpretq_f64_f32(v.q[i]);
    vst1q_f32(p + 8 * i, vreinterpretq_f32_f64(vzip1q_f64(both, both)));
    vst1q_f32(p + 8 * i + 4, vreinterpretq_f32_f64(vzip2q_f64(both, both)));
  }
}
// From pairs to rows.
inline void panel_unpair(VecF& even, VecF& odd) {
  VecF rows[2];
  const VecF pairs[2] = {even, odd};
  MLF_EACH_Q {
    const float64x2_t a = vreinterpretq_f64_f32(pairs[i / 2].q[2 * i % 4]);
    const float64x2_t b = vreinterpretq_f64_f32(pairs[i / 2].q[2 * i % 4 + 1]);
    rows[0].q[i] = vreinterpretq_f32_f64(vzip1q_f64(a, b));
    rows[1].q[i] = vreinterpretq_f32_f64(vzip2q_f64(a, b));
  }
  even = rows[0];
  odd = rows[1];
}
