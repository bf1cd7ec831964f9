// Grouped-query attention over a paged KV cache: each page is reduced on its own (scores, softmax,
// weighted values), pages are merged in order by the online-softmax rule (Milakov & Gimelshein
// 2018; Dao et al. 2022). All query heads of a KV head read its page together.
//
// Each score and each output is one chain of operations (or an exact integer sum), so the bits do
// not depend on how many queries, tokens or outputs are computed together.

template <class Body>
inline void with_page(const PageView& page, Body body) {
  AheadOfPage ahead(page);
  switch (page.kind) {
    case KVKind::fp32:
      return body(FloatPage<float>{page, ahead});
    case KVKind::fp16:
      return body(FloatPage<uint16_t>{page, ahead});
    case KVKind::int16:
      return body(CodedPage<WordCodes>{page, ahead});
    case KVKind::int8:
      return body(CodedPage<ByteCodes>{page, ahead});
  }
}

void kv_store(const float* key, const float* value, const PageView& page, int slot) {
  with_page(page, [&](auto stored) { stored.put(key, value, slot); });
}

void attend_prepare(const Queries& q, KVKind kind, int64_t queries, int64_t head_dim) {
  with_page({nullptr, kind, static_cast<int>(head_dim)},
            [&](auto stored) { stored.prepare(q, queries, head_dim); });
}

inline VecF keep_upto(VecF v, int n, float fill) { return n == 16 ? v : keep_first(v, n, fill); }

// Lines to fetch ahead beside 16 scores and 16 weights, see kLinesByRounding.
constexpr int kLinesByMax = 1, kLinesByWeights = 2;

// Turn the scores p[i][0 .. tokens[i] - 1] of Q queries into weights 2^(score - largest score),
// times their factors if there are any, and zeros up to `end`. What is not finite makes a sum,
// hence the result, NaN. heaviest[i] is the largest weight, NaN if the sum is. Step by step for all
// queries, because each step ends in a long chain of operations on one number.
template <int Q>
inline void softmax(float (*p)[kPageTokens], const int* tokens, int end, const float* factors,
                    const AttentionState& out, float* heaviest, AheadOfPage& ahead) {
  for (int i = 0; i < Q; ++i) {
    VecF largest = splat(-INFINITY);
    for_each_vec(tokens[i], [&](int64_t t, int lanes) {
      ahead.fetch<kLinesByMax>();
      largest = max(keep_upto(load(p[i] + t), lanes, -INFINITY), largest);  // skips NaN
    });
    out.max[i] = max_lane(largest);
  }
  VecF check = splat(0.0f);  // of the factors: 0, or NaN
  for (int i = 0; i < Q; ++i) {
    const int n = tokens[i];
    if (factors && (i == 0 || n != tokens[i - 1])) {
      check = splat(0.0f);
      for_each_vec(n, [&](int64_t t, int lanes) {
        check = fma(keep_upto(load(factors + t), lanes, 0.0f), splat(0.0f), check);
      });
    }
    const VecF shift = splat(out.max[i]);
    VecF total = splat(0.0f), largest = splat(0.0f);
    for_each_vec(n, [&](int64_t t, int lanes) {
      ahead.fetch<kLinesByWeights>();
      VecF weight = keep_upto(exp2_negative(sub(load(p[i] + t), shift)), lanes, 0.0f);
      total = add(total, weight);
      if (factors) {
        weight = mul(weight, keep_upto(load(factors + t), lanes, 0.0f));
        largest = max(weight, largest);
      }
      store(p[i] + t, weight);
    });
    for (int64_t t = round_up(n, 16); t < end; t += 16) store(p[i] + t, splat(0.0f));
    out.sum[i] = sum(add(total, check));
    heaviest[i] = fmaf(out.sum[i], 0.0f, max_lane(largest));
  }
}

