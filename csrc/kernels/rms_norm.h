// Root mean square normalisation (Zhang & Sennrich 2019).

void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t cols,
              float eps) {
  for (int64_t row = 0; row < rows; ++row, x += cols, out += cols) {
    VecF squares = splat(0.0f);
    for_each_vec(cols, [&](int64_t i, int n) {
      const VecF v = load_upto(x + i, n);
      squares = fma(v, v, squares);
    });
    const VecF inverse = splat(1.0f / sqrtf(sum(squares) / static_cast<float>(cols) + eps));
    for_each_vec(cols, [&](int64_t i, int n) {
      store_upto(out + i, mul(mul(load_upto(x + i, n), inverse), load_upto(weight + i, n)), n);
    });
  }
}
