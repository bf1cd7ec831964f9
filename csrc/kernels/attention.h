// Grouped-query attention over a paged KV cache: each page is reduced on its own (scores, softmax,
// weighted values), pages are merged in order by the online-softmax rule (Milakov & Gimelshein
// 2018; Dao et al. 2022). All query heads of a KV head read its page together.
//
// Each score and each output is one chain of operations (or an exact integer sum), so the bits do
// not depend on how many queries, tokens or outputs are computed together.

// Visit 0..n-1 in blocks of Max and one of the rest: body(Constant<block>(), first). A rest in one
// block reads each key and value once: 3 query heads of a KV head are common.
template <int Max, class Body>
inline void for_each_whole_block(int64_t n, Body body, int64_t first = 0) {
  for (; first + Max <= n; first += Max) body(Constant<Max>(), first);
  if constexpr (Max > 1) for_each_whole_block<Max - 1>(n, body, first);
}

// Fetch what lies here in the page wanted next, which is elsewhere than where hardware prefetchers
// look. Into the second-level cache: two pages do not fit the first.
inline void prefetch_next(const void* at, const PageView& page) {
  if (page.ahead) __builtin_prefetch(static_cast<const uint8_t*>(at) + page.ahead, 0, 2);
}

// --- float pages: fp32 and fp16 ----------------------------------------------------------------

inline VecF load_kv(const float* p) { return load(p); }
inline VecF load_kv(const uint16_t* p) { return load_half(p); }
inline void store_kv(float* p, VecF v) { store(p, v); }
// Clamped, but for NaN: min() and max() return their second argument if either is NaN.
inline void store_kv(uint16_t* p, VecF v) {
  store_half(p, min(splat(65504.0f), max(splat(-65504.0f), v)));
}

template <class T>
struct FloatPage {
  // Queries x kSpan tiles of 16 tokens fill the accumulator registers; likewise queries x kSpan
  // vectors of outputs.
  static constexpr int kSpan = kVecRegisters >= 16 ? 4 : kVecRegisters >= 6 ? 1 : 2;
  static constexpr int kQueries = kVecRegisters >= 6 ? 6 : 2;

  const PageView& page;

