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
  for (char* c = line; *c; c++)  // names come from files: a line stays a line, and no terminal obeys it
    if (static_cast<unsigned char>(*c) < ' ' || *c == 127) *c = '?';
  throw Error(line);
}
