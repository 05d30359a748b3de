// modes.h: what run does with an engine: continue a text, talk, answer requests, score, measure.
#pragma once

#include <string>
#include <vector>

#include "engine.h"
#include "options.h"
#include "report.h"
#include "tokenizer.h"

// The reader of our standard output went away: end without a word.
struct ClosedPipe {};

struct Session {
  const Options& options;
  const Model& model;
  const Tokenizer& tokenizer;
  std::string text;           // the prompt; of other modes the text to score, the requests
  std::vector<int> prompt;    // its ids
  std::vector<int> stop_ids;  // tokens that end a text
  Setup setup;
  Engine* engine = nullptr;  // once the memory is planned
  Measured measured;

  // Tokens that a request with a prompt of this length may generate.
  int room(size_t n_prompt) const { return engine->max_request_tokens() - static_cast<int>(n_prompt); }
};

// The first Ctrl-C makes interrupted() true, and what runs ends cleanly; the second one kills.
void catch_interrupt();
bool interrupted();

// Reads and encodes what the mode works on.
void read_input(Session& session);
// Tokens of a sequence: without `least` the mode cannot work, more than `most` it does not need.
struct WantedContext {
  int least, most;
};
WantedContext wanted_context(const Session& session);

void run_mode(Session& session);

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
