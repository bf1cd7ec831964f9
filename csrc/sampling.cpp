#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
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

// Sums of the weights of each block of tokens, in float; the weights themselves where they are
// asked for: of most blocks nobody wants to know more than the sum, and memory for all of them
// would push other things out of the caches.
class Weights {
 public:
  Weights(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
          double temperature, const ForShares& for_shares)
      : kernels_(kernels),
        logits_(logits),
        vocab_(vocab),
        max_(max),
        temperature_(static_cast<float>(std::clamp(temperature, kMinTemperature, kMaxTemperature))),
        sums_(ceil_div(vocab, kSoftmaxBlock)) {
    for_shares(blocks(), [&](Share mine) {
      const int64_t first = mine.begin * kSoftmaxBlock;
      kernels.softmax_weights(logits + first, nullptr, sums_.data() + mine.begin,
                              std::min(mine.end * kSoftmaxBlock, vocab) - first, max, temperature_);
    });
    total_ = std::accumulate(sums_.begin(), sums_.end(), 0.0);
  }
  int64_t vocab() const { return vocab_; }
  int64_t blocks() const { return sums_.size(); }
  float sum(int64_t block) const { return sums_[block]; }
  double total() const { return total_; }

  // Call visit(token, weight) for the tokens of a block.
  template <class Visit>
  void for_each(int64_t block, Visit visit) const {
    float weights[kSoftmaxBlock], sum;
    const int64_t first = block * kSoftmaxBlock;
    const int64_t count = std::min<int64_t>(kSoftmaxBlock, vocab_ - first);
    kernels_.softmax_weights(logits_ + first, weights, &sum, count, max_, temperature_);
    for (int64_t i = 0; i < count; ++i) visit(first + i, weights[i]);
  }
  // ... for tokens of at least some weight.
  template <class Visit>
  void for_each_likely(float least, Visit visit) const {
    for (int64_t block = 0; block < blocks(); ++block) {
      if (sums_[block] < least) continue;
      for_each(block, [&](int64_t token, float weight) {
        if (weight >= least) visit(token, weight);
      });
    }
  }

 private:
  const KernelTable& kernels_;
  const float* logits_;
  const int64_t vocab_;
  const float max_, temperature_;
  std::vector<float> sums_;
  double total_;
};

// A weight such that the tokens from there on sum to at least p * total: the fewer the better, as
// they are weighed in double then. Tokens of less than (1 - p) / vocab of the total together weigh
// less than 1 - p, and need not be tried.
float top_p_bound(const Weights& weights, double p) {
  const double wanted = p * weights.total() / (1 - kSlack), rest = (1 - p) * weights.total();
  // Mostly, few tokens have nearly all of the weight, and few blocks need to be looked at.
  const float often = static_cast<float>(rest / 64);
  double sum = 0;
  weights.for_each_likely(often, [&](int64_t, float weight) { sum += weight; });
  if (sum >= wanted) return often;

  // Else sums of the weights that agree in their first bits: of eight steps per power of two.
  const auto bits = [](float weight) {
    uint32_t all;
    std::memcpy(&all, &weight, sizeof all);
    return all >> 20;
  };
  const float least = static_cast<float>(rest / static_cast<double>(weights.vocab()));
  const uint32_t last = bits(least);
  std::vector<double> sums(bits(1.0f) - last + 2);  // the largest weight is 1, but for rounding
  weights.for_each_likely(least, [&](int64_t, float weight) {
    sums[std::min<size_t>(bits(weight) - last, sums.size() - 1)] += weight;
  });
  sum = 0;
  for (size_t i = sums.size(); i-- > 1;) {
    sum += sums[i];
    if (sum < wanted) continue;
    const uint32_t all = (last + static_cast<uint32_t>(i)) << 20;
    float bound;
    std::memcpy(&bound, &all, sizeof bound);
    return bound;
  }
  return least;
}

int64_t draw_from_all(const Weights& weights, double uniform) {
  const double target = weights.total() * (1 - uniform);
  double before = 0;
  int64_t block = 0;
  while (block + 1 < weights.blocks() && before + weights.sum(block) < target)
    before += weights.sum(block++);
  int64_t found = block * kSoftmaxBlock;
  weights.for_each(block, [&](int64_t token, float weight) {
    if (weight < kImpossible || before >= target) return;
    before += weight;
    found = token;  // the last one where the block's sum was rounded up
  });
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
  return kept.back().token;
}

