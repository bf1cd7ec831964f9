// Products of rows of activation codes with one group of a tile (16 rows) of weights, exactly: what
// tile_dot.h and the panels are made of.

// Reads a tile from front to end, a cache line at a time. Besides, each step may fetch the line
// `ahead` bytes away into the second-level cache: a later layer's weights, or the next page of
// these; 0 for none. `ahead` includes kEvenSteps or kOddSteps or both, which are less than a line:
// the steps of a group that do.
constexpr int64_t kEvenSteps = 1, kOddSteps = 2, kEveryStep = kEvenSteps + kOddSteps;
struct TileReader {
  const uint8_t* line;
  int64_t ahead;

  MLF_INLINE void fetch(const uint8_t* at, int step) const {
    if (ahead & (step % 2 ? kOddSteps : kEvenSteps)) __builtin_prefetch(at + ahead, 0, 2);
  }
  const uint8_t* next(int step = 0) {
    const uint8_t* at = line;
    fetch(at, step);
    line += kStepBytes;
    return at;
  }
  // Some lines at once.
  const uint8_t* next_lines(int count) {
    const uint8_t* at = line;
    if (ahead)
      for (int i = 0; i < count; ++i) fetch(at + i * kStepBytes, i);
    line += count * kStepBytes;
    return at;
  }
};

// The low codes of the wide groups of some rows, group by group: the rows that are wide in one
// share its weights. They lie one behind the other, because they are read once for every few tiles.
struct WideGroup {
  int8_t codes[kGroup];
  int32_t offset;
  float scale;
  int32_t row, group;
};
struct WideGroups {
  const WideGroup* begin;
  const WideGroup* end;
};

// From how few rows on their low codes are multiplied along with their codes.
constexpr int kRowsWithLowCodes = kDotRows < 8 ? 1 : 2;

// The line of a tile at which its reader is before it reads the header of a group; of a group that
// shares the header of the group before it, the line of its first codes. For int8, whose tile has
// one header, lines count from behind it.
constexpr int64_t kGroupsPerHeader = 2;  // at most
inline int64_t header_line(WeightKind kind, int64_t group) {
  const int64_t lines = group * (is_int4(kind) ? kStepsPerGroup / 2 : kStepsPerGroup);
  if (kind == WeightKind::int8) return lines;
  return lines + (kind == WeightKind::int4_g32 ? group : ceil_div(group, 2));
}

// Where the codes of R rows of one group lie, and what their sums start from: distances rather than
// pointers, of which compilers would keep R in memory.
template <int R>
struct CodeRows {
  const int8_t *codes, *low_codes;
  int64_t stride;
  const int32_t* offsets;
  int64_t offset_stride;
  int low_from;  // rows from here on are low codes

  // Codes of M rows, and if R is 2 M, their low codes.
  template <int M>
  static CodeRows of(const Activations& x, int64_t group, Constant<M>) {
    return {x.codes + group * kGroup, x.low_codes + group * kGroup,
            x.padded_cols(),          x.offsets + 2 * group,
            2 * x.groups(),           M};
  }
  static CodeRows one(const int8_t* codes, const int32_t* offset) {
    return {codes, nullptr, 0, offset, 0, 1};
  }
  const int8_t* row(int r) const {
    return r < low_from ? codes + r * stride : low_codes + (r - low_from) * stride;
  }
  int32_t offset(int r) const {
    return offsets[r < low_from ? r * offset_stride : (r - low_from) * offset_stride + 1];
  }
};

#if defined(MLF_OWN_GROUP_DOT)

// One group of T tiles times R rows of codes, exactly, added to acc[r * T + t]. The ISA has the
// loops over steps.
template <int R, int T>
MLF_INLINE void group_dot(TileReader* tiles, const CodeRows<R>& rows, DotSum* acc) {
  const uint8_t* lines[T];
  const int8_t* codes[R];
  MLF_UNROLL for (int t = 0; t < T; ++t) lines[t] = tiles[t].next_lines(kStepsPerGroup);
  MLF_UNROLL for (int r = 0; r < R; ++r) codes[r] = rows.row(r);
  dot_group<R, T>(lines, codes, acc);
}
template <int R, int T>
MLF_INLINE void group_values(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
  DotSum acc[R * T];
  MLF_UNROLL for (int i = 0; i < R * T; ++i) acc[i] = group_begin();
  group_dot<R, T>(tiles, rows, acc);
  MLF_UNROLL for (int i = 0; i < R * T; ++i) out[i] = group_value(acc[i]);
}
template <int R, int T>
MLF_INLINE void group_values_int4(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
  const uint8_t* lines[T];
  NibbleSum acc[R * T];
  MLF_UNROLL for (int t = 0; t < T; ++t) lines[t] = tiles[t].next_lines(kStepsPerGroup / 2);
  const int8_t* codes[R];
  MLF_UNROLL for (int r = 0; r < R; ++r) codes[r] = rows.row(r);
  MLF_UNROLL for (int i = 0; i < R * T; ++i) acc[i] = nibble_begin();
  dot_group_int4<R, T>(lines, codes, acc);
  MLF_UNROLL for (int i = 0; i < R * T; ++i) out[i] = group_value(acc[i]);
}
// All groups of T tiles times M rows.
template <int M, int T>
inline void sums_of_groups(TileReader* tiles, const Activations& x, VecI* total) {
  DotSum acc[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) acc[i] = dot_begin(0);
  for (int64_t group = 0; group < x.groups(); ++group)
    group_dot<M, T>(tiles, CodeRows<M>::of(x, group, Constant<M>()), acc);
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = dot_result(acc[i]);
}