  T* keys() const { return reinterpret_cast<T*>(page.keys()); }
  VecF read(const T* at) const {
    prefetch_next(at, page);
    return load_kv(at);
  }
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
        MLF_UNROLL for (int s = 0; s < S; ++s) key[s] = read(k + (s * dim + d) * 16);
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
        MLF_UNROLL for (int s = 0; s < S; ++s) value[s] = read(v + 16 * s);
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

// --- int8 pages: keys and values are weight matrices; their inputs are rounded to 8 and 16 bits --

// Queries have the precision of keys. Weights of tokens are a few large and many small numbers, and
// take 16 bits: such an input is two signed bytes, low + 256 * high, each multiplied by itself.
// Largest code: a sum of n products with 8-bit codes must fit int32.
inline CodeScale wide_scale(float largest, int64_t n) {
  const int64_t fits = ((int64_t{1} << 31) - 1) / (128 * n);
  return code_scale(largest, static_cast<float>(fits < 127 * 256 ? fits : 127 * 256));
}

// Write the codes of a row of floats, padded with zeros to `padded` (a multiple of 16), and what
// the sums of both halves start from.
inline void code_row(const float* x, int64_t n, int64_t padded, float inverse, int8_t* codes,
                     int32_t* offsets) {
  VecI low_total = splat_int(0), high_total = splat_int(0);
  for (int64_t i = 0; i < padded; i += 16) {
    const int lanes = n - i < 16 ? (n > i ? static_cast<int>(n - i) : 0) : 16;
    const VecF v = inverse == 0.0f ? splat(0.0f) : load_upto(x + i, lanes);
    const VecF code = to_float(round_to_int(mul(v, splat(inverse))));
    // the quarter keeps halves away, whose low byte would be +128
    const VecI high = round_to_int(mul(add(code, splat(0.25f)), splat(1.0f / 256)));
    const VecI low = round_to_int(fma(to_float(high), splat(-256.0f), code));
    store_codes(codes + i, low);
    store_codes(codes + padded + i, high);
    low_total = add(low_total, low);
    high_total = add(high_total, high);
  }
  offsets[0] = -kInt8Offset * sum(low_total);
  offsets[1] = -kInt8Offset * sum(high_total);
}

// acc[(h * M + m) * T + t] += one step of half h of inputs[m] . tile t, for H of all Halves
template <int M, int T, int H, int Halves>
MLF_INLINE void coded_step(const uint8_t* tile, int64_t tile_nbytes, const int8_t* inputs,
                           int64_t padded, DotSum* acc) {
  DotWeights w[T];
  MLF_UNROLL for (int t = 0; t < T; ++t) w[t] = load_step_int8(tile + t * tile_nbytes);
  MLF_UNROLL for (int m = 0; m < M; ++m) MLF_UNROLL for (int h = 0; h < H; ++h) {
    const DotInputs a = load_inputs(inputs + (Halves * m + h) * padded);
    MLF_UNROLL for (int t = 0; t < T; ++t) dot(acc[(h * M + m) * T + t], w[t], a);
  }
}

// y[m * T + t] (16 outputs) = inputs[m] . tile t, exactly; tiles lie `tile_nbytes` apart; inputs
// (M, Halves, padded), offsets (M, Halves). Both halves of the inputs at once, if registers hold
// their sums.
template <int M, int T, int Halves>
MLF_INLINE void coded_tiles(const uint8_t* tile, int64_t tile_nbytes, int64_t steps,
                            const PageView& page, const int8_t* inputs, int64_t padded,
                            const int32_t* offsets, VecI* y) {
  constexpr int H = Halves * M * T <= 16 ? Halves : 1, kSteps = 4;
  if (page.ahead)
    for (int64_t i = 0; i < T * steps; ++i)
      prefetch_next(tile + i / steps * tile_nbytes + i % steps * kStepBytes, page);
  MLF_UNROLL for (int first = 0; first < Halves; first += H) {
    DotSum acc[H * M * T];
    MLF_UNROLL for (int i = 0; i < H * M * T; ++i) acc[i] =
        dot_begin(offsets[i / T % M * Halves + first + i / T / M]);
    const int8_t* in = inputs + first * padded;
    const uint8_t* at = tile;
    int64_t step = 0;
    for (; step + kSteps <= steps; step += kSteps, in += kSteps * kStep, at += kSteps * kStepBytes)
      MLF_UNROLL for (int i = 0; i < kSteps; ++i) coded_step<M, T, H, Halves>(
          at + i * kStepBytes, tile_nbytes, in + i * kStep, padded, acc);
    for (; step < steps; ++step, in += kStep, at += kStepBytes)
      coded_step<M, T, H, Halves>(at, tile_nbytes, in, padded, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const VecI low = first == 0 ? dot_result(acc[i]) : y[i];
      if constexpr (Halves == 2)
        y[i] = first + H == 2 ? add(low, shift_left(dot_result(acc[(H - 1) * M * T + i]), 8)) : low;
      else y[i] = low;
    }
  }
}

struct CodedPage {
  // A number of queries that divides 48 queries, 16 tokens of 3 heads.
  static constexpr int kTiles = kBlockTiles;
  static constexpr int kQueries = kDotRows >= 8 ? (kTiles > 1 ? 6 : 8) : (kDotRows + 1) / 2;

  const PageView& page;

  void put(const float* key, const float* value, int slot) const {
    const int64_t dim = page.head_dim, tile = page.key_tile_nbytes();
    uint8_t* key_out = page.keys() + slot / 16 * tile + slot % 16 * kStep;
    uint8_t* value_out = page.values() + slot / kStep * kStepBytes + slot % kStep;
    const CodeScale key_scale = code_scale(max_abs(key, dim));
    const CodeScale value_scale = code_scale(max_abs(value, dim));
    page.key_scales()[slot] = key_scale.scale;
    page.value_scales()[slot] = value_scale.scale;
    for_each_vec(dim, [&](int64_t i, int n) {
      int8_t key_codes[16], value_codes[16];
      codes(key + i, n, key_scale.inverse, key_codes);
      codes(value + i, n, value_scale.inverse, value_codes);
      for (int j = 0; j < n; ++j)
        key_out[(i + j) / kStep * kStepBytes + (i + j) % kStep] =
            static_cast<uint8_t>(key_codes[j]);
      uint8_t* outputs = value_out + i * kPageTokens;
      for (int j = 0; j < n; ++j) outputs[j * kStep] = static_cast<uint8_t>(value_codes[j]);
    });
  }
  static void codes(const float* x, int n, float inverse, int8_t* out) {
    float rounded[16];
    const VecF v = inverse == 0.0f ? splat(0.0f) : load_upto(x, n);
    store(rounded, to_float(round_to_int(mul(v, splat(inverse)))));
    for (int j = 0; j < n; ++j) out[j] = static_cast<int8_t>(rounded[j]);
  }

