// Pages of the KV cache that hold codes, int8 and int16: keys and values are weight matrices, whose
// inputs are rounded, too. Sums of products are exact integers.

// The largest code of two factors of 16 bits, so that a sum of n products fits int32.
inline float word_limit(int64_t n) {
  const double fits = floor(sqrt(static_cast<double>(((int64_t{1} << 31) - 1) / n)));
  return fits < 32767 ? static_cast<float>(fits) : 32767.0f;
}

// Factors of 8-bit codes with 16 bits: two signed bytes, low + 256 * high, each multiplied by
// itself. Largest code: a sum of n products must fit int32.
inline float wide_limit(int64_t n) {
  const int64_t fits = ((int64_t{1} << 31) - 1) / (128 * n);
  return static_cast<float>(fits < 127 * 256 ? fits : 127 * 256);
}

// The codes of up to 16 numbers.
inline VecI round_codes(const float* x, int lanes, float inverse) {
  if (inverse == 0.0f || lanes <= 0) return splat_int(0);
  return round_to_int(mul(load_upto(x, lanes), splat(inverse)));
}

// Lines to fetch ahead beside 16 weights that are rounded. These and the kKeyLines and
// kValueLines beside 8 lines of this page are as the time that they take, and with three queries
// together as many as a page has (heads of 64).
constexpr int kLinesByRounding = 2;

// What an int8 page multiplies. Queries have the precision of keys. Weights of tokens are a few
// large and many small numbers, and take 16 bits.
struct ByteCodes {
  using Code = int8_t;
  static constexpr int kStep = 4;          // inputs of a step
  static constexpr int kWeightHalves = 2;  // numbers that a weight of a token is
  static constexpr int kKeyLines = 4, kValueLines = 6;
  // A number of queries that divides 48 queries, 16 tokens of 3 heads.
  static constexpr int kTiles = kBlockTiles;
  static constexpr int kQueries = kDotRows >= 8 ? (kTiles > 1 ? 6 : 8) : (kDotRows + 1) / 2;

  static float limit(int64_t) { return kMaxCode; }
  static float weight_limit() { return wide_limit(kPageTokens); }
  static void store_row(int8_t* p, VecI codes) { store_codes(p, codes); }

  using Sum = DotSum;
  static Sum begin(int32_t offset) { return dot_begin(offset); }
  static DotWeights load_step(const uint8_t* p) { return load_step_int8(p); }
  static DotInputs inputs(const int8_t* codes) { return load_inputs(codes); }
  static VecI result(const Sum& sum) { return dot_result(sum); }

  // Write the codes of weights, padded with zeros to a page, and what the sums of both halves start
  // from.
  static void round_weights(const float* x, int64_t n, float inverse, int8_t* codes,
                            int32_t* offsets, AheadOfPage& ahead) {
    VecI low_total = splat_int(0), high_total = splat_int(0);
    for (int64_t i = 0; i < kPageTokens; i += 16) {
      ahead.fetch<kLinesByRounding>();
      const int lanes = n - i < 16 ? (n > i ? static_cast<int>(n - i) : 0) : 16;
      const VecF code = to_float(round_codes(x + i, lanes, inverse));
      // the quarter keeps halves away, whose low byte would be +128
      const VecI high = round_to_int(mul(add(code, splat(0.25f)), splat(1.0f / 256)));
      const VecI low = round_to_int(fma(to_float(high), splat(-256.0f), code));
      store_codes(codes + i, low);
      store_codes(codes + kPageTokens + i, high);
      low_total = add(low_total, low);
      high_total = add(high_total, high);
    }
    offsets[0] = -kInt8Offset * sum(low_total);
    offsets[1] = -kInt8Offset * sum(high_total);
  }
};

// What an int16 page multiplies: 16 bits by 16 bits.
struct WordCodes {
  using Code = int16_t;
  static constexpr int kStep = 2;
  static constexpr int kWeightHalves = 1;
  static constexpr int kKeyLines = 6, kValueLines = 7;
  static constexpr int kTiles = kVecRegisters >= 16 ? 2 : 1;
  static constexpr int kQueries = kVecRegisters >= 16 ? 6 : 4;

  static float limit(int64_t n) { return word_limit(n); }
  static float weight_limit() { return limit(kPageTokens); }
  static void store_row(int16_t* p, VecI codes) { store_words(p, codes); }

