// Log-probabilities and drawing of tokens.
#include "../sampling.h"

#include <cmath>

#include "../dispatch.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace mlf {

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
  m.def(
      "choose",
      [](const py::array& logits, const py::array& chosen_from, double temperature, int64_t top_k,
         double top_p, double min_p, double uniform, const std::string& isa) {
        const float* x = floats(logits, "logits", {-1});
        const int64_t vocab = logits.shape(0);
        const float* from = floats(chosen_from, "chosen_from", {vocab});
        if (!(temperature >= 0) || top_k < 0 || !(top_p > 0) || !(min_p >= 0) || !(min_p <= 1) ||
            !(uniform >= 0) || !(uniform < 1) || vocab < 1)
          throw py::value_error("choose: an argument is out of range");
        const KernelTable& kernels = kernel_table(isa);
        Choice choice;
        {
          py::gil_scoped_release release;
          choice = choose(kernels, x, from, vocab, {temperature, top_k, top_p, min_p}, uniform);
        }
        return py::make_tuple(choice.token, choice.logprob);
      },
      "logits"_a, "chosen_from"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a,
      "isa"_a = "");
}

}  // namespace mlf