  // p[i] = scale * q[i] . keys: the exact sum of codes, times the scales of query and key.
  template <int Q>
  void scores(const Queries& q, int tokens, float scale, float (*p)[kPageTokens]) const {
    if (page.head_dim == 64) scores_of<Q>(q, tokens, scale, p, 64);  // sizes in instructions
    else scores_of<Q>(q, tokens, scale, p, page.head_dim);
  }
  template <int Q>
  MLF_INLINE void scores_of(const Queries& q, int tokens, float scale, float (*p)[kPageTokens],
                            int head_dim) const {
    const int64_t steps = ceil_div(head_dim, kStep), nbytes = kStepBytes * steps;
    for_each_whole_block<kTiles>(ceil_div(tokens, 16), [&](auto count, int64_t first) {
      constexpr int T = decltype(count)::value;
      VecI dots[Q * T];
      coded_tiles<Q, T, 1>(page.keys() + first * nbytes, nbytes, steps, page, q.codes,
                           round_up(head_dim, 16), q.offsets, dots);
      MLF_UNROLL for (int i = 0; i < Q * T; ++i) {
        const int64_t t = 16 * (first + i % T);
        const VecF scales = mul(load(page.key_scales() + t), splat(q.scales[i / T] * scale));
        store(p[i / T] + t, mul(to_float(dots[i]), scales));
      }
    });
  }

  const float* factors() const { return page.value_scales(); }

