// jinja_builtins.h: what templates call: methods of Python's values, Jinja's filters, tests and global functions.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "host/jinja_value.h"

namespace jinja {

// A template, which a stranger wrote, may make this many characters, or a sixteenth as many steps: a second's work, and
// a gigabyte at most.
struct Work {
  size_t left = size_t{1} << 28;
  void charge(size_t amount) {
    if (amount > left) throw Problem("the template takes too many steps or too much memory");
    left -= amount;
  }
};

// What a name stands for; tables of them are short enough to look through.
template <class T>
struct Named {
  std::string_view name;
  T value;
};
template <class T, size_t N>
const T* find_named(const Named<T> (&table)[N], std::string_view name) {
  for (const Named<T>& entry : table)
    if (entry.name == name) return &entry.value;
  return nullptr;
}

// object.name and object[key]: undefined where there is none. Throw Problem where object is undefined.
Value attribute(Work& work, const Value& object, const std::string& name);
Value item(Work& work, const Value& object, const Value& key);
Value slice(Work& work, const Value& object, const Value& start, const Value& stop, const Value& step);
// values % format, as Python's operator on texts.
Value percent_format(Work& work, const Text& format, const Value& values);
bool contains(Work& work, const Value& container, const Value& element);

// Throw Problem for a name that is unknown, arguments that do not fit, and an input of the wrong kind.
Value filter(Work& work, const std::string& name, const Value& input, Arguments& arguments);
bool test(Work& work, const std::string& name, const Value& input, Arguments& arguments);
// range, namespace, raise_exception, ...
std::vector<std::pair<std::string, Value>> globals(Work& work);

// Arguments in the order of `parameters`; empty where there is none. Throws Problem where they do not fit.
std::vector<std::optional<Value>> bind(Arguments& arguments, const std::string& function,
                                       std::initializer_list<const char*> parameters, size_t required = 0);
int64_t to_integer(const Value& value, const char* what);
Text capitalized(TextView text);
Text upper(TextView text);
Text lower(TextView text);
Text replaced(Work& work, const Text& text, const Text& old, const Text& with, int64_t count);
std::vector<TextView> lines(TextView text, bool keep_ends);

}  // namespace jinja
