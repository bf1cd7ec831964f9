// One row of an embedding table of any weight kind.

template <class T>
inline void embed_float(const Weight& table, int64_t row, float* out) {
  const T* values = reinterpret_cast<const T*>(table.data) + row * table.cols;
  for_each_vec(table.cols, [&](int64_t i, int n) { store_upto(out + i, load_weights(values + i, n), n); });
}

inline void embed_packed(const Weight& table, int64_t row, float* out) {
  const bool int4 = table.kind == WeightKind::int4_g32;
  const int64_t lane = row % kTileRows;
  const uint8_t* tile = table.data + row / kTileRows * tile_nbytes(table.kind, table.cols);
  const uint8_t* codes = tile + tile_header_nbytes(table.kind, table.cols) + lane * kStep;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(tile) + lane;
  for (int64_t group = 0; group * kGroup < table.cols; ++group) {
    float scale, min = 0.0f;
    if (table.kind == WeightKind::int8) {
      scale = reinterpret_cast<const float*>(tile)[lane];
    } else if (int4) {
      scale = half_value(halves[group * 2 * kTileRows]);
      min = half_value(halves[(group * 2 + 1) * kTileRows]);
    } else {
      scale = half_value(halves[group * kTileRows]);
    }
    const int64_t first = group * kGroup;
    const int64_t count = table.cols - first < kGroup ? table.cols - first : kGroup;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t step = i / kStep;
      const uint8_t* line = codes + (int4 ? group * 4 + step % 4 : group * kStepsPerGroup + step) * kStepBytes;
      const uint8_t byte = line[i % kStep];
      const int code = int4 ? (step < 4 ? byte & 15 : byte >> 4) : static_cast<int8_t>(byte);
      out[first + i] = scale * static_cast<float>(code) + min;
    }
  }
}

void embed(const Weight& table, int64_t row, float* out) {
  if (table.kind == WeightKind::fp32) embed_float<float>(table, row, out);
  else if (table.kind == WeightKind::bf16) embed_float<uint16_t>(table, row, out);
  else embed_packed(table, row, out);
}
