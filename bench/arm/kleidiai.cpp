// Calls one of KleidiAI's kernels on zeros, as loops.cpp calls ours: kleidiai CASE REPEATS.
// Prints the multiply-accumulates of one call. bench/arm_kleidiai.py builds and counts it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define INT8(name) kai_run_matmul_clamp_f32_qai8dxp##name
#define DECLARE_INT8(name)                                                                  \
  extern "C" void INT8(name)(size_t, size_t, size_t, const void*, const void*, float*, size_t, \
                             size_t, float, float);
#define DECLARE_INT4(name)                                                                       \
  extern "C" void INT8(name)(size_t, size_t, size_t, size_t, const void*, const void*, float*, \
                             size_t, size_t, float, float);
DECLARE_INT8(4x4_qsi8cxp4x4_16x4_neon_dotprod)
DECLARE_INT8(4x8_qsi8cxp4x8_16x4_neon_i8mm)
DECLARE_INT8(1x4_qsi8cxp4x4_1x4_neon_dotprod)
DECLARE_INT4(4x4_qsi4c32p4x4_16x4_neon_dotprod)
DECLARE_INT4(4x8_qsi4c32p4x8_16x4x32_neon_i8mm)
DECLARE_INT4(1x8_qsi4c32p8x8_1x8_neon_dotprod)

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const size_t k = 1024;
  std::vector<char> left(64 * k * 4), right(64 * k * 4);  // larger than any packing
  std::vector<float> out(64 * 64);
  const bool gemv = std::strncmp(argv[1], "gemv", 4) == 0;
  const size_t m = gemv ? 1 : 64, n = 64;
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
#define RUN8(case, name)                                                                          \
  if (!std::strcmp(argv[1], case))                                                               \
    INT8(name)(m, n, k, left.data(), right.data(), out.data(), 4 * n, 4, -1e30f, 1e30f);
#define RUN4(case, name)                                                                           \
  if (!std::strcmp(argv[1], case))                                                                \
    INT8(name)(m, n, k, 32, left.data(), right.data(), out.data(), 4 * n, 4, -1e30f, 1e30f);
    RUN8("gemm_w8a8.dotprod", 4x4_qsi8cxp4x4_16x4_neon_dotprod)
    RUN8("gemm_w8a8.i8mm", 4x8_qsi8cxp4x8_16x4_neon_i8mm)
    RUN8("gemv_w8a8.dotprod", 1x4_qsi8cxp4x4_1x4_neon_dotprod)
    RUN4("gemm_int4.dotprod", 4x4_qsi4c32p4x4_16x4_neon_dotprod)
    RUN4("gemm_int4.i8mm", 4x8_qsi4c32p4x8_16x4x32_neon_i8mm)
    RUN4("gemv_int4.dotprod", 1x8_qsi4c32p8x8_1x8_neon_dotprod)
  }
  std::printf("%zu\n", m * n * k);
}
