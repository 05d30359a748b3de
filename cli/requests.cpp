// requests.cpp: JSON lines in, JSON lines out.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "cli/session.h"

namespace {

using Json = nlohmann::ordered_json;

template <class T>
T get(const Json& object, const char* key, T otherwise, bool (Json::*is)() const noexcept, const char* kind) {
  const auto found = object.find(key);
  if (found == object.end()) return otherwise;
  if (!((*found).*is)()) fail("\"%s\" must be %s, not %s", key, kind, found->dump().c_str());
  return found->get<T>();
}

int get_count(const Json& object, const char* key, int otherwise) {
  const auto n = get<int64_t>(object, key, otherwise, &Json::is_number_integer, "a whole number");
  if (n < 0 || n > std::numeric_limits<int>::max())
    fail("\"%s\" must be >= 0, not %lld", key, static_cast<long long>(n));
  return static_cast<int>(n);
}

std::vector<Message> get_messages(const Json& array) {
  std::vector<Message> messages;
  if (!array.is_array()) fail("\"messages\" must be a list of {\"role\": ..., \"content\": ...}");
  for (const Json& m : array) {
    if (!m.is_object() || m.size() != 2)
      fail("a message must be {\"role\": ..., \"content\": ...}, not %s", m.dump().c_str());
    const auto role = get<std::string>(m, "role", "", &Json::is_string, "a text");
    if (role != "system" && role != "user" && role != "assistant")
      fail("a message's role must be system, user or assistant, not \"%s\"", role.c_str());
    const auto which = role == "system" ? Message::system : role == "user" ? Message::user : Message::assistant;
    messages.push_back({which, get<std::string>(m, "content", "", &Json::is_string, "a text")});
  }
  return messages;
}

// What one line asks for. Throws Error, nlohmann's exceptions for what is no JSON.
struct Asked {
  std::vector<int> prompt;
  int n = 0;
  SamplerOptions sampler;
  std::vector<std::string> stop;
};

Asked parse_request(const Session& s, const std::string& line) {
  const Json j = Json::parse(line);
  if (!j.is_object()) fail("a request must be a JSON object, not %s", line.c_str());
  static const std::set<std::string> keys = {"prompt", "messages",       "n",    "temperature", "top_k", "top_p",
                                             "min_p",  "repeat_penalty", "seed", "stop"};
  for (const auto& [key, value] : j.items())
    if (!keys.count(key))
      fail("unknown key \"%s\": %s", key.c_str(),
           "a request has prompt or messages, n, temperature, top_k, top_p, min_p, repeat_penalty, seed, stop");
  if (j.contains("prompt") == j.contains("messages")) fail("a request needs either \"prompt\" or \"messages\"");
  Asked a;
  if (j.contains("messages"))
    a.prompt = s.tokenizer.encode_chat(get_messages(j["messages"]));
  else
    a.prompt = s.tokenizer.encode(get<std::string>(j, "prompt", "", &Json::is_string, "a text"), false, true);
  if (a.prompt.empty()) fail("the prompt is empty, and this model has no token to begin a text with");
  const SamplerOptions& o = s.options.sampler;
  const auto real = [&](const char* key, float otherwise) {
    return static_cast<float>(get<double>(j, key, static_cast<double>(otherwise), &Json::is_number, "a number"));
  };
  a.sampler = {.temperature = real("temperature", o.temperature),
               .top_k = get_count(j, "top_k", o.top_k),
               .top_p = real("top_p", o.top_p),
               .min_p = real("min_p", o.min_p),
               .repeat_penalty = real("repeat_penalty", o.repeat_penalty),
               .seed = get<uint64_t>(j, "seed", o.seed, &Json::is_number_unsigned, "a whole number >= 0")};
  if (const std::string wrong = problem(a.sampler); !wrong.empty()) fail("%s", wrong.c_str());
  const bool has_n = j.contains("n") || s.options.has_n;
  a.n = tokens_to_generate(s, a.prompt.size(), has_n, get_count(j, "n", s.options.n));
  a.stop = s.options.stop;
  if (const auto stop = j.find("stop"); stop != j.end()) {
    a.stop.clear();
    for (const Json& text : stop->is_array() ? *stop : Json::array({*stop})) {
      if (!text.is_string() || text.get<std::string>().empty())
        fail("\"stop\" must be a text or a list of texts, not %s", stop->dump().c_str());
      a.stop.push_back(text);
    }
  }
  return a;
}

// Answers in the order of the lines, each as soon as it and all before it are there.
class Answers {
 public:
  explicit Answers(size_t n) : answers_(n) {}
  void set(size_t i, const Json& answer) {
    answers_[i] = answer.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
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
    } catch (const Json::exception& e) {
      answers.set(i, {{"line", lines[i].first}, {"error", std::string("not JSON: ") + e.what()}});
    }
  }
  work(s, [&, shown = size_t{0}]() mutable {
    if (answers.done() > shown) show_progress(s, shown = answers.done(), lines.size());
  });
}
