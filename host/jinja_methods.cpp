// jinja_methods.cpp: attributes, elements and methods of values, as Python has them.
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <span>

#include "host/jinja_builtins.h"

namespace jinja {

std::vector<std::optional<Value>> bind(Arguments& arguments, const std::string& function,
                                       std::initializer_list<const char*> parameters, size_t required) {
  std::vector<std::optional<Value>> bound(parameters.size());
  if (arguments.positional.size() > parameters.size())
    throw Problem(function + " takes at most " + std::to_string(parameters.size()) + " arguments");
  std::ranges::copy(arguments.positional, bound.begin());
  for (const auto& [name, value] : arguments.named) {
    const auto at = std::ranges::find_if(parameters, [&](const char* p) { return name == p; });
    if (at == parameters.end() || bound[static_cast<size_t>(at - parameters.begin())])
      throw Problem(function + " takes no argument '" + name + "', or takes it once");
    bound[static_cast<size_t>(at - parameters.begin())] = value;
  }
  for (size_t i = 0; i < required; ++i)
    if (!bound[i]) throw Problem(function + " needs its argument '" + *(parameters.begin() + i) + "'");
  return bound;
}

int64_t to_integer(const Value& value, const char* what) {
  if (const auto i = value.integer()) return *i;
  throw Problem(std::string(what) + " must be a whole number, not a " + value.kind());
}

namespace {

using Category = utf8proc_category_t;
Category category(Char c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(plain(c)));
}
bool is_letter(Char c) {
  return category(c) >= UTF8PROC_CATEGORY_LU && category(c) <= UTF8PROC_CATEGORY_LO;
}
bool is_cased(Char c) {
  return category(c) >= UTF8PROC_CATEGORY_LU && category(c) <= UTF8PROC_CATEGORY_LT;
}
Char changed(Char c, utf8proc_int32_t (*change)(utf8proc_int32_t)) {
  return static_cast<Char>(change(static_cast<utf8proc_int32_t>(plain(c)))) | (c & MARK);
}

// The characters that its case folding makes of c: several of some ("ß", "ﬁ"), whose capitals are theirs.
Text folded(Char c) {
  utf8proc_int32_t parts[4];
  const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(plain(c)), parts, 4, UTF8PROC_CASEFOLD, nullptr);
  Text out;
  for (const utf8proc_int32_t part : std::span(parts, static_cast<size_t>(n)))
    out += static_cast<Char>(part) | (c & MARK);
  return out;
}

// What depends on the letters around it, or is several letters by a rule of its own, is not known here.
Char small(Char c) {
  if (plain(c) == U'\u0130' || plain(c) == U'\u03A3') throw Problem("the small letter of a capital is not known here");
  return changed(c, utf8proc_tolower);
}
Char titled(Char c) {
  const Char title = changed(c, utf8proc_totitle);
  if (folded(c).size() > 1 && category(c) == UTF8PROC_CATEGORY_LL && category(title) != UTF8PROC_CATEGORY_LT)
    throw Problem("the capital of a letter is not known here");
  return title;
}

Text title(TextView text) {
  Text out;
  bool inside = false;  // a word
  for (const Char c : text) {
    out += inside ? small(c) : titled(c);
    inside = is_cased(c);
  }
  return out;
}

}  // namespace

Text upper(TextView text) {
  Text out;
  for (const Char c : text) {
    const Text letters = category(c) == UTF8PROC_CATEGORY_LU ? Text(1, c) : folded(c);
    if (letters.size() == 1)
      out += changed(c, utf8proc_toupper);
    else
      for (const Char letter : letters) out += changed(letter, utf8proc_toupper);
  }
  return out;
}

Text lower(TextView text) {
  Text out;
  for (const Char c : text) out += small(c);
  return out;
}

Text capitalized(TextView text) {
  return text.empty() ? Text() : Text(1, titled(text[0])) + lower(text.substr(1));
}

Text replaced(Work& work, const Text& text, const Text& old, const Text& with, int64_t count) {
  work.charge(text.size() * (1 + old.size() / 16));
  Text out;
  size_t at = 0;
  for (; count != 0; --count) {
    const size_t found = old.empty() && at > text.size() ? text.npos : text.find(old, at);
    if (found == text.npos) break;
    work.charge(found - at + with.size());
    out.append(text, at, found - at).append(with);
    at = found + old.size();
    if (!old.empty()) continue;
    if (at < text.size()) out += text[at];
    ++at;
  }
  return at <= text.size() ? out.append(text, at) : out;
}

