// jinja_value.h: the values that a template works with: Python's, as far as Jinja shows them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "host/json.h"

namespace jinja {

// What is wrong, without the place: Template::render adds it and throws Error.
struct Problem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A character is a code point, or 0xDC00 + byte for a byte that is no UTF-8. Its top bit marks what came with the
// values that the template was given, and stays with it through slicing, replacing and joining; nothing but
// marked() looks at it, so that marked and unmarked texts are equal, found in each other, and sorted alike.
using Char = char32_t;
constexpr Char MARK = 0x80000000;
constexpr Char plain(Char c) {
  return c & ~MARK;
}
constexpr bool marked(Char c) {
  return (c & MARK) != 0;
}

struct CharTraits : std::char_traits<Char> {
  static constexpr bool eq(Char a, Char b) { return plain(a) == plain(b); }
  static constexpr bool lt(Char a, Char b) { return plain(a) < plain(b); }
  static constexpr int compare(const Char* a, const Char* b, size_t n) {
    for (size_t i = 0; i < n; ++i)
      if (!eq(a[i], b[i])) return lt(a[i], b[i]) ? -1 : 1;
    return 0;
  }
  static constexpr const Char* find(const Char* text, size_t n, const Char& c) {
    for (size_t i = 0; i < n; ++i)
      if (eq(text[i], c)) return text + i;
    return nullptr;
  }
};
using Text = std::basic_string<Char, CharTraits>;
using TextView = std::basic_string_view<Char, CharTraits>;

Text to_text(std::string_view utf8, bool mark = false);
std::string to_utf8(TextView text);

// str.isspace() of one character: Unicode's white space and four separators of ASCII.
bool is_space(Char c);
// Without the characters at its ends that `drop` accepts.
template <class Drop>
TextView stripped(TextView text, bool left, bool right, Drop drop) {
  while (left && !text.empty() && drop(text.front())) text.remove_prefix(1);
  while (right && !text.empty() && drop(text.back())) text.remove_suffix(1);
  return text;
}

class Value;
struct List;
struct Dict;
struct Namespace;
struct Loop;
struct Function;

struct Undefined {
  std::string why;  // "'x' is undefined"
};
struct None {};

template <class T>
using Shared = std::shared_ptr<const T>;

// No value changes but a namespace: transformers' sandbox forbids list.append() and its like.
class Value {
 public:
  // All in jinja_value.cpp: the templates' code has them in hundreds of places, and each has a case for every kind.
  Value();
  Value(Undefined x);
  Value(None x);
  Value(bool x);
  Value(int64_t x);
  Value(double x);
  Value(Text x);
  Value(TextView x);
  Value(List x);
  Value(Dict x);
  Value(Shared<Loop> x);
  Value(Shared<Function> x);
  Value(std::shared_ptr<Namespace> x);
  Value(const Value& other);
  Value(Value&& other) noexcept;
  Value& operator=(const Value& other);
  Value& operator=(Value&& other) noexcept;
  ~Value();
  static Value of(const Json& json, bool mark);
  static Value size(size_t n) { return static_cast<int64_t>(n); }
  // What |safe gives: a text that Jinja takes for HTML. What is added to it is escaped.
  static Value html(Text x) {
    Value value(std::move(x));
    value.html_ = true;
    return value;
  }

  // Each is null where the value is of another kind.
  const Undefined* undefined() const { return std::get_if<Undefined>(&value_); }
  bool none() const { return std::holds_alternative<None>(value_); }
  const bool* boolean() const { return std::get_if<bool>(&value_); }
  const double* real() const { return std::get_if<double>(&value_); }
  const Text* text() const { return get<Shared<Text>>(); }
  bool is_html() const { return html_; }
  const List* list() const { return get<Shared<List>>(); }
  const Dict* dict() const { return get<Shared<Dict>>(); }
  const Loop* loop() const { return get<Shared<Loop>>(); }
  const Function* function() const { return get<Shared<Function>>(); }
  Namespace* variables() const { return get<std::shared_ptr<Namespace>>(); }
  std::optional<int64_t> integer() const;  // a bool is one, too
  std::optional<double> number() const;

  bool truth() const;
  std::string kind() const;  // Python's name of its type

 private:
  template <class Pointer>
  auto get() const -> decltype(std::declval<Pointer>().get()) {
    const Pointer* pointer = std::get_if<Pointer>(&value_);
    return pointer ? pointer->get() : nullptr;
  }

  std::variant<Undefined, None, bool, int64_t, double, Shared<Text>, Shared<List>, Shared<Dict>, Shared<Loop>,
               Shared<Function>, std::shared_ptr<Namespace>>
      value_;
  bool html_ = false;
};

struct List {
  // range: of numbers. view: a dict's keys, values or items. lazy: a generator, which gives each element once.
  enum class Kind { list, tuple, range, view, lazy };
  using enum Kind;
  std::vector<Value> items;
  Kind kind = list;
  mutable size_t taken = 0;  // of a lazy one: how many elements it gave
  List() = default;
  List(std::vector<Value> i, Kind k) : items(std::move(i)), kind(k) {}
};

struct Dict {
  std::vector<std::pair<Value, Value>> items;  // in the order in which they were put in; no key twice
  const Value* find(const Value& key) const;
  void set(const Value& key, Value value);
};

struct Namespace {
  std::vector<std::pair<std::string, Value>> items;
};

// `loop` within a for.
struct Loop {
  std::vector<Value> items;
  size_t index = 0;  // of the element whose turn it is
  size_t depth = 1;
  mutable std::optional<std::vector<Value>> changed;
};

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

struct Function {
  std::string name;
  std::function<Value(Arguments&)> call;
};

bool equal(const Value& a, const Value& b);
// Python's a < b. Throws Problem for what has no order.
bool less(const Value& a, const Value& b);
Text str(const Value& value);   // str()
Text repr(const Value& value);  // repr()
// Elements of a list, keys of a dict, characters of a text. Throws Problem for what cannot be iterated.
std::vector<Value> elements(const Value& value);
size_t length(const Value& value);

struct JsonLayout {
  bool ascii = false, sort_keys = false;
  std::optional<Text> indent;  // of one level; none: all on one line
  Text item_separator = U", ", key_separator = U": ";
};
Text to_json(const Value& value, const JsonLayout& layout);

}  // namespace jinja
