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
  const VecF shift = splat(max), divisor = splat(temperature);
  for (int64_t first = 0; first < n; first += kSoftmaxBlock, ++sums) {
    const int64_t left = n - first < kSoftmaxBlock ? n - first : kSoftmaxBlock;
    VecF total = splat(0.0f);
    for_each_vec(left, [&](int64_t i, int lanes) {
      const VecF v = load_upto(x + first + i, lanes);
      const VecF weight = keep_first(exp(div(sub(v, shift), divisor)), lanes, 0.0f);
      if (out) store_upto(out + first + i, weight, lanes);
      total = add(total, weight);
    });
    *sums = sum(total);
  }
}
