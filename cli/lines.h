// lines.h: the lines of a file, or of standard input as they come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Lines end in \n or \r\n; the last one may do without.
class LineReader {
 public:
  enum class Got { line, too_long, nothing, end };

  LineReader() = default;
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;
  ~LineReader();
  // "-", and without it: standard input. A line of more than max_bytes is passed over. Throws Error.
  void open(const std::string& path, size_t max_bytes);
  // nothing: no whole line is there yet; where it may wait, only Ctrl-C ends that: end. too_long: a line went by.
  Got next(std::string& line, bool wait);
  int64_t number() const { return number_; }  // of the last line, from 1
  size_t max_bytes() const { return max_bytes_; }
  // Part of the file that was handed out; negative: nobody knows how much will come.
  double progress() const {
    return size_ > 0 ? static_cast<double>(handed_out_ + begin_) / static_cast<double>(size_) : -1;
  }

 private:
  Got hand_out(std::string& line, size_t end);
  bool read_more(bool wait);

  std::string name_ = "standard input";
  int fd_ = 0;
  size_t max_bytes_ = size_t{16} << 20;
  std::string held_;   // read
  size_t begin_ = 0;   // ... of it, handed out
  bool over_ = false;  // the line's beginning was longer than allowed and is forgotten
  bool ended_ = false;
  int64_t number_ = 0;
  size_t size_ = 0, handed_out_ = 0;  // bytes
};