std::vector<TextView> lines(TextView text, bool keep_ends) {
  std::vector<TextView> out;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = begin;
    while (end < text.size()) {
      const Char p = plain(text[end]);
      if ((p >= 0x0A && p <= 0x0D) || (p >= 0x1C && p <= 0x1E) || p == 0x85 || p == 0x2028 || p == 0x2029) break;
      ++end;
    }
    size_t next = std::min(end + 1, text.size());
    if (text.substr(end).starts_with(U"\r\n")) ++next;
    out.push_back(text.substr(begin, (keep_ends ? next : end) - begin));
    begin = next;
  }
  return out;
}

namespace {

Value list_of(const std::vector<TextView>& parts) {
  List list;
  for (const TextView part : parts) list.items.emplace_back(part);
  return list;
}

const Text& need_text(const Value& value, const char* what) {
  if (value.undefined()) throw Problem(value.undefined()->why);
  if (!value.text()) throw Problem(std::string(what) + " must be a text, not a " + value.kind());
  return *value.text();
}

// At most `most` cuts, negative: any number, counted from the text's end where `from_end`.
Value split(Work& work, const Text& text, Arguments& a, bool from_end) {
  const auto bound = bind(a, "split", {"sep", "maxsplit"});
  const int64_t most = bound[1] ? to_integer(*bound[1], "maxsplit") : -1;
  const bool by_space = !bound[0] || bound[0]->none();
  const Text separator = by_space ? Text() : need_text(*bound[0], "the separator");
  if (!by_space && separator.empty()) throw Problem("the separator of split is empty");
  work.charge(text.size() * (2 + separator.size() / 16));
  std::vector<TextView> parts;
  TextView rest = text;
  const auto cuts_left = [&] { return most < 0 || std::ssize(parts) < most; };
  if (by_space) {
    for (rest = stripped(rest, !from_end, from_end, is_space); !rest.empty();
         rest = stripped(rest, !from_end, from_end, is_space)) {
      const auto end = from_end ? std::find_if(rest.rbegin(), rest.rend(), is_space).base()
                                : std::find_if(rest.begin(), rest.end(), is_space);
      if (!cuts_left() || end == (from_end ? rest.begin() : rest.end())) {
        parts.push_back(rest);
        break;
      }
      const size_t cut = static_cast<size_t>(end - rest.begin());
      parts.push_back(from_end ? rest.substr(cut) : rest.substr(0, cut));
      rest = from_end ? rest.substr(0, cut) : rest.substr(cut);
    }
  } else {
    for (;;) {
      const size_t cut = !cuts_left() ? rest.npos : from_end ? rest.rfind(separator) : rest.find(separator);
      if (cut == rest.npos) break;
      const TextView before = rest.substr(0, cut), behind = rest.substr(cut + separator.size());
      parts.push_back(from_end ? behind : before);
      rest = from_end ? before : behind;
    }
    parts.push_back(rest);
  }
  if (from_end) std::ranges::reverse(parts);
  work.charge(16 * parts.size());
  return list_of(parts);
}

Value strip(Work& work, const Text& text, Arguments& a, bool left, bool right) {
  const auto bound = bind(a, "strip", {"chars"});
  work.charge(text.size());
  if (!bound[0] || bound[0]->none()) return stripped(TextView(text), left, right, is_space);
  const Text& chars = need_text(*bound[0], "the characters to strip");
  work.charge(text.size() * (chars.size() / 16));
  return stripped(TextView(text), left, right, [&](Char c) { return chars.find(c) != chars.npos; });
}

// A place in a text of this length, from an argument that may be negative (from the end on) or none.
size_t place_in(const std::optional<Value>& place, size_t length, size_t otherwise) {
  if (!place || place->none()) return otherwise;
  const int64_t i = to_integer(*place, "a place in a text");
  return static_cast<size_t>(std::max<int64_t>(i < 0 ? i + static_cast<int64_t>(length) : i, 0));
}

struct Span {
  size_t from, to;  // from > to: nothing is there, not even an empty text
};
Span span_of(const std::optional<Value>& start, const std::optional<Value>& end, size_t length) {
  return {place_in(start, length, 0), std::min(place_in(end, length, length), length)};
}

Value edge(const Text& text, Arguments& a, bool end) {
  const auto bound = bind(a, end ? "endswith" : "startswith", {"prefix", "start", "end"}, 1);
  const auto [from, to] = span_of(bound[1], bound[2], text.size());
  if (from > to) return false;
  const TextView part = TextView(text).substr(from, to - from);
  const auto has = [&](const Value& affix) {
    const TextView sought = need_text(affix, "what a text starts or ends with");
    return end ? part.ends_with(sought) : part.starts_with(sought);
  };
  const List* several = bound[0]->list();
  return several && several->kind == List::tuple ? std::ranges::any_of(several->items, has) : has(*bound[0]);
}

Value find(Work& work, const Text& text, Arguments& a, bool from_end) {
  const auto bound = bind(a, "find", {"sub", "start", "end"}, 1);
  const Text& sought = need_text(*bound[0], "what to find");
  work.charge(text.size() * (1 + sought.size() / 16));
  const auto [from, to] = span_of(bound[1], bound[2], text.size());
  if (from > to) return int64_t{-1};
  const TextView part = TextView(text).substr(from, to - from);
  const size_t found = from_end ? part.rfind(sought) : part.find(sought);
  return found == part.npos ? int64_t{-1} : static_cast<int64_t>(from + found);
}

Value count(Work& work, const Text& text, Arguments& a) {
  const Text& sought = need_text(*bind(a, "count", {"sub"}, 1)[0], "what to count");
  work.charge(text.size() * (1 + sought.size() / 16));
  if (sought.empty()) return Value::size(text.size() + 1);
  int64_t n = 0;
  for (size_t at = 0; (at = text.find(sought, at)) != text.npos; at += sought.size()) ++n;
  return n;
}

Value join(Work& work, const Text& separator, Arguments& a) {
  Text out;
  const std::vector<Value> parts = elements(*bind(a, "join", {"iterable"}, 1)[0]);
  for (size_t i = 0; i < parts.size(); ++i) {
    const Text& part = need_text(parts[i], "what is joined");
    work.charge(part.size() + separator.size());
    out += i > 0 ? separator + part : part;
  }
  return out;
}

Value partition(Work& work, const Text& text, Arguments& a, bool from_end) {
  const Text& separator = need_text(*bind(a, "partition", {"sep"}, 1)[0], "the separator");
  if (separator.empty()) throw Problem("the separator of partition is empty");
  work.charge(text.size() * (1 + separator.size() / 16));
  const size_t at = from_end ? text.rfind(separator) : text.find(separator);
  List parts{{}, List::tuple};
  if (at != text.npos)
    parts.items = {text.substr(0, at), separator, text.substr(at + separator.size())};
  else
    parts.items = {from_end ? Text() : text, Text(), from_end ? text : Text()};
  return parts;
}

// Side: -1 fills on the left, 1 on the right, 0 on both.
Value padded(Work& work, const Text& text, Arguments& a, int side) {
  const auto bound = bind(a, "padding", {"width", "fillchar"}, 1);
  const int64_t missing = to_integer(*bound[0], "the width") - std::ssize(text);
  const Text fill = bound[1] ? need_text(*bound[1], "the filling") : Text(U" ");
  if (fill.size() != 1) throw Problem("a filling must be one character");
  if (missing <= 0) return text;
  const size_t n = static_cast<size_t>(missing);
  work.charge(n + text.size());
  // Python's str.center puts the odd one on the left where the width is odd.
  const size_t left = side < 0 ? n : side > 0 ? 0 : n / 2 + (n & (n + text.size()) & 1);
  return Text(left, fill[0]) + text + Text(n - left, fill[0]);
}

// str.format with fields such as {}, {0} and {name}.
Value format(Work& work, const Text& text, Arguments& a) {
  Text out;
  size_t automatic = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const Char c = plain(text[i]);
    const bool twice = i + 1 < text.size() && plain(text[i + 1]) == c;
    if ((c != U'{' && c != U'}') || twice) {
      out += text[i];
      i += (c == U'{' || c == U'}') && twice;
      continue;
    }
    const size_t end = text.find(U'}', i);
    if (c == U'}' || end == text.npos) throw Problem("a single '{' or '}' in the text to format");
    const std::string field = to_utf8(TextView(text).substr(i + 1, end - i - 1));
    if (field.find_first_of(".[!:") != field.npos) throw Problem("the field '{" + field + "}' is not known here");
    const auto named = std::ranges::find(a.named, field, [](const auto& pair) { return pair.first; });
    const bool number = field.find_first_not_of("0123456789") == field.npos && field.size() < 9;
    const size_t index = field.empty() ? automatic++ : number ? std::stoul(field) : a.positional.size();
    if (!number && named == a.named.end()) throw Problem("no argument for the field '{" + field + "}'");
    if (number && index >= a.positional.size()) throw Problem("no argument for the field '{" + field + "}'");
    const Text value = str(number ? a.positional[index] : named->second);
    work.charge(value.size());
    out += value;
    i = end;
  }
  return out;
}

