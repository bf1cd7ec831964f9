// One row of an embedding table of any weight kind.

template <class T>
inline void embed_float(const Weight& table, int64_t row, float* out) {
  const T* values = reinterpret_cast<const T*>(table.data) + row * table.cols;
  for_each_vec(table.cols,
               [&](int64_t i, int n) { store_upto(out + i, load_weights(values + i, n), n); });
}

inline void embed_packed(const Weight& table, int64_t row, float* out) {
  const bool int4 = is_int4(table.kind), grouped = table.kind != WeightKind::int8;
  const bool has_min = table.kind == WeightKind::int4_g32;  // and a header for each group
  const int64_t lane = row % kTileRows;
  const uint8_t* line = table.data + row / kTileRows * tile_nbytes(table.kind, table.cols);
  const float* scales = reinterpret_cast<const float*>(line);
  const uint16_t* halves = nullptr;
  if (!grouped) line += kHeaderBytes;
  for (int64_t group = 0; group * kGroup < table.cols; ++group) {
    float scale, min = 0.0f;
    if (!grouped) {
      scale = scales[lane];
    } else if (!has_min && group % 2) {
      scale = half_value(halves[kTileRows + lane]);
    } else {
      halves = reinterpret_cast<const uint16_t*>(line);
      line += kHeaderBytes;
      scale = half_value(halves[lane]);
      if (has_min) min = half_value(halves[kTileRows + lane]);
    }
    if (int4 && !has_min) min = kSymmetricMin * scale;
    const int64_t first = group * kGroup;
    const int64_t count = table.cols - first < kGroup ? table.cols - first : kGroup;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t step = i / kStep;
      const uint8_t byte = line[(int4 ? step % 4 : step) * kStepBytes + lane * kStep + i % kStep];
      const int code = int4 ? (step < 4 ? byte & 15 : byte >> 4) : static_cast<int8_t>(byte);
      out[first + i] = scale * static_cast<float>(code) + min;
    }
    line += (int4 ? kStepsPerGroup / 2 : kStepsPerGroup) * kStepBytes;
  }
}

void embed(const Weight& table, int64_t row, float* out) {
  if (table.kind == WeightKind::fp32) embed_float<float>(table, row, out);
  else if (table.kind == WeightKind::bf16) embed_float<uint16_t>(table, row, out);
  else embed_packed(table, row, out);
}
