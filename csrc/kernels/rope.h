// Rotary position embedding (Su et al. 2021), in the half-split order of Hugging Face Llama.

void rope(const float* x, const float* cos, const float* sin, float* out, int64_t heads,
          int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t head = 0; head < heads; ++head, x += head_dim, out += head_dim) {
    for_each_vec(half, [&](int64_t i, int n) {
      const VecF a = load_upto(x + i, n), b = load_upto(x + half + i, n);
      const VecF c = load_upto(cos + i, n), s = load_upto(sin + i, n);
      store_upto(out + i, sub(mul(a, c), mul(b, s)), n);
      store_upto(out + half + i, add(mul(b, c), mul(a, s)), n);
    });
  }
}
