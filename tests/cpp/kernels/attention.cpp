// Attention, page by page, with keys and values of every format.
#include <algorithm>

#include "harness.h"

namespace mlf::test {
namespace {

constexpr KVKind kKinds[] = {KVKind::fp32, KVKind::fp16, KVKind::int16, KVKind::int8};

// x as a half-precision number holds it: rounded to nearest, to even where it is in the middle.
double as_half(double x) {
  if (x == 0) return 0;
  const int exponent = std::max(std::ilogb(x), -14);
  const double quantum = std::ldexp(1.0, exponent - 10);
  return std::clamp(std::nearbyint(x / quantum) * quantum, -65504.0, 65504.0);
}

// The largest code of numbers of which products are added up, `terms` of them: in an int32.
float limit(KVKind kind, int64_t terms) {
  if (kind == KVKind::int8) return 127;
  int64_t code = 32767;
  while (code * code * terms > INT32_MAX) --code;
  return static_cast<float>(code);
}

// A row as a page keeps it; of values, `terms` is a page of tokens.
std::vector<double> kept(KVKind kind, const float* x, int64_t dim, int64_t terms) {
  std::vector<double> values(x, x + dim);
  if (kind == KVKind::fp16)
    for (double& value : values) value = as_half(value);
  if (!is_coded(kind)) return values;
  float largest = 0;
  for (int64_t i = 0; i < dim; ++i) largest = std::fmax(largest, std::fabs(x[i]));
  const float most = limit(kind, terms), inverse = largest > 0 ? most / largest : 0;
  for (int64_t i = 0; i < dim; ++i)
    values[i] = static_cast<double>(largest / most) * std::nearbyintf(x[i] * inverse);
  return values;
}

// A page with room, zeros at first.
struct Page {
  std::vector<uint8_t> bytes;
  PageView view;

  Page(KVKind kind, int dim) {
    view = {nullptr, kind, dim};
    bytes.assign(view.nbytes() + 64, 0);
    view.data = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
  void store(const KernelTable& table, const std::vector<float>& keys,
             const std::vector<float>& values) {
    const int64_t dim = view.head_dim;
    for (size_t slot = 0; slot < keys.size() / dim; ++slot)
      table.kv_store(&keys[slot * dim], &values[slot * dim], view, static_cast<int>(slot));
  }
};

template <class T>
T at(const uint8_t* bytes, int64_t index) {
  T value;
  std::memcpy(&value, bytes + index * sizeof(T), sizeof(T));
  return value;
}
double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

MLF_TEST(kv_store) {
  Random random(1);
  for (const KVKind kind : kKinds)
    for (const int dim : {2, 15, 16, 18, 64, 80}) {
      Page page(kind, dim);
      std::vector<float> keys = random.vector(kPageTokens * dim),
                         values = random.vector(kPageTokens * dim);
      for (int i = 0; i < dim; ++i) {
        keys[3 * dim + i] *= 1e-6f;   // subnormal halves
        values[4 * dim + i] *= 1e5f;  // too large for halves
        keys[5 * dim + i] = 0;
      }
      page.store(check.table(), keys, values);
      const std::string name = std::string(name_of(kind)) + " " + sizes({{"head_dim", dim}});
      const PageView& view = page.view;
      for (int64_t t = 0; t < kPageTokens; ++t) {
        const std::vector<double> key = kept(kind, &keys[t * dim], dim, dim),
                                  value = kept(kind, &values[t * dim], dim, kPageTokens);
        bool right = true;
        for (int64_t d = 0; d < dim; ++d) {
          double k, v;
          if (kind == KVKind::int8) {
            k = view.key_scales()[t] *
                static_cast<double>(at<int8_t>(view.keys() + t / 16 * view.key_tile_nbytes(),
                                               (d / 4 * 16 + t % 16) * 4 + d % 4));
            v = view.value_scales()[t] *
                static_cast<double>(
                    at<int8_t>(view.values(), (d / 16 * 32 + t / 4) * 64 + d % 16 * 4 + t % 4));
          } else if (kind == KVKind::int16) {
            k = view.key_scales()[t] *
                static_cast<double>(at<int16_t>(view.keys() + t / 16 * view.key_tile_nbytes(),
                                                (d / 2 * 16 + t % 16) * 2 + d % 2));
            v = view.value_scales()[t] *
                static_cast<double>(
                    at<int16_t>(view.values(), (d / 16 * 64 + t / 2) * 32 + d % 16 * 2 + t % 2));
          } else {
            const int64_t key_at = (t / 16 * dim + d) * 16 + t % 16,
                          value_at = t * view.padded_dim() + d;
            k = kind == KVKind::fp32 ? at<float>(view.keys(), key_at)
                                     : half_value(at<uint16_t>(view.keys(), key_at));
            v = kind == KVKind::fp32 ? at<float>(view.values(), value_at)
                                     : half_value(at<uint16_t>(view.values(), value_at));
          }
          right &= k == key[d] && v == value[d];
        }
        check.require(name + sizes({{", token", t}}), right);
      }
    }
}

// Queries, with room for their codes.
struct QueryRows {
  std::vector<float> values, scales;
  std::vector<uint8_t> codes;
  std::vector<int32_t> offsets;
  Queries view;