std::vector<float> block_maxima(const KernelTable& kernels, const float* logits, int64_t vocab,
                                const ForShares& for_shares) {
  std::vector<float> maxima(ceil_div(vocab, kSoftmaxBlock));
  for_shares(maxima.size(), [&](Share mine) {
    const int64_t first = mine.begin * kSoftmaxBlock;
    kernels.block_max(logits + first, maxima.data() + mine.begin,
                      std::min(mine.end * kSoftmaxBlock, vocab) - first);
  });
  return maxima;
}

// The first of the largest logits; of logits that are no numbers, any.
int64_t likeliest(const KernelTable& kernels, const float* logits, int64_t vocab,
                  const ForShares& for_shares) {
  const std::vector<float> maxima = block_maxima(kernels, logits, vocab, for_shares);
  const auto block = std::max_element(maxima.begin(), maxima.end());
  const int64_t first = (block - maxima.begin()) * kSoftmaxBlock;
  const float* begin = logits + first;
  const float* end = logits + std::min(first + kSoftmaxBlock, vocab);
  const float* found = std::find(begin, end, *block);
  return found == end ? first : found - logits;
}

// Whether all logits are finite or minus infinity.
bool all_countable(const float* logits, int64_t vocab) {
  uint32_t others = 0;  // an exponent of all ones; a loop that compilers make vectors of
  for (int64_t i = 0; i < vocab; ++i) {
    uint32_t bits;
    std::memcpy(&bits, logits + i, sizeof bits);
    others |= (bits & 0x7f800000) == 0x7f800000 && bits != 0xff800000;
  }
  return others == 0;
}

// Call visit(i) for the logits of at least `least`, in order.
template <class Visit>
void for_each_from(float least, const float* logits, int64_t vocab,
                   const std::vector<float>& maxima, Visit visit) {
  for (size_t block = 0; block < maxima.size(); ++block) {
    if (maxima[block] < least) continue;
    const int64_t first = static_cast<int64_t>(block) * kSoftmaxBlock;
    for (int64_t i = first; i < std::min(first + kSoftmaxBlock, vocab); ++i)
      if (logits[i] >= least) visit(i);
  }
}

// The k-th largest logit. The k-th largest of the blocks' maxima is at most that, so only logits
// from there on need to be sorted.
float kth_largest(const float* logits, int64_t vocab, int64_t k, const std::vector<float>& maxima) {
  std::vector<float> large;
  if (k > static_cast<int64_t>(maxima.size())) {
    large.assign(logits, logits + vocab);
  } else {
    std::vector<float> sorted = maxima;
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<>());
    for_each_from(sorted[k - 1], logits, vocab, maxima,
                  [&](int64_t i) { large.push_back(logits[i]); });
  }
  std::nth_element(large.begin(), large.begin() + k - 1, large.end(), std::greater<>());
  return large[k - 1];
}

// Keep the fewest, most likely candidates whose weights sum to at least p * total; of equal ones,
// those that come first.
void keep_top_p(Candidates& candidates, double p, double total) {
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  // All before `begin` are kept, none from `end` on; halve what is between them. A flat
  // distribution has thousands of candidates, and to sort them all would take as long as a tenth of
  // a step.
  constexpr int64_t kFew = 32;
  Candidates sorted = candidates;
  auto begin = sorted.begin(), end = sorted.end();
  double sum = 0;  // of those before `begin`
  while (end - begin > kFew) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, likelier);
    double half = 0;
    for (auto candidate = begin; candidate != middle; ++candidate) half += candidate->weight;
    if (sum + half >= p * total) {
      end = middle;
    } else {
      begin = middle;
      sum += half;
    }
  }
  std::sort(begin, end, likelier);
  while (begin + 1 < end && (sum += begin->weight) < p * total) ++begin;
  const Candidate last = *begin;
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                  [&](const Candidate& c) { return likelier(last, c); }),
                   candidates.end());
}

