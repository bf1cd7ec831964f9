// Kernels of rows of floats: norms, rounding, rotary embedding, softmax; and the machine's limits.
#include <limits>

#include "activation_buffer.h"
#include "harness.h"

namespace mlf::test {
namespace {

MLF_TEST(rms_norm) {
  Random random(1);
  for (const int64_t cols : {1, 2, 15, 16, 17, 31, 33, 576, 1100})
    for (const float spread : {0.0f, 1e-3f, 1.0f, 1e6f}) {
      const int64_t rows = 3;
      const float eps = 1e-5f;
      const std::string name =
          sizes({{"cols", cols}, {"log10 of spread", std::lround(std::log10(spread + 1e-9))}});
      const std::vector<float> x = random.vector(rows * cols, spread), w = random.vector(cols);
      const std::vector<float> got =
          check.run<float>(name, rows * cols, [&](const KernelTable& table, float* out) {
            table.rms_norm(x.data(), w.data(), out, rows, cols, eps);
          });
      std::vector<double> want, bound;
      for (int64_t row = 0; row < rows; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < cols; ++i) squares += std::pow(x[row * cols + i], 2.0);
        const double inverse = 1 / std::sqrt(squares / cols + eps);
        for (int64_t i = 0; i < cols; ++i) {
          want.push_back(x[row * cols + i] * inverse * w[i]);
          // the root halves the error of the mean
          bound.push_back((0.5 * (ceil_div(cols, 16) + 4) + 6) * kUnit * std::fabs(want.back()));
        }
      }
      check.close(name, got, want, bound);
    }
}

MLF_TEST(rope) {
  Random random(2);
  for (const int64_t dim : {2, 6, 30, 32, 34, 64, 80, 128})
    for (const int64_t heads : {1, 3}) {
      const std::string name = sizes({{"heads", heads}, {"head_dim", dim}});
      const std::vector<float> x = random.vector(heads * dim, 3.0f), cos = random.vector(dim / 2),
                               sin = random.vector(dim / 2);
      const std::vector<float> got =
          check.run<float>(name, heads * dim, [&](const KernelTable& table, float* out) {
            table.rope(x.data(), cos.data(), sin.data(), out, heads, dim);
          });
      std::vector<float> in_place = x;
      check.table().rope(in_place.data(), cos.data(), sin.data(), in_place.data(), heads, dim);
      check.same(name + ", in place", in_place, got);
      std::vector<double> want, bound;
      for (int64_t i = 0; i < heads * dim; ++i) {
        const int64_t half = dim / 2, at = i % dim % half;
        const bool first = i % dim < half;
        const double same = static_cast<double>(x[i]) * cos[at];
        const double other = static_cast<double>(x[first ? i + half : i - half]) * sin[at];
        want.push_back(first ? same - other : same + other);
        bound.push_back(2 * kUnit * (std::fabs(same) + std::fabs(other)));
      }
      check.close(name, got, want, bound);
    }
}

// Rows for rounding: any, ties, one large number, nothing, too little, not finite.
std::vector<std::vector<float>> rows_to_round(int64_t cols) {
  Random random(static_cast<uint32_t>(cols));
  std::vector<std::vector<float>> rows{random.vector(cols),         random.vector(cols, 1e-20f),
                                       random.vector(cols, 3e38f),  std::vector<float>(cols, 0.0f),
                                       random.vector(cols, 1e-36f), random.vector(cols)};
  rows.push_back(random.vector(cols));
  for (int64_t i = 0; i < cols; i += 40) rows.back()[i] = 1e4f;  // leaves little to the others
  rows.emplace_back();
  for (int64_t i = 0; i < cols; ++i) rows.back().push_back(i == 0 ? 127.0f : i % 200 - 99.5f);
  rows[5][cols / 2] = std::numeric_limits<float>::infinity();
  return rows;
}
std::vector<float> joined(const std::vector<std::vector<float>>& rows) {
  std::vector<float> all;
  for (const auto& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

// What a row is multiplied by to make codes, and their scale. All in float, as the kernels do.
struct Scale {
  float inverse, scale;
};
Scale scale_of(const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return {0.0f, NAN};
    largest = std::fmax(largest, std::fabs(x[i]));
  }
  if (largest < 0x1p-100f) return {0.0f, 0.0f};
  return {127 / largest, largest / 127};
}
int code_of(float x, Scale scale) {
  return scale.inverse == 0 ? 0 : static_cast<int>(std::nearbyintf(x * scale.inverse));
}
bool same_scale(float got, float want) {
  return got == want || (std::isnan(got) && std::isnan(want));
}

MLF_TEST(quantize_per_token) {
  for (const int64_t cols : {1, 2, 15, 16, 17, 31, 33, 576}) {
    const auto rows = rows_to_round(cols);
    const std::vector<float> x = joined(rows);
    const int64_t count = static_cast<int64_t>(rows.size());
    const std::string name = sizes({{"cols", cols}});
    std::vector<float> scales(count);
    const std::vector<int8_t> got =
        check.run<int8_t>(name, count * cols, [&](const KernelTable& table, int8_t* out) {
          table.quantize_per_token(x.data(), out, scales.data(), count, cols);
        });
    check.table().quantize_per_token(x.data(), std::vector<int8_t>(count * cols).data(),
                                     scales.data(), count, cols);
    std::vector<int8_t> want;
    for (int64_t row = 0; row < count; ++row) {
      const Scale scale = scale_of(rows[row].data(), cols);
      check.require(name + ", scale", same_scale(scales[row], scale.scale));
      for (const float value : rows[row])
        want.push_back(static_cast<int8_t>(code_of(value, scale)));
    }
    check.same(name, got, want);
  }
}

MLF_TEST(quantize_activations) {
  struct Rounding {
    ActivationKind kind;
    bool may_be_wide;
  };
  for (const auto [kind, may_be_wide] : {Rounding{ActivationKind::int8, true},
                                         {ActivationKind::int8_g32, true},
                                         {ActivationKind::int8_g32, false}})
    for (const int64_t cols : {1, 15, 31, 32, 33, 64, 100, 576}) {
      const auto rows = rows_to_round(cols);
      const std::vector<float> x = joined(rows);
      const int64_t count = static_cast<int64_t>(rows.size());
      const std::string name =
          sizes({{"kind", static_cast<int>(kind)}, {"may_be_wide", may_be_wide}, {"cols", cols}});
      ActivationBuffer buffer;
      buffer.resize(count, cols);
      Activations got = buffer.view(kind, cols);
      got.may_be_wide = may_be_wide;
      check.table().quantize_activations(x.data(), got, count);
      int wide_groups = 0;
      for (int64_t row = 0; row < count; ++row)
        for (int64_t group = 0; group < got.groups(); ++group) {
          const bool grouped = kind == ActivationKind::int8_g32;
          const float* values = rows[row].data() + group * kGroup;
          const int64_t n = std::min<int64_t>(kGroup, cols - group * kGroup);
          const Scale scale = grouped ? scale_of(values, n) : scale_of(rows[row].data(), cols);
          const int64_t at = row * got.groups() + group;
          const int8_t* codes = got.codes + row * got.padded_cols() + group * kGroup;
          const int8_t* low_codes = got.low_codes + row * got.padded_cols() + group * kGroup;
          int energy = 0, sum = 0, low_sum = 0;
          for (int64_t i = 0; i < n; ++i)
            energy += code_of(values[i], scale) * code_of(values[i], scale);
          const bool wide = grouped && may_be_wide && energy <= 7 * 127 * 127 / 4;
          wide_groups += wide;
          bool right = got.wide[at] == wide && same_scale(got.scales[at], scale.scale);
          for (int64_t i = 0; i < kGroup; ++i) {
            const int code = i < n ? code_of(values[i], scale) : 0;
            const float rest =
                i < n && scale.inverse != 0 ? values[i] * scale.inverse - code : 0.0f;
            const int low = wide ? static_cast<int>(std::nearbyintf(rest * 254)) : 0;
            right &= codes[i] == code && low_codes[i] == low;
            sum += code;
            low_sum += low;
          }
          check.require(name + sizes({{", row", row}, {"group", group}}), right);
          const float of_group = std::fmaf(scale.scale * (1.0f / 254), static_cast<float>(low_sum),
                                           scale.scale * static_cast<float>(sum));
          check.require(name + ", sum", same_scale(got.group_sums[at], of_group));
        }
      check.require(name + ", wide groups occur",
                    wide_groups > 0 || kind == ActivationKind::int8 || !may_be_wide);
    }
}

MLF_TEST(block_max) {
  Random random(3);
  for (const int64_t n : {1, 15, 16, 17, 63, 64, 65, 130, 1000}) {
    std::vector<float> x = random.vector(n, 100.0f);
    if (n > 20) x[n / 2] = -std::numeric_limits<float>::infinity();
    const int64_t blocks = ceil_div(n, kSoftmaxBlock);
    std::vector<float> want(blocks, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < n; ++i)
      want[i / kSoftmaxBlock] = std::fmax(want[i / kSoftmaxBlock], x[i]);
    const std::string name = sizes({{"n", n}});
    check.same(name,
               check.run<float>(name, blocks,
                                [&](const KernelTable& table, float* out) {
                                  table.block_max(x.data(), out, n);
                                }),
               want);
  }
}

MLF_TEST(softmax_weights) {
  Random random(4);
  for (const int64_t n : {1, 15, 16, 17, 64, 65, 1000})
    for (const float temperature : {0.1f, 1.0f, 30.0f}) {
      const std::vector<float> x = random.vector(n, 20.0f);
      float max = x[0];
      for (const float value : x) max = std::fmax(max, value);
      const int64_t blocks = ceil_div(n, kSoftmaxBlock);
      const std::string name =
          sizes({{"n", n}, {"temperature x 10", std::lround(10 * temperature)}});
      std::vector<float> got_sums(blocks);
      const std::vector<float> got =
          check.run<float>(name, n, [&](const KernelTable& table, float* out) {
            table.softmax_weights(x.data(), out, got_sums.data(), n, max, temperature);
          });
      const std::vector<float> sums = check.run<float>(
          name + ", sums alone", blocks, [&](const KernelTable& table, float* out) {
            table.softmax_weights(x.data(), nullptr, out, n, max, temperature);
          });
      std::vector<double> want, bound, want_sums(blocks), sum_bound(blocks);
      for (int64_t i = 0; i < n; ++i) {
        const double exponent = (static_cast<double>(x[i]) - max) / temperature;
        want.push_back(std::exp(exponent));
        // three roundings of the exponent, four units of the power; at least 2^-126
        bound.push_back((std::expm1(3 * kUnit * std::fabs(exponent)) + 4 * kUnit) * want[i] +
                        0x1p-125);
        want_sums[i / kSoftmaxBlock] += want[i];
        sum_bound[i / kSoftmaxBlock] += bound[i] + 8 * kUnit * want[i];
      }
      check.close(name, got, want, bound);
      check.close(name + ", sums", sums, want_sums, sum_bound);
    }
}

MLF_TEST(read_sum) {
  Random random(5);
  for (const int64_t n : {0, 1, 15, 63, 64, 65, 1000, 4099}) {
    std::vector<float> x(n);
    double want = 0;
    for (float& value : x) want += value = static_cast<float>(random.integer(-1000, 1000));
    check.require(sizes({{"n", n}}), check.table().read_sum(x.data(), n) == want);
  }
}

MLF_TEST(peak_dot) {
  int32_t sink;
  const int64_t one = check.table().peak_dot(1, &sink), many = check.table().peak_dot(1000, &sink);
  check.require("products", one > 0 && many == 1000 * one);
}

MLF_TEST(peak_fma) {
  float sink;
  const int64_t one = check.table().peak_fma(1, &sink), many = check.table().peak_fma(1000, &sink);
  check.require("multiply-adds", one > 0 && many == 1000 * one);
  check.require("each chain ends at 2", sink == 2.0f * static_cast<float>(one));
}

}  // namespace
}  // namespace mlf::test