template <class Is>
Value all(const Text& text, Is is) {
  return !text.empty() && std::ranges::all_of(text, is);
}
bool is_decimal(Char c) {
  return category(c) == UTF8PROC_CATEGORY_ND;
}
// Python takes some of the other numbers for digits ("²") and all of them for alphanumeric.
bool is_digit(Char c) {
  if (category(c) == UTF8PROC_CATEGORY_NO || category(c) == UTF8PROC_CATEGORY_NL)
    throw Problem("whether a number is a digit is not known here");
  return is_decimal(c);
}

Value without_affix(const Text& text, Arguments& a, bool end) {
  const Text& affix = need_text(*bind(a, end ? "removesuffix" : "removeprefix", {"affix"}, 1)[0], "what to remove");
  if (end) return text.ends_with(affix) ? text.substr(0, text.size() - affix.size()) : text;
  return text.starts_with(affix) ? text.substr(affix.size()) : text;
}

Value line_list(const Text& text, Arguments& a) {
  const auto bound = bind(a, "splitlines", {"keepends"});
  return list_of(lines(text, bound[0] && bound[0]->truth()));
}

Value replace_method(Work& work, const Text& text, Arguments& a) {
  const auto bound = bind(a, "replace", {"old", "new", "count"}, 2);
  return replaced(work, text, need_text(*bound[0], "what to replace"), need_text(*bound[1], "the replacement"),
                  bound[2] ? to_integer(*bound[2], "count") : -1);
}

