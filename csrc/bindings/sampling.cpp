// Log-probabilities and drawing of tokens.
#include "../sampling.h"

#include <algorithm>
#include <memory>

#include "../dispatch.h"
#include "arguments.h"
#include "bindings.h"
#include "sampler.h"

namespace py = pybind11;

namespace mlf {
namespace {

std::unique_ptr<BoundSampler> make_sampler(int64_t vocab, double temperature, int64_t top_k,
                                           double top_p, double min_p, double repetition_penalty,
                                           const std::vector<int64_t>& seen, py::object draw,
                                           const std::string& isa) {
  const auto in_vocab = [vocab](int64_t token) { return token >= 0 && token < vocab; };
  if (vocab < 1 || !(temperature >= 0) || top_k < 0 || !(top_p > 0) || !(min_p >= 0) ||
      !(min_p <= 1) || !(repetition_penalty > 0) ||
      !std::all_of(seen.begin(), seen.end(), in_vocab))
    throw py::value_error("Sampler: an argument is out of range");
  const Filters filters{temperature, std::min(top_k, vocab), top_p, min_p};
  return std::make_unique<BoundSampler>(BoundSampler{
      Sampler(kernel_table(isa), vocab, filters, repetition_penalty, seen), std::move(draw)});
}

py::tuple choose_from(BoundSampler& self, const py::array& logits) {
  const Using in_use(self.in_use);
  const float* x = floats(logits, "logits", {self.sampler.vocab()});
  const double uniform = self.next_uniform();
  Choice choice;
  {
    py::gil_scoped_release release;
    choice = self.sampler.choose(x, uniform);
  }
  return py::make_tuple(choice.token, choice.logprob);
}

}  // namespace

double BoundSampler::next_uniform() {
  if (draw.is_none()) return 0;
  if (used == uniforms.size()) {
    uniforms = draw().cast<std::vector<double>>();
    used = 0;
    const auto in_range = [](double uniform) { return uniform >= 0 && uniform < 1; };
    if (uniforms.empty() || !std::all_of(uniforms.begin(), uniforms.end(), in_range)) {
      uniforms.clear();
      throw py::value_error("Sampler: draw must give numbers in [0, 1)");
    }
  }
  return uniforms[used++];
}

void bind_sampling(py::module_& m) {
  using namespace pybind11::literals;
  m.def(
      "logprob",
      [](const py::array& logits, int64_t token, const std::string& isa) {
        const float* x = floats(logits, "logits", {-1});
        const int64_t vocab = logits.shape(0);
        if (token < 0 || token >= vocab)
          throw py::value_error("token must be in 0.." + std::to_string(vocab - 1) + ", got " +
                                std::to_string(token));
        const KernelTable& kernels = kernel_table(isa);
        py::gil_scoped_release release;
        return logprob(kernels, x, vocab, token);
      },
      "logits"_a, "token"_a, "isa"_a = "");
  py::class_<BoundSampler>(m, "Sampler")
      .def(py::init(&make_sampler), py::kw_only(), "vocab"_a, "temperature"_a = 0.0, "top_k"_a = 0,
           "top_p"_a = 1.0, "min_p"_a = 0.0, "repetition_penalty"_a = 1.0,
           "seen"_a = std::vector<int64_t>{}, "draw"_a = py::none(), "isa"_a = "")
      .def("choose", &choose_from, "logits"_a);
}

}  // namespace mlf
