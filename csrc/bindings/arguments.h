// Arguments from Python, checked; what is wrong is a ValueError that names them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "../kernels.h"
#include "../kv_cache.h"

namespace mlf {

using Floats = pybind11::array_t<float, pybind11::array::c_style>;
// kind, rows, columns, packed bytes
using WeightTuple = std::tuple<std::string, int64_t, int64_t, pybind11::array>;

constexpr char kNeverWide[] = "int8_g32_plain";  // int8_g32 without wide groups

std::string shape_text(const pybind11::array& a);
// `a` as a pointer, if it is C-contiguous float32 of this shape (-1: any).
const float* floats(const pybind11::array& a, const char* name, std::vector<int64_t> shape);
// The same, for writing.
float* output(pybind11::array& a, const char* name, std::vector<int64_t> shape);
WeightKind to_kind(const std::string& kind_name, const char* name);
Weight to_weight(const WeightTuple& tuple, const char* name);
ActivationKind to_activation(const std::string& name);
KVKind to_kv_kind(const std::string& name);
void check_activation(const Weight& weight, ActivationKind activation, const char* name);
int check_threads(int threads);

}  // namespace mlf
