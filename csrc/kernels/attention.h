// Grouped-query attention over a paged KV cache: each page is reduced on its own (scores, softmax,
// weighted values), pages are merged in order by the online-softmax rule (Milakov & Gimelshein
// 2018; Dao et al. 2022). All query heads of a KV head read its page together.

inline VecF load_kv(const float* p) { return load(p); }
inline VecF load_kv(const uint16_t* p) { return load_half(p); }
inline void store_kv(float* p, VecF v) { store(p, v); }
// Clamped: an infinity would reach even the tokens that do not attend to it, as 0 * infinity.
inline void store_kv(uint16_t* p, VecF v) {
  store_half(p, min(max(v, splat(-65504.0f)), splat(65504.0f)));
}

template <class T>
inline void kv_store_as(const float* key, const float* value, const PageView& page, int slot) {
  T* keys = static_cast<T*>(page.keys) + (slot / 16 * page.head_dim) * 16 + slot % 16;
  T* values = static_cast<T*>(page.values) + slot * page.padded_dim();
  for_each_vec(page.head_dim, [&](int64_t i, int n) {
    T narrow[16];
    store_kv(narrow, load_upto(key + i, n));
    for (int j = 0; j < n; ++j) keys[(i + j) * 16] = narrow[j];
    store_kv(values + i, load_upto(value + i, n));  // padded with zeros
  });
}

void kv_store(const float* key, const float* value, const PageView& page, int slot) {
  if (page.half) kv_store_as<uint16_t>(key, value, page, slot);
  else kv_store_as<float>(key, value, page, slot);
}

// Q queries x T tiles of 16 tokens fill the accumulator registers; likewise Q x D vectors of
// values.
constexpr int kQueries = kVecRegisters >= 16 ? 4 : 2;
constexpr int kSpan = kVecRegisters / kQueries;

template <int Q, class T>
inline void attend_queries(const float* q, const PageView& page, const int* tokens,
                           const AttentionState& out, float scale) {
  const int dim = page.head_dim, padded = page.padded_dim();
  const T* keys = static_cast<const T*>(page.keys);
  const T* values = static_cast<const T*>(page.values);
  int longest = 0;
  for (int i = 0; i < Q; ++i) longest = tokens[i] > longest ? tokens[i] : longest;

  float p[Q][kPageTokens];
  for (int first = 0; first < longest; first += 16 * kSpan) {
    VecF acc[Q][kSpan];
    for (int i = 0; i < Q; ++i)
      for (int t = 0; t < kSpan; ++t) acc[i][t] = splat(0.0f);
    // The last span may reach beyond the filled tokens: a page is always whole, and what is read
    // there is dropped below.
    for (int d = 0; d < dim; ++d) {
      VecF k[kSpan];
      for (int t = 0; t < kSpan; ++t) k[t] = load_kv(keys + ((first / 16 + t) * dim + d) * 16);
      for (int i = 0; i < Q; ++i) {
        const VecF x = splat(q[i * dim + d]);
        for (int t = 0; t < kSpan; ++t) acc[i][t] = fma(x, k[t], acc[i][t]);
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int t = 0; t < kSpan; ++t) store(p[i] + first + 16 * t, mul(acc[i][t], splat(scale)));
  }

  for (int i = 0; i < Q; ++i) {
    const int n = tokens[i];
    VecF largest = splat(-INFINITY), total = splat(0.0f);
    for_each_vec(n, [&](int64_t t, int lanes) {
      largest = max(largest, keep_first(load(p[i] + t), lanes, -INFINITY));
    });
    out.max[i] = max_lane(largest);
    const VecF shift = splat(out.max[i]);
    for_each_vec(n, [&](int64_t t, int lanes) {
      const VecF e = keep_first(exp(sub(load(p[i] + t), shift)), lanes, 0.0f);
      store(p[i] + t, e);
      total = add(total, e);
    });
    out.sum[i] = sum(total);
    for (int t = static_cast<int>(round_up(n, 16)); t < longest; ++t) p[i][t] = 0.0f;
  }

  for (int d = 0; d < padded; d += 16 * kSpan) {
    const int span = padded - d < 16 * kSpan ? (padded - d) / 16 : kSpan;
    VecF acc[Q][kSpan];
    for (int i = 0; i < Q; ++i)
      for (int s = 0; s < kSpan; ++s) acc[i][s] = splat(0.0f);
    for (int t = 0; t < longest; ++t) {
      VecF v[kSpan];
      for (int s = 0; s < kSpan; ++s)
        v[s] = load_kv(values + t * padded + d + 16 * (s < span ? s : 0));
      for (int i = 0; i < Q; ++i) {
        const VecF weight = splat(p[i][t]);
        for (int s = 0; s < kSpan; ++s) acc[i][s] = fma(weight, v[s], acc[i][s]);
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int s = 0; s < span; ++s) store(out.values + i * padded + d + 16 * s, acc[i][s]);
  }
}

template <class T>
inline void attend_page_as(const float* q, const PageView& page, const int* tokens,
                           AttentionState out, int64_t queries, float scale) {
  for_each_block<kQueries>(queries, [&](auto count, int64_t i) {
    const AttentionState block{out.values + i * page.padded_dim(), out.max + i, out.sum + i};
    attend_queries<decltype(count)::value, T>(q + i * page.head_dim, page, tokens + i, block,
                                              scale);
  });
}

void attend_page(const float* q, const PageView& page, const int* tokens, const AttentionState& out,
                 int64_t queries, float scale) {
  if (page.half) attend_page_as<uint16_t>(q, page, tokens, out, queries, scale);
  else attend_page_as<float>(q, page, tokens, out, queries, scale);
}

inline float exp_scalar(float x) {
  float lanes[16];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

void attend_merge(const AttentionState& into, const AttentionState& from, int64_t queries,
                  int64_t padded_dim) {
  for (int64_t i = 0; i < queries; ++i) {
    const float largest = into.max[i] > from.max[i] ? into.max[i] : from.max[i];
    const float keep = exp_scalar(into.max[i] - largest), take = exp_scalar(from.max[i] - largest);
    float* a = into.values + i * padded_dim;
    const float* b = from.values + i * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += 16)
      store(a + d, fma(load(b + d), splat(take), mul(load(a + d), splat(keep))));
    into.sum[i] = fmaf(from.sum[i], take, into.sum[i] * keep);
    into.max[i] = largest;
  }
}

void attend_finish(const AttentionState& state, float* out, int64_t queries, int64_t head_dim) {
  const int64_t padded = round_up(head_dim, 16);
  for (int64_t i = 0; i < queries; ++i, out += head_dim) {
    const VecF inverse = splat(1.0f / state.sum[i]);
    for_each_vec(head_dim, [&](int64_t d, int n) {
      store_upto(out + d, mul(load(state.values + i * padded + d), inverse), n);
    });
  }
}
