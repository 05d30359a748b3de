// jinja_filters.cpp: Jinja's filters, tests and global functions, and those that transformers adds.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <ctime>

#include "host/jinja_builtins.h"

namespace jinja {

namespace {

using Call = Arguments;
using Filter = Value (*)(Work&, const Value&, Call&);

// What Jinja calls a soft string: texts as they are, other values printed.
Text printed(Work& work, const Value& value) {
  Text text = str(value);
  work.charge(text.size());
  return text;
}

std::vector<Value> all_elements(Work& work, const Value& value) {
  if (value.text() || value.dict()) work.charge(32 * length(value));
  std::vector<Value> items = elements(value);
  work.charge(8 * items.size());
  return items;
}

// "a.b.0": an attribute of an attribute, an index where it is a number.
Value by_path(Work& work, Value value, const Value& path) {
  if (path.integer()) return item(work, value, path);
  std::string rest = to_utf8(str(path));
  for (size_t dot = 0; dot != rest.npos;) {
    dot = rest.find('.');
    const std::string part = rest.substr(0, dot);
    if (dot != rest.npos) rest = rest.substr(dot + 1);
    const bool number = !part.empty() && part.size() < 10 && part.find_first_not_of("0123456789") == part.npos;
    value = item(work, value, number ? Value(int64_t{std::stoi(part)}) : Value(to_text(part)));
  }
  return value;
}

// What sort, unique, min and max compare: an attribute, texts without their case.
Value sort_key(Work& work, const Value& value, const std::optional<Value>& attribute, bool case_sensitive) {
  const Value key = attribute && !attribute->none() ? by_path(work, value, *attribute) : value;
  return key.text() && !case_sensitive ? Value(lower(*key.text())) : key;
}

bool flag(const std::optional<Value>& value) {
  return value && value->truth();
}

std::vector<Value> sorted(Work& work, std::vector<Value> items, bool reverse, auto key_of) {
  std::vector<std::pair<Value, Value>> keyed;
  for (Value& value : items) keyed.emplace_back(key_of(value), value);
  const auto before = [&](const auto& a, const auto& b) {
    work.charge(16);
    return reverse ? less(b.first, a.first) : less(a.first, b.first);
  };
  std::ranges::stable_sort(keyed, before);
  std::ranges::transform(keyed, items.begin(), [](const auto& pair) { return pair.second; });
  return items;
}

Value sort(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "sort", {"reverse", "case_sensitive", "attribute"});
  return List(sorted(work, all_elements(work, input), flag(bound[0]),
                     [&](const Value& v) { return sort_key(work, v, bound[2], flag(bound[1])); }),
              List::list);
}

Value dictsort(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "dictsort", {"case_sensitive", "by", "reverse"});
  if (!input.dict()) throw Problem("dictsort needs a dict, not a " + input.kind());
  const size_t by = bound[1] && equal(*bound[1], Value(Text(U"value"))) ? 1 : 0;
  std::vector<Value> pairs;
  for (const auto& [key, value] : input.dict()->items) pairs.push_back(List({key, value}, List::tuple));
  work.charge(16 * pairs.size());
  return List(sorted(work, std::move(pairs), flag(bound[2]),
                     [&](const Value& v) { return sort_key(work, v.list()->items[by], {}, flag(bound[0])); }),
              List::list);
}

Value unique(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "unique", {"case_sensitive", "attribute"});
  std::vector<Value> seen, out;
  for (const Value& value : all_elements(work, input)) {
    const Value key = sort_key(work, value, bound[1], flag(bound[0]));
    work.charge(4 * seen.size());
    if (std::ranges::any_of(seen, [&](const Value& other) { return equal(other, key); })) continue;
    seen.push_back(key);
    out.push_back(value);
  }
  return List(std::move(out), List::lazy);
}

