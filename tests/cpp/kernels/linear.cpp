// linear, swiglu and embed, with weights of every kind.
#include "matrices.h"

namespace mlf::test {
namespace {

struct Product {
  ActivationKind activation;
  int64_t rows, outputs, cols;
  Fill weights, inputs;
  bool may_be_wide = true;  // groups of inputs
};

// Remainders of every tile, panel and block of groups; and extremes of one sign, which saturate
// first, over the longest sums.
std::vector<Product> products(ActivationKind activation) {
  std::vector<Product> all;
  const auto add = [&](int64_t rows, int64_t outputs, int64_t cols, Fill w, Fill x) {
    all.push_back({activation, rows, outputs, cols, w, x});
  };
  for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33, 67})
    add(rows, 40, 100, Fill::random, Fill::random);
  for (const int64_t cols : {1, 31, 32, 33, 63, 64, 1030})
    for (const int64_t rows : {1, 2, 19}) add(rows, 17, cols, Fill::random, Fill::random);
  for (const int64_t outputs : {1, 15, 16, 65, 97})
    for (const int64_t rows : {1, 18}) add(rows, outputs, 33, Fill::random, Fill::random);
  all.push_back({activation, 66, 16, 2112, Fill::random, Fill::random});  // more than a panel has
  for (const Fill weights : kFills)
    for (const Fill inputs : {Fill::largest, Fill::smallest, Fill::mixed})
      for (const int64_t rows : {1, 2, 4, 18}) add(rows, 16, 1088, weights, inputs);
  if (activation == ActivationKind::int8_g32)
    for (const int64_t rows : {1, 2, 3, 8, 19, 67})
      all.push_back({activation, rows, 40, 100, Fill::random, Fill::random, false});
  return all;
}

std::string name_of(const Product& p, WeightKind kind) {
  return sizes({{"kind", static_cast<int>(kind)},
                {"activation", static_cast<int>(p.activation)},
                {"rows", p.rows},
                {"outputs", p.outputs},
                {"cols", p.cols},
                {"weights", static_cast<int>(p.weights)},
                {"inputs", static_cast<int>(p.inputs)},
                {"may_be_wide", p.may_be_wide}});
}

// What is exact, and how far a kernel may be from it, per output.
struct Exact {
  std::vector<double> values, bound;
};
Exact exact_product(const Inputs& x, const Matrix& w, int64_t rows, ActivationKind activation) {
  const int64_t outputs = w.weight.rows, cols = w.weight.cols, groups = w.groups();
  Exact exact{std::vector<double>(rows * outputs), std::vector<double>(rows * outputs)};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < outputs; ++n) {
      double total = 0, size = 0;
      if (activation == ActivationKind::floating) {
        for (int64_t k = 0; k < cols; ++k) {
          const double term = x.values[row * cols + k] * w.values[w.at(n, k)];
          total += term;
          size += std::fabs(term);
        }
        // 16 chains, each rounded once per term, and their sum
        exact.bound[row * outputs + n] = (ceil_div(cols, 16) + 5) * kUnit * size;
      } else {
        for (int64_t group = 0; group < groups; ++group) {
          double dot = 0, sum = 0;  // of the group: exact, but for the scales
          for (int64_t k = group * kGroup; k < cols && k < (group + 1) * kGroup; ++k) {
            dot += x.values[row * cols + k] * w.codes[w.at(n, k)];
            sum += x.values[row * cols + k];
          }
          const double scaled = dot * w.scales[n * groups + group];
          const double least = sum * w.mins[n * groups + group];
          total += scaled + least;
          size += std::fabs(scaled) + std::fabs(least);
          // codes and low codes are added up apart, and may cancel
          double apart = 0;
          for (int64_t k = group * kGroup; k < cols && k < (group + 1) * kGroup; ++k)
            apart += std::fabs(x.values[row * cols + k] * w.codes[w.at(n, k)]);
          size += 0.01 * apart * w.scales[n * groups + group];
        }
        exact.bound[row * outputs + n] = (2 * groups + 8) * kUnit * size;
      }
      exact.values[row * outputs + n] = total;
    }
  return exact;
}

