// session.h: what every mode of run works with: its input, an engine, and the way from tokens to text.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/options.h"
#include "cli/report.h"
#include "host/engine.h"
#include "host/error.h"
#include "host/tokenizer.h"

// The lines of a file, or of standard input as they come. They end in \n or \r\n.
class LineReader {
 public:
  enum class Got { line, nothing, end };

  LineReader() = default;
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;
  ~LineReader();
  void open(const std::string& path);  // "-", and without it: standard input. Throws Error
  // nothing: no whole line is there yet; where it may wait, only Ctrl-C ends that: end.
  Got next(std::string& line, bool wait);
  int number() const { return number_; }  // of the last line, from 1
  // Part of the file that was handed out; negative: nobody knows how much will come.
  double progress() const { return size_ > 0 ? static_cast<double>(handed_out_) / static_cast<double>(size_) : -1; }

 private:
  Got hand_out(std::string& line, size_t end);

  std::string name_ = "standard input";
  int fd_ = 0;
  std::string held_;  // read, and not yet handed out
  bool ended_ = false;
  int number_ = 0;
  size_t size_ = 0, handed_out_ = 0;  // bytes
};

struct Session {
  const Options& options;
  const Model& model;
  const Tokenizer& tokenizer;
  Threads& threads;
  std::string text;           // the prompt, or the text to score
  std::vector<int> prompt;    // its ids
  std::vector<int> stop_ids;  // tokens that end a text
  int sequences = 1;          // at once, at most
  Setup setup;
  Engine* engine = nullptr;  // once the memory is planned
  Measured measured;
  LineReader lines;  // the requests, or the turns of a chat

  // Tokens that a request with a prompt of this length may generate.
  int room(size_t n_prompt) const { return engine->max_request_tokens() - static_cast<int>(n_prompt); }
};

// Reads and encodes what the mode works on.
void read_input(Session& session);
// Tokens of a sequence: without `least` the mode cannot work, more than `most` it does not need.
struct WantedContext {
  int least, most;
};
WantedContext wanted_context(const Session& session);

// The modes: cli/talk.cpp, cli/requests.cpp, cli/measure.cpp.
void continue_text(Session& session);
void chat(Session& session);
void answer_requests(Session& session);
void perplexity(Session& session);
void write_logits(Session& session);
void bench(Session& session);

// Throws Error where the text is too short for this context.
void check_perplexity(const Session& session, int context);

constexpr int BENCH_CONTEXTS[] = {128, 1024, 4096}, BENCH_DECODE = 128;

// The first Ctrl-C makes interrupted() true, and what runs ends cleanly; the second one kills.
void catch_interrupt();
bool interrupted();

// The reader of our standard output went away: end without a word.
struct ClosedPipe {};
// To standard output, seen at once. Throws ClosedPipe, Error.
void print(std::string_view text);
void require_utf8(const std::string& text, const std::string& what);

// A request with the flags' sampler. Its logits enter the report as sequences first_sequence + sample.
Request make_request(Session& session, std::vector<int> prompt, int n, size_t first_sequence);
// What -n means for a prompt of this length: 0 is as many as there is room for, without it 256 are enough.
int tokens_to_generate(const Session& session, size_t n_prompt, bool has_n, int n);
// Until nothing is left to do; Ctrl-C ends all requests with what they have.
void work(Session& session);
void note_first_token(Session& session);

// Hands on text as it becomes certain: whole characters, and nothing that may yet turn out to be a stop text.
class TextStream {
 public:
  using Sink = std::function<void(std::string_view)>;
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops, Sink sink)
      : tokenizer_(tokenizer), stops_(std::move(stops)), sink_(std::move(sink)) {}

  bool push(int id);  // false: a stop text has come
  void finish();
  bool stopped() const { return stopped_; }

 private:
  bool take(const std::string& text);
  size_t longest_beginning() const;

  const Tokenizer& tokenizer_;
  std::vector<std::string> stops_;
  Sink sink_;
  Utf8Stream utf8_;
  std::string held_;
  bool stopped_ = false;
};

// A file that appears under its name once it is whole. Throws Error at once where it cannot be written.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();
  void write(const void* data, size_t bytes);
  void commit();

 private:
  std::string path_, written_path_;
  FILE* file_ = nullptr;
};