  // out[i] = sum of p[i][t] * codes[t], with p[i] rounded to 16 bits.
  template <int Q>
  void mix(float (*p)[kPageTokens], const float* largest, int tokens, float* out) const {
    const int64_t padded = page.padded_dim(), steps = ceil_div(tokens, kStep);
    int8_t inputs[Q][2][kPageTokens];
    CodeScale scales[Q];
    int32_t offsets[Q][2];
    for (int i = 0; i < Q; ++i) {
      scales[i] = wide_scale(largest[i], kPageTokens);
      code_row(p[i], round_up(tokens, 16), kPageTokens, scales[i].inverse, inputs[i][0],
               offsets[i]);
    }
    for_each_whole_block<kTiles>(padded / 16, [&](auto count, int64_t first) {
      constexpr int T = decltype(count)::value;
      constexpr int64_t kNbytes = 16 * kPageTokens;
      VecI dots[Q * T];
      coded_tiles<Q, T, 2>(page.values() + first * kNbytes, kNbytes, steps, page, inputs[0][0],
                           kPageTokens, offsets[0], dots);
      MLF_UNROLL for (int i = 0; i < Q * T; ++i)
          store(out + i / T * padded + 16 * (first + i % T),
                mul(to_float(dots[i]), splat(scales[i / T].scale)));
    });
  }
};

// --- all pages -----------------------------------------------------------------------------------

template <class Body>
inline void with_page(const PageView& page, Body body) {
  switch (page.kind) {
    case KVKind::fp32:
      return body(FloatPage<float>{page});
    case KVKind::fp16:
      return body(FloatPage<uint16_t>{page});
    case KVKind::int8:
      return body(CodedPage{page});
  }
}

void kv_store(const float* key, const float* value, const PageView& page, int slot) {
  with_page(page, [&](auto stored) { stored.put(key, value, slot); });
}

void attend_prepare(const Queries& q, int64_t queries, int64_t head_dim) {
  for (int64_t i = 0; i < queries; ++i) {
    const float* x = q.values + i * head_dim;
    const int64_t padded = round_up(head_dim, 16);
    const CodeScale scale = code_scale(max_abs(x, head_dim));
    q.scales[i] = scale.scale;
    VecI total = splat_int(0);
    for (int64_t d = 0; d < padded; d += 16) {
      const int lanes = head_dim - d < 16 ? static_cast<int>(head_dim - d) : 16;
      const VecF v = scale.inverse == 0.0f ? splat(0.0f) : load_upto(x + d, lanes);
      const VecI code = round_to_int(mul(v, splat(scale.inverse)));
      store_codes(q.codes + i * padded + d, code);
      total = add(total, code);
    }
    q.offsets[i] = -kInt8Offset * sum(total);
  }
}

inline VecF keep_upto(VecF v, int n, float fill) { return n == 16 ? v : keep_first(v, n, fill); }

// Turn n scores into weights 2^(score - max), times their factors if there are any, and zeros up to
// `end`. What is not finite makes the sum, hence the result, NaN. Returns the largest weight, NaN
// if the sum is.
inline float softmax(float* p, int n, int end, const float* factors, float& max_out,
                     float& sum_out) {
  VecF largest = splat(-INFINITY), total = splat(0.0f), heaviest = splat(0.0f);
  for_each_vec(n, [&](int64_t t, int lanes) {
    largest = max(keep_upto(load(p + t), lanes, -INFINITY), largest);  // skips NaN
  });
  max_out = max_lane(largest);
  const VecF shift = splat(max_out), zero = splat(0.0f);
  for_each_vec(n, [&](int64_t t, int lanes) {
    VecF weight = exp2_negative(sub(load(p + t), shift)), term = weight;
    if (factors) {
      weight = keep_upto(mul(weight, load(factors + t)), lanes, 0.0f);
      term = fma(weight, zero, term);
      heaviest = max(weight, heaviest);
    }
    total = add(total, keep_upto(term, lanes, 0.0f));
    store(p + t, keep_upto(weight, lanes, 0.0f));
  });
  sum_out = sum(total);
  for (int64_t t = round_up(n, 16); t < end; t += 16) store(p + t, zero);
  return factors ? fmaf(sum_out, 0.0f, max_lane(heaviest)) : 0.0f;
}

template <int Q, class Page>
inline void attend_queries(const Page& page, const Queries& q, const int* tokens,
                           const AttentionState& out, float scale) {
  int longest = 0;  // tokens beyond the last that any query sees are skipped
  for (int i = 0; i < Q; ++i) longest = tokens[i] > longest ? tokens[i] : longest;
  float p[Q][kPageTokens], heaviest[Q];
  page.template scores<Q>(q, longest, scale, p);
  for (int i = 0; i < Q; ++i)
    heaviest[i] = softmax(p[i], tokens[i], longest, page.factors(), out.max[i], out.sum[i]);
  page.template mix<Q>(p, heaviest, longest, out.values);
}

void attend_page(const Queries& q, const PageView& page, const int* tokens,
                 const AttentionState& out, int64_t queries, float scale) {
  const int64_t dim = page.head_dim, padded = page.padded_dim();
  const float scale_log2 = scale * 1.44269504088896341f;  // e^x = 2^(x log2(e))
  with_page(page, [&](auto stored) {
    for_each_whole_block<decltype(stored)::kQueries>(queries, [&](auto count, int64_t i) {
      const Queries some{q.values + i * dim, q.codes + i * padded, q.scales + i, q.offsets + i};
      const AttentionState block{out.values + i * padded, out.max + i, out.sum + i};
      attend_queries<decltype(count)::value>(stored, some, tokens + i, block, scale_log2);
    });
  });
}

void attend_merge(const AttentionState& into, const AttentionState& from, int64_t queries,
                  int64_t padded_dim) {
  for_each_vec(queries, [&](int64_t i, int n) {
    const VecF a = load_upto(into.max + i, n), b = load_upto(from.max + i, n);
    const VecF largest = max(a, b), keep = exp2_negative(sub(a, largest)),
               take = exp2_negative(sub(b, largest));
    store_upto(into.max + i, largest, n);
    store_upto(into.sum + i,
               fma(load_upto(from.sum + i, n), take, mul(load_upto(into.sum + i, n), keep)), n);
    float keeps[16], takes[16];
    store(keeps, keep);
    store(takes, take);
    for (int j = 0; j < n; ++j) {
      float* to = into.values + (i + j) * padded_dim;
      const float* add = from.values + (i + j) * padded_dim;
      const VecF k = splat(keeps[j]), t = splat(takes[j]);
      for (int64_t d = 0; d < padded_dim; d += 16)
        store(to + d, fma(load(add + d), t, mul(load(to + d), k)));
    }
  });
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