template <int Q, class Page>
inline void attend_queries(const Page& page, const Queries& q, const int* tokens,
                           const AttentionState& out, float scale) {
  int longest = 0;  // tokens beyond the last that any query sees are skipped
  for (int i = 0; i < Q; ++i) longest = tokens[i] > longest ? tokens[i] : longest;
  float p[Q][kPageTokens], heaviest[Q];
  page.template scores<Q>(q, longest, scale, p);
  softmax<Q>(p, tokens, longest, page.factors(), out, heaviest, page.ahead);
  page.template mix<Q>(p, heaviest, longest, out.values);
}

void attend_page(const Queries& q, const PageView& page, const int* tokens,
                 const AttentionState& out, int64_t queries, float scale) {
  const int64_t dim = page.head_dim, padded = page.padded_dim();
  const int64_t codes_nbytes = padded * page.element_nbytes();
  const float scale_log2 = scale * 1.44269504088896341f;  // e^x = 2^(x log2(e))
  with_page(page, [&](auto stored) {
    if constexpr (decltype(stored)::kHasTogether) {
      if (queries >= kTogetherFrom) {
        for (int64_t i = 0; i < queries; i += kTogether)
          stored.attend_together(
              {q.values + i * dim, q.codes + i * codes_nbytes, q.scales + i, q.offsets + i},
              tokens + i, {out.values + i * padded, out.max + i, out.sum + i},
              queries - i < kTogether ? queries - i : kTogether, scale_log2);
        stored.ahead.fetch_rest();
        return;
      }
    }
    for_each_whole_block<decltype(stored)::kQueries>(queries, [&](auto count, int64_t i) {
      const Queries some{q.values + i * dim, q.codes + i * codes_nbytes, q.scales + i,
                         q.offsets + i};
      const AttentionState block{out.values + i * padded, out.max + i, out.sum + i};
      attend_queries<decltype(count)::value>(stored, some, tokens + i, block, scale_log2);
    });
    stored.ahead.fetch_rest();
  });
}

void attend_merge(const AttentionState& into, const AttentionState& from, int64_t count,
                  int64_t stride, int64_t queries, int64_t padded_dim) {
  constexpr int64_t kMost = 32;  // states whose factors are known at once
  float keeps[kMost][16], takes[kMost][16];
  for (int64_t first = 0; first < count; first += kMost) {
    const int64_t states = count - first < kMost ? count - first : kMost;
    for_each_vec(queries, [&](int64_t i, int n) {
      VecF largest = load_upto(into.max + i, n), total = load_upto(into.sum + i, n);
      for (int64_t s = 0, at = first * stride + i; s < states; ++s, at += stride) {
        const VecF a = largest, b = load_upto(from.max + at, n);
        largest = max(a, b);
        const VecF keep = exp2_negative(sub(a, largest)), take = exp2_negative(sub(b, largest));
        total = fma(load_upto(from.sum + at, n), take, mul(total, keep));
        store(keeps[s], keep);
        store(takes[s], take);
      }
      store_upto(into.max + i, largest, n);
      store_upto(into.sum + i, total, n);
      for (int j = 0; j < n; ++j)  // values stay in registers from state to state
        for_each_whole_block<4>(padded_dim / 16, [&](auto vecs, int64_t vec) {
          constexpr int V = decltype(vecs)::value;
          const int64_t at = (i + j) * padded_dim + 16 * vec;
          const float* add = from.values + first * stride + at;
          VecF v[V];
          MLF_UNROLL for (int d = 0; d < V; ++d) v[d] = load(into.values + at + 16 * d);
          for (int64_t s = 0; s < states; ++s, add += stride) {
            const VecF keep = splat(keeps[s][j]), take = splat(takes[s][j]);
            MLF_UNROLL for (int d = 0; d < V; ++d) v[d] =
                fma(load(add + 16 * d), take, mul(v[d], keep));
          }
          MLF_UNROLL for (int d = 0; d < V; ++d) store(into.values + at + 16 * d, v[d]);
        });
    });
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
