// What this table could do at best: loops for csrc/machine_probe.cpp, not for models.

#if !defined(MLF_PEAK_DOT)
// An ISA without a faster one is held to the product that its kernels use.
constexpr int kPeakProducts = kTileRows * kStep;
struct PeakSum {
  DotSum v;
};
inline PeakSum peak_zero() { return {dot_begin(0)}; }
inline void peak_dot_step(PeakSum& sum, const uint8_t* codes) {
  asm volatile("" : : "r"(codes) : "memory");  // or the product would be computed once
  dot(sum.v, load_step_int8(codes), load_inputs(reinterpret_cast<const int8_t*>(codes)));
}
inline int32_t peak_value(const PeakSum& sum) { return ::mlf::sum(dot_result(sum.v)); }
constexpr int kPeakChains = 4;
#endif

// Does `rounds` rounds of int8 products into int32 sums; returns how many products that were.
int64_t peak_dot(int64_t rounds, int32_t* sink) {
  alignas(64) uint8_t codes[2 * kStepBytes];
  memset(codes, 1, sizeof codes);
  PeakSum sums[kPeakChains];  // enough chains to hide the latency of an instruction
  MLF_UNROLL for (int i = 0; i < kPeakChains; ++i) sums[i] = peak_zero();
  for (int64_t round = 0; round < rounds; ++round) {
    MLF_UNROLL for (int i = 0; i < kPeakChains; ++i) peak_dot_step(sums[i], codes);
  }
  *sink = 0;
  for (const PeakSum& each : sums) *sink ^= peak_value(each);
  return rounds * kPeakChains * kPeakProducts;
}

// The same with fp32 multiply-adds.
int64_t peak_fma(int64_t rounds, float* sink) {
  VecF sums[kVecRegisters];
  // Different starts, or equal chains would be computed once.
  MLF_UNROLL for (int i = 0; i < kVecRegisters; ++i) sums[i] = splat(static_cast<float>(i));
  const VecF half = splat(0.5f), one = splat(1.0f);  // sums go to 2: no overflow, no denormals
  for (int64_t round = 0; round < rounds; ++round) {
    MLF_UNROLL for (int i = 0; i < kVecRegisters; ++i) sums[i] = fma(sums[i], half, one);
  }
  *sink = 0;
  for (const VecF each : sums) *sink += sum(each);
  return rounds * kVecRegisters * 16;
}

// The sum of `count` values, read in a few streams: one leaves a core's line buffers half idle.
// Plain loops: compilers make vectors of these on every ISA, but not of the scalar table's VecF.
double read_sum(const float* values, int64_t count) {
  constexpr int kStreams = 4;
  const int64_t part = count / kStreams / 16 * 16;
  float sums[kStreams][16] = {};
  for (int64_t i = 0; i < part; i += 16)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < 16; ++j) sums[s][j] += values[s * part + i + j];
  double total = 0;
  for (const auto& lanes : sums)
    for (const float lane : lanes) total += lane;
  for (int64_t i = kStreams * part; i < count; ++i) total += values[i];
  return total;
}
