// The digits that kernels/ring/ makes of inputs, for their test: a warp, 128 inputs at a time.
#include "../../../kernels/ring/weights.cuh"

struct Arguments {
  const float* inputs;    // [warps][128]
  unsigned char* digits;  // [warps][256]
  float* units;           // [warps][32]
  int* sums;              // [warps][32]
  int warps;
};

KERNEL(digits, Arguments) {
  constexpr int kInputs = 4 * LANES, kChunk = chunk_inputs(KIND);
  const int lane = thread_id(), place = 4 * lane;
  for (int warp = 0; warp < arguments.warps; ++warp) {
    float values[4];
    for (int i = 0; i < 4; ++i) values[i] = arguments.inputs[warp * kInputs + place + i];
    unsigned char* chunk =
        arguments.digits + warp * 2 * kInputs + place / kChunk * digits_nbytes(KIND);
    arguments.units[warp * LANES + lane] =
        store_digits<KIND>(chunk, place % kChunk, values, arguments.sums[warp * LANES + lane]);
  }
}
