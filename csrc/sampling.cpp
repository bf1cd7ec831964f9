#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace mlf {
namespace {

// What separates float weights from the exact ones, with room: used to find candidates that are
// then weighed in double.
constexpr double kSlack = 1e-4;
// Beyond these, float weights are 0 and 1, or all 1, already.
constexpr double kMinTemperature = 1e-30, kMaxTemperature = 1e30;
constexpr float kImpossible = 1e-30f;  // less than any weight that counts

struct Candidate {
  int64_t token;
  float logit;
  double weight;  // exp((logit - max) / temperature)
};
using Candidates = std::vector<Candidate>;

// Weights of all tokens, and sums of each block, in float.
struct Weights {
  std::vector<float> values, sums;  // values may be left out
  double total;
};

// In a buffer of each thread: fresh memory of this size would cost more than the arithmetic.
const Weights& weigh(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
                     double temperature, bool with_values) {
  thread_local Weights weights;
  if (with_values) weights.values.resize(vocab);
  weights.sums.resize(ceil_div(vocab, kSoftmaxBlock));
  kernels.softmax_weights(
      logits, with_values ? weights.values.data() : nullptr, weights.sums.data(), vocab, max,
      static_cast<float>(std::clamp(temperature, kMinTemperature, kMaxTemperature)));
  weights.total = std::accumulate(weights.sums.begin(), weights.sums.end(), 0.0);
  return weights;
}

// Call visit(token) for tokens of at least some weight.
template <class Visit>
void for_each_likely(const Weights& weights, float least, Visit visit) {
  const int64_t vocab = weights.values.size();
  for (size_t block = 0; block < weights.sums.size(); ++block) {
    if (weights.sums[block] < least) continue;
    const int64_t end = std::min<int64_t>((block + 1) * kSoftmaxBlock, vocab);
    for (int64_t token = block * kSoftmaxBlock; token < end; ++token)
      if (weights.values[token] >= least) visit(token);
  }
}

// A weight such that the tokens from there on sum to at least p * total: the fewer the better, but
// tokens of less than (1 - p) / vocab of the total together weigh less than 1 - p, and need not be
// tried.
float top_p_bound(const Weights& weights, double p) {
  const double vocab = static_cast<double>(weights.values.size());
  for (double tokens = 64; tokens < vocab; tokens *= 16) {
    const float least = static_cast<float>((1 - p) / tokens * weights.total);
    double sum = 0;
    for_each_likely(weights, least, [&](int64_t token) { sum += weights.values[token]; });
    if (sum * (1 - kSlack) >= p * weights.total) return least;
  }
  return static_cast<float>((1 - p) / vocab * weights.total);
}

int64_t draw_from_all(const Weights& weights, double uniform) {
  const double target = weights.total * (1 - uniform);
  const int64_t blocks = weights.sums.size(), vocab = weights.values.size();
  double before = 0;
  int64_t block = 0;
  while (block + 1 < blocks && before + weights.sums[block] < target)
    before += weights.sums[block++];
  const int64_t end = std::min((block + 1) * kSoftmaxBlock, vocab);
  int64_t found = block * kSoftmaxBlock;
  for (int64_t token = found; token < end && before < target; ++token) {
    if (weights.values[token] < kImpossible) continue;
    before += weights.values[token];
    found = token;  // the last one where the block's sum was rounded up
  }
  return found;
}

int64_t draw_from(const Candidates& kept, double uniform) {  // by ascending token
  double total = 0, reached = 0;
  for (const Candidate& candidate : kept) total += candidate.weight;
  const double target = total * (1 - uniform);
  for (const Candidate& candidate : kept) {
    reached += candidate.weight;
    if (reached >= target) return candidate.token;
  }
  if (kept.empty()) throw std::invalid_argument("max must be the largest logit");
  return kept.back().token;
}

// The k-th largest logit. The k-th largest of the blocks' maxima is at most that, so only logits
// from there on need to be sorted.
float kth_largest(const KernelTable& kernels, const float* logits, int64_t vocab, int64_t k) {
  std::vector<float> maxima(ceil_div(vocab, kSoftmaxBlock)), large;
  kernels.block_max(logits, maxima.data(), vocab);
  const int64_t blocks = maxima.size();
  if (k > blocks) {
    large.assign(logits, logits + vocab);
  } else {
    std::vector<float> sorted = maxima;
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<>());
    for (int64_t block = 0; block < blocks; ++block) {
      if (maxima[block] < sorted[k - 1]) continue;
      const int64_t end = std::min((block + 1) * kSoftmaxBlock, vocab);
      for (int64_t i = block * kSoftmaxBlock; i < end; ++i)
        if (logits[i] >= sorted[k - 1]) large.push_back(logits[i]);
    }
  }
  std::nth_element(large.begin(), large.begin() + k - 1, large.end(), std::greater<>());
  return large[k - 1];
}

// Keep the fewest, most likely candidates whose weights sum to at least p * total; of equal ones,
// those that come first.
void keep_top_p(Candidates& candidates, double p, double total) {
  const auto less_likely = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit < b.logit : a.token > b.token;
  };
  // A heap, because usually few are taken.
  std::make_heap(candidates.begin(), candidates.end(), less_likely);
  auto end = candidates.end();
  for (double sum = 0; end != candidates.begin() && sum < p * total;) {
    std::pop_heap(candidates.begin(), end, less_likely);
    sum += (--end)->weight;
  }
  candidates.erase(candidates.begin(), end);
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
}

}  // namespace

double logprob(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
               int64_t token) {
  const Weights& weights = weigh(kernels, logits, vocab, max, 1.0, false);
  return static_cast<double>(logits[token] - max) - std::log(weights.total);
}

int64_t draw(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
             const Filters& filters, double uniform) {
  Candidates candidates;
  const auto add = [&](int64_t token) {
    const double scaled = (static_cast<double>(logits[token]) - max) / filters.temperature;
    candidates.push_back({token, logits[token], std::exp(scaled)});
  };
  double total = 0;  // of the weights before top_p
  if (filters.top_k > 0 && filters.top_k < vocab) {
    const float least = kth_largest(kernels, logits, vocab, filters.top_k);
    for (int64_t i = 0; i < vocab; ++i)
      if (logits[i] >= least) add(i);
    for (const Candidate& candidate : candidates) total += candidate.weight;
  } else {
    const Weights& weights = weigh(kernels, logits, vocab, max, filters.temperature, true);
    if (filters.top_p >= 1 && filters.min_p <= 0) return draw_from_all(weights, uniform);
    total = weights.total;
    const float least =
        filters.top_p < 1 ? top_p_bound(weights, filters.top_p) : static_cast<float>(filters.min_p);
    for_each_likely(weights, least * static_cast<float>(1 - kSlack), add);
  }
  if (filters.top_p < 1) keep_top_p(candidates, filters.top_p, total);
  if (filters.min_p > 0)
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                    [&](const Candidate& c) { return c.weight < filters.min_p; }),
                     candidates.end());
  return draw_from(candidates, uniform);
}

}  // namespace mlf
