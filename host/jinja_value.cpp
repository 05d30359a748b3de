#include "host/jinja_value.h"

#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "host/unicode.h"
#include "host/utf8.h"

namespace jinja {

Text to_text(std::string_view utf8, bool mark) {
  Text text;
  text.reserve(utf8.size());
  while (!utf8.empty()) {
    const int length = sequence_length(utf8);
    utf8proc_int32_t point = 0xDC00 + static_cast<uint8_t>(utf8[0]);
    if (length > 0) utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(utf8.data()), length, &point);
    text += static_cast<Char>(point) | (mark ? MARK : 0);
    utf8.remove_prefix(static_cast<size_t>(std::max(1, length)));
  }
  return text;
}

std::string to_utf8(TextView text) {
  std::string out;
  out.reserve(text.size());
  for (const Char c : text) {
    if (const Char point = plain(c); point >= 0xDC80 && point < 0xDD00) {
      out += static_cast<char>(point - 0xDC00);
    } else {
      utf8proc_uint8_t bytes[4];
      const auto n = utf8proc_encode_char(static_cast<utf8proc_int32_t>(point), bytes);
      out.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(n));
    }
  }
  return out;
}

bool is_space(Char c) {
  return is_white_space(plain(c)) || (plain(c) >= 0x1C && plain(c) <= 0x1F);
}

Value::Value() : value_(Undefined{"undefined"}) {}
Value::Value(Undefined x) : value_(std::move(x)) {}
Value::Value(None x) : value_(x) {}
Value::Value(bool x) : value_(x) {}
Value::Value(int64_t x) : value_(x) {}
Value::Value(double x) : value_(x) {}
Value::Value(Text x) : value_(std::make_shared<const Text>(std::move(x))) {}
Value::Value(TextView x) : Value(Text(x)) {}
Value::Value(List x) : value_(std::make_shared<const List>(std::move(x))) {}
Value::Value(Dict x) : value_(std::make_shared<const Dict>(std::move(x))) {}
Value::Value(Shared<Loop> x) : value_(std::move(x)) {}
Value::Value(Shared<Function> x) : value_(std::move(x)) {}
Value::Value(std::shared_ptr<Namespace> x) : value_(std::move(x)) {}
Value::Value(const Value& other) = default;
Value::Value(Value&& other) noexcept = default;
Value& Value::operator=(const Value& other) = default;
Value& Value::operator=(Value&& other) noexcept = default;
Value::~Value() = default;

Value Value::of(const Json& json, bool mark) {
  if (const Json::Object* members = json.object()) {
    Dict dict;
    for (const auto& [key, member] : *members) dict.items.emplace_back(to_text(key, mark), of(member, mark));
    return dict;
  }
  if (const Json::Array* array = json.array()) {
    List list;
    for (const Json& element : *array) list.items.push_back(of(element, mark));
    return list;
  }
  if (const std::string* s = json.string()) return to_text(*s, mark);
  if (const bool* b = json.boolean()) return *b;
  if (const auto i = json.integer<int64_t>()) return *i;
  if (const auto d = json.number()) return *d;
  return None{};
}

std::optional<int64_t> Value::integer() const {
  if (const int64_t* i = std::get_if<int64_t>(&value_)) return *i;
  if (const bool* b = boolean()) return *b;
  return {};
}

std::optional<double> Value::number() const {
  if (const auto i = integer()) return static_cast<double>(*i);
  if (const double* d = real()) return *d;
  return {};
}

bool Value::truth() const {
  if (undefined() || none()) return false;
  if (const auto n = number()) return *n != 0;
  if (const Text* t = text()) return !t->empty();
  if (const List* l = list()) return l->kind == List::lazy || !l->items.empty();
  if (const Dict* d = dict()) return !d->items.empty();
  return true;
}

std::string Value::kind() const {
  if (undefined()) return "Undefined";
  if (none()) return "NoneType";
  if (boolean()) return "bool";
  if (integer()) return "int";
  if (real()) return "float";
  if (text()) return "str";
  if (dict()) return "dict";
  if (loop()) return "LoopContext";
  if (variables()) return "Namespace";
  if (!list()) return "function";
  constexpr const char* KINDS[] = {"list", "tuple", "range", "dict view", "generator"};
  return KINDS[static_cast<size_t>(list()->kind)];
}

const Value* Dict::find(const Value& key) const {
  if (key.list() || key.dict()) throw Problem("a " + key.kind() + " is no key of a dict");
  const auto at = std::ranges::find_if(items, [&](const auto& item) { return equal(item.first, key); });
  return at == items.end() ? nullptr : &at->second;
}

void Dict::set(const Value& key, Value value) {
  if (const Value* old = find(key))
    *const_cast<Value*>(old) = std::move(value);
  else
    items.emplace_back(key, std::move(value));
}

