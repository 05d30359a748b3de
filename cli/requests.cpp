// requests.cpp: JSON lines in, JSON lines out.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <limits>
#include <memory>
#include <set>

#include "cli/session.h"
#include "json.h"

namespace {

// The value of a key, as `convert` takes it (null: it is something else); `otherwise` where there is no such key.
template <class T>
T get(const Json& object, const char* key, const T& otherwise, const char* kind, auto convert) {
  const Json* value = object.find(key);
  if (!value) return otherwise;
  const auto x = convert(*value);
  if (!x) fail("\"%s\" must be %s, not %s", key, kind, value->text().c_str());
  return static_cast<T>(*x);
}

std::string get_text(const Json& object, const char* key) {
  return get(object, key, std::string(), "a text", [](const Json& v) { return v.string(); });
}

float get_real(const Json& object, const char* key, float otherwise) {
  return get(object, key, otherwise, "a number", [](const Json& v) { return v.number(); });
}

int get_count(const Json& object, const char* key, int otherwise) {
  return get(object, key, otherwise, "a whole number from 0 to 2147483647", [](const Json& v) {
    const auto n = v.integer<int>();
    return n && *n >= 0 ? n : std::nullopt;
  });
}

uint64_t get_seed(const Json& object, uint64_t otherwise) {
  return get(object, "seed", otherwise, "a whole number from 0 to 2^64 - 1",
             [](const Json& v) { return v.integer<uint64_t>(); });
}

std::vector<Message> get_messages(const Json& list) {
  std::vector<Message> messages;
  if (!list.array()) fail("\"messages\" must be a list of {\"role\": ..., \"content\": ...}");
  for (const Json& m : *list.array()) {
    if (!m.find("role") || !m.find("content") || m.object()->size() != 2)
      fail("a message must be {\"role\": ..., \"content\": ...}, not %s", m.text().c_str());
    const std::string role = get_text(m, "role");
    if (role != "system" && role != "user" && role != "assistant")
      fail("a message's role must be system, user or assistant, not \"%s\"", role.c_str());
    const auto which = role == "system" ? Message::system : role == "user" ? Message::user : Message::assistant;
    messages.push_back({which, get_text(m, "content")});
  }
  return messages;
}

std::vector<std::string> get_stops(const Json& stop) {
  std::vector<std::string> stops;
  for (const Json& text : stop.array() ? *stop.array() : Json::Array{stop}) {
    if (!text.string() || text.string()->empty())
      fail("\"stop\" must be a text or a list of texts, none of them empty, not %s", stop.text().c_str());
    stops.push_back(*text.string());
  }
  return stops;
}

// What one line asks for. Throws Error.
struct Asked {
  std::vector<int> prompt;
  int n = 0;
  SamplerOptions sampler;
  std::vector<std::string> stop;
};

Asked parse_request(const Session& s, const std::string& line) {
  const Json j = parse_json(line, "the line");
  if (!j.object()) fail("a request must be a JSON object, not %s", line.c_str());
  static const std::set<std::string> keys = {"prompt", "messages",       "n",    "temperature", "top_k", "top_p",
                                             "min_p",  "repeat_penalty", "seed", "stop"};
  for (const auto& [key, value] : *j.object())
    if (!keys.count(key))
      fail("unknown key \"%s\": %s", key.c_str(),
           "a request has prompt or messages, n, temperature, top_k, top_p, min_p, repeat_penalty, seed, stop");
  const Json* messages = j.find("messages");
  if ((messages != nullptr) == (j.find("prompt") != nullptr)) fail("a request needs either \"prompt\" or \"messages\"");
  Asked a;
  a.prompt = messages ? s.tokenizer.encode_chat(get_messages(*messages))
                      : s.tokenizer.encode(get_text(j, "prompt"), false, true);
  if (a.prompt.empty()) fail("the prompt is empty, and this model has no token to begin a text with");
  const SamplerOptions& o = s.options.sampler;
  a.sampler = {.temperature = get_real(j, "temperature", o.temperature),
               .top_k = get_count(j, "top_k", o.top_k),
               .top_p = get_real(j, "top_p", o.top_p),
               .min_p = get_real(j, "min_p", o.min_p),
               .repeat_penalty = get_real(j, "repeat_penalty", o.repeat_penalty),
               .seed = get_seed(j, o.seed)};
  if (const std::string wrong = problem(a.sampler); !wrong.empty()) fail("%s", wrong.c_str());
  a.n = tokens_to_generate(s, a.prompt.size(), j.find("n") || s.options.has_n, get_count(j, "n", s.options.n));
  const Json* stop = j.find("stop");
  a.stop = stop ? get_stops(*stop) : s.options.stop;
  return a;
}

// Answers in the order of the lines, each as soon as it and all before it are there.
class Answers {
 public:
  explicit Answers(size_t n) : answers_(n) {}
  void set(size_t i, const Json::Object& answer) {
    answers_[i] = Json(answer).text() + "\n";
    for (; next_ < answers_.size() && !answers_[next_].empty(); next_++) print(answers_[next_]);
    done_++;
  }
  size_t done() const { return done_; }

 private:
  std::vector<std::string> answers_;
  size_t next_ = 0, done_ = 0;
};

void show_progress(const Session& s, size_t done, size_t all) {
  if (s.options.quiet || !isatty(STDERR_FILENO)) return;
  const Stats stats = s.engine->stats();
  const double seconds = stats.prompt_seconds + stats.decode_seconds;
  const int width = 30, filled = static_cast<int>(done * static_cast<size_t>(width) / all);
  std::fprintf(stderr, "\r[%-*s] %zu of %zu, %.1f tokens/s%s", width,
               std::string(static_cast<size_t>(filled), '#').c_str(), done, all,
               static_cast<double>(stats.generated_tokens) / std::max(seconds, 1e-9), done == all ? "\n" : "");
}

void submit_line(Session& s, Answers& answers, size_t i, int line_number, const std::string& line) {
  Asked asked = parse_request(s, line);
  Request r = make_request(s, std::move(asked.prompt), asked.n, i);
  r.sampler = asked.sampler;
  auto text = std::make_shared<std::string>();
  auto stream =
      std::make_shared<TextStream>(s.tokenizer, asked.stop, [text](std::string_view piece) { *text += piece; });
  r.on_token = [&s, stream](int, int id) {
    note_first_token(s);
    return stream->push(id);
  };
  r.on_finish = [&s, &answers, i, line_number, text, stream](const Result& result) {
    if (result.finish == Finish::cancelled) return answers.set(i, {{"line", line_number}, {"error", "interrupted"}});
    stream->finish();
    char hash[17];
    std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(s.measured.hashes[i].value()));
    answers.set(i, {{"line", line_number},
                    {"text", *text},
                    {"finish", stream->stopped() ? "stop" : name(result.finish)},
                    {"prompt_tokens", result.n_prompt},
                    {"cached_tokens", result.n_cached},
                    {"generated_tokens", result.ids.size()},
                    {"seconds", result.seconds},
                    {"logits_hash", hash}});
  };
  s.engine->submit(std::move(r));
}

}  // namespace

void answer_requests(Session& s) {
  const auto lines = request_lines(s.text);
  Answers answers(lines.size());
  for (size_t i = 0; i < lines.size(); i++) {
    try {
      submit_line(s, answers, i, lines[i].first, lines[i].second);
    } catch (const Error& e) {
      answers.set(i, {{"line", lines[i].first}, {"error", e.what()}});
    }
  }
  work(s, [&, shown = size_t{0}]() mutable {
    if (answers.done() > shown) show_progress(s, shown = answers.done(), lines.size());
  });
}