using TextMethod = Value (*)(Work&, const Text&, Arguments&);
#define METHOD(expression) \
  [](Work& w, const Text& t, Arguments& a) -> Value { return static_cast<void>(w), static_cast<void>(a), expression; }
constexpr Named<TextMethod> TEXT_METHODS[] = {
    {"strip", METHOD(strip(w, t, a, true, true))},
    {"lstrip", METHOD(strip(w, t, a, true, false))},
    {"rstrip", METHOD(strip(w, t, a, false, true))},
    {"split", METHOD(split(w, t, a, false))},
    {"rsplit", METHOD(split(w, t, a, true))},
    {"splitlines", METHOD(line_list(t, a))},
    {"startswith", METHOD(edge(t, a, false))},
    {"endswith", METHOD(edge(t, a, true))},
    {"replace", replace_method},
    {"find", METHOD(find(w, t, a, false))},
    {"rfind", METHOD(find(w, t, a, true))},
    {"count", count},
    {"join", join},
    {"partition", METHOD(partition(w, t, a, false))},
    {"rpartition", METHOD(partition(w, t, a, true))},
    {"ljust", METHOD(padded(w, t, a, 1))},
    {"rjust", METHOD(padded(w, t, a, -1))},
    {"center", METHOD(padded(w, t, a, 0))},
    {"format", format},
    {"upper", METHOD(upper(t))},
    {"lower", METHOD(lower(t))},
    {"title", METHOD(title(t))},
    {"capitalize", METHOD(capitalized(t))},
    {"removeprefix", METHOD(without_affix(t, a, false))},
    {"removesuffix", METHOD(without_affix(t, a, true))},
    {"isspace", METHOD(all(t, is_space))},
    {"isalpha", METHOD(all(t, is_letter))},
    {"isdecimal", METHOD(all(t, is_decimal))},
    {"isdigit", METHOD(all(t, is_digit))},
    {"isalnum", METHOD(all(t, [](Char c) { return is_letter(c) || is_digit(c); }))},
};
#undef METHOD

Value view(const Dict& dict, const std::string& name) {
  List list{{}, List::view};
  for (const auto& [key, value] : dict.items) {
    if (name == "items")
      list.items.emplace_back(List{{key, value}, List::tuple});
    else
      list.items.push_back(name == "keys" ? key : value);
  }
  return list;
}