namespace {

constexpr size_t MAX_DEPTH = 500;  // of values in values

void check_depth(size_t depth) {
  if (depth > MAX_DEPTH) throw Problem("a value is nested too deeply");
}

// A tuple of two.
std::pair<const List*, const List*> sequences(const Value& a, const Value& b) {
  if (a.list() && b.list() && a.list()->kind == b.list()->kind && a.list()->kind != List::lazy)
    return {a.list(), b.list()};
  return {};
}

bool equal(const Value& a, const Value& b, size_t depth) {
  check_depth(depth);
  if (a.undefined() || b.undefined()) return a.undefined() && b.undefined();
  if (a.none() || b.none()) return a.none() && b.none();
  if (a.integer() && b.integer()) return *a.integer() == *b.integer();
  if (a.number() && b.number()) return *a.number() == *b.number();
  if (a.text() && b.text()) return *a.text() == *b.text();
  const auto same = [&](const Value& x, const Value& y) { return equal(x, y, depth + 1); };
  if (const auto [x, y] = sequences(a, b); x) return std::ranges::equal(x->items, y->items, same);
  if (a.dict() && b.dict()) {
    return a.dict()->items.size() == b.dict()->items.size() &&
           std::ranges::all_of(a.dict()->items, [&](const auto& item) {
             const Value* other = b.dict()->find(item.first);
             return other && same(item.second, *other);
           });
  }
  if (a.list() && b.list()) return a.list() == b.list();
  if (a.variables() && b.variables()) return a.variables() == b.variables();
  return a.function() && a.function() == b.function();
}

bool less(const Value& a, const Value& b, size_t depth) {
  check_depth(depth);
  if (a.integer() && b.integer()) return *a.integer() < *b.integer();
  if (a.number() && b.number()) return *a.number() < *b.number();
  if (a.text() && b.text()) return *a.text() < *b.text();
  if (const auto [x, y] = sequences(a, b); x) {
    for (size_t i = 0; i < std::min(x->items.size(), y->items.size()); ++i)
      if (!equal(x->items[i], y->items[i], depth + 1)) return less(x->items[i], y->items[i], depth + 1);
    return x->items.size() < y->items.size();
  }
  for (const Value* value : {&a, &b})
    if (value->undefined()) throw Problem(value->undefined()->why);
  throw Problem("a " + a.kind() + " and a " + b.kind() + " have no order");
}

// The shortest digits that give the number back, as Python writes them.
std::string number_text(double x) {
  if (std::isnan(x)) return "nan";
  if (std::isinf(x)) return x < 0 ? "-inf" : "inf";
  char digits[400];
  const bool fixed = x == 0 || (std::abs(x) >= 1e-4 && std::abs(x) < 1e16);
  const auto end = std::to_chars(digits, digits + sizeof digits, x,
                                 fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string text(digits, end.ptr);
  if (fixed && text.find('.') == std::string::npos) text += ".0";
  return text;
}

bool is_printable(Char c) {
  if (plain(c) == ' ') return true;
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(plain(c)));
  return category != UTF8PROC_CATEGORY_CN && category < UTF8PROC_CATEGORY_ZS;
}

// `digits` hexadecimal ones after \x, \u or \U.
Text escape(Char kind, Char c, int digits) {
  Text out = {U'\\', kind};
  while (digits-- > 0) out += U"0123456789abcdef"[plain(c) >> 4 * digits & 15];
  for (Char& x : out) x |= c & MARK;
  return out;
}

Text text_repr(const Text& text) {
  const Char quote = text.find(U'\'') != text.npos && text.find(U'"') == text.npos ? U'"' : U'\'';
  Text out(1, quote);
  for (const Char c : text) {
    const Char p = plain(c), mark = c & MARK;
    const size_t named = TextView(U"\n\r\t").find(p);
    if (p == quote || p == U'\\')
      out += {U'\\' | mark, c};
    else if (named != TextView::npos)
      out += {U'\\' | mark, U"nrt"[named] | mark};
    else if (is_printable(c))
      out += c;
    else
      out += p < 0x100 ? escape(U'x', c, 2) : p < 0x10000 ? escape(U'u', c, 4) : escape(U'U', c, 8);
  }
  return out + quote;
}

Text repr(const Value& value, size_t depth) {
  check_depth(depth);
  if (value.undefined()) return U"Undefined";
  if (value.none()) return U"None";
  if (value.boolean()) return *value.boolean() ? U"True" : U"False";
  if (value.integer()) return to_text(std::to_string(*value.integer()));
  if (value.real()) return to_text(number_text(*value.real()));
  if (value.text()) return text_repr(*value.text());
  Text out;
  const auto add = [&](const Text& item) { out += out.empty() ? item : U", " + item; };
  if (const List* list = value.list(); list && list->kind <= List::tuple) {
    for (const Value& item : list->items) add(repr(item, depth + 1));
    if (list->kind == List::list) return U'[' + out + U']';
    return U'(' + out + (list->items.size() == 1 ? U",)" : U")");
  }
  if (!value.dict()) throw Problem("a " + value.kind() + " cannot be printed");
  for (const auto& [key, item] : value.dict()->items) add(repr(key, depth + 1) + U": " + repr(item, depth + 1));
  return U'{' + out + U'}';
}

Text json_text(const Text& text, bool ascii) {
  Text out(1, U'"');
  for (const Char c : text) {
    const Char p = plain(c), mark = c & MARK;
    const size_t named = TextView(U"\"\\\n\r\t\b\f").find(p);
    if (named != TextView::npos)
      out += {U'\\' | mark, U"\"\\nrtbf"[named] | mark};
    else if (p >= 0x10000 && ascii)
      out += escape(U'u', (0xD800 + ((p - 0x10000) >> 10)) | mark, 4) + escape(U'u', (0xDC00 + (p & 0x3FF)) | mark, 4);
    else if (p < 0x20 || (ascii && p >= 0x7F))
      out += p == 0x7F ? Text(1, c) : escape(U'u', c, 4);
    else
      out += c;
  }
  return out + U'"';
}

Text json_scalar(const Value& value, const JsonLayout& layout) {
  if (value.none()) return U"null";
  if (value.boolean()) return *value.boolean() ? U"true" : U"false";
  if (value.text()) return json_text(*value.text(), layout.ascii);
  if (const double* d = value.real(); d && !std::isfinite(*d))
    return std::isnan(*d) ? U"NaN" : *d < 0 ? U"-Infinity" : U"Infinity";
  if (value.number()) return repr(value, 0);
  throw Problem("a " + value.kind() + " cannot be written as JSON");
}

Text json(const Value& value, const JsonLayout& layout, size_t depth) {
  check_depth(depth);
  const auto line = [&](size_t level) {
    Text out;
    if (layout.indent) out += U'\n';
    for (size_t i = 0; layout.indent && i < level; ++i) out += *layout.indent;
    return out;
  };
  std::vector<Text> parts;
  const List* list = value.list() && value.list()->kind <= List::tuple ? value.list() : nullptr;
  if (list) {
    for (const Value& item : list->items) parts.push_back(json(item, layout, depth + 1));
  } else if (value.dict()) {
    auto items = value.dict()->items;
    if (layout.sort_keys)
      std::ranges::stable_sort(items, [](const auto& a, const auto& b) { return less(a.first, b.first, 0); });
    for (const auto& [key, item] : items) {
      const Text name = json_scalar(key, layout);
      parts.push_back((key.text() ? name : U'"' + name + U'"') + layout.key_separator + json(item, layout, depth + 1));
    }
  } else {
    return json_scalar(value, layout);
  }
  Text out;
  for (const Text& part : parts) out += (out.empty() ? Text() : layout.item_separator) + line(depth + 1) + part;
  if (!parts.empty()) out += line(depth);
  return list ? U'[' + out + U']' : U'{' + out + U'}';
}

}  // namespace