// One scale per token: an exact integer, then the product with the scale of the token, then with
// that of the row.
std::vector<float> exact_w8a8(const Inputs& x, const Matrix& w, int64_t rows) {
  std::vector<float> out;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < w.weight.rows; ++n) {
      int64_t total = 0;
      for (int64_t k = 0; k < w.weight.cols; ++k)
        total += x.view.codes[row * x.view.padded_cols() + k] * w.codes[w.at(n, k)];
      const float scaled = static_cast<float>(total) * x.view.scales[row * x.view.groups()];
      out.push_back(scaled * w.scales[n * w.groups()]);
    }
  return out;
}

constexpr WeightKind kKinds[] = {WeightKind::fp32,     WeightKind::bf16,
                                 WeightKind::int8,     WeightKind::int8_g32,
                                 WeightKind::int4_g32, WeightKind::int4_sym_g32};

template <class Use>
void for_each_product(Use use) {
  uint32_t seed = 0;
  for (const WeightKind kind : kKinds) {
    std::vector<ActivationKind> activations{ActivationKind::floating};
    if (is_quantized(kind)) activations = {ActivationKind::int8, ActivationKind::int8_g32};
    for (const ActivationKind activation : activations)
      for (const Product& p : products(activation)) {
        const Matrix w = make_matrix(kind, p.outputs, p.cols, p.weights, ++seed);
        Random random(seed);
        use(p, w, make_floats(p.inputs, p.rows * p.cols, random));
      }
  }
}

MLF_TEST(linear) {
  for_each_product([&](const Product& p, const Matrix& w, const std::vector<float>& x) {
    const std::string name = name_of(p, w.weight.kind);
    const auto multiply = [&](const KernelTable& table, float* out, int64_t stride,
                              const Tiles& tiles, bool accumulate) {
      Inputs inputs;
      make_inputs(inputs, table, p.activation, x, p.rows, p.cols, p.may_be_wide);
      table.linear(inputs.view, w.weight, out, p.rows, stride, tiles, accumulate);
    };
    const Tiles all{0, w.weight.tiles()};
    const std::vector<float> got = check.run<float>(
        name, p.rows * p.outputs,
        [&](const KernelTable& table, float* out) { multiply(table, out, p.outputs, all, false); });
    Inputs inputs;
    make_inputs(inputs, check.table(), p.activation, x, p.rows, p.cols, p.may_be_wide);
    const Exact exact = exact_product(inputs, w, p.rows, p.activation);
    check.close(name, got, exact.values, exact.bound);
    if (w.weight.kind == WeightKind::int8 && p.activation == ActivationKind::int8)
      check.same(name + ", exactly", got, exact_w8a8(inputs, w, p.rows));

    // Some tiles, in rows that are farther apart, added to what is there.
    const int64_t stride = p.outputs + 3;
    std::vector<float> before(p.rows * stride, 0.25f), want = before;
    const Tiles some{all.end / 3, all.end - all.end / 4};
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t n = some.begin * 16; n < some.end * 16 && n < p.outputs; ++n)
        want[row * stride + n] += got[row * p.outputs + n];
    multiply(check.table(), before.data(), stride, some, true);
    check.same(name + ", some tiles, accumulated", before, want);
  });
}

double silu(double x) { return x / (1 + std::exp(-x)); }