Value extreme(Work& work, const Value& input, Call& a, bool largest) {
  const auto bound = bind(a, largest ? "max" : "min", {"case_sensitive", "attribute"});
  const auto key = [&](const Value& v) { return sort_key(work, v, bound[1], flag(bound[0])); };
  const std::vector<Value> items = all_elements(work, input);
  const Value* best = nullptr;
  for (const Value& value : items)
    if (!best || (largest ? less(key(*best), key(value)) : less(key(value), key(*best)))) best = &value;
  return best ? *best : Undefined{"there is nothing to take the least or the largest of"};
}

Value groupby(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "groupby", {"attribute", "default", "case_sensitive"}, 1);
  if (bound[1]) throw Problem("groupby takes no default here");
  const auto key = [&](const Value& v) { return sort_key(work, v, bound[0], flag(bound[2])); };
  List groups;
  std::vector<Value> members;
  const auto items = sorted(work, all_elements(work, input), false, key);
  for (size_t i = 0; i < items.size(); ++i) {
    members.push_back(items[i]);
    if (i + 1 < items.size() && equal(key(items[i]), key(items[i + 1]))) continue;
    const Value name = by_path(work, members[0], *bound[0]);
    groups.items.push_back(List({name, List(std::exchange(members, {}), List::list)}, List::tuple));
  }
  return groups;
}

// map(attribute=...) or map("filter", its arguments).
Value map(Work& work, const Value& input, Call& a) {
  List out({}, List::lazy);
  const std::vector<Value> items = input.truth() ? all_elements(work, input) : std::vector<Value>();
  if (a.positional.empty()) {
    const auto bound = bind(a, "map", {"attribute", "default"}, 1);
    for (const Value& value : items) {
      const Value found = by_path(work, value, *bound[0]);
      out.items.push_back(found.undefined() && bound[1] ? *bound[1] : found);
    }
    return out;
  }
  const std::string name = to_utf8(str(a.positional[0]));
  a.positional.erase(a.positional.begin());
  for (const Value& value : items) {
    Arguments copy = a;
    out.items.push_back(filter(work, name, value, copy));
  }
  return out;
}

// select, reject, selectattr, rejectattr: the elements whose value, or whose attribute, passes a test; or fails it.
Value select(Work& work, const Value& input, Call& a, bool wanted, bool attribute) {
  List out({}, List::lazy);
  if (attribute && a.positional.empty()) throw Problem("this filter needs an attribute's name");
  const Value path = attribute ? a.positional[0] : Value();
  a.positional.erase(a.positional.begin(), a.positional.begin() + attribute);
  std::string name;
  if (!a.positional.empty()) {
    name = to_utf8(str(a.positional[0]));
    a.positional.erase(a.positional.begin());
  }
  if (!input.truth()) return out;
  for (const Value& value : all_elements(work, input)) {
    const Value tested = attribute ? by_path(work, value, path) : value;
    Arguments copy = a;
    if ((name.empty() ? tested.truth() : test(work, name, tested, copy)) == wanted) out.items.push_back(value);
  }
  return out;
}

Value join(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "join", {"d", "attribute"});
  const Text separator = bound[0] ? printed(work, *bound[0]) : Text();
  Text out;
  bool first = true;
  for (const Value& value : all_elements(work, input)) {
    if (!std::exchange(first, false)) out += separator;
    out += printed(work, bound[1] && !bound[1]->none() ? by_path(work, value, *bound[1]) : value);
    work.charge(separator.size());
  }
  return out;
}

Value items(Work& work, const Value& input, Call& a) {
  bind(a, "items", {});
  if (!input.dict() && !input.undefined()) throw Problem("items needs a dict, not a " + input.kind());
  List out({}, List::lazy);
  if (input.dict())
    for (const auto& [key, value] : input.dict()->items) out.items.push_back(List({key, value}, List::tuple));
  work.charge(16 * out.items.size());
  return out;
}

