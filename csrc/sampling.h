// Choice of the next token. mobilellm_fast/sampling.py is the specification.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace mlf {

// Limits that change nothing: top_k = 0, top_p = 1, min_p = 0.
struct Filters {
  double temperature;  // > 0
  int64_t top_k;
  double top_p, min_p;
};

// The natural log of a token's probability under softmax(logits); `max` is the largest, finite.
double logprob(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
               int64_t token);

// Draw a token: the first, by id, at which the cumulated probability of what the filters keep
// reaches 1 - uniform; uniform in [0, 1).
int64_t draw(const KernelTable& kernels, const float* logits, int64_t vocab, float max,
             const Filters& filters, double uniform);

}  // namespace mlf