MLF_TEST(swiglu) {
  for_each_product([&](const Product& p, const Matrix& gate, const std::vector<float>& x) {
    if (p.rows * p.outputs * p.cols > 100000) return;  // the products are those of linear
    const std::string name = name_of(p, gate.weight.kind);
    // Where the number of inputs is odd, gate and up are of two kinds, as in files they may be.
    const WeightKind kind = gate.weight.kind,
                     other = kind == WeightKind::int8 ? WeightKind::int4_g32 : WeightKind::int8,
                     up_kind = is_quantized(kind) && p.cols % 2 ? other : kind;
    const Matrix up = make_matrix(up_kind, p.outputs, p.cols, Fill::random, 7);
    Tiles tiles{0, gate.weight.tiles()};
    const auto call = [&](const KernelTable& table, const Activations& out) {
      Inputs inputs;
      make_inputs(inputs, table, p.activation, x, p.rows, p.cols, p.may_be_wide);
      table.swiglu(inputs.view, gate.weight, up.weight, out, p.rows, tiles);
    };
    ActivationBuffer buffer;
    buffer.resize(p.rows, p.outputs);
    const std::vector<float> got =
        check.run<float>(name, p.rows * p.outputs, [&](const KernelTable& table, float* out) {
          Activations values = buffer.view(ActivationKind::floating, p.outputs);
          values.values = out;
          call(table, values);
        });
    Inputs inputs;
    make_inputs(inputs, check.table(), p.activation, x, p.rows, p.cols, p.may_be_wide);
    const Exact g = exact_product(inputs, gate, p.rows, p.activation);
    const Exact u = exact_product(inputs, up, p.rows, p.activation);
    std::vector<double> want, bound;
    for (size_t i = 0; i < got.size(); ++i) {
      const double s = silu(g.values[i]), v = u.values[i];
      // slope at most 1.1; e^x, a sum, a quotient, a product; and far below 0, where e^x is clamped
      const double of_silu = 1.1 * g.bound[i] + 8 * kUnit * std::fabs(s) + 1e-35;
      want.push_back(s * v);
      bound.push_back(std::fabs(v) * of_silu + (std::fabs(s) + of_silu) * u.bound[i] +
                      kUnit * std::fabs(s * v) + 1e-35);
    }
    check.close(name, got, want, bound);

    // As codes: those of what came out as floats.
    Inputs rounded;
    make_inputs(rounded, check.table(), ActivationKind::int8_g32, got, p.rows, p.outputs,
                p.may_be_wide);
    const auto bytes = [&](const Activations& a) {
      std::vector<int8_t> both(a.codes, a.codes + p.rows * a.padded_cols());
      both.insert(both.end(), a.low_codes, a.low_codes + p.rows * a.padded_cols());
      return both;
    };
    const auto codes = [&] {
      ActivationBuffer fresh;
      fresh.resize(p.rows, p.outputs);
      Activations out = fresh.view(ActivationKind::int8_g32, p.outputs);
      out.may_be_wide = p.may_be_wide;
      call(check.table(), out);
      return bytes(out);
    };
    check.same(name + ", codes", codes(), bytes(rounded.view));

    // In other streams, fetching meanwhile what comes next: as the second of two passes does.
    tiles.ahead = gate.weight.nbytes() / kStepBytes * kStepBytes;
    tiles.stride = 2, tiles.phase = 1;
    check.same(name + ", from cache", codes(), bytes(rounded.view));
  });
}

MLF_TEST(embed) {
  uint32_t seed = 0;
  for (const WeightKind kind : kKinds)
    for (const int64_t cols : {1, 15, 16, 31, 32, 33, 100, 576}) {
      const Matrix table = make_matrix(kind, 35, cols, Fill::random, ++seed);
      for (const int64_t row : {0, 1, 15, 16, 34}) {
        const std::string name =
            sizes({{"kind", static_cast<int>(kind)}, {"cols", cols}, {"row", row}});
        std::vector<float> want;
        for (int64_t k = 0; k < cols; ++k) {
          const int64_t i = table.at(row, k);
          if (!is_quantized(kind)) {
            want.push_back(static_cast<float>(table.values[i]));
            continue;
          }
          const int64_t group = table.in_group(row, k);
          const float scaled = table.scales[group] * static_cast<float>(table.codes[i]);
          want.push_back(scaled + table.mins[group]);
        }
        check.same(name,
                   check.run<float>(
                       name, cols,
                       [&](const KernelTable& t, float* out) { t.embed(table.weight, row, out); }),
                   want);
      }
    }
}

}  // namespace
}  // namespace mlf::test
