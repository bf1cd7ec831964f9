// Pages of the KV cache that hold floats: fp32 and fp16.

// Visit 0..n-1 in blocks of Max and one of the rest: body(Constant<block>(), first). A rest in one
// block reads each key and value once: 3 query heads of a KV head are common.
template <int Max, class Body>
inline void for_each_whole_block(int64_t n, Body body, int64_t first = 0) {
  for (; first + Max <= n; first += Max) body(Constant<Max>(), first);
  if constexpr (Max > 1) for_each_whole_block<Max - 1>(n, body, first);
}

inline VecF load_kv(const float* p) { return load(p); }
inline VecF load_kv(const uint16_t* p) { return load_half(p); }
inline void store_kv(float* p, VecF v) { store(p, v); }
// Clamped, but for NaN: min() and max() return their second argument if either is NaN.
inline void store_kv(uint16_t* p, VecF v) {
  store_half(p, min(splat(65504.0f), max(splat(-65504.0f), v)));
}

template <class T>
struct FloatPage {
  static constexpr bool kHasTogether = false;
  // Queries x kSpan tiles of 16 tokens fill the accumulator registers; likewise queries x kSpan
  // vectors of outputs.
  static constexpr int kSpan = kVecRegisters >= 16 ? 4 : kVecRegisters >= 6 ? 1 : 2;
  static constexpr int kQueries = kVecRegisters >= 6 ? 6 : 2;
  static constexpr int kLines = sizeof(T);  // ahead, beside 4 vectors of elements

  const PageView& page;
  AheadOfPage& ahead;

  T* keys() const { return reinterpret_cast<T*>(page.keys()); }
  T* values() const { return reinterpret_cast<T*>(page.values()); }

  // What is not finite becomes a key of NaN and a value of 0: scores are masked for each query,
  // while values of tokens that a query does not see are multiplied by 0.
  void put(const float* key, const float* value, int slot) const {
    T* key_out = keys() + (slot / 16 * page.head_dim) * 16 + slot % 16;
    T* value_out = values() + slot * page.padded_dim();
    const bool finite = max_abs(key, page.head_dim) + max_abs(value, page.head_dim) < INFINITY;
    for_each_vec(page.head_dim, [&](int64_t i, int n) {
      T narrow[16];
      store_kv(narrow, finite ? load_upto(key + i, n) : splat(NAN));
      for (int j = 0; j < n; ++j) key_out[(i + j) * 16] = narrow[j];
      store_kv(value_out + i, finite ? load_upto(value + i, n) : splat(0.0f));  // padded with zeros
    });
  }

  static void prepare(const Queries&, int64_t, int64_t) {}

  // p[i] = scale * q[i] . keys, for the tiles that hold the first `tokens` tokens.
  template <int Q>
  void scores(const Queries& q, int tokens, float scale, float (*p)[kPageTokens]) const {
    const int64_t dim = page.head_dim;
    for_each_whole_block<kSpan>(ceil_div(tokens, 16), [&](auto span, int64_t tile) {
      constexpr int S = decltype(span)::value;
      const T* k = keys() + tile * dim * 16;
      VecF acc[Q][S];
      MLF_UNROLL for (int i = 0; i < Q; ++i) MLF_UNROLL for (int s = 0; s < S; ++s) acc[i][s] =
          splat(0.0f);
      for (int64_t d = 0; d < dim; ++d) {
        VecF key[S];
        ahead.fetch<(kLines * S + 3) / 4>();
        MLF_UNROLL for (int s = 0; s < S; ++s) key[s] = load_kv(k + (s * dim + d) * 16);
        MLF_UNROLL for (int i = 0; i < Q; ++i) {
          const VecF x = splat(q.values[i * dim + d]);
          MLF_UNROLL for (int s = 0; s < S; ++s) acc[i][s] = fma(x, key[s], acc[i][s]);
        }
      }
      MLF_UNROLL for (int i = 0; i < Q; ++i) MLF_UNROLL for (int s = 0; s < S; ++s)
          store(p[i] + 16 * (tile + s), mul(acc[i][s], splat(scale)));
    });
  }

  // What the softmax multiplies each token's weight by: nothing.
  const float* factors() const { return nullptr; }

  // out[i] = sum of p[i][t] * values[t] over the first `tokens` tokens.
  template <int Q>
  void mix(float (*p)[kPageTokens], const float*, int tokens, float* out) const {
    const int64_t padded = page.padded_dim();
    for_each_whole_block<kSpan>(padded / 16, [&](auto span, int64_t first) {
      constexpr int S = decltype(span)::value;
      const T* v = values() + 16 * first;
      VecF acc[Q][S];
      MLF_UNROLL for (int i = 0; i < Q; ++i) MLF_UNROLL for (int s = 0; s < S; ++s) acc[i][s] =
          splat(0.0f);
      for (int t = 0; t < tokens; ++t, v += padded) {
        VecF value[S];
        ahead.fetch<(kLines * S + 3) / 4>();
        MLF_UNROLL for (int s = 0; s < S; ++s) value[s] = load_kv(v + 16 * s);
        MLF_UNROLL for (int i = 0; i < Q; ++i) {
          const VecF weight = splat(p[i][t]);
          MLF_UNROLL for (int s = 0; s < S; ++s) acc[i][s] = fma(weight, value[s], acc[i][s]);
        }
      }
      MLF_UNROLL for (int i = 0; i < Q; ++i) MLF_UNROLL for (int s = 0; s < S; ++s)
          store(out + i * padded + 16 * (first + s), acc[i][s]);
    });
  }
};
