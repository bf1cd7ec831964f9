// The softmax of many queries over a page of codes, which gives the bits of softmax() and of the
// rounding of its weights behind. Step by step for all queries of a block, because each step of one
// ends in a long chain of operations.

// 2^x of N vectors, the bits of exp2_negative. NaN has to be the constant NAN.
template <int N>
MLF_INLINE void exp2_negatives(VecF* x) {
  constexpr float kBias =
      12582912.0f;  // 1.5 * 2^23: integers are the low bits of what it is added to
  constexpr float kFactors[] = {9.6715126353e-3f, 5.5507337738e-2f, 2.4022242086e-1f,
                                6.9314697759e-1f, 1.0f};
  VecF biased[N], p[N];
  MLF_UNROLL for (int i = 0; i < N; ++i) x[i] = max(splat(-126.0f), x[i]);
  MLF_UNROLL for (int i = 0; i < N; ++i) biased[i] = add(x[i], splat(kBias));
  MLF_UNROLL for (int i = 0; i < N; ++i) p[i] = sub(biased[i], splat(kBias));
  MLF_UNROLL for (int i = 0; i < N; ++i) x[i] = sub(x[i], p[i]);
  MLF_UNROLL for (int i = 0; i < N; ++i) p[i] =
      fma(splat(1.3264714333e-3f), x[i], splat(kFactors[0]));
  MLF_UNROLL for (int n = 1; n < 5; ++n) MLF_UNROLL for (int i = 0; i < N; ++i) p[i] =
      fma(p[i], x[i], splat(kFactors[n]));
  // The integer is added to the exponent: nothing where it is NaN.
  MLF_UNROLL for (int i = 0; i < N; ++i) x[i] =
      as_float(add(as_int(p[i]), shift_left(as_int(biased[i]), 23)));
}

// The weights of the tokens of a page, times the scales of their values, as words.
template <int N>
struct WordWeightsOf {
  alignas(64) int16_t codes[N][kPageTokens];  // zeros for tokens that a query does not see
  float scales[N];
};

template <bool Whole>  // Whole: all queries see all of the page
struct PageSoftmax {
  float (*p)[kPageTokens];  // scores, then weights
  const int* tokens;
  const float* factors;  // of each token's weight

  // Up to 16 queries. Writes out.max and out.sum, and from `first` on weights, the largest code of
  // which is `limit`.
  template <int N>
  void operator()(int queries, const AttentionState& out, float limit, WordWeightsOf<N>& weights,
                  int64_t first) const {
    alignas(64) float totals[16][16], largest[16] = {}, inverses[16], scales[16];
    VecI heaviest[16];
    MLF_ROLL for (int i = 0; i < queries; ++i) out.max[i] = largest_score(i);
    MLF_ROLL for (int i = 0; i < queries; ++i) exponentials(i, out.max[i], totals[i], heaviest[i]);
    MLF_ROLL for (int i = 0; i < queries; ++i) {
      const int32_t bits = max_lane(heaviest[i]);
      memcpy(largest + i, &bits, sizeof bits);
      out.sum[i] = fmaf(largest[i], 0.0f, sum(load(totals[i])));
      largest[i] = fmaf(out.sum[i], 0.0f, largest[i]);
    }
    store(inverses, div(splat(limit), load(largest)));
    store(scales, div(load(largest), splat(limit)));
    MLF_ROLL for (int i = 0; i < queries; ++i) {
      const bool rounds = largest[i] >= kLeastLargest;
      weights.scales[first + i] = rounds ? scales[i] : largest[i] < kLeastLargest ? 0.0f : NAN;
      round_weights(i, rounds ? inverses[i] : 0.0f, weights.codes[first + i]);
    }
  }

 private:
  static constexpr int kVecs = kPageTokens / 16;

  VecF seen(VecF v, int64_t query, int vec, float fill) const {
    if (Whole) return v;
    const int n = tokens[query] - 16 * vec;
    return keep_first(v, n < 0 ? 0 : n < 16 ? n : 16, fill);
  }

  MLF_INLINE float largest_score(int64_t query) const {
    VecF largest[2] = {splat(-INFINITY), splat(-INFINITY)};
    MLF_UNROLL for (int i = 0; i < kVecs; ++i) largest[i % 2] =
        max(seen(load(p[query] + 16 * i), query, i, -INFINITY), largest[i % 2]);  // skips NaN
    return max_lane(max(largest[0], largest[1]));
  }

  // `heaviest` is the largest weight times its factor: none is negative, and NaN is above all.
  MLF_INLINE void exponentials(int64_t query, float max_score, float* totals,
                               VecI& heaviest) const {
    constexpr int N = kVecRegisters >= 16 ? 4 : 1;  // as many as registers hold
    VecF total = splat(0.0f);
    VecI largest = splat_int(0);
    MLF_UNROLL for (int vec = 0; vec < kVecs; vec += N) {
      VecF w[N];
      MLF_UNROLL for (int i = 0; i < N; ++i) w[i] =
          sub(load(p[query] + 16 * (vec + i)), splat(max_score));
      exp2_negatives<N>(w);
      MLF_UNROLL for (int i = 0; i < N; ++i) {
        w[i] = seen(w[i], query, vec + i, 0.0f);
        total = add(total, w[i]);
        w[i] = mul(w[i], seen(load(factors + 16 * (vec + i)), query, vec + i, 0.0f));
        largest = max(largest, as_int(w[i]));
        store(p[query] + 16 * (vec + i), w[i]);
      }
    }
    heaviest = largest;
    store(totals, total);
  }

  MLF_INLINE void round_weights(int64_t query, float inverse, int16_t* codes) const {
    if (inverse == 0.0f) {  // also where weights are not finite
      memset(codes, 0, kPageTokens * sizeof *codes);
      return;
    }
    MLF_UNROLL for (int i = 0; i < kVecs; ++i)
        store_words(codes + 16 * i, round_to_int(mul(load(p[query] + 16 * i), splat(inverse))));
  }
};
