// error.h: how every stage reports what the user did wrong or the machine lacks.
#pragma once

#include <stdexcept>

// One line that names the file, the field, the value and the fix. run.cpp prints it and ends with exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// printf-style: throw Error with the formatted line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