Value first(Work& work, const Value& input, Call& a) {
  bind(a, "first", {});
  const List* list = input.list();
  if (list && list->kind == List::lazy)
    return list->taken < list->items.size() ? list->items[list->taken++] : Undefined{"there is no first element"};
  const std::vector<Value> all = all_elements(work, input);
  return all.empty() ? Undefined{"there is no first element"} : all.front();
}

Value last(Work& work, const Value& input, Call& a) {
  bind(a, "last", {});
  if (input.list() && input.list()->kind == List::lazy) throw Problem("a generator has no last element: use |list");
  const std::vector<Value> all = all_elements(work, input);
  return all.empty() ? Undefined{"there is no last element"} : all.back();
}

Value reverse(Work& work, const Value& input, Call& a) {
  bind(a, "reverse", {});
  if (const Text* text = input.text()) return Text(text->rbegin(), text->rend());
  std::vector<Value> all = all_elements(work, input);
  std::ranges::reverse(all);
  return List(std::move(all), List::lazy);
}

Value default_value(Work&, const Value& input, Call& a) {
  const auto bound = bind(a, "default", {"default_value", "boolean"});
  const bool missing = input.undefined() || (flag(bound[1]) && !input.truth());
  return missing ? bound[0].value_or(Text()) : input;
}

Value replace(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "replace", {"old", "new", "count"}, 2);
  const bool counted = bound[2] && !bound[2]->none();
  return replaced(work, printed(work, input), printed(work, *bound[0]), printed(work, *bound[1]),
                  counted ? to_integer(*bound[2], "count") : -1);
}

Value trim(Work& work, const Value& input, Call& a) {
  const Value text = printed(work, input);
  const Value strip = attribute(work, text, "strip");
  return strip.function()->call(a);
}

// Jinja's own: capitals after white space, hyphens and opening brackets.
Value title(Work& work, const Value& input, Call& a) {
  bind(a, "title", {});
  Text out;
  bool begins = true;
  for (const Char c : printed(work, input)) {
    out += begins ? upper(TextView(&c, 1)) : lower(TextView(&c, 1));
    begins = is_space(c) || TextView(U"-({[<").find(plain(c)) != TextView::npos;
  }
  return out;
}

Value indent(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "indent", {"width", "first", "blank"});
  const int64_t width = bound[0] && !bound[0]->text() ? to_integer(*bound[0], "the width") : 4;
  work.charge(static_cast<size_t>(std::clamp<int64_t>(width, 0, INT32_MAX)));
  const Text margin =
      bound[0] && bound[0]->text() ? *bound[0]->text() : Text(static_cast<size_t>(std::max<int64_t>(width, 0)), U' ');
  const Text text = printed(work, input) + U"\n";
  Text out = flag(bound[1]) ? margin : Text();
  bool begins = true;
  for (const TextView line : lines(text, false)) {
    work.charge(margin.size() + line.size());
    if (!begins) out += U'\n' + (line.empty() && !flag(bound[2]) ? Text() : margin);
    begins = false;
    out += line;
  }
  return out;
}

Value truncate(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "truncate", {"length", "killwords", "end", "leeway"});
  const int64_t most = bound[0] ? to_integer(*bound[0], "length") : 255;
  const int64_t leeway = bound[3] && !bound[3]->none() ? to_integer(*bound[3], "leeway") : 5;
  const Text end = bound[2] ? str(*bound[2]) : Text(U"..."), text = printed(work, input);
  if (most < std::ssize(end) || leeway < 0) throw Problem("truncate: the length is less than what is put at the end");
  if (std::ssize(text) <= most || std::ssize(text) - most <= leeway) return text;
  const Text kept = text.substr(0, static_cast<size_t>(most) - end.size());
  return (flag(bound[1]) ? kept : kept.substr(0, kept.rfind(U' '))) + end;
}

