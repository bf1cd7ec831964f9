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
    const int64_t groups = ceil_div(cols, kGroup);
    values_.resize(rows * cols);
    codes_.resize(rows * groups * kGroup);
    scales_.resize(rows * groups);
    offsets_.resize(rows * groups);
    group_sums_.resize(rows * groups);
  }

  Activations view(ActivationKind kind, int64_t cols) {
    return {kind,
            cols,
            values_.data(),
            codes_.data(),
            scales_.data(),
            offsets_.data(),
            group_sums_.data()};
  }

 private:
  std::vector<float> values_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_, group_sums_;
  std::vector<int32_t> offsets_;
};

}  // namespace mlf
