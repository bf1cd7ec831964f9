// The tokenizer as a table.
#include "../tokenizer/tokenizer.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "../tokenizer/detokenizer.h"
#include "bindings.h"

namespace py = pybind11;

namespace mlf {
namespace {

using tokenizer::Detokenizer;
using tokenizer::kNone;
using tokenizer::Tokenizer;
using tokenizer::View;

// A tokenizer and the Python buffer that its table lies in.
struct BoundTokenizer {
  py::buffer_info buffer;  // holds the memory
  Tokenizer tokenizer;

  explicit BoundTokenizer(py::buffer_info info)
      : buffer(std::move(info)),
        tokenizer(static_cast<const uint8_t*>(buffer.ptr),
                  static_cast<size_t>(buffer.size * buffer.itemsize)) {}
};

std::unique_ptr<BoundTokenizer> make_tokenizer(const py::buffer& table) {
  py::buffer_info info = table.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("table must be contiguous");
  return std::make_unique<BoundTokenizer>(std::move(info));
}

std::string_view utf8_of(const py::str& text) {
  Py_ssize_t nbytes;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &nbytes);
  if (!data) throw py::error_already_set();  // a lone surrogate
  return {data, static_cast<size_t>(nbytes)};
}

std::vector<int32_t> encode(const BoundTokenizer& self, const py::str& text, bool add_special) {
  const std::string_view utf8 = utf8_of(text);  // lives as long as `text`
  py::gil_scoped_release release;
  return self.tokenizer.encode(utf8, add_special);
}

std::string decode(const BoundTokenizer& self, const std::vector<int32_t>& ids, bool skip_special) {
  return self.tokenizer.decode(ids.data(), ids.size(), skip_special);
}

std::optional<uint32_t> given(uint32_t id) {
  return id == kNone ? std::nullopt : std::optional(id);
}

std::vector<uint32_t> special_ids(const BoundTokenizer& self) {
  const tokenizer::Table& table = self.tokenizer.table();
  std::vector<uint32_t> ids;
  for (uint32_t id = 0; id < table.vocab_size(); ++id)
    if (table.token_flags(id) & tokenizer::kSpecial) ids.push_back(id);
  return ids;
}

std::vector<uint32_t> eos_ids(const BoundTokenizer& self) {
  const View<uint32_t> view = self.tokenizer.table().eos();
  std::vector<uint32_t> ids;
  for (size_t i = 0; i < view.size(); ++i) ids.push_back(view[i]);
  return ids;
}

}  // namespace

void bind_tokenizer(py::module_& m) {
  using namespace pybind11::literals;

  py::class_<BoundTokenizer>(m, "Tokenizer")
      .def(py::init(&make_tokenizer), "table"_a)
      .def("encode", &encode, "text"_a, "add_special_tokens"_a)
      .def("decode", &decode, "ids"_a, "skip_special_tokens"_a)
      .def(
          "count",
          [](const BoundTokenizer& self, const py::str& text, bool add_special_tokens) {
            return self.tokenizer.count(utf8_of(text), add_special_tokens);
          },
          "text"_a, "add_special_tokens"_a)
      .def(
          "bytes_of",
          [](const BoundTokenizer& self, int32_t id) {
            const std::string_view bytes = self.tokenizer.bytes_of(id);
            return py::bytes(bytes.data(), bytes.size());
          },
          "id"_a)
      .def(
          "id_of",
          [](const BoundTokenizer& self, const py::bytes& bytes) {
            return given(self.tokenizer.id_of(std::string_view(bytes)));
          },
          "bytes"_a)
      .def_property_readonly(
          "vocab_size",
          [](const BoundTokenizer& self) { return self.tokenizer.table().vocab_size(); })
      .def_property_readonly("bos_id",
                             [](const BoundTokenizer& self) {
                               return given(self.tokenizer.table().word(tokenizer::Word::bos_id));
                             })
      .def_property_readonly("eos_ids", &eos_ids)
      .def_property_readonly("special_ids", &special_ids);

  py::class_<Detokenizer>(m, "Detokenizer")
      .def(py::init([](const BoundTokenizer& owner, const std::vector<int32_t>& context) {
             return std::make_unique<Detokenizer>(owner.tokenizer, context);
           }),
           "tokenizer"_a, "context"_a = std::vector<int32_t>{}, py::keep_alive<1, 2>())
      .def("push", &Detokenizer::push, "id"_a)
      .def("finish", &Detokenizer::finish);
}

}  // namespace mlf