// int(): from a number or from a text that is one, else the default.
Value to_int(Work&, const Value& input, Call& a) {
  const auto bound = bind(a, "int", {"default", "base"});
  if (bound[1] && to_integer(*bound[1], "base") != 10) throw Problem("int knows no other base than 10 here");
  const Value otherwise = bound[0].value_or(int64_t{0});
  if (input.integer()) return *input.integer();
  std::optional<double> number = input.number();
  if (input.text()) {
    std::string digits = to_utf8(stripped(TextView(*input.text()), true, true, is_space));
    if (digits.starts_with('+') && !digits.starts_with("+-")) digits.erase(0, 1);
    int64_t value = 0;
    const char *begin = digits.data(), *end = begin + digits.size();
    const auto whole = std::from_chars(begin, end, value);
    if (whole.ec == std::errc() && whole.ptr == end) return value;
    double real = 0;
    const auto parsed = std::from_chars(begin, end, real);
    if (parsed.ec == std::errc() && parsed.ptr == end) number = real;
  }
  return number && std::abs(*number) < 9e18 ? Value(static_cast<int64_t>(*number)) : otherwise;
}

Value to_float(Work&, const Value& input, Call& a) {
  const auto bound = bind(a, "float", {"default"});
  if (const auto number = input.number()) return *number;
  double real = 0;
  const std::string digits = input.text() ? to_utf8(stripped(TextView(*input.text()), true, true, is_space)) : "";
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), real);
  const bool whole = !digits.empty() && parsed.ec == std::errc() && parsed.ptr == digits.data() + digits.size();
  return whole ? Value(real) : bound[0].value_or(0.0);
}

Value round(Work&, const Value& input, Call& a) {
  const auto bound = bind(a, "round", {"precision", "method"});
  const auto number = input.number();
  if (!number) throw Problem("round needs a number, not a " + input.kind());
  const double scale = std::pow(10.0, bound[0] ? static_cast<double>(to_integer(*bound[0], "precision")) : 0.0);
  const std::string method = bound[1] ? to_utf8(str(*bound[1])) : "common";
  if (method == "ceil") return std::ceil(*number * scale) / scale;
  if (method == "floor") return std::floor(*number * scale) / scale;
  if (method != "common") throw Problem("round knows common, ceil and floor");
  if (input.integer() && scale >= 1) return *input.integer();
  return std::nearbyint(*number * scale) / scale;
}

Value absolute(Work&, const Value& input, Call& a) {
  bind(a, "abs", {});
  if (const auto i = input.integer(); i && *i != INT64_MIN) return *i < 0 ? -*i : *i;
  if (const auto x = input.number()) return std::abs(*x);
  throw Problem("abs needs a number, not a " + input.kind());
}

Value sum(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "sum", {"attribute", "start"});
  Value total = bound[1].value_or(int64_t{0});
  for (const Value& value : all_elements(work, input)) {
    const Value x = bound[0] && !bound[0]->none() ? by_path(work, value, *bound[0]) : value;
    int64_t whole = 0;
    if (!x.number() || !total.number()) throw Problem("sum needs numbers, not a " + x.kind());
    if (x.integer() && total.integer() && !__builtin_add_overflow(*x.integer(), *total.integer(), &whole))
      total = whole;
    else
      total = *x.number() + *total.number();
  }
  return total;
}

