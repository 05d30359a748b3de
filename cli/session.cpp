// session.cpp: what every mode of run works with.
#include "cli/session.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <limits>

namespace {

constexpr int DEFAULT_N = 256, DEFAULT_CONTEXT = 4096, PERPLEXITY_CONTEXT = 512;

const auto start = std::chrono::steady_clock::now();
volatile sig_atomic_t interrupt_came = 0;

std::string read_all(const std::string& path) {
  FILE* file = path == "-" ? stdin : std::fopen(path.c_str(), "rb");
  std::string text;
  char piece[65536];
  for (size_t n; file && (n = std::fread(piece, 1, sizeof piece, file)) > 0;) text.append(piece, n);
  const bool bad = !file || std::ferror(file) != 0;
  const int error = errno;
  if (file && file != stdin) std::fclose(file);
  if (bad) fail("cannot read %s: %s", path == "-" ? "standard input" : path.c_str(), std::strerror(error));
  return text;
}

// As llama.cpp does, one newline at the end is not part of a text read from a file.
std::string read_text(const std::string& path) {
  std::string text = read_all(path);
  require_utf8(text, path == "-" ? "standard input" : path);
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

}  // namespace

void catch_interrupt() {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupt_came = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // and no SA_RESTART: a read that waits ends
  sigaction(SIGINT, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error of write
}

bool interrupted() {
  return interrupt_came != 0;
}

void print(std::string_view text) {
  if (text.empty()) return;
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw ClosedPipe{};
  fail("cannot write to standard output: %s", std::strerror(errno));
}

// Bytes that are no UTF-8 leave the stream as something else than they entered.
void require_utf8(const std::string& text, const std::string& what) {
  Utf8Stream stream;
  const std::string valid = stream.push(text) + stream.finish();
  if (text == valid) return;
  const auto differs = std::mismatch(text.begin(), text.end(), valid.begin(), valid.end()).first - text.begin();
  const size_t at = std::min(static_cast<size_t>(differs), text.size() - 1);
  fail("%s is not UTF-8: byte 0x%02x at offset %zu; convert it first, for example with iconv -t UTF-8", what.c_str(),
       static_cast<unsigned>(static_cast<unsigned char>(text[at])), at);
}

// ---- The input.

LineReader::~LineReader() {
  if (fd_ > 0) close(fd_);
}

void LineReader::open(const std::string& path) {
  if (path == "-") return;
  name_ = path;
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info = {};
  if (fd_ < 0 || fstat(fd_, &info) != 0) fail("cannot read %s: %s", path.c_str(), std::strerror(errno));
  if (S_ISDIR(info.st_mode)) fail("cannot read %s: it is a directory", path.c_str());
  if (S_ISREG(info.st_mode)) size_ = static_cast<size_t>(info.st_size);
}

LineReader::Got LineReader::next(std::string& line, bool wait) {
  size_t searched = 0;
  for (;;) {
    if (const size_t end = held_.find('\n', searched); end != std::string::npos) return hand_out(line, end + 1);
    if (ended_) return held_.empty() ? Got::end : hand_out(line, held_.size());
    searched = held_.size();
    pollfd ready = {fd_, POLLIN, 0};
    if (poll(&ready, 1, wait ? 50 : 0) <= 0) {  // a Ctrl-C just before it would not end a poll without an end
      if (!wait) return Got::nothing;
      if (interrupted()) return Got::end;
      continue;
    }
    char piece[65536];
    const ssize_t n = read(fd_, piece, sizeof piece);
    if (n < 0 && errno != EINTR) fail("cannot read %s: %s", name_.c_str(), std::strerror(errno));
    if (n > 0) held_.append(piece, static_cast<size_t>(n));
    ended_ = n == 0;
  }
}

// The first `end` bytes of held_.
LineReader::Got LineReader::hand_out(std::string& line, size_t end) {
  line = held_.substr(0, end);
  held_.erase(0, end);
  handed_out_ += end;
  number_++;
  if (line.ends_with('\n')) line.pop_back();
  if (line.ends_with('\r')) line.pop_back();
  return Got::line;
}

void read_input(Session& s) {
  const Options& o = s.options;
  for (int id = 0; id < s.tokenizer.vocab_size() && !o.ignore_eos; id++)
    if (s.tokenizer.is_end_of_generation(id)) s.stop_ids.push_back(id);
  if (o.chat && !s.tokenizer.chat().refusal().empty()) fail("--chat: %s", s.tokenizer.chat().refusal().c_str());
  if (o.chat || o.bench) return;
  s.sequences = o.samples;
  if (!o.prompts.empty()) {
    s.lines.open(o.prompts);
    s.sequences = o.parallel;
    return;
  }
  std::string source = "the prompt";
  if (o.has_prompt) {
    s.text = o.prompt;
    require_utf8(s.text, source);
  } else {
    const std::string path = !o.perplexity.empty() ? o.perplexity : !o.prompt_file.empty() ? o.prompt_file : "-";
    if (path == "-" && isatty(STDIN_FILENO)) std::fputs("the prompt, ended by Ctrl-D:\n", stderr);
    s.text = read_text(path);
    source = path == "-" ? "standard input" : path;
  }
  s.prompt = s.tokenizer.encode(s.text, false, true);
  if (s.prompt.empty())
    fail("%s is empty, and this model has no token to begin a text with: give it some text", source.c_str());
}

WantedContext wanted_context(const Session& s) {
  const Options& o = s.options;
  const int n_prompt = static_cast<int>(s.prompt.size());
  const int n = std::min(o.n, std::numeric_limits<int>::max() - n_prompt);  // no overflow: no context is as long
  if (!o.perplexity.empty()) return {PERPLEXITY_CONTEXT, PERPLEXITY_CONTEXT};
  if (!o.logits.empty()) return {n_prompt, n_prompt};
  if (o.bench) return {2, BENCH_CONTEXTS[std::size(BENCH_CONTEXTS) - 1] + BENCH_DECODE};
  if (o.chat || !o.prompts.empty()) return {2, DEFAULT_CONTEXT};
  if (n > 0) return {n_prompt + n, n_prompt + n};
  return {n_prompt + 1, o.has_n ? std::max(n_prompt + 1, DEFAULT_CONTEXT) : n_prompt + DEFAULT_N};
}

// ---- Requests.

Request make_request(Session& s, std::vector<int> prompt, int n, size_t first_sequence) {
  Request r;
  r.prompt = std::move(prompt);
  r.n = n;
  r.sampler = s.options.sampler;
  r.stop = s.stop_ids;
  r.on_logits = [&s, first_sequence, n_prompt = static_cast<int>(r.prompt.size())](int sample, int position,
                                                                                   const float* logits) {
    s.measured.use_logits(s.model.config, first_sequence + static_cast<size_t>(sample), position, position >= n_prompt,
                          logits);
  };
  return r;
}

void note_first_token(Session& s) {
  const std::chrono::duration<double> now = std::chrono::steady_clock::now() - start;
  if (s.measured.first_token == 0) s.measured.first_token = now.count();
}

void work(Session& s) {
  while (s.engine->step())
    if (interrupted()) s.engine->cancel_all();
}

int tokens_to_generate(const Session& s, size_t n_prompt, bool has_n, int n) {
  if (n > 0) return n;
  return std::max(1, has_n ? s.room(n_prompt) : std::min(s.room(n_prompt), DEFAULT_N));
}

// ---- Tokens to text.

bool TextStream::push(int id) {
  // A vocabulary padded to a round size has ids that the tokenizer lacks.
  return take(utf8_.push(id < tokenizer_.vocab_size() ? tokenizer_.bytes(id) : ""));
}

void TextStream::finish() {
  if (!stopped_ && take(utf8_.finish())) sink_(held_);
  held_.clear();
}

bool TextStream::take(const std::string& text) {
  held_ += text;
  size_t end = std::string::npos;
  for (const std::string& stop : stops_) end = std::min(end, held_.find(stop));
  stopped_ = end != std::string::npos;
  if (!stopped_) end = held_.size() - longest_beginning();
  sink_(std::string_view(held_).substr(0, end));
  held_.erase(0, end);
  return !stopped_;
}

// Of the ends of held_ that a stop text begins with, the longest.
size_t TextStream::longest_beginning() const {
  size_t longest = 0;
  for (const std::string& stop : stops_)
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; n--)
      if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) longest = n;
  return longest;
}

// ---- Output files.

OutputFile::OutputFile(const std::string& path) : path_(path), written_path_(path) {
  struct stat status;
  const bool exists = stat(path.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) fail("cannot write %s: it is a directory", path.c_str());
  if (!exists || S_ISREG(status.st_mode)) written_path_ += ".partial";  // a device or a pipe is written as it is
  file_ = std::fopen(written_path_.c_str(), "wb");
  if (!file_) fail("cannot write %s: %s", path.c_str(), std::strerror(errno));
}

OutputFile::~OutputFile() {
  if (!file_) return;
  std::fclose(file_);
  if (written_path_ != path_) std::remove(written_path_.c_str());
}

void OutputFile::write(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, file_) != bytes) fail("cannot write %s: %s", path_.c_str(), std::strerror(errno));
}

void OutputFile::commit() {
  const bool closed = std::fclose(std::exchange(file_, nullptr)) == 0;
  if (!closed || (written_path_ != path_ && std::rename(written_path_.c_str(), path_.c_str()) != 0))
    fail("cannot write %s: %s", path_.c_str(), std::strerror(errno));
}
