// error.h: how every stage reports what the user did wrong or the machine lacks.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

// One line that names the file, the field, the value and the fix. run.cpp prints it and ends with exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What it says, in words for the user where it is not ours.
inline const char* reason(const std::exception& e) {
  return dynamic_cast<const std::bad_alloc*>(&e) ? "out of memory" : e.what();
}

// With a question mark for each control character: names come from files, and a terminal would obey them.
std::string one_line(std::string text);

// printf-style: throw Error with the formatted line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
