#include "rope.h"

#include <algorithm>
#include <cmath>

namespace mlf::image {
namespace {

constexpr double kTwoPi = 6.283185307179586;

std::vector<float> plain(double theta, int64_t head_dim) {
  std::vector<float> out(head_dim / 2);
  const double base = static_cast<double>(static_cast<float>(theta));
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    out[i] = 1.0f / static_cast<float>(std::pow(base, static_cast<double>(exponent)));
  }
  return out;
}

}  // namespace

std::vector<float> Rope::frequencies(int64_t length) const {
  if (scaling == Scaling::dynamic) {
    const float seen = static_cast<float>(std::max(length, trained_length));
    const float stretch = static_cast<float>(factor) * seen / static_cast<float>(trained_length) -
                          static_cast<float>(factor - 1);
    const double exponent = static_cast<double>(head_dim) / static_cast<double>(head_dim - 2);
    return plain(theta * std::pow(static_cast<double>(stretch), exponent), head_dim);
  }
  std::vector<float> out = plain(theta, head_dim);
  const float by = static_cast<float>(factor);
  if (scaling == Scaling::linear)
    for (float& f : out) f /= by;
  if (scaling == Scaling::llama3) {
    const float low = static_cast<float>(low_freq_factor);
    const float high = static_cast<float>(high_freq_factor);
    const float trained = static_cast<float>(original_length);
    for (float& f : out) {
      const float wavelength = 1.0f / f * static_cast<float>(kTwoPi);
      const float blend = (1.0f / wavelength * trained - low) / (high - low);
      const float blended = (1.0f - blend) * f / by + blend * f;
      if (wavelength > trained / low) f /= by;
      else if (!(wavelength < trained / high)) f = blended;
    }
  }
  return out;
}

void Rope::rows(int64_t first, int64_t count, float* cos, float* sin) const {
  std::vector<float> turns = frequencies(0);
  for (int64_t position = first; position < first + count; ++position) {
    if (scaling == Scaling::dynamic) turns = frequencies(position + 1);
    for (const float turn : turns) {
      const double angle = static_cast<double>(static_cast<float>(position) * turn);
      *cos++ = static_cast<float>(std::cos(angle));
      *sin++ = static_cast<float>(std::sin(angle));
    }
  }
}

}  // namespace mlf::image
