// A JSON document, read whole: for the header of a packed image. Nothing in it is trusted.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace mlf::image {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in order; a later key wins
  // An integer keeps all its digits (uint64_t where int64_t has too few); the rest are doubles.
  using Value =
      std::variant<std::nullptr_t, bool, int64_t, uint64_t, double, std::string, Array, Object>;

  // Throws std::invalid_argument: it is no JSON, is nested deeper than 64, or has an integer beyond
  // 64 bits.
  static Json parse(std::string_view text);

  // The value as a T, or null if it is none.
  template <class T>
  const T* as() const {
    return std::get_if<T>(&value_);
  }
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  // A member of an object; null if there is none, or this is no object.
  const Json* find(std::string_view name) const;

 private:
  friend class JsonParser;
  Value value_ = nullptr;
};

}  // namespace mlf::image
