#include <cstdlib>
#include <stdexcept>

#include "harness.h"

namespace {

using namespace mlf;
using namespace mlf::test;

constexpr int kSkipped = 77;

bool contains(const std::vector<std::string>& names, const std::string& name) {
  for (const std::string& each : names)
    if (each == name) return true;
  return false;
}

int run(const std::string& isa, const std::string& op) {
  if (!contains(compiled_isas(), isa)) {
    std::fprintf(stderr, "no table is called %s\n", isa.c_str());
    return 1;
  }
  if (!contains(supported_isas(), isa)) return kSkipped;
  const bool beside = isa != "scalar" && contains(compiled_isas(), "scalar");
  Check check(kernel_table(isa), beside ? &kernel_table("scalar") : nullptr);
  int count = 0;
  for (const Test& test : tests())
    if (op == test.op) {
      test.run(check);
      ++count;
    }
  std::printf("%s %s: %d checks, %d failed\n", isa.c_str(), op.c_str(), check.checks(),
              check.failures());
  if (count == 0) std::fprintf(stderr, "no test of %s\n", op.c_str());
  return count == 0 || check.checks() == 0 || check.failures() != 0;
}

int selected(const std::string& isa) {
  const std::string got = kernel_table("").name;
  if (got != isa) {
    std::fprintf(stderr, "dispatch selected %s, not %s\n", got.c_str(), isa.c_str());
    return 1;
  }
  for (const std::string& name : compiled_isas()) {
    bool refused = false;
    try {
      kernel_table(name);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    if (refused == contains(supported_isas(), name)) {
      std::fprintf(stderr, "%s was %s\n", name.c_str(), refused ? "refused" : "not refused");
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: test_kernels ISA OP | --selected ISA\n");
    return 2;
  }
  return std::strcmp(argv[1], "--selected") == 0 ? selected(argv[2]) : run(argv[1], argv[2]);
}
