// Choice of the next token. mobilellm_fast/sampling.py is the specification.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace mlf {

// Limits that change nothing: top_k = 0, top_p = 1, min_p = 0.
struct Filters {
  double temperature;  // 0: the likeliest token, the first on ties
  int64_t top_k;
  double top_p, min_p;
};

struct Choice {
  int64_t token;
  double logprob;
};

// The natural log of a token's probability under softmax(logits). NaN if a logit is no number or
// the largest not finite.
double logprob(const KernelTable& kernels, const float* logits, int64_t vocab, int64_t token);

// Choose a token: the first, by id, at which the cumulated probability of what the filters keep of
// `chosen_from` (vocab logits, too) reaches 1 - uniform; uniform in [0, 1). With it its `logprob`,
// of `logits`; NaN if either's are broken as above. What takes long is done by `for_shares`; the
// result does not depend on it.
Choice choose(const KernelTable& kernels, const float* logits, const float* chosen_from,
              int64_t vocab, const Filters& filters, double uniform,
              const ForShares& for_shares = for_one_share);

// Chooses the tokens of one sequence, of which it remembers what a penalty needs to know. Not for
// concurrent use.
class Sampler {
 public:
  // Logits of the tokens `seen`, each in 0..vocab-1, and of those chosen later are divided by the
  // penalty where they are positive, else multiplied; 1 changes nothing.
  Sampler(const KernelTable& kernels, int64_t vocab, const Filters& filters,
          double repetition_penalty, const std::vector<int64_t>& seen);

  int64_t vocab() const { return static_cast<int64_t>(is_seen_.size()); }
  // As `choose`, which a penalty's overflow makes NaN, too.
  Choice choose(const float* logits, double uniform, const ForShares& for_shares = for_one_share);

 private:
  void see(int64_t token);

  const KernelTable& kernels_;
  const Filters filters_;
  const float penalty_;
  std::vector<bool> is_seen_;  // (vocab)
  std::vector<int64_t> seen_;
  std::vector<float> penalised_;  // (vocab), if there is a penalty
};

}  // namespace mlf
