// session.cpp: what every mode of run works with.
#include "cli/session.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace {

constexpr size_t MOST_TEXT = size_t{256} << 20;  // bytes: more than any context, and what is measured within a day
constexpr int DEFAULT_N = 256, PERPLEXITY_CONTEXT = 512;

const auto program_start = std::chrono::steady_clock::now();

// At a terminal, with editing; until Ctrl-D.
std::string typed_text() {
  Editor editor;
  std::fputs("the prompt, ended by Ctrl-D:\n", stderr);
  std::string text, line;
  for (bool first = true; editor.read("", line); first = false) text += (first ? "" : "\n") + line;
  return text;
}

std::string read_all(const std::string& path) {
  FILE* file = path == "-" ? stdin : std::fopen(path.c_str(), "rb");
  std::string text;
  char piece[65536];
  for (size_t n; file && text.size() <= MOST_TEXT && (n = std::fread(piece, 1, sizeof piece, file)) > 0;)
    text.append(piece, n);
  const bool bad = !file || std::ferror(file) != 0;
  const int error = errno;
  if (file && file != stdin) std::fclose(file);
  if (bad) fail("cannot read %s: %s", shown(path).c_str(), std::strerror(error));
  if (text.size() > MOST_TEXT) fail("%s has more than %zu MB: give a part of it", shown(path).c_str(), MOST_TEXT >> 20);
  return text;
}

// As llama.cpp does, one newline at the end is not part of a text read from a file.
std::string read_text(const std::string& path) {
  std::string text = read_all(path);
  require_utf8(text, shown(path));
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

}  // namespace

std::string shown(const std::string& path) {
  return path == "-" ? "standard input" : path;
}

std::string valid_utf8(const std::string& text) {
  Utf8Stream stream;
  const std::string valid = stream.push(text);
  return valid + stream.finish();
}

void require_utf8(const std::string& text, const std::string& what) {
  const std::string valid = valid_utf8(text);
  if (text == valid) return;
  const auto differs = std::mismatch(text.begin(), text.end(), valid.begin(), valid.end()).first - text.begin();
  const size_t at = std::min(static_cast<size_t>(differs), text.size() - 1);
  fail("%s is not UTF-8: byte 0x%02x at offset %zu; convert it first, for example with iconv -t UTF-8", what.c_str(),
       static_cast<unsigned>(static_cast<unsigned char>(text[at])), at);
}

std::string looks_special(const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<int> plain = tokenizer.encode(text, false, false);
  for (const int id : tokenizer.encode(text, true, false))
    if (tokenizer.bytes(id).empty() && std::find(plain.begin(), plain.end(), id) == plain.end())
      return tokenizer.text(id);
  return "";
}

// ---- The input.

void read_input(Session& s) {
  const Options& o = s.options;
  for (int id = 0; id < s.tokenizer.vocab_size() && !o.ignore_eos; id++)
    if (s.tokenizer.is_end_of_generation(id)) s.stop_ids.push_back(id);
  if (o.system) require_utf8(*o.system, "--system");
  for (const std::string& stop : o.stop) require_utf8(stop, "--stop");
  if (o.chat && !s.tokenizer.chat().refusal().empty()) fail("--chat: %s", s.tokenizer.chat().refusal().c_str());
  if (o.chat) {  // a template that refuses the system message, or a variable, does so before anything is typed
    std::vector<Message> opening{{Message::user, "x"}};
    if (o.system) opening.insert(opening.begin(), {Message::system, *o.system});
    s.tokenizer.encode_chat(opening, o.chat_arguments);
  }
  if (o.chat && !s.editor) s.lines.open("-", o.max_line);
  if (o.chat || o.bench) return;
  s.sequences = o.samples;
  if (!o.prompts.empty()) {
    s.lines.open(o.prompts, o.max_line);
    s.sequences = o.parallel;
    return;
  }
  std::string source = "the prompt";
  if (o.has_prompt) {
    s.text = o.prompt;
    require_utf8(s.text, source);
  } else {
    const std::string path = !o.perplexity.empty() ? o.perplexity : !o.prompt_file.empty() ? o.prompt_file : "-";
    s.text = path == "-" && isatty(STDIN_FILENO) ? typed_text() : read_text(path);
    source = shown(path);
  }
  s.prompt = s.tokenizer.encode(s.text, o.special, true);
  if (const std::string token = o.special ? "" : looks_special(s.tokenizer, s.text); !token.empty())
    note(source + " has " + token + " as plain text; with --special it is that token");
  if (s.prompt.empty())
    fail("%s is empty, and this model has no token to begin a text with: give it some text", source.c_str());
}

WantedContext wanted_context(const Session& s) {
  const Options& o = s.options;
  const int n_prompt = static_cast<int>(s.prompt.size());
  const int n = std::min(o.n, std::numeric_limits<int>::max() - n_prompt);  // no overflow: no context is as long
  if (!o.perplexity.empty()) return {PERPLEXITY_CONTEXT, PERPLEXITY_CONTEXT};
  if (!o.logits.empty() || !o.heatmap.empty() || o.explain) return {n_prompt, n_prompt};
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
  r.on_finish = [](const Result& result) {
    if (result.finish == Finish::error) fail("%s", result.error.c_str());
  };
  r.on_logits = [&s, first_sequence](int sample, int, const float* logits) {
    require_finite(s, logits);
    s.measured.use_logits(first_sequence + static_cast<size_t>(sample), logits, s.model.config.vocab_size);
  };
  return r;
}

bool finite(const float* logits, int n) {
  return std::all_of(logits, logits + n, [](float x) { return std::isfinite(x); });
}

void require_finite(const Session& s, const float* logits) {
  if (finite(logits, s.model.config.vocab_size)) return;
  if (s.kv_overflowed())
    fail("the logits are not finite numbers: this text has keys or values that KV %s cannot hold: make KV=bf16",
         s.setup.kv);
  fail("the logits are not finite numbers: the model file or its arithmetic is broken: export the model again");
}

void note_first_token(Session& s) {
  const std::chrono::duration<double> now = std::chrono::steady_clock::now() - program_start;
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