// The token at which the cumulated probability of what the filters keep reaches 1 - uniform; `max`
// is the largest logit, finite.
int64_t draw(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
             const Filters& filters, double uniform, const ForShares& for_shares) {
  Candidates candidates;
  const auto add = [&](int64_t token) {
    const double scaled = (static_cast<double>(logits[token]) - max) / filters.temperature;
    candidates.push_back({token, logits[token], std::exp(scaled)});
  };
  double total = 0;  // of the weights before top_p
  if (filters.top_k > 0 && filters.top_k < vocab) {
    const std::vector<float> maxima = block_maxima(kernels, logits, vocab, for_shares);
    for_each_from(kth_largest(logits, vocab, filters.top_k, maxima), logits, vocab, maxima, add);
    for (const Candidate& candidate : candidates) total += candidate.weight;
  } else {
    const Weights weights(kernels, logits, vocab, max, filters.temperature, for_shares);
    if (filters.top_p >= 1 && filters.min_p <= 0) return draw_from_all(weights, uniform);
    total = weights.total();
    const float least =
        filters.top_p < 1 ? top_p_bound(weights, filters.top_p) : static_cast<float>(filters.min_p);
    weights.for_each_likely(least * static_cast<float>(1 - kSlack),
                            [&](int64_t token, float) { add(token); });
  }
  if (filters.top_p < 1) keep_top_p(candidates, filters.top_p, total);
  if (filters.min_p > 0)
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                    [&](const Candidate& c) { return c.weight < filters.min_p; }),
                     candidates.end());
  return draw_from(candidates, uniform);
}

// NaN unless the largest logit is finite and none is no number.
double log_softmax(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
                   int64_t token, const ForShares& for_shares) {
  const Weights weights(kernels, logits, vocab, max, 1.0, for_shares);
  return static_cast<double>(logits[token] - max) - std::log(weights.total());
}

}  // namespace

double logprob(const KernelTable& kernels, const float* logits, int64_t vocab, int64_t token) {
  const float max = logits[likeliest(kernels, logits, vocab, for_one_share)];
  return log_softmax(kernels, logits, vocab, max, token, for_one_share);
}

Choice choose(const KernelTable& kernels, const float* logits, const float* chosen_from,
              int64_t vocab, const Filters& filters, double uniform, const ForShares& for_shares) {
  const int64_t first = likeliest(kernels, logits, vocab, for_shares);
  const double logprob = log_softmax(kernels, logits, vocab, logits[first], first, for_shares);
  Choice choice{first, logprob};
  if (!std::isfinite(logprob)) return choice;
  if (chosen_from != logits) {
    choice.token = likeliest(kernels, chosen_from, vocab, for_shares);
    if (!all_countable(chosen_from, vocab) || !std::isfinite(chosen_from[choice.token]))
      return {choice.token, NAN};
  }
  if (filters.temperature > 0)
    choice.token =
        draw(kernels, chosen_from, vocab, chosen_from[choice.token], filters, uniform, for_shares);
  choice.logprob = static_cast<double>(logits[choice.token] - logits[first]) + logprob;
  return choice;
}

Sampler::Sampler(const KernelTable& kernels, int64_t vocab, const Filters& filters,
                 double repetition_penalty, const std::vector<int64_t>& seen)
    : kernels_(kernels),
      filters_(filters),
      penalty_(static_cast<float>(repetition_penalty)),
      is_seen_(vocab) {
  if (repetition_penalty == 1) return;
  penalised_.resize(vocab);
  for (const int64_t token : seen) see(token);
}

Choice Sampler::choose(const float* logits, double uniform, const ForShares& for_shares) {
  const float* chosen_from = logits;
  if (!penalised_.empty()) {
    std::copy_n(logits, vocab(), penalised_.begin());
    for (const int64_t token : seen_) {
      float& value = penalised_[token];
      value = value < 0 ? value * penalty_ : value / penalty_;
    }
    chosen_from = penalised_.data();
  }
  const Choice choice =
      mlf::choose(kernels_, logits, chosen_from, vocab(), filters_, uniform, for_shares);
  if (!penalised_.empty() && !std::isnan(choice.logprob)) see(choice.token);
  return choice;
}

void Sampler::see(int64_t token) {
  if (is_seen_[token]) return;
  is_seen_[token] = true;
  seen_.push_back(token);
}

}  // namespace mlf
