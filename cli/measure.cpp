// measure.cpp: perplexity, logits, speed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>

#include "cli/probe.h"
#include "cli/session.h"
#include "host/json.h"
#include "kernels/simd.h"
#include "kernels/threads.h"

namespace {

constexpr int BENCH_PROMPT = 512, BENCH_REPEATS = 5;

// -log of the probability that softmax(logits) gives to `id`.
double negative_log_probability(const float* logits, int n, int id) {
  const float largest = *std::max_element(logits, logits + n);
  double sum = 0;
  int i = 0;
  for (; i + simd::LANES <= n; i += simd::LANES)
    sum += static_cast<double>(simd::sum(simd::exp(simd::load(logits + i) - largest)));
  for (; i < n; i++) sum += std::exp(static_cast<double>(logits[i] - largest));
  return std::log(sum) - static_cast<double>(logits[id] - largest);
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
  r.on_logits = [&s](int, int, const float* logits) { require_finite(s, logits); };
  r.on_finish = [](const Result& result) {
    if (result.finish == Finish::error) fail("%s", result.error.c_str());
  };
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
  const StepShape step{.context = run.decode_context / run.decode_steps};
  const double bytes = work_of(s.model, step, static_cast<double>(s.setup.kv_bytes_per_token)).bytes();
  const double speed = percentile(speeds, 0.5);
  return Json::Object{{"test", "tg" + std::to_string(BENCH_DECODE)},
                      {"context", context},
                      {"tokens_per_second", speed},
                      {"bytes_per_token", bytes},
                      {"gb_per_second", bytes * speed / 1e9},
                      {"bandwidth_percent", 100 * bytes * speed / bandwidth}};
}

}  // namespace

void check_perplexity(const Session& s, int context) {
  if (context < 3) fail("-c %d: a chunk needs at least 3 tokens, or none of it is scored", context);
  if (static_cast<int>(s.prompt.size()) < 2 * context)
    fail("%s has %zu tokens: at least %d are needed with a context of %d (-c)", shown(s.options.perplexity).c_str(),
         s.prompt.size(), 2 * context, context);
}

// As llama-perplexity scores: chunks of the context's size, the first token of each replaced by BOS where the model
// begins its texts with it, the second half of a chunk scored, so that each token has at least half a context before
// it.
void perplexity(Session& s) {
  const int context = s.setup.limits.context, first = context / 2;
  const std::vector<int> begin = s.tokenizer.encode("", false, true);
  int chunks = static_cast<int>(s.prompt.size()) / context;
  if (s.options.chunks > 0) chunks = std::min(chunks, s.options.chunks);
  double sum = 0, squares = 0;
  int count = 0;
  for (int chunk = 0; chunk < chunks; chunk++) {
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
    if (interrupted()) return print("\n");
    char text[64];
    std::snprintf(text, sizeof text, "[%d]%.4f,", chunk + 1, std::exp(sum / count));
    print(text);
  }
  const double mean = sum / count, variance = squares / count - mean * mean;
  s.measured.perplexity = std::exp(mean);
  char text[128];
  std::snprintf(text, sizeof text, "\nperplexity %.4f +/- %.5f, %d chunks of %d tokens\n", std::exp(mean),
                std::exp(mean) * std::sqrt(std::max(0.0, variance) / std::max(1, count - 1)), chunks, context);
  print(text);
}

// float32 [tokens, vocab_size], row by row as they are computed.
void write_logits(Session& s) {
  OutputFile& file = *s.output;
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

double logit_seconds(const SamplerOptions& options, int vocab_size) {
  constexpr int REPEATS = 25;
  std::vector<float> logits(static_cast<size_t>(vocab_size));
  std::mt19937 generator(1);
  std::normal_distribution<float> likely(0, 3);
  for (float& x : logits) x = likely(generator);
  SamplerScratch scratch(vocab_size);
  Sampler sampler(options);
  LogitsHash hash;
  std::vector<double> runs;
  for (int i = 0; i < REPEATS; i++) {
    const auto began = std::chrono::steady_clock::now();
    if (!finite(logits.data(), vocab_size)) return 0;
    hash.add(logits.data(), vocab_size);
    sampler.sample(logits.data(), vocab_size, nullptr, 0, scratch);
    runs.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return percentile(runs, 0.5) / vocab_size;
}

void bench(Session& s) {
  const int longest = s.engine->max_request_tokens();
  const double bandwidth = [&] {
    const Buffer<std::byte> memory = memory_to_read(s.threads);
    return read_bandwidth(s.threads, s.threads.most(), {memory.data(), memory.size()});
  }();
  Json::Array tests;
  std::vector<double> speeds;
  const int n_prompt = std::min(BENCH_PROMPT, longest - 1);
  for (unsigned i = 0; i <= BENCH_REPEATS && !interrupted(); i++) {  // the first one warms up
    const Run run = run_random(s, n_prompt, 1, 100 + i);
    if (i > 0) speeds.push_back(run.prompt_tokens / run.prompt_seconds);
  }
  tests.push_back(Json::Object{
      {"test", "pp" + std::to_string(n_prompt)}, {"context", 0}, {"tokens_per_second", percentile(speeds, 0.5)}});
  for (const int context : BENCH_CONTEXTS)
    if (context + BENCH_DECODE <= longest && !interrupted()) tests.push_back(bench_decode(s, context, bandwidth));
  const Json::Object report = {{"model", s.model.path},
                               {"cache", s.setup.cache},
                               {"kernel", s.setup.kernel},
                               {"kv", s.setup.kv},
                               {"kernels", kernel_level()},
                               {"threads", s.setup.threads},
                               {"read_gb_per_second", bandwidth / 1e9},
                               {"repeats", BENCH_REPEATS},
                               {"tests", tests}};
  print(Json(report).text(true) + "\n");
}
