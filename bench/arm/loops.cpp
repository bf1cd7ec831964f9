// Calls one kernel on random numbers, for bench/arm_model.py to trace: loops ISA CASE REPEATS.
// Prints the multiply-accumulates of one call.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "activation_buffer.h"
#include "dispatch.h"

namespace {

using namespace mlf;

// Numbers in [-1, 1) from a linear congruential generator.
struct Random {
  uint32_t state = 1;
  float next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
};

struct Case {
  const char* name;
  WeightKind kind;
  ActivationKind activation;
  int64_t rows, outputs, cols;
};

// Four tiles: times a panel of a prompt, or side by side, as decode reads them.
constexpr Case kCases[] = {
    {"gemm_w8a8", WeightKind::int8, ActivationKind::int8, 64, 64, 1024},
    {"gemm_int8", WeightKind::int8, ActivationKind::int8_g32, 64, 64, 1024},
    {"gemm_int4", WeightKind::int4_g32, ActivationKind::int8_g32, 64, 64, 1024},
    {"gemv_w8a8", WeightKind::int8, ActivationKind::int8, 1, 64, 1024},
    {"gemv_int8", WeightKind::int8, ActivationKind::int8_g32, 1, 64, 1024},
    {"gemv_int4", WeightKind::int4_g32, ActivationKind::int8_g32, 1, 64, 1024},
    {"gemv_int4_sym", WeightKind::int4_sym_g32, ActivationKind::int8_g32, 1, 64, 1024},
};

int run(const KernelTable& kernels, const Case& c, int repeats) {
  Random random;
  std::vector<float> x(c.rows * c.cols), out(c.rows * c.outputs);
  for (float& value : x) value = random.next();
  ActivationBuffer buffer;
  buffer.resize(c.rows, c.cols);
  const Activations activations = buffer.view(c.activation, c.cols);
  kernels.quantize_activations(x.data(), activations, c.rows);
  Weight weight{c.kind, c.outputs, c.cols, nullptr};
  std::vector<uint8_t> data(weight.nbytes() + 64);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(127.0f * random.next());
  weight.data = data.data() + (64 - reinterpret_cast<uintptr_t>(data.data()) % 64) % 64;
  for (int i = 0; i < repeats; ++i)
    kernels.linear(activations, weight, out.data(), c.rows, c.outputs, {0, weight.tiles()}, false);
  std::printf("%lld\n", static_cast<long long>(c.rows * c.outputs * c.cols));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4)
    for (const Case& c : kCases)
      if (std::strcmp(argv[2], c.name) == 0)
        return run(kernel_table(argv[1]), c, std::atoi(argv[3]));
  std::fprintf(stderr, "usage: loops ISA CASE REPEATS\n");
  return 2;
}
