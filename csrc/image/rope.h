// The rotary table in the steps of mobilellm_fast/rope.py, which states the formulas.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mlf::image {

struct Rope {
  enum class Scaling { none, linear, dynamic, llama3 };

  int64_t head_dim = 0, trained_length = 0;  // max_position_embeddings
  double theta = 0;
  Scaling scaling = Scaling::none;
  double factor = 1, low_freq_factor = 0, high_freq_factor = 0;
  int64_t original_length = 0;  // of llama3

  // Cosines and sines of the positions first..first + count - 1: (count, head_dim / 2) each.
  void rows(int64_t first, int64_t count, float* cos, float* sin) const;

 private:
  std::vector<float> frequencies(int64_t length) const;  // of a sequence of this length
};

}  // namespace mlf::image
