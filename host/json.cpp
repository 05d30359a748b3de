#include "host/json.h"

#include <jansson.h>

#include <cmath>
#include <cstdlib>
#include <memory>

#include "host/error.h"
#include "host/utf8.h"

namespace {

using Tree = std::unique_ptr<json_t, decltype([](json_t* tree) { json_decref(tree); })>;
using Text = std::unique_ptr<char, decltype([](char* text) { std::free(text); })>;

Json value_of(json_t* tree) {
  if (json_is_object(tree)) {
    Json::Object members;
    const char* key;
    json_t* value;
    json_object_foreach(tree, key, value) members.emplace_back(key, value_of(value));
    return members;
  }
  if (json_is_array(tree)) {
    Json::Array elements;
    for (size_t i = 0; i < json_array_size(tree); i++) elements.push_back(value_of(json_array_get(tree, i)));
    return elements;
  }
  if (json_is_string(tree)) return std::string(json_string_value(tree), json_string_length(tree));
  if (json_is_integer(tree)) return json_integer_value(tree);
  if (json_is_real(tree)) return json_real_value(tree);
  if (json_is_boolean(tree)) return bool(json_boolean_value(tree));
  return {};
}

std::string well_formed(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const int length = sequence_length(text);
    out += length < 1 ? "\xef\xbf\xbd" : text.substr(0, static_cast<size_t>(length));
    text.remove_prefix(static_cast<size_t>(std::max(1, length)));
  }
  return out;
}

Tree tree_of(const Json& json) {
  if (const Json::Object* members = json.object()) {
    Tree tree(json_object());
    for (const auto& [key, value] : *members)
      json_object_set_new(tree.get(), well_formed(key).c_str(), tree_of(value).release());
    return tree;
  }
  if (const Json::Array* elements = json.array()) {
    Tree tree(json_array());
    for (const Json& value : *elements) json_array_append_new(tree.get(), tree_of(value).release());
    return tree;
  }
  if (const std::string* s = json.string()) {
    const std::string text = well_formed(*s);
    return Tree(json_stringn(text.data(), text.size()));
  }
  if (const bool* b = json.boolean()) return Tree(json_boolean(*b));
  if (const auto i = json.integer<int64_t>()) return Tree(json_integer(*i));
  if (const auto d = json.number(); d && std::isfinite(*d)) return Tree(json_real(*d));
  return Tree(json_null());
}

}  // namespace

Json parse_json(std::string_view text, const std::string& what) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);  // a byte order mark, as some editors begin every file
  const size_t zero = text.find('\0');                          // which Jansson passes over between values
  if (zero != text.npos) fail("%s is not JSON: at byte %zu: a zero byte", what.c_str(), zero);
  json_error_t error;
  const Tree tree(
      json_loadb(text.data(), text.size(), JSON_DECODE_ANY | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error));
  if (!tree) fail("%s is not JSON: at byte %d: %s", what.c_str(), error.position, error.text);
  return value_of(tree.get());
}

std::optional<double> Json::number() const {
  if (const auto* x = std::get_if<int64_t>(&value_)) return static_cast<double>(*x);
  if (const auto* x = std::get_if<double>(&value_)) return *x;
  return {};
}

const Json* Json::find(std::string_view key) const {
  if (const Object* members = object())
    for (const auto& [name, value] : *members)
      if (name == key) return &value;
  return nullptr;
}

std::string Json::text(bool indented) const {
  const size_t layout = indented ? JSON_INDENT(2) : JSON_COMPACT;
  const Text text(json_dumps(tree_of(*this).get(), layout | JSON_ENCODE_ANY | JSON_REAL_PRECISION(15)));
  return text.get();
}
