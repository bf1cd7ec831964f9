// The vector interface for ARM's matrix products (SMMLA), which take 2 rows x 8 inputs of both
// sides and add 2 x 2 sums: for many activation rows; few are multiplied as in vec_dotprod.h.
#pragma once

#include "vec_dotprod.h"

// Tiles for many rows (kernels/panel_dot.h) are rearranged: registers of 2 weight rows x 8 inputs.
// A pair of activation rows has its sums in registers of 2 x 2, outputs 0..7 of both rows in the
// first DotSum or VecF, outputs 8..15 in the second.
#define MLF_PAIRED_PANELS
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

// acc[m] += one rearranged group . codes[m], for M rows, paired.
template <int M>
MLF_INLINE void panel_dot_group(const uint8_t* group, const int8_t* const* codes, DotSum* acc) {
  static_assert(M % 2 == 0, "rows come in pairs");
  MLF_UNROLL for (int half = 0; half < 2; ++half) {
    int8x16_t a[M / 2][2];
    MLF_UNROLL for (int p = 0; p < M / 2; ++p) {
      const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(codes[2 * p] + 16 * half));
      const int64x2_t y = vreinterpretq_s64_s8(vld1q_s8(codes[2 * p + 1] + 16 * half));
      a[p][0] = vreinterpretq_s8_s64(vzip1q_s64(x, y));
      a[p][1] = vreinterpretq_s8_s64(vzip2q_s64(x, y));
    }
    MLF_UNROLL for (int eight = 0; eight < 2; ++eight) {
      MLF_UNROLL for (int j = 0; j < 8; j += 2) {
        const uint8_t* at = group + 256 * half + 128 * eight + 16 * j;
        const int8x16_t w[2] = {vreinterpretq_s8_u8(vld1q_u8(at)),
                                vreinterpretq_s8_u8(vld1q_u8(at + 16))};  // one LDP
        MLF_UNROLL for (int i = 0; i < 2; ++i) MLF_UNROLL for (int p = 0; p < M / 2; ++p) {
          int32x4_t& sum = acc[2 * p + (j + i) / 4].rows[(j + i) % 4];
          sum = dot_pairs(sum, a[p][eight], w[i]);
        }
      }
    }
  }
}

// One number of each of two rows, where their sums are.
inline VecF panel_splat(float even, float odd) {
  const float32x4_t v = vcombine_f32(vdup_n_f32(even), vdup_n_f32(odd));
  return {{v, v, v, v}};
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
