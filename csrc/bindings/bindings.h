// The parts of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace mlf {

void bind_executor(pybind11::module_& m);
void bind_machine(pybind11::module_& m);
void bind_operators(pybind11::module_& m);
void bind_sampling(pybind11::module_& m);
void bind_tokenizer(pybind11::module_& m);

}  // namespace mlf
