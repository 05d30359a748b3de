// modes.cpp: what run does with an engine: continue a text, talk, answer requests, score, measure.
#include "modes.h"

#include <omp.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "simd.h"

namespace {

using Json = nlohmann::ordered_json;

constexpr int DEFAULT_N = 256, DEFAULT_CONTEXT = 4096, PERPLEXITY_CONTEXT = 512;
constexpr int BENCH_PROMPT = 512, BENCH_DECODE = 128, BENCH_REPEATS = 5, BENCH_CONTEXTS[] = {128, 1024, 4096};

const auto start = std::chrono::steady_clock::now();
volatile sig_atomic_t interrupt_came = 0;

// ---- Files and streams.

// Standard output: whatever is written is seen at once.
void print(std::string_view text) {
  if (text.empty()) return;
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw ClosedPipe{};
  fail("cannot write to standard output: %s", std::strerror(errno));
}

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

// Bytes that are no UTF-8 leave the stream as something else than they entered.
void require_utf8(const std::string& text, const std::string& what) {
  Utf8Stream stream;
  const std::string valid = stream.push(text) + stream.finish();
  const auto [in, out] = std::mismatch(text.begin(), text.end(), valid.begin(), valid.end());
  if (in == text.end()) return;
  fail("%s is not UTF-8: byte 0x%02x at offset %zu; convert it first, for example with iconv -t UTF-8", what.c_str(),
       static_cast<unsigned>(static_cast<unsigned char>(*in)), static_cast<size_t>(in - text.begin()));
}

// As llama.cpp does, one newline at the end is not part of a text read from a file.
std::string read_text(const std::string& path) {
  std::string text = read_all(path);
  require_utf8(text, path == "-" ? "standard input" : path);
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

// ---- Tokens to text.

// Hands on text as it becomes certain: whole characters, and nothing that may yet turn out to be a stop text.
class TextStream {
 public:
  using Sink = std::function<void(std::string_view)>;
  TextStream(const Tokenizer& tokenizer, const std::vector<std::string>& stops, Sink sink)
      : tokenizer_(tokenizer), stops_(stops), sink_(std::move(sink)) {}

  // False: a stop text has come. A vocabulary padded to a round size has ids that the tokenizer lacks.
  bool push(int id) { return take(utf8_.push(id < tokenizer_.vocab_size() ? tokenizer_.bytes(id) : "")); }
  void finish() {
    if (!stopped_ && take(utf8_.finish())) sink_(held_);
    held_.clear();
  }
  bool stopped() const { return stopped_; }

 private:
  bool take(const std::string& text) {
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
  size_t longest_beginning() const {
    size_t longest = 0;
    for (const std::string& stop : stops_)
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; n--)
        if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) longest = n;
    return longest;
  }

  const Tokenizer& tokenizer_;
  std::vector<std::string> stops_;
  Sink sink_;
  Utf8Stream utf8_;
  std::string held_;
  bool stopped_ = false;
};

std::string token_line(const Tokenizer& tokenizer, int id) {
  const std::string text = id < tokenizer.vocab_size() ? tokenizer.text(id) : "";
  return std::to_string(id) + "\t" + Json(text).dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// ---- Requests.

// A request whose logits enter the report as sequences first, first + 1, ... one a sample.
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

// Ends when nothing is left to do; Ctrl-C ends all requests with what they have.
void work(Session& s, const std::function<void()>& after_step = {}) {
  bool cancelled = false;
  while (s.engine->step()) {
    if (after_step) after_step();
    if (interrupted() && !cancelled) s.engine->cancel_all(), cancelled = true;
  }
}

// ---- Continue a text.

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
    if (texts_.size() > 1) print((live_ > 0 ? "\n" : "") + ("--- sample " + std::to_string(live_ + 1)) + "\n");
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

// -n 0 is as many as there is room for.
int tokens_to_generate(const Session& s, size_t n_prompt, bool has_n, int n) {
  if (n > 0) return n;
  return std::max(1, has_n ? s.room(n_prompt) : std::min(s.room(n_prompt), DEFAULT_N));
}

void continue_text(Session& s) {
  std::optional<Samples> samples;
  Request r = make_request(s, s.prompt, tokens_to_generate(s, s.prompt.size(), s.options.has_n, s.options.n), 0);
  r.samples = s.options.samples;
  r.on_token = [&](int sample, int id) { return samples->token(sample, id); };
  r.on_finish = [&](const Result& result) { samples->finish(result.sample); };
  s.engine->submit(std::move(r));
  samples.emplace(s);
  work(s);
  if (!s.options.tokens) print("\n");
}

// ---- Talk.

// False at the end of the input.
bool read_line(std::string& line) {
  line.clear();
  for (int c; (c = std::getchar()) != EOF && c != '\n';) line += static_cast<char>(c);
  return !interrupted() && (!line.empty() || !std::feof(stdin));
}

// The whole conversation is the prompt of each turn; the engine finds what is in the cache already.
void chat(Session& s) {
  std::vector<Message> messages;
  if (!s.options.system.empty()) messages.push_back({Message::system, s.options.system});
  const bool terminal = isatty(STDIN_FILENO) != 0;
  std::string line;
  for (;;) {
    if (terminal) std::fputs("> ", stderr);
    if (!read_line(line)) break;
    if (line.empty()) continue;
    require_utf8(line, "this line");
    messages.push_back({Message::user, line});
    s.prompt = s.tokenizer.encode_chat(messages);
    const int room = s.room(s.prompt.size()), n = s.options.n > 0 ? std::min(s.options.n, room) : room;
    if (room < 1)
      fail("the conversation fills the context of %d tokens: begin a new one, or enlarge it with -c",
           s.engine->max_request_tokens());
    std::string answer;
    TextStream stream(s.tokenizer, s.options.stop, [&](std::string_view text) {
      answer += text;
      print(text);
    });
    Request r = make_request(s, s.prompt, n, 0);
    r.on_token = [&](int, int id) {
      note_first_token(s);
      return stream.push(id);
    };
    s.engine->submit(std::move(r));
    work(s);
    stream.finish();
    print("\n");
    messages.push_back({Message::assistant, answer});
    if (interrupted()) break;
  }
  if (terminal) std::fputs("\n", stderr);
}

// ---- Answer requests: JSON lines in, JSON lines out.

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
  for (const auto& [key, value] : j.items())
    if (const auto keys = {"prompt", "messages", "n", "temperature", "top_k", "top_p", "min_p", "repeat_penalty",
                           "seed", "stop"};
        std::find(keys.begin(), keys.end(), key) == keys.end())
      fail(
          "unknown key \"%s\": a request has prompt or messages, n, temperature, top_k, top_p, min_p, repeat_penalty, "
          "seed, stop",
          key.c_str());
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

void submit_line(Session& s, Answers& answers, size_t i, size_t line_number, const std::string& line) {
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

void answer_requests(Session& s) {
  std::vector<std::pair<size_t, std::string>> lines;  // number from 1, request
  size_t number = 0;
  for (size_t begin = 0; begin < s.text.size(); number++) {
    const size_t end = std::min(s.text.find('\n', begin), s.text.size());
    std::string line = s.text.substr(begin, end - begin);
    if (line.find_first_not_of(" \t\r") != std::string::npos) lines.emplace_back(number + 1, std::move(line));
    begin = end + 1;
  }
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
  work(s, [&] { show_progress(s, answers.done(), lines.size()); });
}

// ---- Score.

// -log of the probability that softmax(logits) gives to `id`.
double negative_log_probability(const float* logits, int n, int id) {
  const float largest = *std::max_element(logits, logits + n);
  double sum = 0;
  int i = 0;
  for (; i + simd::LANES <= n; i += simd::LANES)
    sum += static_cast<double>(simd::sum(simd::exp(simd::sub(simd::load(logits + i), simd::set(largest)))));
  for (; i < n; i++) sum += std::exp(static_cast<double>(logits[i] - largest));
  const double result = std::log(sum) - static_cast<double>(logits[id] - largest);
  if (!std::isfinite(result)) fail("the logits are not finite numbers: the model file or its arithmetic is broken");
  return result;
}

// As llama-perplexity scores: chunks of the context's size, the first token of each replaced by BOS where the model
// begins its texts with it, the second half of a chunk scored, so that each token has at least half a context before
// it.
void perplexity(Session& s) {
  const int context = s.setup.limits.context, first = context / 2;
  const std::vector<int> begin = s.tokenizer.encode("", false, true);
  int chunks = static_cast<int>(s.prompt.size()) / context;
  if (chunks < 2)
    fail("%s has %zu tokens: at least %d are needed with a context of %d (-c)", s.options.perplexity.c_str(),
         s.prompt.size(), 2 * context, context);
  if (s.options.chunks > 0) chunks = std::min(chunks, s.options.chunks);
  double sum = 0, squares = 0;
  int count = 0;
  for (int chunk = 0; chunk < chunks && !interrupted(); chunk++) {
    const int* ids = s.prompt.data() + static_cast<ptrdiff_t>(chunk) * context;
    Request r = make_request(s, std::vector<int>(ids, ids + context), 0, 0);
    if (!begin.empty() && begin[0] == s.tokenizer.bos()) r.prompt[0] = begin[0];
    r.logits_from = first;
    r.on_logits = [&, hash = r.on_logits](int sample, int position, const float* logits) {
      if (position == context - 1) return;  // what it predicts is in the next chunk
      hash(sample, position, logits);
      const double x = negative_log_probability(logits, s.model.config.vocab_size, ids[position + 1]);
      sum += x;
      squares += x * x;
      count++;
    };
    s.engine->submit(std::move(r));
    work(s);
    char text[64];
    std::snprintf(text, sizeof text, "[%d]%.4f,", chunk + 1, std::exp(sum / count));
    print(text);
  }
  if (interrupted()) return print("\n");
  const double mean = sum / count, variance = squares / count - mean * mean;
  s.measured.perplexity = std::exp(mean);
  char text[128];
  std::snprintf(text, sizeof text, "\nperplexity %.4f +/- %.5f, %d chunks of %d tokens\n", std::exp(mean),
                std::exp(mean) * std::sqrt(std::max(0.0, variance) / (count - 1)), chunks, context);
  print(text);
}

// float32 [tokens, vocab_size], row by row as they are computed.
void write_logits(Session& s) {
  OutputFile file(s.options.logits);
  const int vocab_size = s.model.config.vocab_size;
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(s.prompt.size()) + ", " +
                       std::to_string(vocab_size) + "), }";
  header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');  // NumPy aligns the data to 64 bytes
  header += '\n';
  const unsigned char length[2] = {static_cast<unsigned char>(header.size() % 256),
                                   static_cast<unsigned char>(header.size() / 256)};
  file.write("\x93NUMPY\x01\x00", 8);
  file.write(length, 2);
  file.write(header.data(), header.size());
  Request r = make_request(s, s.prompt, 0, 0);
  r.logits_from = 0;
  r.on_logits = [&, hash = r.on_logits](int sample, int position, const float* logits) {
    hash(sample, position, logits);
    file.write(logits, static_cast<size_t>(vocab_size) * sizeof(float));
  };
  s.engine->submit(std::move(r));
  work(s);
  if (!interrupted()) file.commit();
}

// ---- Measure.

// Bytes a second that the threads read together from memory that no cache holds.
double read_bandwidth() {
  Buffer<uint64_t> data(size_t{512} << 17);  // 512 MB
  const size_t n = data.size();
  uint64_t sum = 0;
  double best = 0;
#pragma omp parallel for
  for (size_t i = 0; i < n; i++) data[i] = i;
  for (int repeat = 0; repeat < 5; repeat++) {
    const double began = omp_get_wtime();
#pragma omp parallel for simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += data[i];
    best = std::max(best, static_cast<double>(n * sizeof(uint64_t)) / (omp_get_wtime() - began));
  }
  return sum == 1 ? 0 : best;  // the sum is used, or the loop would go
}

// One request of random tokens; what it added to the statistics.
struct Run {
  double prompt_tokens, prompt_seconds, decode_steps, decode_seconds, decode_context;
};
Run run_random(Session& s, int n_prompt, int n, unsigned seed) {
  std::mt19937 generator(seed);
  Request r;
  for (int i = 0; i < n_prompt; i++)
    r.prompt.push_back(static_cast<int>(generator() % static_cast<unsigned>(s.model.config.vocab_size)));
  r.n = n;
  const Stats before = s.engine->stats();
  s.engine->submit(std::move(r));
  work(s);
  const Stats after = s.engine->stats();
  return {static_cast<double>(after.prompt_tokens - before.prompt_tokens), after.prompt_seconds - before.prompt_seconds,
          static_cast<double>(after.decode_steps - before.decode_steps), after.decode_seconds - before.decode_seconds,
          static_cast<double>(after.decode_context - before.decode_context)};
}

// The same prompt again and again: from the second time on it comes out of the cache.
Json bench_decode(Session& s, int context, double bandwidth) {
  std::vector<double> speeds;
  Run run{};
  run_random(s, context, 1, 1);
  for (int i = 0; i < BENCH_REPEATS && !interrupted(); i++) {
    run = run_random(s, context, BENCH_DECODE, 1);
    speeds.push_back(run.decode_steps / run.decode_seconds);
  }
  const double read = tokens_read(s.model.config, static_cast<int>(run.decode_context / run.decode_steps));
  const double bytes =
      static_cast<double>(s.model.weight_bytes_per_token) + read * static_cast<double>(s.setup.kv_bytes_per_token);
  const double speed = percentile(speeds, 0.5);
  return {{"test", "tg" + std::to_string(BENCH_DECODE)},
          {"context", context},
          {"tokens_per_second", speed},
          {"bytes_per_token", bytes},
          {"gb_per_second", bytes * speed / 1e9},
          {"bandwidth_percent", 100 * bytes * speed / bandwidth}};
}

void bench(Session& s) {
  const int longest = s.engine->max_request_tokens();
  const double bandwidth = read_bandwidth();
  Json tests = Json::array();
  std::vector<double> speeds;
  const int n_prompt = std::min(BENCH_PROMPT, longest - 1);
  for (unsigned i = 0; i <= BENCH_REPEATS && !interrupted(); i++) {  // the first one warms up
    const Run run = run_random(s, n_prompt, 1, 100 + i);
    if (i > 0) speeds.push_back(run.prompt_tokens / run.prompt_seconds);
  }
  tests.push_back(
      {{"test", "pp" + std::to_string(n_prompt)}, {"context", 0}, {"tokens_per_second", percentile(speeds, 0.5)}});
  for (const int context : BENCH_CONTEXTS)
    if (context + BENCH_DECODE <= longest && !interrupted()) tests.push_back(bench_decode(s, context, bandwidth));
  print(Json{{"model", s.model.path},
             {"cache", s.setup.cache},
             {"kernel", s.setup.kernel},
             {"kv", s.setup.kv},
             {"kernels", kernel_level()},
             {"threads", s.setup.threads},
             {"read_gb_per_second", bandwidth / 1e9},
             {"repeats", BENCH_REPEATS},
             {"tests", tests}}
            .dump(2) +
        "\n");
}

}  // namespace

// ---- What is asked for.

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

void read_input(Session& s) {
  const Options& o = s.options;
  for (int id = 0; id < s.tokenizer.vocab_size() && !o.ignore_eos; id++)
    if (s.tokenizer.is_end_of_generation(id)) s.stop_ids.push_back(id);
  if (o.chat && !s.tokenizer.chat().present) fail("--chat: %s", s.tokenizer.chat().refusal.c_str());
  if (o.chat && !o.system.empty() && !s.tokenizer.chat().system_refusal.empty())
    fail("--system: %s", s.tokenizer.chat().system_refusal.c_str());
  if (o.chat || o.bench) return;
  if (!o.prompts.empty()) {
    s.text = read_all(o.prompts);
    return;
  }
  if (o.has_prompt) {
    s.text = o.prompt;
    require_utf8(s.text, "the prompt");
  } else {
    const std::string path = !o.perplexity.empty() ? o.perplexity : !o.prompt_file.empty() ? o.prompt_file : "-";
    if (path == "-" && isatty(STDIN_FILENO)) std::fputs("the prompt, ended by Ctrl-D:\n", stderr);
    s.text = read_text(path);
  }
  s.prompt = s.tokenizer.encode(s.text, false, true);
  if (s.prompt.empty())
    fail("the prompt is empty, and this model has no token to begin a text with: give it some text with -i");
}

WantedContext wanted_context(const Session& s) {
  const Options& o = s.options;
  const int n_prompt = static_cast<int>(s.prompt.size());
  const int n = std::min(o.n, std::numeric_limits<int>::max() - n_prompt);  // no overflow: no context is as long
  if (!o.perplexity.empty()) return {PERPLEXITY_CONTEXT, PERPLEXITY_CONTEXT};
  if (!o.logits.empty()) return {n_prompt, n_prompt};
  if (o.bench) return {2, BENCH_CONTEXTS[2] + BENCH_DECODE};
  if (o.chat || !o.prompts.empty()) return {2, DEFAULT_CONTEXT};
  if (n > 0) return {n_prompt + n, n_prompt + n};
  return {n_prompt + 1, o.has_n ? std::max(n_prompt + 1, DEFAULT_CONTEXT) : n_prompt + DEFAULT_N};
}

void run_mode(Session& s) {
  const Options& o = s.options;
  if (o.chat) return chat(s);
  if (o.bench) return bench(s);
  if (!o.prompts.empty()) return answer_requests(s);
  if (!o.perplexity.empty()) return perplexity(s);
  if (!o.logits.empty()) return write_logits(s);
  continue_text(s);
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
