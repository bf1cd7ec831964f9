// AVX-512 with VNNI, and AMX where there are many rows: a processor's matrix instructions multiply
// 16 rows of codes with one group of a tile of weights, which is their operand as it lies in
// memory.
//
// Compiled twice: as table amx, and as table amx_emulated, with which a machine that has AVX-512
// alone can test all but the instructions themselves.
#pragma once

#include "vec_avx512vnni.h"

#define MLF_MATRIX
#define MLF_AMX
constexpr int kMatrixRows = 16;  // rows of codes at once
constexpr int kMatrixSums = 4;   // products at once, to hide their latency
constexpr int64_t kPanelRows = kMatrixRows;
constexpr int64_t kBlockGroups = 32;  // 16 KB of codes, 4 KB of scales
constexpr int64_t kPackedGroupBytes = kGroup * kTileRows;

using MatrixSums = int32_t[kMatrixRows][kTileRows];

inline void panel_pack_int4(const uint8_t* lines, uint8_t* out) {
  for (int i = 0; i < kStepsPerGroup / 2; ++i) {
    DotWeights low, high;
    load_steps_int4(lines + i * kStepBytes, low, high);
    _mm512_store_si512(out + i * kStepBytes, low.rows);
    _mm512_store_si512(out + (i + kStepsPerGroup / 2) * kStepBytes, high.rows);
  }
}
inline VecI load_ints(const int32_t* p) { return {_mm512_load_si512(p)}; }

#if defined(__AMX_INT8__)

struct alignas(64) MatrixShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_nbytes[16] = {};
  uint8_t rows[16] = {};
};

// A thread's tile registers have their shapes while one of these lives: 0 to 3 are sums, 4 and 5
// are rows of codes, 6 and 7 groups of weights.
class PanelInputs {
 public:
  PanelInputs() = default;
  PanelInputs(const PanelInputs&) = delete;
  ~PanelInputs() {
    if (shaped_) _tile_release();
  }
  static int64_t most_rows(int64_t) { return INT64_MAX; }
  void take(const Activations& x, int64_t rows) {
    if (rows < kPanelRows || x.kind == ActivationKind::floating) return;
    shaped_ = true;
    MatrixShapes shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_nbytes[i] = i == 4 || i == 5 ? kGroup : kStepBytes;
      shapes.rows[i] = i < 6 ? kMatrixRows : kStepsPerGroup;
    }
    asm volatile("" : : "r"(&shapes) : "memory");  // the next line shows compilers 8 of 64 bytes
    _tile_loadconfig(&shapes);
  }

 private:
  bool shaped_ = false;
};

// out[i] = the sum over groups i, i + 4, i + 8 ... of 16 rows of codes . group, exactly;
// `codes` are those of group 0, rows `stride` bytes apart.
inline void matrix_products(const uint8_t* const* groups, int64_t count, const int8_t* codes,
                            int64_t stride, MatrixSums* out) {
  asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read
#define MLF_PRODUCT(i, a, w)                              \
  if (i < count - first) {                                \
    _tile_loadd(a, codes + (first + i) * kGroup, stride); \
    _tile_loadd(w, groups[first + i], kStepBytes);        \
    _tile_dpbssd(i, a, w);                                \
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t first = 0; first < count; first += kMatrixSums) {
    MLF_PRODUCT(0, 4, 6)
    MLF_PRODUCT(1, 5, 7)
    MLF_PRODUCT(2, 4, 6)
    MLF_PRODUCT(3, 5, 7)
  }
#undef MLF_PRODUCT
  _tile_stored(0, out[0], kStepBytes);
  if (count > 1) _tile_stored(1, out[1], kStepBytes);
  if (count > 2) _tile_stored(2, out[2], kStepBytes);
  if (count > 3) _tile_stored(3, out[3], kStepBytes);
  asm volatile("" ::: "memory");  // nor tile stores what they write
}

#else

struct PanelInputs {
  static int64_t most_rows(int64_t) { return INT64_MAX; }
  void take(const Activations&, int64_t) {}
};

inline void matrix_products(const uint8_t* const* groups, int64_t count, const int8_t* codes,
                            int64_t stride, MatrixSums* out) {
  for (int64_t i = 0; i < kMatrixSums && i < count; ++i) memset(out[i], 0, sizeof out[i]);
  for (int64_t group = 0; group < count; ++group) {
    const int8_t* weights = reinterpret_cast<const int8_t*>(groups[group]);
    for (int row = 0; row < kMatrixRows; ++row)
      for (int k = 0; k < kGroup; ++k)
        for (int n = 0; n < kTileRows; ++n)
          out[group % kMatrixSums][row][n] +=
              codes[row * stride + group * kGroup + k] *
              weights[k / kStep * kStepBytes + n * kStep + k % kStep];
  }
}

#endif
