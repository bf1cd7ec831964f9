// A table-driven test of the kernels: one function per op of csrc/kernels.h, run on one table.
//
//   test_kernels ISA OP           exit status 77 if this machine cannot run the table
//   test_kernels --selected ISA   dispatch must select it, and refuse what cannot run
//
// Every output is held to a plain reference, exactly or within a bound, and to the bits of the
// scalar table; outputs start as garbage, and what lies behind them must stay as it was.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "dispatch.h"

namespace mlf::test {

constexpr double kUnit = 0x1p-24;  // of a float's rounding

// The same numbers on every machine, from a linear congruential generator.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 1664525u + 1013904223u;
    return state_ ^ state_ >> 16;
  }
  int integer(int low, int high) {  // low..high
    return low + static_cast<int>(bits() % static_cast<uint32_t>(high - low + 1));
  }
  float uniform() {
    return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f;
  }  // [-1, 1]
  std::vector<float> vector(int64_t n, float spread = 1.0f) {
    std::vector<float> values(n);
    for (float& value : values) value = spread * uniform();
    return values;
  }

 private:
  uint32_t state_;
};

// Bytes that no kernel may leave where it has to write, nor touch elsewhere.
constexpr uint8_t kGarbage = 0xA5;
constexpr int64_t kBehind = 64;  // elements

class Check {
 public:
  Check(const KernelTable& table, const KernelTable* plain) : table_(table), plain_(plain) {}

  // Returns the n elements that call(table, out) writes; the scalar table must write the same.
  template <class T, class Call>
  std::vector<T> run(const std::string& what, int64_t n, Call call) {
    const std::vector<T> got = written<T>(what, table_, n, call);
    if (plain_) same(what + ", beside the scalar table", got, written<T>(what, *plain_, n, call));
    return got;
  }
  const KernelTable& table() const { return table_; }

  template <class T>
  void same(const std::string& what, const std::vector<T>& got, const std::vector<T>& want) {
    ++checks_;
    for (size_t i = 0; i < want.size(); ++i)
      if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0)
        return fail(what, i, static_cast<double>(got[i]), static_cast<double>(want[i]), 0);
  }
  // |got - want| <= bound; a comparison with NaN is false.
  void close(const std::string& what, const std::vector<float>& got,
             const std::vector<double>& want, const std::vector<double>& bound) {
    ++checks_;
    for (size_t i = 0; i < want.size(); ++i)
      if (!(std::fabs(got[i] - want[i]) <= bound[i]))
        return fail(what, i, got[i], want[i], bound[i]);
  }
  void require(const std::string& what, bool holds) {
    ++checks_;
    if (!holds) fail(what, 0, 0, 1, 0);
  }

  int checks() const { return checks_; }
  int failures() const { return failures_; }

 private:
  template <class T, class Call>
  std::vector<T> written(const std::string& what, const KernelTable& table, int64_t n, Call call) {
    std::vector<T> out(n + kBehind);
    std::memset(static_cast<void*>(out.data()), kGarbage, out.size() * sizeof(T));
    const std::vector<T> behind(out.begin() + n, out.end());
    call(table, out.data());
    same(what + ", behind its output", std::vector<T>(out.begin() + n, out.end()), behind);
    out.resize(n);
    return out;
  }
  void fail(const std::string& what, size_t at, double got, double want, double bound) {
    if (++failures_ <= 10)
      std::fprintf(stderr, "%s: [%zu] is %.9g, not %.9g (bound %.3g)\n", what.c_str(), at, got,
                   want, bound);
  }

  const KernelTable& table_;
  const KernelTable* plain_;
  int checks_ = 0, failures_ = 0;
};

// The tests, each of one op.
struct Test {
  const char* op;
  void (*run)(Check&);
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* op, void (*run)(Check&)) { tests().push_back({op, run}); }
};
#define MLF_TEST(op)                                                \
  static void test_##op(::mlf::test::Check& check);                 \
  static const ::mlf::test::Register register_##op(#op, test_##op); \
  static void test_##op(::mlf::test::Check& check)

// "rows=3 cols=17", for messages.
inline std::string sizes(std::initializer_list<std::pair<const char*, int64_t>> all) {
  std::string text;
  for (const auto& [name, value] : all)
    text += std::string(text.empty() ? "" : " ") + name + "=" + std::to_string(value);
  return text;
}

}  // namespace mlf::test
