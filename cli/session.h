// session.h: what every mode of run works with: its input, an engine, and the way from tokens to text.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/editor.h"
#include "cli/lines.h"
#include "cli/options.h"
#include "cli/output.h"
#include "cli/ranks.h"
#include "cli/report.h"
#include "cli/signals.h"
#include "host/engine.h"
#include "host/error.h"
#include "host/tokenizer.h"

struct Session {
  const Options& options;
  const Model& model;
  const Tokenizer& tokenizer;
  Threads& threads;
  std::vector<RankMemory> ranks = {};  // of this run; at least one
  Editor* editor = nullptr;            // of a chat at a terminal
  LineReader lines = {};               // the requests, or the turns of another chat
  OutputFile* output = nullptr;        // of --logits or --heatmap
  std::string text = "";               // the prompt, or the text to score
  std::vector<int> prompt = {};        // its ids
  std::vector<int> stop_ids = {};      // tokens that end a text
  int sequences = 1;                   // at once, at most
  Setup setup = {};
  Engine* engine = nullptr;                       // once the memory is planned
  std::function<bool()> kv_overflowed = nullptr;  // whether the cache met what its type cannot hold
  Measured measured = {};
  bool failed = false;  // a request or a turn went wrong: exit code 1

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

// The modes: cli/talk.cpp, cli/chat.cpp, cli/requests.cpp, cli/measure.cpp.
void continue_text(Session& session);
void chat(Session& session);
void answer_requests(Session& session);
void perplexity(Session& session);
void write_logits(Session& session);
void bench(Session& session);

// Throws Error where the text is too short for this context.
void check_perplexity(const Session& session, int context);

constexpr int BENCH_CONTEXTS[] = {128, 1024, 4096}, BENCH_DECODE = 128;

// What lines for the reader call a file.
std::string shown(const std::string& path);
void require_utf8(const std::string& text, const std::string& what);
// The text with U+FFFD for each wrong byte.
std::string valid_utf8(const std::string& text);
// Of plain text that looks like a special token: what --special would take it for ("<|im_end|>"); empty: it has none.
std::string looks_special(const Tokenizer& tokenizer, const std::string& text);

// Whether all of logits [n] are finite numbers.
bool finite(const float* logits, int n);
// Throws Error where a logit is not a finite number, with the likely cause.
void require_finite(const Session& session, const float* logits);
// A request with the flags' sampler. Its logits are checked, and enter the report as sequences first_sequence + sample;
// an error of it comes out of work().
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
