// output.h: where a run writes: standard output, and files that are whole or not there.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

#include "cli/options.h"

// The reader of our standard output went away: end without a word.
struct ClosedPipe {};
// To standard output, seen at once. Throws ClosedPipe, Error.
void print(std::string_view text);

// printf-style.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// One line on stderr beside the report: what was done else than asked, though it is no error.
void note(const std::string& line);

// Throws Error where --stats or --logits would write over a file that this run reads, or both into one.
void check_outputs(const Options& options);

// A file that appears under its name, through links, once it is whole. Until then it lies beside it under a name of
// this process. A device, a pipe, a descriptor (/dev/stdout, /dev/fd/3) and "-" (standard output) are written as they
// are. The constructor throws Error where the file cannot be written.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();
  void write(const void* data, size_t bytes);
  void commit();

 private:
  void open_beside();

  std::string path_;     // as the user named it
  std::string target_;   // the file itself, behind its links
  std::string partial_;  // empty: written as it is
  FILE* file_ = nullptr;
};
