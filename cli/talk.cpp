// talk.cpp: continue a text.
#include <cstdio>
#include <optional>

#include "cli/session.h"

namespace {

// ID <tab> "text": what would break the line is written as in JSON.
std::string token_line(const Tokenizer& tokenizer, int id) {
  std::string line = std::to_string(id) + "\t\"";
  for (const char c : id < tokenizer.vocab_size() ? tokenizer.text(id) : "") {
    char code[8];
    std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
    line += c == '"' || c == '\\'                 ? std::string("\\") + c
            : static_cast<unsigned char>(c) < ' ' ? code
                                                  : std::string(1, c);
  }
  return line + "\"\n";
}

// Samples are computed side by side and printed one after the other: the first that is not complete is printed live.
class Samples {
 public:
  explicit Samples(Session& s) : session_(s), texts_(static_cast<size_t>(s.options.samples)) {
    for (size_t i = 0; i < texts_.size(); i++)
      streams_.emplace_back(s.tokenizer, s.options.stop, [this, i](std::string_view text) {
        if (!session_.options.tokens) add(i, text);
      });
    begin();
  }

  bool token(int sample, int id) {
    note_first_token(session_);
    const auto i = static_cast<size_t>(sample);
    if (session_.options.tokens) add(i, token_line(session_.tokenizer, id));
    return streams_[i].push(id);
  }

  void finish(int sample) {
    const auto i = static_cast<size_t>(sample);
    streams_[i].finish();
    texts_[i].done = true;
    for (; live_ < texts_.size() && texts_[live_].done; begin())
      if (++live_ == texts_.size()) return;
  }

 private:
  struct Text {
    std::string held;
    bool done = false;
  };

  void add(size_t i, std::string_view text) {
    if (i == live_)
      print(text);
    else
      texts_[i].held += text;
  }

  void begin() {
    const Session& s = session_;
    if (texts_.size() > 1) print(std::string(live_ > 0 ? "\n" : "") + "--- sample " + std::to_string(live_ + 1) + "\n");
    if (!s.options.tokens) print(s.text);
    for (size_t i = 0; i < s.prompt.size() && s.options.tokens; i++) print(token_line(s.tokenizer, s.prompt[i]));
    if (s.options.tokens) print("\n");
    print(texts_[live_].held);
  }

  Session& session_;
  std::vector<TextStream> streams_;
  std::vector<Text> texts_;
  size_t live_ = 0;
};

}  // namespace

void continue_text(Session& s) {
  std::optional<Samples> samples;
  Request r = make_request(s, s.prompt, tokens_to_generate(s, s.prompt.size(), s.options.has_n, s.options.n), 0);
  r.samples = s.options.samples;
  r.on_token = [&](int sample, int id) { return samples->token(sample, id); };
  std::string error;  // of one sample; the others go on
  r.on_finish = [&](const Result& result) {
    if (!result.error.empty()) error = result.error;
    samples->finish(result.sample);
  };
  s.engine->submit(std::move(r));
  samples.emplace(s);
  work(s);
  if (!s.options.tokens) print("\n");
  if (!error.empty()) fail("%s", error.c_str());
}