  QueryRows(const KernelTable& table, std::vector<float> x, int64_t queries, int64_t dim,
            KVKind kind)
      : values(std::move(x)),
        scales(queries),
        codes(queries * round_up(dim, 16) * 2),
        offsets(queries) {
    view = {values.data(), codes.data(), scales.data(), offsets.data()};
    table.attend_prepare(view, kind, queries, dim);
  }
};
// The largest code of a weight: of 16 bits where values have 8, so that a page of products fits
// int32.
double weight_limit(KVKind kind) {
  return kind == KVKind::int8 ? 127 * 256 : limit(kind, kPageTokens);
}

// The codes of queries, and what they stand for.
template <class Code>
void check_prepared(Check& check, KVKind kind, const std::vector<float>& x, int64_t queries,
                    int64_t dim) {
  const int64_t padded = round_up(dim, 16);
  const std::string name =
      std::string(name_of(kind)) + " " + sizes({{"queries", queries}, {"head_dim", dim}});
  const std::vector<Code> codes =
      check.run<Code>(name, queries * padded, [&](const KernelTable& table, Code* out) {
        QueryRows rows(table, x, queries, dim, KVKind::fp32);
        rows.view.codes = reinterpret_cast<uint8_t*>(out);
        table.attend_prepare(rows.view, kind, queries, dim);
      });
  const QueryRows rows(check.table(), x, queries, dim, kind);
  std::vector<float> got;
  std::vector<double> want, bound;
  for (int64_t i = 0; i < queries; ++i) {
    const std::vector<double> rounded = kept(kind, &x[i * dim], dim, dim);
    for (int64_t d = 0; d < padded; ++d) {
      got.push_back(rows.scales[i] * static_cast<float>(codes[i * padded + d]));
      want.push_back(d < dim ? rounded[d] : 0);
      bound.push_back(kUnit * std::fabs(want.back()));  // of the product
    }
  }
  check.close(name, got, want, bound);
}

MLF_TEST(attend_prepare) {
  Random random(2);
  for (const int64_t dim : {2, 15, 16, 33, 64, 128})
    for (const int64_t queries : {1, 3}) {
      const std::vector<float> x = random.vector(queries * dim, 5.0f);
      check_prepared<int8_t>(check, KVKind::int8, x, queries, dim);
      check_prepared<int16_t>(check, KVKind::int16, x, queries, dim);
    }
}

struct Attention {
  KVKind kind;
  int dim;
  int64_t queries;
  std::vector<int> tokens;  // that each query sees
};

// Many queries take another way through a page than a few, to the same bits.
void check_together(Check& check) {
  Random random(6);
  for (const KVKind kind : kKinds)
    for (const int dim : {18, 33, 64})
      for (const int64_t n : {8, 9, 96, 103})
        for (const bool whole : {true, false}) {
          const int64_t padded = round_up(dim, 16);
          std::vector<float> keys = random.vector(kPageTokens * dim, 2.0f),
                             values = random.vector(kPageTokens * dim, 3.0f),
                             q = random.vector(n * dim, 4.0f);
          std::vector<int> tokens(n, kPageTokens);
          if (!whole) {
            for (int& seen : tokens) seen = random.integer(0, kPageTokens);
            keys[90 * dim] = values[100 * dim] = NAN;  // of a key, of a value, and of a query
            q[7 * dim] = NAN;
          }
          for (int64_t d = 0; d < dim; ++d) keys[40 * dim + d] *= 9;  // far apart scores
          Page page(kind, dim);
          page.store(check.table(), keys, values);
          const auto attend = [&](const KernelTable& table, float* out, int64_t first,
                                  int64_t count) {
            const QueryRows rows(table,
                                 {q.begin() + first * dim, q.begin() + (first + count) * dim},
                                 count, dim, kind);
            table.attend_page(rows.view, page.view, tokens.data() + first,
                              {out, out + count * padded, out + count * (padded + 1)}, count, 0.2f);
          };
          const std::string name = std::string(name_of(kind)) + " " +
                                   sizes({{"head_dim", dim}, {"queries", n}}) +
                                   (whole ? " whole" : "");
          std::vector<float> together(n * (padded + 2));
          attend(check.table(), together.data(), 0, n);
          const auto number = [](float x) { return std::isnan(x) ? NAN : x; };  // NaN is NaN
          for (float& x : together) x = number(x);
          std::vector<float> alone(together.size());
          for (int64_t i = 0; i < n; ++i) {
            std::vector<float> one(padded + 2);
            attend(check.table(), one.data(), i, 1);
            for (int64_t d = 0; d < padded; ++d) alone[i * padded + d] = number(one[d]);
            for (int part = 0; part < 2; ++part)
              alone[n * (padded + part) + i] = number(one[padded + part]);
          }
          // where the sum is NaN, nothing else matters
          for (int64_t i = 0; i < n; ++i)
            if (std::isnan(alone[n * (padded + 1) + i])) {
              std::fill_n(together.begin() + i * padded, padded, 0.0f);
              std::fill_n(alone.begin() + i * padded, padded, 0.0f);
            }
          check.same(name + ", beside each alone", together, alone);
        }
}

MLF_TEST(attend_page) {
  Random random(3);
  std::vector<Attention> cases;
  for (const KVKind kind : kKinds) {
    for (const int tokens : {1, 3, 15, 16, 17, 127, 128})
      cases.push_back({kind, 64, 3, {tokens, tokens, tokens}});
    for (const int dim : {2, 15, 18, 80, 128}) cases.push_back({kind, dim, 2, {37, 128}});
    for (int64_t queries = 1; queries <= 9; ++queries) {
      std::vector<int> tokens;
      for (int64_t i = 0; i < queries; ++i)
        tokens.push_back(static_cast<int>(11 * i));  // none, too
      cases.push_back({kind, 18, queries, tokens});
    }
  }
  for (const Attention& c : cases) {
    const int64_t dim = c.dim, padded = round_up(dim, 16), n = c.queries;
    const std::string name =
        std::string(name_of(c.kind)) + " " +
        sizes({{"head_dim", dim}, {"queries", n}, {"tokens", c.tokens.back()}});
    const std::vector<float> q = random.vector(n * dim, 4.0f),
                             keys = random.vector(kPageTokens * dim, 2.0f),
                             values = random.vector(kPageTokens * dim, 3.0f);
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    const std::vector<float> got =
        check.run<float>(name, n * (padded + 2), [&](const KernelTable& table, float* out) {
          Page page(c.kind, c.dim);
          page.store(table, keys, values);
          const QueryRows rows(table, q, n, dim, c.kind);
          table.attend_page(rows.view, page.view, c.tokens.data(),
                            {out, out + n * padded, out + n * (padded + 1)}, n, scale);
        });
    std::vector<double> want(n * padded), bound(n * padded), sums, sum_bound;
    for (int64_t i = 0; i < n; ++i) {
      double largest = 0, size = 0, largest_v = 0, total = 0;
      // queries are rounded as keys are where those are codes
      const std::vector<double> query =
          kept(is_coded(c.kind) ? c.kind : KVKind::fp32, &q[i * dim], dim, dim);
      std::vector<double> scores;
      for (int t = 0; t < c.tokens[i]; ++t) {
        const std::vector<double> key = kept(c.kind, &keys[t * dim], dim, dim);
        double score = 0, sizes_of = 0;
        for (int64_t d = 0; d < dim; ++d) {
          score += query[d] * key[d] * scale;
          sizes_of += std::fabs(query[d] * key[d] * scale);
        }
        scores.push_back(score);
        size = std::fmax(size, sizes_of);
        largest = t ? std::fmax(largest, score) : score;
      }
      const double score_error = (dim + 4) * kUnit * size;
      // the largest score, in powers of two, is one of them
      const double got_max = got[n * padded + i];
      const bool right_max = c.tokens[i] == 0
                                 ? std::isinf(got_max) && got_max < 0
                                 : std::fabs(got_max - largest * 1.4426950408889634) <=
                                       1.45 * score_error + 2 * kUnit * std::fabs(got_max);
      check.require(name + ", largest", right_max);
      std::vector<double> sizes_of(padded);
      for (int t = 0; t < c.tokens[i]; ++t) {
        const std::vector<double> value = kept(c.kind, &values[t * dim], dim, kPageTokens);
        const double weight = std::exp(scores[t] - largest);
        total += weight;
        for (int64_t d = 0; d < dim; ++d) {
          want[i * padded + d] += weight * value[d];
          sizes_of[d] += std::fabs(weight * value[d]);
        }
        float largest_of = 0;
        for (int64_t d = 0; d < dim; ++d)
          largest_of = std::fmax(largest_of, std::fabs(values[t * dim + d]));
        largest_v = std::fmax(largest_v, largest_of);
      }
      const double relative =
          std::expm1(2.2 * score_error) + (c.tokens[i] + 16 + 2 * std::fabs(largest)) * kUnit;
      sums.push_back(total);
      sum_bound.push_back(relative * total);
      for (int64_t d = 0; d < dim; ++d) {
        bound[i * padded + d] = relative * sizes_of[d] + 1e-37;
        // weights, times the scales of values that are codes, are rounded
        if (is_coded(c.kind))
          bound[i * padded + d] += c.tokens[i] * 0.51 * largest_v / weight_limit(c.kind);
      }
    }
    check.close(name, {got.begin(), got.begin() + n * padded}, want, bound);
    check.close(name + ", sums", {got.begin() + n * (padded + 1), got.end()}, sums, sum_bound);
  }
  check_together(check);
}

// Several states at once give the bits of one after the other.
void check_chain(Check& check) {
  Random random(7);
  for (const int64_t queries : {1, 3, 17})
    for (const int64_t padded : {16, 64, 80})
      for (const int64_t count : {0, 1, 2, 31, 32, 33, 70}) {
        const int64_t n = queries * padded, stride = n + 2 * queries + 5;
        std::vector<float> into = random.vector(n + 2 * queries, 8.0f),
                           from = random.vector(count * stride, 8.0f);
        const auto view = [&](float* p) { return AttentionState{p, p + n, p + n + queries}; };
        if (count > 2) {
          from[2 * stride + n + queries] = NAN;                           // a sum
          for (int64_t i = 0; i < queries; ++i) from[n + i] = -INFINITY;  // nothing seen
        }
        std::vector<float> at_once = into, chain = into;
        check.table().attend_merge(view(at_once.data()), view(from.data()), count, stride, queries,
                                   padded);
        for (int64_t s = 0; s < count; ++s)
          check.table().attend_merge(view(chain.data()), view(from.data() + s * stride), 1, 0,
                                     queries, padded);
        check.same(
            sizes({{"queries", queries}, {"padded_dim", padded}, {"count", count}}) + ", at once",
            at_once, chain);
      }
}

MLF_TEST(attend_merge) {
  Random random(4);
  for (const int64_t queries : {1, 3, 15, 16, 17, 33})
    for (const int64_t padded : {16, 32, 80}) {
      const std::string name = sizes({{"queries", queries}, {"padded_dim", padded}});
      const int64_t n = queries * padded;
      std::vector<float> into = random.vector(n + 2 * queries, 8.0f),
                         from = random.vector(n + 2 * queries, 8.0f);
      for (int64_t i = n + queries; i < n + 2 * queries; ++i)
        into[i] = std::fabs(into[i]) + 1, from[i] = std::fabs(from[i]) + 1;
      const auto view = [&](float* p) { return AttentionState{p, p + n, p + n + queries}; };
      const std::vector<float> got =
          check.run<float>(name, n + 2 * queries, [&](const KernelTable& table, float* out) {
            std::copy(into.begin(), into.end(), out);
            std::vector<float> other = from;
            table.attend_merge(view(out), view(other.data()), 1, 0, queries, padded);
          });
      std::vector<double> want(got.size()), bound(got.size());
      for (int64_t i = 0; i < queries; ++i) {
        const double a = into[n + i], b = from[n + i], largest = std::fmax(a, b);
        const double keep = std::exp2(a - largest), take = std::exp2(b - largest);
        want[n + i] = largest;  // exactly
        const auto merge = [&](int64_t at) {
          want[at] = into[at] * keep + from[at] * take;
          // a power, whose exponent is rounded once, and two products
          bound[at] = (8 + 20) * kUnit * (std::fabs(into[at]) * keep + std::fabs(from[at]) * take);
        };
        merge(n + queries + i);
        for (int64_t d = 0; d < padded; ++d) merge(i * padded + d);
      }
      check.close(name, got, want, bound);
    }
  check_chain(check);
}

MLF_TEST(attend_finish) {
  Random random(5);
  for (const int64_t dim : {2, 15, 16, 18, 64, 80})
    for (const int64_t queries : {1, 3}) {
      const int64_t padded = round_up(dim, 16);
      const std::string name = sizes({{"queries", queries}, {"head_dim", dim}});
      std::vector<float> values = random.vector(queries * padded), sums = random.vector(queries);
      for (float& sum : sums) sum = std::fabs(sum) + 1;
      const std::vector<float> got =
          check.run<float>(name, queries * dim, [&](const KernelTable& table, float* out) {
            table.attend_finish({values.data(), nullptr, sums.data()}, out, queries, dim);
          });
      std::vector<double> want, bound;
      for (int64_t i = 0; i < queries * dim; ++i) {
        want.push_back(static_cast<double>(values[i / dim * padded + i % dim]) / sums[i / dim]);
        bound.push_back(2 * kUnit * std::fabs(want.back()) + 1e-44);
      }
      check.close(name, got, want, bound);
    }
}

}  // namespace
}  // namespace mlf::test