  using Sum = VecI;
  static Sum begin(int32_t) { return splat_int(0); }
  static WordWeights load_step(const uint8_t* p) { return load_step_int16(p); }
  static WordInputs inputs(const int16_t* codes) { return load_word_inputs(codes); }
  static VecI result(const Sum& sum) { return sum; }

  static void round_weights(const float* x, int64_t n, float inverse, int16_t* codes,
                            int32_t* offsets, AheadOfPage& ahead) {
    for (int64_t i = 0; i < n; i += 16) {
      ahead.fetch<kLinesByRounding>();
      store_words(codes + i, round_codes(x + i, 16, inverse));
    }
    offsets[0] = 0;
  }
};

// acc[(h * M + m) * T + t] += one step of half h of inputs[m] . tile t, for H of all Halves
template <class Codes, int M, int T, int H, int Halves>
MLF_INLINE void coded_step(const uint8_t* tile, int64_t tile_nbytes,
                           const typename Codes::Code* inputs, int64_t padded,
                           typename Codes::Sum* acc) {
  decltype(Codes::load_step(tile)) w[T];
  MLF_UNROLL for (int t = 0; t < T; ++t) w[t] = Codes::load_step(tile + t * tile_nbytes);
  MLF_UNROLL for (int m = 0; m < M; ++m) MLF_UNROLL for (int h = 0; h < H; ++h) {
    const auto a = Codes::inputs(inputs + (Halves * m + h) * padded);
    MLF_UNROLL for (int t = 0; t < T; ++t) dot(acc[(h * M + m) * T + t], w[t], a);
  }
}

// y[m * T + t] (16 outputs) = inputs[m] . tile t, exactly; tiles lie `tile_nbytes` apart; inputs
// (M, Halves, padded), offsets (M, Halves). Both halves of the inputs at once, if registers hold
// their sums. Fetches Lines ahead beside 8 lines of this one.
template <class Codes, int M, int T, int Halves, int Lines, class Ahead>
MLF_INLINE void coded_tiles(const uint8_t* tile, int64_t tile_nbytes, int64_t steps, Ahead& ahead,
                            const typename Codes::Code* inputs, int64_t padded,
                            const int32_t* offsets, VecI* y) {
  constexpr int H = Halves * M * T <= 16 ? Halves : 1, kSteps = 4;
  MLF_UNROLL for (int first = 0; first < Halves; first += H) {
    typename Codes::Sum acc[H * M * T];
    MLF_UNROLL for (int i = 0; i < H * M * T; ++i) acc[i] =
        Codes::begin(offsets[i / T % M * Halves + first + i / T / M]);
    const auto* in = inputs + first * padded;
    const uint8_t* at = tile;
    int64_t step = 0;
    for (; step + kSteps <= steps;
         step += kSteps, in += kSteps * Codes::kStep, at += kSteps * kStepBytes) {
      ahead.template fetch<(Lines * kSteps * T + 7) / 8>();
      MLF_UNROLL for (int i = 0; i < kSteps; ++i) coded_step<Codes, M, T, H, Halves>(
          at + i * kStepBytes, tile_nbytes, in + i * Codes::kStep, padded, acc);
    }
    for (; step < steps; ++step, in += Codes::kStep, at += kStepBytes)
      coded_step<Codes, M, T, H, Halves>(at, tile_nbytes, in, padded, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const VecI low = first == 0 ? Codes::result(acc[i]) : y[i];
      if constexpr (Halves == 2)
        y[i] =
            first + H == 2 ? add(low, shift_left(Codes::result(acc[(H - 1) * M * T + i]), 8)) : low;
      else y[i] = low;
    }
  }
}

// From so many queries on, they attend together; a lone token has fewer, but for more than 8 heads
// of a KV head. And so many do at most: a multiple of 32 tokens of 3 heads. (24 and 48 were slower:
// 6% and 3%, int8.)
constexpr int kTogetherFrom = 9, kTogether = 96;

template <class Codes>
struct CodedPage {
  using Code = typename Codes::Code;
  static constexpr int kTiles = Codes::kTiles, kQueries = Codes::kQueries;

  const PageView& page;
  AheadOfPage& ahead;