Value tojson(Work& work, const Value& input, Call& a) {
  const auto bound = bind(a, "tojson", {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonLayout layout{.ascii = flag(bound[0]), .sort_keys = flag(bound[3]), .indent = {}};
  if (bound[1] && bound[1]->text())
    layout.indent = *bound[1]->text();
  else if (bound[1] && !bound[1]->none())
    layout.indent = Text(static_cast<size_t>(std::clamp<int64_t>(to_integer(*bound[1], "indent"), 0, 100)), U' ');
  if (layout.indent) layout.item_separator = Text(1, U',');
  if (bound[2] && !bound[2]->none()) {
    const std::vector<Value> two = elements(*bound[2]);
    if (two.size() != 2) throw Problem("separators must be two texts");
    layout.item_separator = str(two[0]);
    layout.key_separator = str(two[1]);
  }
  Text text = to_json(input, layout);
  work.charge(text.size());
  return text;
}

Value format(Work& work, const Value& input, Call& a) {
  if (!a.named.empty()) throw Problem("format takes no named values here");
  return percent_format(work, printed(work, input), List(std::move(a.positional), List::tuple));
}

// Parts of `n` elements; slice: n parts, the first ones one element longer. fill: what the last lack.
Value batch(Work& work, const Value& input, Call& a, bool slices) {
  const auto bound = bind(a, slices ? "slice" : "batch", {"n", "fill_with"}, 1);
  const int64_t n = to_integer(*bound[0], "the size or number of parts");
  if (n < 1) throw Problem("the size or number of parts must be at least 1");
  const std::vector<Value> all = all_elements(work, input);
  const size_t size = static_cast<size_t>(n), parts = slices ? size : (all.size() + size - 1) / size;
  const bool fills = bound[1] && !bound[1]->none();
  work.charge(8 * (parts + (fills ? size : 0)));
  List out({}, List::lazy);
  for (size_t i = 0, at = 0; i < parts; ++i) {
    const size_t whole = all.size() / size, longer = all.size() % size;
    const size_t take = slices ? whole + (i < longer) : std::min(size, all.size() - at);
    List part({all.begin() + static_cast<std::ptrdiff_t>(at), all.begin() + static_cast<std::ptrdiff_t>(at + take)},
              List::list);
    at += take;
    if (fills && slices && i >= longer && longer > 0) part.items.push_back(*bound[1]);
    while (fills && !slices && part.items.size() < size) part.items.push_back(*bound[1]);
    out.items.push_back(std::move(part));
  }
  return out;
}

Value wordcount(Work& work, const Value& input, Call& a) {
  bind(a, "wordcount", {});
  int64_t n = 0;
  bool inside = false;
  for (const Char c : printed(work, input)) {
    const bool letter = !is_space(c) && (plain(c) >= 0x80 || std::isalnum(static_cast<int>(plain(c))) || c == U'_');
    n += letter && !inside;
    inside = letter;
  }
  return n;
}

Value attribute_filter(Work& work, const Value& input, Call& a) {
  const std::string name = to_utf8(str(*bind(a, "attr", {"name"}, 1)[0]));
  return input.dict() ? Undefined{"a dict has no attribute '" + name + "'"} : attribute(work, input, name);
}

#define FILTER(expression) \
  [](Work& w, const Value& v, Call& a) -> Value { return static_cast<void>(w), static_cast<void>(a), expression; }
constexpr Named<Filter> FILTERS[] = {
    {"abs", absolute},
    {"attr", attribute_filter},
    {"batch", FILTER(batch(w, v, a, false))},
    {"capitalize", FILTER(capitalized(printed(w, v)))},
    {"count", FILTER(Value::size(length(v)))},
    {"d", default_value},
    {"default", default_value},
    {"dictsort", dictsort},
    {"first", first},
    {"float", to_float},
    {"format", format},
    {"groupby", groupby},
    {"indent", indent},
    {"int", to_int},
    {"items", items},
    {"join", join},
    {"last", last},
    {"length", FILTER(Value::size(length(v)))},
    {"list", FILTER(List(all_elements(w, v), List::list))},
    {"lower", FILTER(lower(printed(w, v)))},
    {"map", map},
    {"max", FILTER(extreme(w, v, a, true))},
    {"min", FILTER(extreme(w, v, a, false))},
    {"reject", FILTER(select(w, v, a, false, false))},
    {"rejectattr", FILTER(select(w, v, a, false, true))},
    {"replace", replace},
    {"reverse", reverse},
    {"round", round},
    {"safe", FILTER(Value::html(printed(w, v)))},
    {"select", FILTER(select(w, v, a, true, false))},
    {"selectattr", FILTER(select(w, v, a, true, true))},
    {"slice", FILTER(batch(w, v, a, true))},
    {"sort", sort},
    {"string", FILTER(printed(w, v))},
    {"sum", sum},
    {"title", title},
    {"tojson", tojson},
    {"trim", trim},
    {"truncate", truncate},
    {"unique", unique},
    {"upper", FILTER(upper(printed(w, v)))},
    {"wordcount", wordcount},
};
#undef FILTER

// ---- Tests

bool is_iterable(const Value& v) {
  return v.undefined() || v.text() || v.list() || v.dict() || v.loop();
}

int64_t divided(const Value& v, int64_t by) {
  if (by == 0) throw Problem("division by zero");
  const int64_t rest = to_integer(v, "what is divided") % by;
  return rest;
}

bool compared(Work& work, const std::string& name, const Value& a, const Value& b) {
  if (name == "eq" || name == "equalto" || name == "==") return equal(a, b);
  if (name == "ne" || name == "!=") return !equal(a, b);
  if (name == "lt" || name == "lessthan" || name == "<") return less(a, b);
  if (name == "gt" || name == "greaterthan" || name == ">") return less(b, a);
  if (name == "le" || name == "<=") return less(a, b) || equal(a, b);
  if (name == "ge" || name == ">=") return less(b, a) || equal(a, b);
  if (name == "in") return contains(work, b, a);
  if (name == "divisibleby") return divided(a, to_integer(b, "the divisor")) == 0;
  if (name == "sameas") {
    if (!a.none() && !a.boolean()) throw Problem("sameas knows none, true and false alone here");
    return a.none() ? b.none() : b.boolean() && *a.boolean() == *b.boolean();
  }
  throw Problem("the test '" + name + "' is not known here");
}

bool is_test(const Value& v);

using Test = bool (*)(const Value&);
constexpr Named<Test> TESTS[] = {
    {"boolean", [](const Value& v) { return v.boolean() != nullptr; }},
    {"callable", [](const Value& v) { return v.function() || v.undefined(); }},
    {"defined", [](const Value& v) { return !v.undefined(); }},
    {"even", [](const Value& v) { return divided(v, 2) == 0; }},
    {"false", [](const Value& v) { return v.boolean() && !*v.boolean(); }},
    {"filter", [](const Value& v) { return v.text() && find_named(FILTERS, to_utf8(*v.text())); }},
    {"float", [](const Value& v) { return v.real() != nullptr; }},
    {"integer", [](const Value& v) { return v.integer() && !v.boolean(); }},
    {"iterable", is_iterable},
    {"lower",
     [](const Value& v) {
       const Text t = str(v);
       return t == lower(t) && t != upper(t);
     }},
    {"mapping", [](const Value& v) { return v.dict() != nullptr; }},
    {"none", [](const Value& v) { return v.none(); }},
    {"number", [](const Value& v) { return v.number().has_value(); }},
    {"odd", [](const Value& v) { return divided(v, 2) != 0; }},
    {"sequence",
     [](const Value& v) {
       return v.undefined() || v.text() || v.dict() || (v.list() && v.list()->kind <= List::range);
     }},
    {"string", [](const Value& v) { return v.text() != nullptr; }},
    {"test", is_test},
    {"true", [](const Value& v) { return v.boolean() && *v.boolean(); }},
    {"undefined", [](const Value& v) { return v.undefined() != nullptr; }},
    {"upper",
     [](const Value& v) {
       const Text t = str(v);
       return t == upper(t) && t != lower(t);
     }},
};

bool is_test(const Value& v) {
  return v.text() && find_named(TESTS, to_utf8(*v.text()));
}

// ---- Global functions

Value range(Work& work, Call& a) {
  std::vector<int64_t> numbers;
  for (const Value& value : a.positional) numbers.push_back(to_integer(value, "a number of range"));
  if (numbers.empty() || numbers.size() > 3 || !a.named.empty()) throw Problem("range takes 1 to 3 numbers");
  const int64_t from = numbers.size() > 1 ? numbers[0] : 0, to = numbers[numbers.size() > 1];
  const int64_t step = numbers.size() > 2 ? numbers[2] : 1;
  if (step == 0) throw Problem("the step of range is 0");
  List list({}, List::range);
  for (int64_t i = from; step > 0 ? i < to : i > to;) {
    // The bound of Jinja's sandbox.
    if (list.items.size() >= 100000) throw Problem("a range of more than 100000 numbers");
    work.charge(8);
    list.items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return list;
}

void add_members(Call& a, auto add) {
  for (const Value& value : a.positional) {
    if (value.dict()) {
      for (const auto& [key, item] : value.dict()->items) add(key, item);
      continue;
    }
    for (const Value& pair : elements(value)) {
      const std::vector<Value> two = elements(pair);
      if (two.size() != 2) throw Problem("a dict is made of pairs");
      add(two[0], two[1]);
    }
  }
  for (const auto& [name, value] : a.named) add(Value(to_text(name)), value);
}

Value make_dict(Work& work, Call& a) {
  Dict dict;
  add_members(a, [&](const Value& key, const Value& value) {
    work.charge(8 + 4 * dict.items.size());
    dict.set(key, value);
  });
  return dict;
}

Value strftime_now(Work&, Call& a) {
  const Value format = *bind(a, "strftime_now", {"format"}, 1)[0];
  if (!format.text()) throw Problem("strftime_now needs a text");
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char text[1024];
  const std::string pattern = to_utf8(*format.text());
  return to_text({text, std::strftime(text, sizeof text, pattern.c_str(), &local)});
}

Value raise_exception(Work&, Call& a) {
  throw Problem(to_utf8(str(*bind(a, "raise_exception", {"message"}, 1)[0])));
}

// In it a template finds its blocks, and there are none.
Value self(Work&, Call&) {
  throw Problem("self cannot be called");
}

// joiner(", "): a function that gives nothing at first, then the separator.
Value joiner(Work&, Call& a) {
  const auto bound = bind(a, "joiner", {"sep"});
  const Value separator = bound[0].value_or(Text(U", "));
  return std::make_shared<const Function>(
      Function{"joiner", [separator, used = std::make_shared<bool>(false)](Call& call) {
                 bind(call, "a joiner", {});
                 return std::exchange(*used, true) ? separator : Value(Text());
               }});
}

}  // namespace

Value filter(Work& work, const std::string& name, const Value& input, Arguments& arguments) {
  const Filter* known = find_named(FILTERS, name);
  if (!known) throw Problem("the filter '" + name + "' is not known here");
  return (*known)(work, input, arguments);
}

bool test(Work& work, const std::string& name, const Value& input, Arguments& arguments) {
  if (const Test* known = find_named(TESTS, name); known && arguments.positional.empty()) return (*known)(input);
  return compared(work, name, input, *bind(arguments, "the test '" + name + "'", {"other"}, 1)[0]);
}

std::vector<std::pair<std::string, Value>> globals(Work& work) {
  constexpr std::pair<const char*, Value (*)(Work&, Call&)> FUNCTIONS[] = {
      {"range", range},   {"dict", make_dict}, {"strftime_now", strftime_now}, {"raise_exception", raise_exception},
      {"joiner", joiner}, {"self", self},
  };
  std::vector<std::pair<std::string, Value>> out;
  for (const auto& [name, function] : FUNCTIONS)
    out.emplace_back(name, std::make_shared<const Function>(
                               Function{name, [&work, call = function](Call& a) { return call(work, a); }}));
  return out;
}

}  // namespace jinja