Value dict_method(Work& work, const Value& self, const std::string& name, Arguments& a) {
  const Dict& dict = *self.dict();
  work.charge(16 * dict.items.size());
  if (name == "get") {
    const auto bound = bind(a, "get", {"key", "default"}, 1);
    const Value* found = dict.find(*bound[0]);
    return found ? *found : bound[1].value_or(None{});
  }
  bind(a, name, {});
  return name == "copy" ? self : view(dict, name);
}

Value list_method(Work& work, const Value& self, const std::string& name, Arguments& a) {
  const List& list = *self.list();
  work.charge(16 * list.items.size());
  if (name == "copy") return bind(a, name, {}), self;
  const Value sought = *bind(a, name, {"value"}, 1)[0];
  const auto is = [&](const Value& element) { return equal(element, sought); };
  if (name == "count") return static_cast<int64_t>(std::ranges::count_if(list.items, is));
  const auto at = std::ranges::find_if(list.items, is);
  if (at == list.items.end()) throw Problem("the value is not in the list");
  return static_cast<int64_t>(at - list.items.begin());
}

Value loop_method(const Loop& loop, const std::string& name, Arguments& a) {
  if (name == "cycle") {
    if (a.positional.empty()) throw Problem("cycle needs an argument");
    return a.positional[loop.index % a.positional.size()];
  }
  const bool same = loop.changed && std::ranges::equal(*loop.changed, a.positional,
                                                       [](const Value& x, const Value& y) { return equal(x, y); });
  loop.changed = a.positional;
  return !same;
}

Value loop_attribute(const Loop& loop, const std::string& name) {
  const size_t n = loop.items.size(), i = loop.index;
  if (name == "index") return Value::size(i + 1);
  if (name == "index0") return Value::size(i);
  if (name == "revindex") return Value::size(n - i);
  if (name == "revindex0") return Value::size(n - i - 1);
  if (name == "first") return i == 0;
  if (name == "last") return i + 1 == n;
  if (name == "length") return Value::size(n);
  if (name == "depth") return Value::size(loop.depth);
  if (name == "depth0") return Value::size(loop.depth - 1);
  if (name == "previtem") return i > 0 ? loop.items[i - 1] : Undefined{"there is no previous item"};
  if (name == "nextitem") return i + 1 < n ? loop.items[i + 1] : Undefined{"there is no next item"};
  return Undefined{"'loop' has no '" + name + "'"};
}

bool is_one_of(const std::string& name, std::initializer_list<const char*> names) {
  return std::ranges::any_of(names, [&](const char* known) { return name == known; });
}

Value method(Work& work, const Value& self, const std::string& name,
             Value (*call)(Work&, const Value&, const std::string&, Arguments&)) {
  return std::make_shared<const Function>(
      Function{name, [&work, self, name, call](Arguments& a) { return call(work, self, name, a); }});
}

Undefined missing(const Value& object, const std::string& name) {
  return {"a " + object.kind() + " has no '" + name + "'"};
}

}  // namespace

// Methods hide a dict's keys of the same name, as they do in Jinja: write object["items"].
Value attribute(Work& work, const Value& object, const std::string& name) {
  if (object.undefined()) throw Problem(object.undefined()->why);
  if (object.text() && find_named(TEXT_METHODS, name))
    return method(work, object, name, [](Work& w, const Value& self, const std::string& n, Arguments& a) {
      return (*find_named(TEXT_METHODS, n))(w, *self.text(), a);
    });
  if (object.dict() && is_one_of(name, {"get", "items", "keys", "values", "copy"}))
    return method(work, object, name, dict_method);
  if (object.list() && object.list()->kind <= List::range && is_one_of(name, {"index", "count", "copy"}))
    return method(work, object, name, list_method);
  if (object.loop() && is_one_of(name, {"cycle", "changed"}))
    return method(work, object, name, [](Work&, const Value& self, const std::string& n, Arguments& a) {
      return loop_method(*self.loop(), n, a);
    });
  if (object.loop()) return loop_attribute(*object.loop(), name);
  if (const Namespace* variables = object.variables()) {
    const auto at = std::ranges::find(variables->items, name, [](const auto& pair) { return pair.first; });
    return at == variables->items.end() ? missing(object, name) : at->second;
  }
  return object.dict() ? item(work, object, to_text(name)) : missing(object, name);
}