  void put(const float* key, const float* value, int slot) const {
    constexpr int kStep = Codes::kStep;
    const int64_t dim = page.head_dim, tile = page.key_tile_nbytes();
    Code* key_out = reinterpret_cast<Code*>(page.keys() + slot / 16 * tile) + slot % 16 * kStep;
    Code* value_out = reinterpret_cast<Code*>(page.values() + slot / kStep * kStepBytes);
    const CodeScale key_scale = code_scale(max_abs(key, dim), Codes::limit(dim));
    const CodeScale value_scale = code_scale(max_abs(value, dim), Codes::limit(kPageTokens));
    page.key_scales()[slot] = key_scale.scale;
    page.value_scales()[slot] = value_scale.scale;
    for_each_vec(dim, [&](int64_t i, int n) {
      Code codes[16];
      Codes::store_row(codes, round_codes(key + i, n, key_scale.inverse));
      for (int j = 0; j < n; ++j)
        key_out[(i + j) / kStep * 16 * kStep + (i + j) % kStep] = codes[j];
      Codes::store_row(codes, round_codes(value + i, n, value_scale.inverse));
      Code* outputs = value_out + i / 16 * 16 * kPageTokens + slot % kStep;
      for (int j = 0; j < n; ++j) outputs[j * kStep] = codes[j];
    });
  }

  static Code* codes_of(const Queries& q) { return reinterpret_cast<Code*>(q.codes); }

  // Round queries to codes, and what sums of their products start from.
  static void prepare(const Queries& q, int64_t queries, int64_t head_dim) {
    const int64_t padded = round_up(head_dim, 16);
    const float limit = Codes::limit(head_dim);
    for (int64_t i = 0; i < queries; ++i) {
      const float* x = q.values + i * head_dim;
      const CodeScale scale = code_scale(max_abs(x, head_dim), limit);
      q.scales[i] = scale.scale;
      VecI total = splat_int(0);
      for (int64_t d = 0; d < padded; d += 16) {
        const int lanes = head_dim - d < 16 ? static_cast<int>(head_dim - d) : 16;
        const VecI code = round_codes(x + d, lanes, scale.inverse);
        Codes::store_row(codes_of(q) + i * padded + d, code);
        total = add(total, code);
      }
      q.offsets[i] = -kInt8Offset * sum(total);
    }
  }

