// Softmax over a vocabulary, in blocks of kSoftmaxBlock logits.

void block_max(const float* x, float* out, int64_t n) {
  for (int64_t first = 0; first < n; first += kSoftmaxBlock, ++out) {
    const int64_t left = n - first < kSoftmaxBlock ? n - first : kSoftmaxBlock;
    VecF largest = splat(-INFINITY);
    for_each_vec(left, [&](int64_t i, int lanes) {
      largest = max(largest, keep_first(load_upto(x + first + i, lanes), lanes, -INFINITY));
    });
    *out = max_lane(largest);
  }
}

void softmax_weights(const float* x, float* out, float* sums, int64_t n, float max,
                     float temperature) {
  // e^(x / t) = 2^(x * (log2(e) / t)). Where that factor overflows, the largest logit keeps its
  // weight, because 0 times a finite factor is 0.
  const float log2_e = 1.44269504088896341f, scale = log2_e / temperature;
  const VecF shift = splat(max), factor = splat(scale < 1e38f ? scale : 1e38f);
  for (int64_t first = 0; first < n; first += kSoftmaxBlock, ++sums) {
    const int64_t left = n - first < kSoftmaxBlock ? n - first : kSoftmaxBlock;
    VecF total = splat(0.0f);
    for_each_vec(left, [&](int64_t i, int lanes) {
      const VecF v = load_upto(x + first + i, lanes);
      const VecF weight = keep_first(exp2_negative(mul(sub(v, shift), factor)), lanes, 0.0f);
      if (out) store_upto(out + first + i, weight, lanes);
      total = add(total, weight);
    });
    *sums = sum(total);
  }
}
