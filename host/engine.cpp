#include "host/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>

#include "host/error.h"
#include "host/thread_count.h"
#include "kernels/threads.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One sample of a request.
struct Sample : Sequence {
  std::shared_ptr<const Request> asked;
  Result result;
  Sampler sampler;
  bool cancelled = false;
  Clock::time_point submitted, last_token;
};

// A row of logits from which a token is to be drawn.
struct Draw {
  Sample* sample;
  const float* logits;  // [vocab_size]
};

}  // namespace

const char* name(Finish finish) {
  switch (finish) {
    case Finish::length:
      return "length";
    case Finish::stop:
      return "stop";
    case Finish::callback:
      return "callback";
    case Finish::cancelled:
      return "cancelled";
    case Finish::error:
      return "error";
  }
  return "";
}

double percentile(std::vector<double> values, double p) {
  if (values.empty()) return 0;
  auto rank = static_cast<std::ptrdiff_t>(std::ceil(p * static_cast<double>(values.size()))) - 1;
  auto place = values.begin() + std::max<std::ptrdiff_t>(rank, 0);
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

struct Engine::Impl {
  Forward forward;
  Threads& threads;
  int n_threads;
  bool choose_threads;
  int vocab_size;
  Scheduler scheduler;
  ThreadCount thread_count{n_threads};
  std::vector<std::unique_ptr<Sample>> samples = {};  // unfinished, by age
  std::vector<SamplerScratch> scratch = {};           // [n_threads]
  int n_requests = 0;
  int step_threads = n_threads;  // of the latest step
  Stats stats = {};

  bool count_step(const Batch& batch);
  void show_logits(Sample* s, int position, const float* logits);
  std::vector<Draw> collect(const float* logits);
  void fork(Draw first, std::vector<Draw>* draws);
  std::vector<int> draw(const std::vector<Draw>& draws);
  void accept(Sample* s, int id);
  std::optional<Finish> take(Sample* s, int id);
  void finish(Sample* s, Finish reason);
  void drop_ended();
  void lose_step(const char* why);
  const float* compute(const Batch& batch);
};

void Engine::Impl::show_logits(Sample* s, int position, const float* logits) {
  if (!s->asked->on_logits || !s->result.error.empty()) return;
  try {
    s->asked->on_logits(s->sample, position, logits);
  } catch (const std::exception& e) {
    s->result.error = reason(e);
  }
}

// Hands out the logits [n_logits, vocab_size]; returns the rows from which a token is to be drawn.
std::vector<Draw> Engine::Impl::collect(const float* logits) {
  std::vector<Draw> draws;
  for (Sequence* sequence : scheduler.scheduled()) {
    auto* s = static_cast<Sample*>(sequence);
    for (; s->next_logits < s->computed; ++s->next_logits, logits += vocab_size) {
      show_logits(s, s->next_logits, logits);
      if (s->next_logits == s->size() - 1 && s->result.error.empty()) draws.push_back({s, logits});
    }
  }
  for (size_t i = 0, n = draws.size(); i < n; ++i) {
    if (!draws[i].sample->begun) fork(draws[i], &draws);
  }
  return draws;
}

// The prompt of `first` has just been computed: the other samples of its request begin with the same logits.
void Engine::Impl::fork(Draw first, std::vector<Draw>* draws) {
  for (Sequence* sequence : scheduler.fork(*first.sample)) {
    auto* s = static_cast<Sample*>(sequence);
    show_logits(s, s->size() - 1, first.logits);
    if (s->result.error.empty()) draws->push_back({s, first.logits});
  }
}

// Their tokens; where a sample's went wrong, any.
std::vector<int> Engine::Impl::draw(const std::vector<Draw>& draws) {
  std::vector<int> ids(draws.size());
  const size_t work = draws.size() * static_cast<size_t>(vocab_size);
  threads.run(work > 100000 ? n_threads : 1, [&](const Team& team) {  // below, waking the team takes longer
    team.for_each_dynamic(static_cast<int>(draws.size()), [&](int i) {
      const Draw& d = draws[static_cast<size_t>(i)];
      Sample* s = d.sample;
      if (s->asked->n == 0) return;
      try {
        ids[static_cast<size_t>(i)] = s->sampler.sample(d.logits, vocab_size, s->tokens.data(), s->size(),
                                                        scratch[static_cast<size_t>(team.rank)]);
      } catch (const std::exception& e) {
        s->result.error = reason(e);
      }
    });
  });
  return ids;
}

void Engine::Impl::accept(Sample* s, int id) {
  std::optional<Finish> ended;
  try {
    ended = take(s, id);
  } catch (const std::bad_alloc& e) {
    s->result.error = reason(e);
  }
  if (ended) finish(s, *ended);
}

// Whether s ends with this token.
std::optional<Finish> Engine::Impl::take(Sample* s, int id) {
  const Request& asked = *s->asked;
  if (asked.n == 0) return Finish::length;
  double between = seconds_since(s->last_token);
  s->last_token = Clock::now();
  (s->begun ? stats.between_tokens : stats.first_token).add(between);
  if (!s->begun) s->result.first_token = between;
  s->begun = true;
  if (std::find(asked.stop.begin(), asked.stop.end(), id) != asked.stop.end()) return Finish::stop;
  s->tokens.push_back(id);
  s->result.ids.push_back(id);
  ++stats.generated_tokens;
  if (asked.on_token && !asked.on_token(s->sample, id)) return Finish::callback;
  if (static_cast<int>(s->result.ids.size()) == asked.n) return Finish::length;
  return {};
}

void Engine::Impl::finish(Sample* s, Finish reason) {
  scheduler.remove(s);
  s->result.finish = reason;
  s->result.n_cached = s->n_cached;
  s->result.seconds = seconds_since(s->submitted);
  if (s->asked->on_finish) s->asked->on_finish(s->result);
  std::erase_if(samples, [&](const auto& owned) { return owned.get() == s; });
}

// What was cancelled, and what went wrong in the step before.
void Engine::Impl::drop_ended() {
  const auto ended = [](const auto& s) { return s->cancelled || !s->result.error.empty(); };
  for (auto s = samples.begin(); (s = std::ranges::find_if(samples, ended)) != samples.end();)
    finish(s->get(), (*s)->result.error.empty() ? Finish::cancelled : Finish::error);
}

// The step went wrong, for all that are in it.
void Engine::Impl::lose_step(const char* why) {
  for (Sequence* s : scheduler.scheduled()) static_cast<Sample*>(s)->result.error = why;
  for (const auto& s : samples)
    if (s->left() == 0) s->result.error = why;  // forked from them, and without a token yet
}

const float* Engine::Impl::compute(const Batch& batch) {
  if (choose_threads) step_threads = thread_count.next(batch.n_tokens, machine_load());
  const auto start = Clock::now();
  const float* logits = forward(batch, step_threads);
  if (choose_threads) thread_count.note(seconds_since(start));
  return logits;
}

// Before the sequences advance. True: a step without any prompt's tokens.
bool Engine::Impl::count_step(const Batch& batch) {
  int generating = 0;
  for (const Sequence* s : scheduler.scheduled()) generating += s->generates();
  bool decode = generating == batch.n_sequences;
  ++stats.steps;
  stats.prompt_tokens += batch.n_tokens - generating;
  if (decode) {
    ++stats.decode_steps;
    stats.decode_tokens += batch.n_sequences;
    stats.decode_context += std::accumulate(batch.context_len, batch.context_len + batch.n_sequences, int64_t{0});
  }
  return decode;
}

// ---- the interface

Engine::Engine(Forward forward, Threads& threads, const Limits& limits, int block_size, int vocab_size, int window,
               BlockHash hash, bool choose_threads)
    : impl_(new Impl{.forward = std::move(forward),
                     .threads = threads,
                     .n_threads = limits.max_threads,
                     .choose_threads = choose_threads,
                     .vocab_size = vocab_size,
                     .scheduler = Scheduler(limits, block_size, window, hash)}) {
  for (int i = 0; i < limits.max_threads; i++) impl_->scratch.emplace_back(vocab_size);
}

size_t Engine::bytes(const Limits& limits, int vocab_size) {
  return static_cast<size_t>(limits.max_threads) * SamplerScratch::bytes(vocab_size);
}

Engine::~Engine() = default;

int Engine::max_request_tokens() const {
  return impl_->scheduler.max_tokens();
}

int Engine::submit(Request request) {
  Impl& e = *impl_;
  auto size = static_cast<int>(request.prompt.size());
  if (size == 0) fail("the prompt is empty: a request needs at least one token");
  for (int id : request.prompt) {
    if (id < 0 || id >= e.vocab_size) fail("token %d of the prompt is not in [0, %d)", id, e.vocab_size);
  }
  if (request.n < 0 || request.samples < 1) {
    fail("n %d, samples %d: n must be at least 0, samples at least 1", request.n, request.samples);
  }
  if (request.n > max_request_tokens() - size) {
    fail(
        "a prompt of %d tokens and n %d do not fit: the cache takes %d tokens of one sequence; shorten the prompt, "
        "lower n or enlarge the context or the cache",
        size, request.n, max_request_tokens());
  }
  auto asked = std::make_shared<const Request>(std::move(request));
  std::vector<std::unique_ptr<Sample>> made;
  for (int i = 0; i < asked->samples; ++i) {
    auto s = std::make_unique<Sample>();
    s->asked = asked;
    s->request = s->result.request = e.n_requests;
    s->sample = s->result.sample = i;
    s->result.n_prompt = size;
    SamplerOptions options = asked->sampler;
    options.seed += static_cast<uint64_t>(i);
    s->sampler = Sampler(options);
    s->tokens = asked->prompt;
    s->next_logits = asked->logits_from < 0 ? size - 1 : std::min(asked->logits_from, size - 1);
    s->submitted = s->last_token = Clock::now();
    made.push_back(std::move(s));
  }
  const size_t before = e.samples.size();
  e.samples.insert(e.samples.end(), std::move_iterator(made.begin()), std::move_iterator(made.end()));
  try {
    for (size_t i = before; i < e.samples.size(); ++i) e.scheduler.add(e.samples[i].get());
  } catch (...) {
    for (size_t i = before; i < e.samples.size(); ++i) e.scheduler.remove(e.samples[i].get());
    e.samples.resize(before);
    throw;
  }
  return e.n_requests++;
}

void Engine::cancel(int request) {
  for (const auto& s : impl_->samples) s->cancelled |= s->request == request;
}

void Engine::cancel_all() {
  for (const auto& s : impl_->samples) s->cancelled = true;
}

int Engine::unfinished() const {
  return static_cast<int>(impl_->samples.size());
}

bool Engine::step() {
  Impl& e = *impl_;
  auto start = Clock::now();
  e.drop_ended();
  if (e.samples.empty()) return false;
  bool decode = false;
  std::vector<Draw> draws;
  std::vector<int> ids;
  try {
    const Batch& batch = e.scheduler.next();
    const float* logits = e.compute(batch);
    decode = e.count_step(batch);
    e.scheduler.advance();
    draws = e.collect(logits);
    ids = e.draw(draws);
  } catch (const std::exception& error) {
    if (e.scheduler.scheduled().empty()) throw;
    e.lose_step(reason(error));
    return true;
  }
  for (size_t i = 0; i < draws.size(); ++i) {
    if (draws[i].sample->result.error.empty()) e.accept(draws[i].sample, ids[i]);
  }
  const double seconds = seconds_since(start);
  (decode ? e.stats.decode_seconds : e.stats.prompt_seconds) += seconds;
  if (decode) e.stats.decode_step.add(seconds);
  (decode ? e.stats.decode_threads : e.stats.prompt_threads) += e.step_threads;
  return true;
}

Stats Engine::stats() const {
  Stats stats = impl_->stats;
  static_cast<CacheStats&>(stats) = impl_->scheduler.stats();
  return stats;
}
