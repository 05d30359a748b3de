#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "device.h"
#include "utf8.h"

namespace {

constexpr int MAX_DEPTH = 100;  // values within values: the parser calls itself

// A function for each kind of value; at_ is where it begins, and afterwards where it has ended.
class Parser {
 public:
  Parser(std::string_view text, const std::string& what) : text_(text), what_(what) {}

  Json document() {
    take("\xef\xbb\xbf");  // a byte order mark, as some editors begin every file
    Json v = value(0);
    if (at_ < text_.size()) wrong("comes more than one value");
    return v;
  }

 private:
  [[noreturn]] void wrong(const char* what) const {
    fail("%s is not JSON: at byte %zu %s", what_.c_str(), at_, at_ < text_.size() ? what : "it ends");
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(std::string_view word) {
    const bool is_there = text_.substr(at_).starts_with(word);
    if (is_there) at_ += word.size();
    return is_there;
  }

  void skip_space() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }

  bool take_digits() {
    const size_t begin = at_;
    while (peek() >= '0' && peek() <= '9') at_++;
    return at_ > begin;
  }

  // With the space around it.
  Json value(int depth) {
    if (depth > MAX_DEPTH) wrong("values are nested too deep");
    skip_space();
    const char c = peek();
    Json v = c == '{'        ? object(depth)
             : c == '['      ? array(depth)
             : c == '"'      ? Json(string())
             : take("true")  ? Json(true)
             : take("false") ? Json(false)
             : take("null")  ? Json()
                             : number();
    skip_space();
    return v;
  }

  Json array(int depth) {
    Json::Array elements;
    at_++;
    skip_space();
    if (take("]")) return elements;
    do elements.push_back(value(depth + 1));
    while (take(","));
    if (!take("]")) wrong("',' or ']' is missing");
    return elements;
  }

  Json object(int depth) {
    Json::Object members;
    at_++;
    skip_space();
    if (take("}")) return members;
    do {
      skip_space();
      if (peek() != '"') wrong("a key in double quotes is missing");
      std::string key = string();
      skip_space();
      if (!take(":")) wrong("':' is missing");
      members.emplace_back(std::move(key), value(depth + 1));
    } while (take(","));
    if (!take("}")) wrong("',' or '}' is missing");
    refuse_twins(members);
    return members;
  }

  // Readers differ in which of two values they take.
  void refuse_twins(const Json::Object& members) const {
    std::vector<std::string_view> keys;
    for (const auto& [key, value] : members) keys.push_back(key);
    std::sort(keys.begin(), keys.end());
    const auto twin = std::adjacent_find(keys.begin(), keys.end());
    if (twin != keys.end()) fail("%s names \"%s\" twice", what_.c_str(), std::string(*twin).c_str());
  }

  Json number() {
    const size_t begin = at_;
    take("-");
    if (!take("0") && !take_digits()) wrong("a value is missing");
    bool whole = true;
    if (take(".")) {
      whole = false;
      if (!take_digits()) wrong("a digit is missing");
    }
    if (take("e") || take("E")) {
      whole = false;
      if (!take("+")) take("-");
      if (!take_digits()) wrong("a digit is missing");
    }
    const char *first = text_.data() + begin, *last = text_.data() + at_;
    int64_t i = 0;
    uint64_t u = 0;
    double d = 0;
    if (whole && std::from_chars(first, last, i).ec == std::errc()) return i;
    if (whole && std::from_chars(first, last, u).ec == std::errc()) return u;
    if (std::from_chars(first, last, d).ec == std::errc()) return d;
    at_ = begin;
    wrong("a number is too large or too small");
  }

  std::string string() {
    std::string out;
    at_++;
    while (!take("\"")) {
      if (take("\\")) {
        escape(out);
        continue;
      }
      const auto rest = text_.substr(at_);
      const int length = rest.empty() ? 0 : sequence_length(rest);
      if (length < 1) wrong("a byte is not UTF-8");
      if (static_cast<unsigned char>(rest[0]) < ' ') wrong("a control character must be escaped");
      out += rest.substr(0, static_cast<size_t>(length));
      at_ += static_cast<size_t>(length);
    }
    return out;
  }

