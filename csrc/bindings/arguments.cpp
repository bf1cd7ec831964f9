#include "arguments.h"

#include <map>

namespace py = pybind11;

namespace mlf {

std::string shape_text(const py::array& a) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + ")";
}

const float* floats(const py::array& a, const char* name, std::vector<int64_t> shape) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.data()) % alignof(float) == 0;
  bool ok =
      aligned && py::isinstance<Floats>(a) && a.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; ok && i < shape.size(); ++i) ok = shape[i] < 0 || a.shape(i) == shape[i];
  if (ok) return static_cast<const float*>(a.data());
  std::string want = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    want += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  throw py::value_error(std::string(name) + " must be C-contiguous float32 of shape " + want +
                        "), got " + std::string(py::str(a.dtype())) + " " + shape_text(a));
}

float* output(py::array& a, const char* name, std::vector<int64_t> shape) {
  floats(a, name, std::move(shape));
  return static_cast<float*>(a.mutable_data());  // throws if read-only
}

WeightKind to_kind(const std::string& kind_name, const char* name) {
  const std::map<std::string, WeightKind> kinds = {
      {"fp32", WeightKind::fp32},         {"bf16", WeightKind::bf16},
      {"int8", WeightKind::int8},         {"int8_g32", WeightKind::int8_g32},
      {"int4_g32", WeightKind::int4_g32}, {"int4_sym_g32", WeightKind::int4_sym_g32}};
  const auto kind = kinds.find(kind_name);
  if (kind == kinds.end())
    throw py::value_error(std::string(name) + ": unknown weight kind " + kind_name);
  return kind->second;
}

Weight to_weight(const WeightTuple& tuple, const char* name) {
  const auto& [kind_name, rows, cols, data] = tuple;
  const py::ssize_t item = kind_name == "fp32" ? 4 : kind_name == "bf16" ? 2 : 1;
  const bool contiguous =
      (data.flags() & py::array::c_style) && data.itemsize() == item &&
      reinterpret_cast<uintptr_t>(data.data()) % (kind_name == "bf16" ? 2 : 4) == 0;
  if (rows > (int64_t{1} << 31) || cols > (int64_t{1} << 24))
    throw py::value_error(std::string(name) + " is too large");
  const Weight weight{to_kind(kind_name, name), rows, cols,
                      static_cast<const uint8_t*>(data.data())};
  if (cols > kMaxCols)
    throw py::value_error(std::string(name) + " must have at most " + std::to_string(kMaxCols) +
                          " columns, got " + std::to_string(cols));
  if (rows < 1 || cols < 1 || !contiguous || data.nbytes() != weight.nbytes())
    throw py::value_error(std::string(name) + " must hold " + std::to_string(weight.nbytes()) +
                          " contiguous, aligned bytes for " + kind_name + " (" +
                          std::to_string(rows) + ", " + std::to_string(cols) + "), got " +
                          std::to_string(data.nbytes()));
  return weight;
}

ActivationKind to_activation(const std::string& name) {
  if (name == "float") return ActivationKind::floating;
  if (name == "int8") return ActivationKind::int8;
  if (name == "int8_g32" || name == kNeverWide) return ActivationKind::int8_g32;
  throw py::value_error("activation must be float, int8, int8_g32 or int8_g32_plain, got " + name);
}

KVKind to_kv_kind(const std::string& name) {
  KVKind kind;
  if (find_kv_kind(name.c_str(), kind)) return kind;
  throw py::value_error("kv_format must be fp16, fp32, int16 or int8, got " + name);
}

void check_activation(const Weight& weight, ActivationKind activation, const char* name) {
  if (is_quantized(weight.kind) != (activation != ActivationKind::floating))
    throw py::value_error(std::string(name) +
                          ": integer weights need integer activations, float weights float ones");
  // one sum over all inputs must fit int32
  constexpr int64_t kMost = (int64_t{1} << 31) / (128 * kMaxCode);
  if (activation == ActivationKind::int8 && weight.cols > kMost)
    throw py::value_error(std::string(name) + " must have at most " + std::to_string(kMost) +
                          " columns for int8 activations, got " + std::to_string(weight.cols));
}

int check_threads(int threads) {
  if (threads < 1 || threads > 1024)
    throw py::value_error("threads must be in 1..1024, got " + std::to_string(threads));
  return threads;
}

}  // namespace mlf