Value item(Work& work, const Value& object, const Value& key) {
  if (object.undefined()) throw Problem(object.undefined()->why);
  const std::string shown = key.text() || key.number() ? to_utf8(str(key)) : key.kind();
  if (const Dict* dict = object.dict()) {
    work.charge(4 * dict->items.size());
    if (!key.list() && !key.dict())
      if (const Value* found = dict->find(key)) return *found;
  } else if (const auto index = key.integer()) {
    const List* list = object.list() && object.list()->kind <= List::range ? object.list() : nullptr;
    const size_t n = object.text() ? object.text()->size() : list ? list->items.size() : 0;
    const int64_t i = *index < 0 ? *index + static_cast<int64_t>(n) : *index;
    if (i < 0 || i >= static_cast<int64_t>(n)) return missing(object, shown);
    return list ? list->items[static_cast<size_t>(i)] : Text(1, (*object.text())[static_cast<size_t>(i)]);
  }
  return key.text() && !object.dict() ? attribute(work, object, shown) : missing(object, shown);
}

Value slice(Work& work, const Value& object, const Value& start, const Value& stop, const Value& step) {
  if (object.undefined()) throw Problem(object.undefined()->why);
  const List* list = object.list() && object.list()->kind <= List::range ? object.list() : nullptr;
  if (!list && !object.text()) throw Problem("a " + object.kind() + " cannot be sliced");
  const int64_t n = static_cast<int64_t>(length(object));
  const int64_t by = step.none() ? 1 : to_integer(step, "the step of a slice");
  if (by == 0) throw Problem("the step of a slice is 0");
  const auto place = [&](const Value& at, int64_t otherwise) {
    if (at.none()) return otherwise;
    const int64_t i = to_integer(at, "a place in a slice");
    return std::clamp<int64_t>(i < 0 ? i + n : i, by > 0 ? 0 : -1, by > 0 ? n : n - 1);
  };
  const int64_t from = place(start, by > 0 ? 0 : n - 1), to = place(stop, by > 0 ? n : -1);
  const int64_t span = by > 0 ? to - from : from - to;
  const int64_t count = span <= 0 ? 0 : (span - 1) / std::max(by > 0 ? by : -by, int64_t{1}) + 1;
  work.charge(static_cast<size_t>(count) * (list ? 8 : 1));
  Text text;
  List part{{}, list ? list->kind : List::list};
  for (int64_t k = 0; k < count; ++k) {
    const size_t i = static_cast<size_t>(from + k * by);
    if (list)
      part.items.push_back(list->items[i]);
    else
      text += (*object.text())[i];
  }
  return list ? Value(std::move(part)) : Value(std::move(text));
}

Value percent_format(Work& work, const Text& format, const Value& values) {
  const List* several = values.list() && values.list()->kind == List::tuple ? values.list() : nullptr;
  size_t used = 0;
  Text out;
  for (size_t i = 0; i < format.size(); ++i) {
    if (plain(format[i]) != U'%') {
      out += format[i];
      continue;
    }
    const Char kind = ++i < format.size() ? plain(format[i]) : U'\0';
    if (kind == U'%') {
      out += format[i];
      continue;
    }
    if (kind != U's' && kind != U'd' && kind != U'r') throw Problem("a text to format knows %s, %d, %r and %% here");
    if (used >= (several ? several->items.size() : 1)) throw Problem("not enough values for the text to format");
    const Value& value = several ? several->items[used] : values;
    ++used;
    if (kind == U'd') to_integer(value, "the value for %d");
    const Text shown = kind == U'r' ? repr(value) : str(kind == U'd' ? Value(*value.integer()) : value);
    work.charge(shown.size());
    out += shown;
  }
  if (used < (several ? several->items.size() : values.dict() ? 0 : 1))
    throw Problem("too many values for the text to format");
  return out;
}

bool contains(Work& work, const Value& container, const Value& element) {
  if (const Text* text = container.text()) {
    const Text& sought = need_text(element, "what is looked for in a text");
    work.charge(text->size() * (1 + sought.size() / 16));
    return text->find(sought) != text->npos;
  }
  if (const Dict* dict = container.dict()) return work.charge(4 * dict->items.size()), dict->find(element) != nullptr;
  if (container.undefined()) return false;
  const List* list = container.list();
  if (!list) throw Problem("a " + container.kind() + " has no elements");
  work.charge(4 * list->items.size());
  for (size_t i = list->kind == List::lazy ? list->taken : 0; i < list->items.size(); ++i) {
    if (list->kind == List::lazy) list->taken = i + 1;
    if (equal(list->items[i], element)) return true;
  }
  return false;
}

}  // namespace jinja
