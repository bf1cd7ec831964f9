// A sampler and where its random numbers come from.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../sampling.h"
#include "in_use.h"

namespace mlf {

struct BoundSampler {
  Sampler sampler;
  // Makes a list or array of some more numbers in [0, 1); None where none are needed. In blocks,
  // because numpy's code is in no cache after a step.
  pybind11::object draw;
  std::vector<double> uniforms = {};
  size_t used = 0;                 // of those
  std::vector<float> logits = {};  // (vocab), of the executor's last step for it
  InUse in_use{"[generate] a sampler must be used by one thread at a time"};

  double next_uniform();
};

}  // namespace mlf