  void escape(std::string& out) {
    constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    if (take("u")) return append_utf8(code_point(), out);
    const size_t which = letters.find(peek());
    if (which == letters.npos) wrong("an unknown character follows '\\'");
    out += meanings[which];
    at_++;
  }

  unsigned hex4() {
    unsigned x = 0;
    const auto digits = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), x, 16);
    if (digits.size() < 4 || end != digits.data() + 4) wrong("four hexadecimal digits are missing");
    at_ += 4;
    return x;
  }

  // After \u; of a character beyond U+FFFF both halves.
  unsigned code_point() {
    const unsigned x = hex4();
    if (x < 0xD800 || x > 0xDFFF) return x;
    const unsigned low = x < 0xDC00 && take("\\u") ? hex4() : 0;
    if (low < 0xDC00 || low > 0xDFFF) wrong("half a surrogate pair is missing");
    return 0x10000 + ((x - 0xD800) << 10) + (low - 0xDC00);
  }

  static void append_utf8(unsigned x, std::string& out) {
    const auto add = [&](unsigned byte) { out += static_cast<char>(byte); };
    const auto continuation = [&](int shift) { add(0x80 | (x >> shift & 0x3F)); };
    if (x < 0x80) return add(x);
    if (x < 0x800) return add(0xC0 | x >> 6), continuation(0);
    if (x < 0x10000) return add(0xE0 | x >> 12), continuation(6), continuation(0);
    add(0xF0 | x >> 18), continuation(12), continuation(6), continuation(0);
  }

  std::string_view text_;
  const std::string& what_;
  size_t at_ = 0;
};

void write_string(std::string& out, std::string_view text) {
  out += '"';
  while (!text.empty()) {
    const int length = sequence_length(text);
    const auto c = static_cast<unsigned char>(text[0]);
    char code[8];
    std::snprintf(code, sizeof code, "\\u%04x", c);
    if (length < 1)
      out += "\xef\xbf\xbd";
    else if (c == '"' || c == '\\')
      (out += '\\') += text[0];
    else if (c == '\n')
      out += "\\n";
    else if (c < ' ')
      out += code;
    else
      out += text.substr(0, static_cast<size_t>(length));
    text.remove_prefix(static_cast<size_t>(std::max(1, length)));
  }
  out += '"';
}

template <class Number>
void write_number(std::string& out, Number x) {
  char digits[32];  // the shortest that reads back as the same number
  out.append(digits, std::to_chars(digits, digits + sizeof digits, x).ptr);
}

}  // namespace

Json parse_json(std::string_view text, const std::string& what) {
  return Parser(text, what).document();
}

std::optional<double> Json::number() const {
  if (const auto* x = std::get_if<int64_t>(&value_)) return static_cast<double>(*x);
  if (const auto* x = std::get_if<uint64_t>(&value_)) return static_cast<double>(*x);
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
  std::string out;
  const std::string newline = "\n";
  write(out, indented ? &newline : nullptr);
  return out;
}

// newline: what begins a line at this depth; null: everything stays on one.
void Json::write(std::string& out, const std::string* newline) const {
  const std::string deeper = newline ? *newline + "  " : "";
  const auto list = [&](char open, char close, const auto& elements, auto write_one) {
    out += open;
    for (const auto& e : elements) {
      if (&e != &elements.front()) out += ',';
      out += deeper;
      write_one(e);
    }
    if (newline && !elements.empty()) out += *newline;
    out += close;
  };
  const std::string* inner = newline ? &deeper : nullptr;
  if (const Array* elements = array())
    list('[', ']', *elements, [&](const Json& e) { e.write(out, inner); });
  else if (const Object* members = object())
    list('{', '}', *members, [&](const auto& member) {
      write_string(out, member.first);
      out += newline ? ": " : ":";
      member.second.write(out, inner);
    });
  else if (const std::string* s = string())
    write_string(out, *s);
  else if (const bool* b = boolean())
    out += *b ? "true" : "false";
  else if (const auto i = integer<int64_t>())
    write_number(out, *i);
  else if (const auto u = integer<uint64_t>())
    write_number(out, *u);
  else if (const auto d = number(); d && std::isfinite(*d))
    write_number(out, *d);
  else
    out += "null";
}
