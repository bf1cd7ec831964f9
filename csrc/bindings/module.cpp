// The Python module mobilellm_fast._C: checks shapes and lifetimes, releases the GIL, calls C++.
#include "../dispatch.h"
#include "arguments.h"
#include "bindings.h"

namespace py = pybind11;
using namespace mlf;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels and executor of mobilellm_fast";
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("tile_nbytes", [](const std::string& kind, int64_t cols) {
    return tile_nbytes(to_kind(kind, "weight"), cols);
  });
  bind_machine(m);
  bind_operators(m);
  bind_tokenizer(m);
  bind_sampling(m);
  bind_executor(m);
}