  // p[i] = scale * q[i] . keys: the exact sum of codes, times the scales of query and key. A few
  // queries wait for memory: here and in mix(), tiles are read in the order in which they lie.
  // Where two were read side by side, hardware prefetchers did less, and less in the next stages,
  // too (docs/performance-decisions.md).
  template <int Q>
  void scores(const Queries& q, int tokens, float scale, float (*p)[kPageTokens]) const {
    scores_beside<Q, 1>(q, tokens, scale, p, ahead);
  }
  template <int Q, int Most, class Ahead>
  MLF_INLINE void scores_beside(const Queries& q, int tokens, float scale, float (*p)[kPageTokens],
                                Ahead& following) const {
    if (page.head_dim == 64) scores_of<Q, Most, 64>(q, tokens, scale, p, following);
    else scores_of<Q, Most, 0>(q, tokens, scale, p, following);
  }
  // Most tiles at once. Dim, if not 0, is head_dim, so that sizes are in the instructions.
  template <int Q, int Most, int Dim, class Ahead>
  MLF_INLINE void scores_of(const Queries& q, int tokens, float scale, float (*p)[kPageTokens],
                            Ahead& following) const {
    for_each_whole_block<Most>(ceil_div(tokens, 16), [&](auto count, int64_t first) {
      constexpr int T = decltype(count)::value;
      const int head_dim = Dim ? Dim : page.head_dim;
      const int64_t steps = ceil_div(head_dim, Codes::kStep), nbytes = kStepBytes * steps;
      VecI dots[Q * T];
      coded_tiles<Codes, Q, T, 1, Codes::kKeyLines>(page.keys() + first * nbytes, nbytes, steps,
                                                    following, codes_of(q), round_up(head_dim, 16),
                                                    q.offsets, dots);
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
    constexpr int kHalves = Codes::kWeightHalves;
    const int64_t padded = page.padded_dim(), steps = ceil_div(tokens, Codes::kStep);
    Code inputs[Q][kHalves][kPageTokens];
    CodeScale scales[Q];
    int32_t offsets[Q][kHalves];
    for (int i = 0; i < Q; ++i) {
      scales[i] = code_scale(largest[i], Codes::weight_limit());
      Codes::round_weights(p[i], round_up(tokens, 16), scales[i].inverse, inputs[i][0], offsets[i],
                           ahead);
    }
    for (int64_t tile = 0; tile < padded / 16; ++tile) {
      constexpr int64_t kNbytes = 16 * kPageTokens * sizeof(Code);
      VecI dots[Q];
      coded_tiles<Codes, Q, 1, kHalves, Codes::kValueLines>(page.values() + tile * kNbytes, kNbytes,
                                                            steps, ahead, inputs[0][0], kPageTokens,
                                                            offsets[0], dots);
      MLF_UNROLL for (int i = 0; i < Q; ++i)
          store(out + i * padded + 16 * tile, mul(to_float(dots[i]), splat(scales[i].scale)));
    }
  }

  // Attend to the first tokens[i] tokens, per query, for up to kTogether queries: they take turns
  // with the keys, then with each tile of the values, whose bytes become words before. A product of
  // words does the work of two of bytes.
#if defined(MLF_WIDEN)
  static constexpr bool kHasTogether = true;
#else
  static constexpr bool kHasTogether = sizeof(Code) == sizeof(int16_t);
#endif
  void attend_together(const Queries& q, const int* tokens, const AttentionState& out,
                       int64_t queries, float scale) const {
    const int64_t dim = page.head_dim, padded = page.padded_dim();
    WordWeightsOf<kTogether> weights;
    // block by block
    const int64_t lines = page.nbytes() / kStepBytes * kQueries / queries;
    for_each_block<kQueries>(queries, [&](auto count, int64_t i) {
      constexpr int Q = decltype(count)::value;
      for (int64_t line = 0; line < lines; line += 4) ahead.template fetch<4>();
      const Queries some{q.values + i * dim, q.codes + i * padded * sizeof(Code), q.scales + i,
                         q.offsets + i};
      weigh<Q>(some, tokens + i, {nullptr, out.max + i, out.sum + i}, scale, weights, i);
    });
    for_each_block<WordCodes::kTiles>(padded / 16, [&](auto count, int64_t first) {
      mix_together<decltype(count)::value>(weights, tokens, queries, first, out.values);
    });
  }

  template <int Q>
  MLF_INLINE void weigh(const Queries& q, const int* tokens, const AttentionState& out, float scale,
                        WordWeightsOf<kTogether>& weights, int64_t first) const {
    alignas(64) float p[Q][kPageTokens];
    NothingAhead none;
    int longest = 0, shortest = kPageTokens;
    for (int i = 0; i < Q; ++i) {
      longest = tokens[i] > longest ? tokens[i] : longest;
      shortest = tokens[i] < shortest ? tokens[i] : shortest;
    }
    scores_beside<Q, kTiles>(q, longest, scale, p, none);
    const float limit = Codes::weight_limit();
    if (shortest == kPageTokens)
      PageSoftmax<true>{p, tokens, factors()}(Q, out, limit, weights, first);
    else PageSoftmax<false>{p, tokens, factors()}(Q, out, limit, weights, first);
  }

  // The outputs of T tiles of values.
  template <int T>
  MLF_INLINE void mix_together(const WordWeightsOf<kTogether>& weights, const int* tokens,
                               int64_t queries, int64_t first, float* out) const {
    constexpr int64_t kLength = 16 * kPageTokens;  // codes of a tile
    const int64_t padded = page.padded_dim();
    const uint8_t* tiles = page.values() + first * kLength * sizeof(Code);
#if defined(MLF_WIDEN)
    constexpr bool kWiden = sizeof(Code) == 1;
    alignas(64) int16_t wide[kWiden ? T * kLength : 1];
    if constexpr (kWiden) {
      for (int64_t at = 0; at < T * kLength; at += kStepBytes) widen_step(tiles + at, wide + at);
      tiles = reinterpret_cast<const uint8_t*>(wide);
    }
#endif
    NothingAhead none;
    const int32_t offsets[WordCodes::kQueries] = {};
    for_each_block<WordCodes::kQueries>(queries, [&](auto count, int64_t i) {
      constexpr int Q = decltype(count)::value;
      int longest = 0;
      for (int64_t at = i; at < i + Q; ++at) longest = tokens[at] > longest ? tokens[at] : longest;
      VecI dots[Q * T];
      coded_tiles<WordCodes, Q, T, 1, 0>(tiles, kLength * sizeof(int16_t),
                                         ceil_div(longest, WordCodes::kStep), none,
                                         weights.codes[i], kPageTokens, offsets, dots);
      MLF_UNROLL for (int at = 0; at < Q * T; ++at)
          store(out + (i + at / T) * padded + 16 * (first + at % T),
                mul(to_float(dots[at]), splat(weights.scales[i + at / T])));
    });
  }
};
