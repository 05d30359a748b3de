// json.h: a JSON value. Jansson reads and writes it: strictly, since the text comes from strangers, and in no compiler
// time, of which the C++ libraries want three seconds in each file that includes them.
#pragma once

#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the text's order; no key twice

  Json() = default;  // null
  Json(bool x) : value_(x) {}
  template <std::integral T>
  Json(T x) : value_(static_cast<int64_t>(x)) {}  // at most 2^63 - 1
  Json(double x) : value_(x) {}
  Json(const char* x) : value_(std::string(x)) {}
  Json(std::string x) : value_(std::move(x)) {}
  Json(Array x) : value_(std::move(x)) {}
  Json(Object x) : value_(std::move(x)) {}

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  // Each is null, or empty, where the value is of another kind.
  const bool* boolean() const { return std::get_if<bool>(&value_); }
  const std::string* string() const { return std::get_if<std::string>(&value_); }
  const Array* array() const { return std::get_if<Array>(&value_); }
  const Object* object() const { return std::get_if<Object>(&value_); }
  std::optional<double> number() const;
  // A number written without fraction and exponent that T holds.
  template <std::integral T>
  std::optional<T> integer() const {
    if (const auto* x = std::get_if<int64_t>(&value_); x && std::in_range<T>(*x)) return static_cast<T>(*x);
    return {};
  }
  // Of an object: the value of this key, or null.
  const Json* find(std::string_view key) const;

  // On one line; where `indented`, each element on a line of its own. Bytes that are no UTF-8 become U+FFFD, numbers
  // that JSON cannot write null.
  std::string text(bool indented = false) const;

 private:
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value_ = nullptr;
};

// Throws Error with one line: "WHAT is not JSON: at byte 17: ...".
Json parse_json(std::string_view text, const std::string& what);
