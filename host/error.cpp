// error.cpp: one line for an error, whatever a file put into it.
#include "host/error.h"

#include <cstdarg>
#include <cstdio>

void fail(const char* format, ...) {
  char line[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  throw Error(one_line(line));
}

std::string one_line(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < ' ' || c == 127) c = '?';
  return text;
}
