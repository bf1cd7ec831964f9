// The tokenizer's part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace mlf {

void bind_tokenizer(pybind11::module_& m);

}  // namespace mlf
