// requests.cpp: JSON lines in, JSON lines out.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <map>
#include <memory>
#include <set>

#include "cli/session.h"
#include "host/json.h"

namespace {

constexpr const char* INTERRUPTED = "interrupted";

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
  return get(object, "seed", otherwise, "a whole number from 0 to 2^63 - 1",
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

// The command line's, and the request's own in their place.
Json get_template_arguments(const Session& s, const Json& request) {
  const Json* own = request.find("chat_template_kwargs");
  if (!own) return s.options.chat_arguments;
  if (!own->object()) fail("\"chat_template_kwargs\" must be an object, not %s", own->text().c_str());
  Json::Object all = *own->object();
  if (const Json::Object* others = s.options.chat_arguments.object())
    for (const auto& member : *others)
      if (!own->find(member.first)) all.push_back(member);
  return all;
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
  static const std::set<std::string> keys = {
      "prompt",         "messages", "n",    "temperature",         "top_k", "top_p", "min_p",
      "repeat_penalty", "seed",     "stop", "chat_template_kwargs"};
  for (const auto& [key, value] : *j.object())
    if (!keys.count(key))
      fail("unknown key \"%s\": %s", key.c_str(),
           "a request has prompt or messages, n, temperature, top_k, top_p, min_p, repeat_penalty, seed, stop, "
           "chat_template_kwargs");
  const Json* messages = j.find("messages");
  if ((messages != nullptr) == (j.find("prompt") != nullptr)) fail("a request needs either \"prompt\" or \"messages\"");
  if (!messages && j.find("chat_template_kwargs")) fail("\"chat_template_kwargs\" makes no sense without \"messages\"");
  Asked a;
  a.prompt = messages ? s.tokenizer.encode_chat(get_messages(*messages), get_template_arguments(s, j))
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

// Answers in the order of the requests, each as soon as it and all before it are there.
class Answers {
 public:
  void set(size_t request, const Json::Object& answer) {
    waiting_[request] = Json(answer).text() + "\n";
    for (auto next = waiting_.find(printed_); next != waiting_.end(); next = waiting_.find(++printed_)) {
      print(next->second);
      waiting_.erase(next);
    }
  }
  size_t done() const { return printed_ + waiting_.size(); }

 private:
  std::map<size_t, std::string> waiting_;
  size_t printed_ = 0;
};

void show_progress(const Session& s, size_t done, const char* end) {
  // Answers that go by on the same terminal tell as much.
  if (s.options.quiet || !isatty(STDERR_FILENO) || isatty(STDOUT_FILENO)) return;
  const Stats stats = s.engine->stats();
  const double seconds = stats.prompt_seconds + stats.decode_seconds, part = s.lines.progress();
  constexpr int WIDTH = 30;
  if (part >= 0) std::fprintf(stderr, "\r[%-*s] ", WIDTH, std::string(static_cast<size_t>(part * WIDTH), '#').c_str());
  std::fprintf(stderr, "%s%zu done, %.1f tokens/s%s", part >= 0 ? "" : "\r", done,
               static_cast<double>(stats.generated_tokens) / std::max(seconds, 1e-9), end);
}

void submit(Session& s, Answers& answers, size_t i, const std::string& line) {
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
  r.on_finish = [&s, &answers, i, number = s.lines.number(), text, stream](const Result& result) {
    if (result.finish == Finish::cancelled) return answers.set(i, {{"line", number}, {"error", INTERRUPTED}});
    stream->finish();
    char hash[17];
    std::snprintf(hash, sizeof hash, "%016" PRIx64, s.measured.hashes[i].value());
    answers.set(i, {{"line", number},
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

// A request each line that is not empty.
LineReader::Got next_request(Session& s, std::string& line, bool wait) {
  for (;;) {
    const auto got = s.lines.next(line, wait);
    if (got != LineReader::Got::line || line.find_first_not_of(" \t") != std::string::npos) return got;
  }
}

}  // namespace

// A line is read once there is room to compute it, and waited for only where nothing else is to do.
void answer_requests(Session& s) {
  Answers answers;
  size_t n = 0, shown = 0;  // requests
  std::string line;
  for (bool more = true; more || s.engine->unfinished() > 0;) {
    while (more && s.engine->unfinished() < s.sequences) {
      const auto got = next_request(s, line, s.engine->unfinished() == 0);
      more = got != LineReader::Got::end;
      if (got != LineReader::Got::line) break;
      const size_t i = n++;
      try {
        submit(s, answers, i, line);
      } catch (const Error& e) {
        answers.set(i, {{"line", s.lines.number()}, {"error", e.what()}});
      }
    }
    s.engine->step();
    if (answers.done() > shown) show_progress(s, shown = answers.done(), "");
    if (interrupted()) s.engine->cancel_all(), more = false;
  }
  show_progress(s, shown, "\n");
  while (interrupted() && next_request(s, line, false) == LineReader::Got::line)
    answers.set(n++, {{"line", s.lines.number()}, {"error", INTERRUPTED}});
}