// One group of a tile, for many rows of inputs.
struct Int8Codes {
  TileReader tile;
  void read(TileReader& reader) { tile = reader; }
  VecF dot_row(const int8_t* codes, int32_t offset) const {
    TileReader reader = tile;
    VecF out;
    group_values<1, 1>(&reader, CodeRows<1>::one(codes, &offset), &out);
    return out;
  }
};
struct Int4Codes {
  TileReader tile;
  void read(TileReader& reader) { tile = reader; }
  VecF dot_row(const int8_t* codes, int32_t offset) const {
    TileReader reader = tile;
    VecF out;
    group_values_int4<1, 1>(&reader, CodeRows<1>::one(codes, &offset), &out);
    return out;
  }
};

#else

// One group of T tiles times R rows of codes, exactly: integer sums acc[r * T + t].
template <int R, int T>
inline void group_sums(TileReader* tiles, const CodeRows<R>& rows, DotSum* acc) {
  MLF_UNROLL for (int i = 0; i < R * T; ++i) acc[i] = dot_begin(rows.offset(i / T));
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup; ++step) {
    DotWeights w[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) w[t] = load_step_int8(tiles[t].next(step));
    MLF_UNROLL for (int r = 0; r < R; ++r) {
      const DotInputs a = load_inputs(rows.row(r) + step * kStep);
      MLF_UNROLL for (int t = 0; t < T; ++t) dot(acc[r * T + t], w[t], a);
    }
  }
}

// As above for 4-bit weights, which need no offsets.
template <int R, int T>
inline void group_sums_int4(TileReader* tiles, const CodeRows<R>& rows, NibbleSum* acc) {
  MLF_UNROLL for (int i = 0; i < R * T; ++i) acc[i] = nibble_begin();
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup / 2; ++step) {
    NibbleWeights low[T], high[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) load_steps_int4(tiles[t].next(step), low[t], high[t]);
    MLF_UNROLL for (int r = 0; r < R; ++r) {
      const int8_t* codes = rows.row(r) + step * kStep;
      const auto first = load_nibble_inputs(codes), second = load_nibble_inputs(codes + kGroup / 2);
      MLF_UNROLL for (int t = 0; t < T; ++t) {
        dot(acc[r * T + t], low[t], first);
        dot(acc[r * T + t], high[t], second);
      }
    }
  }
}

// Codes of one group of a tile, kept for many rows of inputs.
struct Int8Codes {
  DotWeights steps[kStepsPerGroup];
  void read(TileReader& tile) {
    MLF_UNROLL for (DotWeights& step : steps) step = load_step_int8(tile.next());
  }
  VecF dot_row(const int8_t* codes, int32_t offset) const {
    DotSum acc = dot_begin(offset);
    MLF_UNROLL for (int i = 0; i < kStepsPerGroup; ++i)
        dot(acc, steps[i], load_inputs(codes + i * kStep));
    return to_float(dot_result(acc));
  }
};

struct Int4Codes {
  NibbleWeights steps[kStepsPerGroup];
  void read(TileReader& tile) {
    constexpr int kLines = kStepsPerGroup / 2;
    MLF_UNROLL for (int i = 0; i < kLines; ++i)
        load_steps_int4(tile.next(), steps[i], steps[i + kLines]);
  }
  VecF dot_row(const int8_t* codes, int32_t) const {
    NibbleSum acc = nibble_begin();
    MLF_UNROLL for (int i = 0; i < kStepsPerGroup; ++i)
        dot(acc, steps[i], load_nibble_inputs(codes + i * kStep));
    return to_float(dot_result(acc));
  }
};

// The sums of a group as floats.
template <int R, int T>
inline void group_values(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
  DotSum acc[R * T];
  group_sums<R, T>(tiles, rows, acc);
  MLF_UNROLL for (int i = 0; i < R * T; ++i) out[i] = to_float(dot_result(acc[i]));
}
template <int R, int T>
inline void group_values_int4(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
  NibbleSum acc[R * T];
  group_sums_int4<R, T>(tiles, rows, acc);
  MLF_UNROLL for (int i = 0; i < R * T; ++i) out[i] = to_float(dot_result(acc[i]));
}
// All groups of T tiles times M rows.
template <int M, int T>
inline void sums_of_groups(TileReader* tiles, const Activations& x, VecI* total) {
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat_int(0);
  for (int64_t group = 0; group < x.groups(); ++group) {
    DotSum acc[M * T];
    group_sums<M, T>(tiles, CodeRows<M>::of(x, group, Constant<M>()), acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = add(total[i], dot_result(acc[i]));
  }
}

#endif
