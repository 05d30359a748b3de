// lines.cpp: the lines of a file, or of standard input as they come.
#include "cli/lines.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "cli/signals.h"
#include "host/error.h"

LineReader::~LineReader() {
  if (fd_ > 0) close(fd_);
}

void LineReader::open(const std::string& path, size_t max_bytes) {
  // Where a terminal edits the line itself, it drops what comes after 4095 bytes without a word.
  constexpr size_t TERMINAL_LINE = 4094;
  max_bytes_ = max_bytes;
  if (path != "-") {
    name_ = path;
    fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  }
  struct stat info = {};
  if (fd_ < 0 || fstat(fd_, &info) != 0) fail("cannot read %s: %s", name_.c_str(), std::strerror(errno));
  if (S_ISDIR(info.st_mode)) fail("cannot read %s: it is a directory", name_.c_str());
  if (S_ISREG(info.st_mode)) size_ = static_cast<size_t>(info.st_size);
  if (isatty(fd_)) max_bytes_ = std::min(max_bytes_, TERMINAL_LINE);
}

LineReader::Got LineReader::next(std::string& line, bool wait) {
  size_t searched = begin_;
  for (;;) {
    if (const size_t end = held_.find('\n', searched); end != std::string::npos) return hand_out(line, end + 1);
    if (ended_) return held_.size() == begin_ && !over_ ? Got::end : hand_out(line, held_.size());
    handed_out_ += begin_;
    held_.erase(0, std::exchange(begin_, 0));
    if (held_.size() > max_bytes_ + 2) {  // \r\n
      handed_out_ += held_.size();
      held_.clear();
      over_ = true;
    }
    searched = held_.size();
    if (read_more(wait)) continue;
    if (!wait) return Got::nothing;
    if (interrupted()) return Got::end;
  }
}

// False: nothing is there yet.
bool LineReader::read_more(bool wait) {
  pollfd ready = {fd_, POLLIN, 0};
  // A Ctrl-C just before it would not end a poll without an end.
  if (poll(&ready, 1, wait ? 50 : 0) <= 0) return false;
  char piece[65536];
  const ssize_t n = read(fd_, piece, sizeof piece);
  if (n < 0 && errno != EINTR && errno != EAGAIN) fail("cannot read %s: %s", name_.c_str(), std::strerror(errno));
  if (n > 0) held_.append(piece, static_cast<size_t>(n));
  ended_ = n == 0;
  return true;
}

// What is held up to `end`.
LineReader::Got LineReader::hand_out(std::string& line, size_t end) {
  line = held_.substr(begin_, end - begin_);
  begin_ = end;
  number_++;
  if (line.ends_with('\n')) line.pop_back();
  if (line.ends_with('\r')) line.pop_back();
  return std::exchange(over_, false) || line.size() > max_bytes_ ? Got::too_long : Got::line;
}
