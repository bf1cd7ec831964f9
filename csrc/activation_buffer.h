// Memory for the inputs of a linear layer.
#pragma once

#include <cstdint>
#include <vector>

#include "quant.h"

namespace mlf {

class ActivationBuffer {
 public:
  // Room for `rows` rows of up to `cols` inputs.
  void resize(int64_t rows, int64_t cols) {
    widest_ = cols;
    groups_ = ceil_div(cols, kGroup);
    values_.resize(rows * cols);
    codes_.resize(rows * groups_ * kGroup);
    low_codes_.resize(rows * groups_ * kGroup);
    scales_.resize(rows * groups_);
    offsets_.resize(rows * groups_ * 2);
    group_sums_.resize(rows * groups_);
    wide_.resize(rows * groups_);
  }

  // Rows of `cols` inputs from `row` on. Threads that fill rows of their own may be at layers of
  // different widths, so the place of their first row does not depend on `cols`.
  Activations view(ActivationKind kind, int64_t cols, int64_t row = 0) {
    return {kind,
            cols,
            values_.data() + row * widest_,
            codes_.data() + row * groups_ * kGroup,
            low_codes_.data() + row * groups_ * kGroup,
            scales_.data() + row * groups_,
            offsets_.data() + row * groups_ * 2,
            group_sums_.data() + row * groups_,
            wide_.data() + row * groups_};
  }
  float* values() { return values_.data(); }

 private:
  int64_t widest_ = 0, groups_ = 0;
  std::vector<float> values_;
  std::vector<int8_t> codes_, low_codes_;
  std::vector<float> scales_, group_sums_;
  std::vector<int32_t> offsets_;
  std::vector<uint8_t> wide_;
};

}  // namespace mlf