bool equal(const Value& a, const Value& b) {
  return equal(a, b, 0);
}
bool less(const Value& a, const Value& b) {
  return less(a, b, 0);
}
Text repr(const Value& value) {
  return repr(value, 0);
}
Text str(const Value& value) {
  if (value.undefined()) return {};
  return value.text() ? *value.text() : repr(value, 0);
}
Text to_json(const Value& value, const JsonLayout& layout) {
  return json(value, layout, 0);
}

std::vector<Value> elements(const Value& value) {
  if (value.undefined()) return {};
  std::vector<Value> out;
  if (const Text* text = value.text()) {
    for (const Char c : *text) out.push_back(Text(1, c));
  } else if (const Dict* dict = value.dict()) {
    for (const auto& [key, item] : dict->items) out.push_back(key);
  } else if (const List* list = value.list()) {
    const size_t from = list->kind == List::lazy ? std::exchange(list->taken, list->items.size()) : 0;
    out.assign(list->items.begin() + static_cast<std::ptrdiff_t>(from), list->items.end());
  } else {
    throw Problem("a " + value.kind() + " has no elements");
  }
  return out;
}

size_t length(const Value& value) {
  if (value.undefined()) return 0;
  if (value.text()) return value.text()->size();
  if (value.dict()) return value.dict()->items.size();
  if (value.list() && value.list()->kind != List::lazy) return value.list()->items.size();
  throw Problem("a " + value.kind() + " has no length");
}

}  // namespace jinja
