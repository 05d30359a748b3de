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

// The value of a key; null where there is none, or null.
const Json* find(const Json& object, const char* key) {
  const Json* value = object.find(key);
  return value && !value->is_null() ? value : nullptr;
}

// The value of a key, as `convert` takes it (null: it is something else); `otherwise` where there is none.
template <class T>
T get(const Json& object, const char* key, const T& otherwise, const char* kind, auto convert) {
  const Json* value = find(object, key);
  if (!value) return otherwise;
  const auto x = convert(*value);
  if (!x) fail("\"%s\" must be %s, not %s", key, kind, value->text().c_str());
  return static_cast<T>(*x);
}

std::string get_text(const Json& object, const char* key) {
  return get(object, key, std::string(), "a text", [](const Json& v) { return v.string(); });
}

bool get_switch(const Json& object, const char* key, bool otherwise) {
  return get(object, key, otherwise, "true or false", [](const Json& v) { return v.boolean(); });
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

// As -n: -1 and -2 are 0.
int get_n(const Json& object, int otherwise) {
  return get(object, "n", otherwise, "a whole number from -2 to 2147483647", [](const Json& v) {
    const auto n = v.integer<int>();
    return n && *n >= -2 ? std::optional(std::max(0, *n)) : std::nullopt;
  });
}

// As -s: -1 is another one each time.
uint64_t get_seed(const Json& object, uint64_t otherwise) {
  return get(object, "seed", otherwise, "a whole number from -1 to 2^63 - 1", [](const Json& v) {
    return v.integer<int>() == -1 ? std::optional(random_seed()) : v.integer<uint64_t>();
  });
}

// A text, or a list of parts {"type": "text", "text": ...}, each on lines of its own.
std::string get_content(const Json& message) {
  const Json* content = find(message, "content");
  if (!content || !content->array()) return get_text(message, "content");
  std::string text;
  for (const Json& part : *content->array()) {
    if (!part.object() || part.object()->size() != 2 || get_text(part, "type") != "text" || !find(part, "text"))
      fail("a part of a message's content must be {\"type\": \"text\", \"text\": ...}, not %s", part.text().c_str());
    if (&part != content->array()->data()) text += '\n';
    text += get_text(part, "text");
  }
  return text;
}

std::vector<Message> get_messages(const Json& list) {
  std::vector<Message> messages;
  if (!list.array()) fail("\"messages\" must be a list of {\"role\": ..., \"content\": ...}");
  for (const Json& m : *list.array()) {
    if (!find(m, "role") || !find(m, "content") || m.object()->size() != 2)
      fail("a message must be {\"role\": ..., \"content\": ...}, not %s", m.text().c_str());
    const std::string role = get_text(m, "role");
    if (role != "system" && role != "user" && role != "assistant")
      fail("a message's role must be system, user or assistant, not \"%s\"", role.c_str());
    const auto which = role == "system" ? Message::system : role == "user" ? Message::user : Message::assistant;
    messages.push_back({which, get_content(m)});
  }
  return messages;
}

// The command line's, and the request's own in their place.
Json get_template_arguments(const Session& s, const Json& request) {
  const Json* own = find(request, "chat_template_kwargs");
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
  std::string note;  // for the answer
};

// Their ids, and a note where plain text looks like a special token.
void encode_prompt(const Session& s, const Json& j, Asked& a) {
  const std::string text = get_text(j, "prompt");
  const bool special = get_switch(j, "special", s.options.special);
  a.prompt = s.tokenizer.encode(text, special, true);
  if (const std::string token = special ? "" : looks_special(s.tokenizer, text); !token.empty())
    a.note = "the prompt has " + token + " as plain text; with \"special\": true it is that token";
}

Asked parse_request(const Session& s, const Json& j) {
  if (!j.object()) fail("a request must be a JSON object, not %s", j.text().c_str());
  static const std::set<std::string> keys = {
      "id",    "prompt", "messages",       "special", "n",    "temperature",         "top_k",
      "top_p", "min_p",  "repeat_penalty", "seed",    "stop", "chat_template_kwargs"};
  for (const auto& [key, value] : *j.object())
    if (!keys.count(key))
      fail("unknown key \"%s\": %s", key.c_str(),
           "a request has prompt or messages, id, special, chat_template_kwargs, n, temperature, top_k, top_p, min_p, "
           "repeat_penalty, seed, stop");
  const Json* messages = find(j, "messages");
  if ((messages != nullptr) == (find(j, "prompt") != nullptr))
    fail("a request needs either \"prompt\" or \"messages\"");
  if (messages && find(j, "special")) fail("\"special\" goes with \"prompt\": what messages say is plain text");
  if (!messages && find(j, "chat_template_kwargs")) fail("\"chat_template_kwargs\" goes with \"messages\"");
  Asked a;
  if (messages)
    a.prompt = s.tokenizer.encode_chat(get_messages(*messages), get_template_arguments(s, j));
  else
    encode_prompt(s, j, a);
  if (a.prompt.empty()) fail("the prompt is empty, and this model has no token to begin a text with");
  const SamplerOptions& o = s.options.sampler;
  a.sampler = {.temperature = std::max(0.0f, get_real(j, "temperature", o.temperature)),
               .top_k = get_count(j, "top_k", o.top_k),
               .top_p = get_real(j, "top_p", o.top_p),
               .min_p = get_real(j, "min_p", o.min_p),
               .repeat_penalty = get_real(j, "repeat_penalty", o.repeat_penalty),
               .seed = get_seed(j, o.seed)};
  if (const std::string wrong = problem(a.sampler); !wrong.empty()) fail("%s", wrong.c_str());
  a.n = tokens_to_generate(s, a.prompt.size(), find(j, "n") || s.options.has_n, get_n(j, s.options.n));
  const Json* stop = find(j, "stop");
  a.stop = stop ? get_stops(*stop) : s.options.stop;
  return a;
}

// What an answer begins with: the line's number, and its id where it has one.
Json::Object head(int64_t line, const Json* id) {
  Json::Object answer = {{"line", line}};
  if (id) answer.emplace_back("id", *id);
  return answer;
}

// Answers in the order of the requests, each as soon as it and all before it are there.
class Answers {
 public:
  explicit Answers(Session& s) : session_(s) {}

  void set(size_t request, Json::Object answer) {
    waiting_[request] = Json(std::move(answer)).text() + "\n";
    for (auto next = waiting_.find(printed_); next != waiting_.end(); next = waiting_.find(++printed_)) {
      print(next->second);
      session_.measured.close(printed_);
      waiting_.erase(next);
    }
  }
  void refuse(size_t request, Json::Object answer, const std::string& error) {
    session_.failed = true;
    answer.emplace_back("error", error);
    set(request, std::move(answer));
  }
  size_t done() const { return printed_ + waiting_.size(); }

 private:
  Session& session_;
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

// Throws Error where the request cannot be taken.
void submit(Session& s, Answers& answers, size_t i, const Json& json, const Json::Object& begin) {
  Asked asked = parse_request(s, json);
  Request r = make_request(s, std::move(asked.prompt), asked.n, i);
  r.sampler = asked.sampler;
  auto text = std::make_shared<std::string>();
  auto stream =
      std::make_shared<TextStream>(s.tokenizer, asked.stop, [text](std::string_view piece) { *text += piece; });
  r.on_token = [&s, stream](int, int id) {
    note_first_token(s);
    return stream->push(id);
  };
  r.on_finish = [&s, &answers, i, begin, remark = asked.note, text, stream](const Result& result) {
    if (result.finish == Finish::cancelled) return answers.refuse(i, begin, INTERRUPTED);
    if (result.finish == Finish::error) return answers.refuse(i, begin, result.error);
    stream->finish();
    char hash[17];
    std::snprintf(hash, sizeof hash, "%016" PRIx64, s.measured.hash_of(i));
    Json::Object answer = begin;
    const Json::Object rest = {{"text", *text},
                               {"finish", stream->stopped() ? "stop" : name(result.finish)},
                               {"prompt_tokens", result.n_prompt},
                               {"cached_tokens", result.n_cached},
                               {"generated_tokens", result.ids.size()},
                               {"seconds", result.seconds},
                               {"logits_hash", hash}};
    answer.insert(answer.end(), rest.begin(), rest.end());
    if (!remark.empty()) answer.emplace_back("note", remark);
    answers.set(i, std::move(answer));
  };
  s.engine->submit(std::move(r));
}

// One line's request: submitted, or answered with what is wrong with it.
void take_line(Session& s, Answers& answers, size_t i, LineReader::Got got, const std::string& line) {
  const int64_t number = s.lines.number();
  Json::Object begin = head(number, nullptr);
  try {
    if (got == LineReader::Got::too_long)
      fail("the line has more than %zu bytes: --max-line allows more", s.lines.max_bytes());
    const Json json = parse_json(line, "the line");
    begin = head(number, find(json, "id"));
    if (interrupted()) fail("%s", INTERRUPTED);
    submit(s, answers, i, json, begin);
  } catch (const std::exception& e) {
    answers.refuse(i, begin, reason(e));
  }
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
  Answers answers(s);
  size_t n = 0, shown = 0;  // requests
  std::string line;
  for (bool more = true; more || s.engine->unfinished() > 0;) {
    while (more && s.engine->unfinished() < s.sequences) {
      const auto got = next_request(s, line, s.engine->unfinished() == 0);
      more = got != LineReader::Got::end;
      if (got == LineReader::Got::nothing || !more) break;
      take_line(s, answers, n++, got, line);
    }
    s.engine->step();
    if (answers.done() > shown) show_progress(s, shown = answers.done(), "");
    if (interrupted()) s.engine->cancel_all(), more = false;
  }
  show_progress(s, shown, "\n");
  if (!interrupted()) return;
  for (auto got = next_request(s, line, false); got == LineReader::Got::line || got == LineReader::Got::too_long;
       got = next_request(s, line, false))
    take_line(s, answers, n++, got, line);
}
