// output.cpp: where a run writes.
#include "cli/output.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstring>
#include <filesystem>
#include <utility>

#include "cli/signals.h"
#include "host/error.h"
#include "host/tokenizer.h"

namespace fs = std::filesystem;

namespace {

[[noreturn]] void cannot_write(const std::string& path) {
  fail("cannot write %s: %s", path.c_str(), std::strerror(errno));
}

// The descriptor that a path names, such as /dev/stdout or /dev/fd/3; -1: it names none.
int named_descriptor(const fs::path& path) {
  std::error_code none;
  const fs::path folder = fs::canonical(path.has_parent_path() ? path.parent_path() : ".", none);
  const std::string name = path.filename();
  if (folder != fs::canonical("/proc/self/fd", none) || name.empty()) return -1;
  return name.find_first_not_of("0123456789") == name.npos && name.size() < 9 ? std::stoi(name) : -1;
}

// What a path stands for. Links are followed by name, so that the last one may point at a file that is yet to come.
struct Place {
  fs::path path;
  int descriptor;  // -1: none
};
Place follow_links(fs::path path) {
  constexpr int MAX_LINKS = 40;  // Linux's own bound
  std::error_code error;
  for (int i = 0; i < MAX_LINKS; i++) {
    if (const int fd = named_descriptor(path); fd >= 0) return {path, fd};
    const fs::path next = fs::read_symlink(path, error);
    if (error) return {path, -1};
    path = path.parent_path() / next;  // an absolute one replaces all
  }
  errno = ELOOP;
  cannot_write(path);
}

// The same file under any of its names. One that is not there yet is known by its path.
bool same_file(const std::string& a, const std::string& b) {
  struct stat x = {}, y = {};
  const bool a_there = stat(a.c_str(), &x) == 0, b_there = stat(b.c_str(), &y) == 0;
  if (a_there && b_there) return S_ISREG(x.st_mode) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
  std::error_code error;
  const auto real = [&](const std::string& path) {
    return fs::weakly_canonical(fs::absolute(follow_links(path).path), error);
  };
  return a_there == b_there && real(a) == real(b);
}

bool is_descriptor(const std::string& path) {
  return path == "-" || follow_links(path).descriptor >= 0;
}

void check_output(const std::string& flag, const std::string& path, const Options& o) {
  const auto refuse = [&](const std::string& other, const char* what) {
    if (!other.empty() && same_file(path, other))
      throw Usage(flag + " " + path + ": that is " + what + ": give another name");
  };
  refuse(o.model, "the model");
  refuse(tokenizer_path(o.model), "the model's tokenizer");
  for (const std::string& input : {o.prompt_file, o.prompts, o.perplexity, o.chat_template})
    if (input != "-") refuse(input, "read by this run");
  refuse("/dev/stdin", "standard input");
  if (is_descriptor(path)) return;
  refuse("/dev/stdout", "where standard output goes");
  refuse("/dev/stderr", "where standard error goes");
}

}  // namespace

std::string format(const char* pattern, ...) {
  va_list arguments, again;
  va_start(arguments, pattern);
  va_copy(again, arguments);
  std::string text(static_cast<size_t>(std::vsnprintf(nullptr, 0, pattern, arguments)), '\0');
  std::vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  va_end(arguments);
  return text;
}

void print(std::string_view text) {
  if (text.empty()) return;
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw ClosedPipe{};
  fail("cannot write to standard output: %s", std::strerror(errno));
}

void note(const std::string& line) {
  std::fprintf(stderr, "run: %s\n", one_line(line).c_str());
}

void check_outputs(const Options& o) {
  if (!o.stats.empty()) check_output("--stats", o.stats, o);
  if (!o.logits.empty()) check_output("--logits", o.logits, o);
  if (!o.heatmap.empty()) check_output("--heatmap", o.heatmap, o);
  if (!o.stats.empty() && !o.logits.empty() && same_file(o.stats, o.logits))
    throw Usage("--stats " + o.stats + ": --logits writes there: give another name");
}

OutputFile::OutputFile(const std::string& path) : path_(path) {
  const Place place = path == "-" ? Place{path, STDOUT_FILENO} : follow_links(path);
  target_ = place.path;
  struct stat status = {};
  const bool exists = stat(target_.c_str(), &status) == 0;
  if (place.descriptor >= 0) {  // opened by its name, a file would be written from its beginning on, over what is there
    const int fd = fcntl(place.descriptor, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    file_ = fd < 0 ? nullptr : fdopen(fd, "wb");
  } else if (exists && S_ISDIR(status.st_mode)) {
    fail("cannot write %s: it is a directory", path.c_str());
  } else if (exists && !S_ISREG(status.st_mode)) {
    file_ = std::fopen(target_.c_str(), "wbe");
  } else {
    open_beside();
    if (exists && file_ && fchmod(fileno(file_), status.st_mode & 07777) != 0) cannot_write(path);
  }
  if (!file_) cannot_write(path);
}

// Under a name that nobody else has: what is there already, a link that somebody planted included, is not written.
void OutputFile::open_beside() {
  constexpr int MAX_TRIES = 1000;
  const fs::path target(target_);
  if (target.filename().string().size() > NAME_MAX) {
    errno = ENAMETOOLONG;
    return;
  }
  for (int i = 0; i < MAX_TRIES; i++) {
    const std::string suffix = ".partial." + std::to_string(getpid()) + (i ? "." + std::to_string(i) : "");
    const std::string name = target.filename().string().substr(0, NAME_MAX - suffix.size()) + suffix;
    partial_ = (target.parent_path() / name).string();
    remove_on_death(partial_);
    const int fd = open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    file_ = fd < 0 ? nullptr : fdopen(fd, "wb");
    if (file_) return;
    keep_on_death(partial_);
    if (errno != EEXIST) return;
  }
}

OutputFile::~OutputFile() {
  if (!file_) return;
  std::fclose(file_);
  if (partial_.empty()) return;
  unlink(partial_.c_str());
  keep_on_death(partial_);
}

void OutputFile::write(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, file_) != bytes) cannot_write(path_);
}

void OutputFile::commit() {
  bool done = std::fclose(std::exchange(file_, nullptr)) == 0;
  if (!partial_.empty()) {
    done = done && std::rename(partial_.c_str(), target_.c_str()) == 0;
    const int error = errno;
    if (!done) unlink(partial_.c_str());
    keep_on_death(partial_);
    errno = error;
  }
  if (!done) cannot_write(path_);
}
