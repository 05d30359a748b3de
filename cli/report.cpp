// report.cpp: what a run tells of itself.
#include "cli/report.h"

#include <algorithm>
#include <bit>
#include <cinttypes>
#include <cstdio>
#include <string_view>

#include "host/json.h"

void LogitsHash::add(const float* row, int n) {
  int i = 0;
  for (; i + STREAMS <= n; i += STREAMS)
    for (int j = 0; j < STREAMS; j++) streams_[j] = (streams_[j] ^ std::bit_cast<uint32_t>(row[i + j])) * PRIME;
  for (int j = 0; i + j < n; j++) streams_[j] = (streams_[j] ^ std::bit_cast<uint32_t>(row[i + j])) * PRIME;
}

uint64_t LogitsHash::value() const {
  uint64_t hash = OFFSET;
  for (const uint64_t stream : streams_) hash = (hash ^ stream) * PRIME;
  return hash;
}

void HashOfAll::add(uint64_t hash) {
  if (n_++ == 0) first_ = hash;
  folded_ = (folded_ ^ hash) * 0x100000001b3u;
}

void Measured::use_logits(size_t sequence, const float* logits, int n) {
  open[sequence].add(logits, n);
  logit_rows++;
}

uint64_t Measured::hash_of(size_t sequence) const {
  const auto found = open.find(sequence);
  return found == open.end() ? LogitsHash().value() : found->second.value();
}

void Measured::close(size_t sequence) {
  if (!open.count(sequence)) return;
  closed.add(hash_of(sequence));
  open.erase(sequence);
}

uint64_t logits_hash(const Measured& measured) {
  HashOfAll all = measured.closed;
  for (const auto& [sequence, hash] : measured.open) all.add(hash.value());
  return all.value();
}

Work decode_work(const Model& model, const Setup& setup, const Measured& measured) {
  const Stats& s = measured.stats;
  const double steps = static_cast<double>(s.decode_steps), tokens = static_cast<double>(s.decode_tokens);
  if (steps == 0) return {};
  const StepShape mean{
      .sequences = tokens / steps, .context = static_cast<double>(s.decode_context) / tokens, .logits = tokens / steps};
  return work_of(model, mean, static_cast<double>(setup.kv_bytes_per_token));
}

namespace {

double mb(size_t bytes) {
  return static_cast<double>(bytes) / 1e6;
}

double ratio(double a, double b) {
  return b > 0 ? a / b : 0;
}

// Of one sequence: tokens.
double decode_steps_per_second(const Stats& s) {
  return ratio(static_cast<double>(s.decode_steps), s.decode_seconds);
}

double decode_bytes_per_second(const Model& model, const Setup& setup, const Measured& m) {
  return decode_work(model, setup, m).bytes() * decode_steps_per_second(m.stats);
}

// Of a machine that other programs use too, the mean step tells more of them than of this one.
double median_steps_per_second(const Stats& s) {
  return ratio(1, s.decode_step.percentile(0.5));
}

// Beside what was measured, where the machine was probed.
void print_predicted(const Model& model, const Setup& setup, const Measured& m, const char* step) {
  if (!m.machine || m.stats.decode_steps == 0) return;
  const StepTime t = time_of(decode_work(model, setup, m), *m.machine);
  std::fprintf(stderr,
               "predict  %.1f %s/s, bound by %s: weights %.3f ms, KV %.3f, compute %.3f, launches %.3f, logits %.3f; "
               "the median step: %.0f %% of it; probed now: %.2f GB/s of these weights\n",
               1 / t.total(), step, t.bound(), t.weights * 1e3, t.kv * 1e3, (t.products + t.attention) * 1e3,
               t.launches * 1e3, t.logits * 1e3, 100 * median_steps_per_second(m.stats) * t.total(),
               m.machine->bandwidth / 1e9);
}

double total_tokens_per_second(const Stats& s) {
  return ratio(static_cast<double>(s.generated_tokens), s.prompt_seconds + s.decode_seconds);
}

// Of the two kinds of steps, on average.
double prompt_threads(const Stats& s) {
  return ratio(static_cast<double>(s.prompt_threads), static_cast<double>(s.steps - s.decode_steps));
}
double decode_threads(const Stats& s) {
  return ratio(static_cast<double>(s.decode_threads), static_cast<double>(s.decode_steps));
}

}  // namespace

void print_setup(const Model& model, const Setup& s) {
  const Limits& l = s.limits;
  std::fprintf(stderr, "model    %s: %s, %.1fM parameters: %s\n", model.path.c_str(), model.config.attention.c_str(),
               model.n_parameters / 1e6, model.types.c_str());
  std::fprintf(stderr, "run      %s cache, %s kernel, KV %s, %s (%s), %d threads, seed %" PRIu64 "\n", s.cache,
               s.kernel, s.kv, s.device, kernel_level(), s.threads, s.seed);
  std::fprintf(stderr, "KV       %zu bytes a token; %d x %d tokens: %.1f MB\n", s.kv_bytes_per_token, l.n_blocks,
               s.block_size, mb(s.kv_bytes));
  for (size_t r = 0; r < s.ranks.size() && s.ranks.size() > 1; r++) {
    const RankSetup& rank = s.ranks[r];
    std::fprintf(stderr,
                 "rank %-3zu %s, %" PRId64
                 " threads: %.1f MB needed: weights %.1f, KV %.1f, activations %.1f; free %.1f\n",
                 r, rank.host.c_str(), rank.threads, mb(rank.weight_bytes + rank.kv_bytes + rank.activation_bytes),
                 mb(rank.weight_bytes), mb(rank.kv_bytes), mb(rank.activation_bytes), mb(rank.free_bytes));
  }
  if (s.ranks.size() > 1) return;
  std::fprintf(stderr, "memory   %.1f MB needed: weights %.1f, KV %.1f, activations %.1f; free %.1f\n",
               mb(model.weight_bytes + s.kv_bytes + s.activation_bytes), mb(model.weight_bytes), mb(s.kv_bytes),
               mb(s.activation_bytes), mb(s.free_bytes));
}

void print_measured(const Model& model, const Setup& setup, const Measured& m) {
  const Stats& s = m.stats;
  std::fprintf(stderr, "prompt   %" PRId64 " tokens in %.3f s: %.1f tokens/s; %" PRId64 " more found in the cache\n",
               s.prompt_tokens, s.prompt_seconds, ratio(static_cast<double>(s.prompt_tokens), s.prompt_seconds),
               s.cached_tokens);
  const char* step = setup.limits.max_sequences == 1 ? "tokens" : "steps";
  std::fprintf(stderr, "decode   %" PRId64 " %s in %.3f s: %.1f %s/s, %.2f GB/s; first token %.0f ms after the start\n",
               s.decode_steps, step, s.decode_seconds, decode_steps_per_second(s), step,
               decode_bytes_per_second(model, setup, m) / 1e9, m.first_token * 1e3);
  print_predicted(model, setup, m, step);
  if (setup.ranks.size() > 1)
    std::fprintf(stderr,
                 "gather   %.2f MB came to rank 0, in %" PRId64 " gathers: %.3f s, %.1f %% of the steps' time\n",
                 static_cast<double>(m.traffic.bytes) / 1e6, m.traffic.gathers, m.traffic.seconds,
                 100 * ratio(m.traffic.seconds, s.prompt_seconds + s.decode_seconds));
  std::fprintf(stderr, "threads  %.2f for prompts, %.2f for decode: the mean of the steps, of %d\n", prompt_threads(s),
               decode_threads(s), setup.threads);
  std::fprintf(stderr, "logits   hash %016" PRIx64 " of %" PRId64 " rows\n", logits_hash(m), m.logit_rows);
  if (setup.limits.max_sequences == 1) return;
  std::fprintf(stderr,
               "requests %" PRId64 " tokens, %.1f a second in all; at most %d at once, %" PRId64
               " preempted; first token %.0f ms "
               "(p99 %.0f), between tokens %.1f ms (p99 %.1f)\n",
               s.generated_tokens, total_tokens_per_second(s), s.peak_sequences, s.preemptions,
               s.first_token.percentile(0.5) * 1e3, s.first_token.percentile(0.99) * 1e3,
               s.between_tokens.percentile(0.5) * 1e3, s.between_tokens.percentile(0.99) * 1e3);
  std::fprintf(stderr,
               "blocks   %d used at most, of %d; %d shared at most, %" PRId64 " copied, %" PRId64
               " evicted, waste %.1f %%\n",
               s.peak_used, s.blocks, s.peak_shared, s.copies, s.evicted, s.waste * 100);
}

namespace {

Json::Object setup_json(const Model& model, const Setup& setup) {
  return {{"model", model.path},
          {"attention", model.config.attention},
          {"cache", setup.cache},
          {"kernel", setup.kernel},
          {"kv", setup.kv},
          {"device", setup.device},
          {"kernels", kernel_level()},
          {"threads", setup.threads},
          {"seed", setup.seed},
          {"parameters", model.n_parameters},
          {"weights", model.types},
          {"weight_bytes", model.weight_bytes},
          {"weight_bytes_per_token", work_of(model, {}, 0).weight_bytes},
          {"context", setup.limits.context},
          {"kv_bytes_per_token", setup.kv_bytes_per_token},
          {"kv_bytes", setup.kv_bytes},
          {"activation_bytes", setup.activation_bytes},
          {"free_bytes", setup.free_bytes}};
}

Json::Array ranks_json(const Setup& setup) {
  Json::Array ranks;
  for (const RankSetup& r : setup.ranks)
    ranks.push_back(Json::Object{{"host", r.host},
                                 {"threads", r.threads},
                                 {"weight_bytes", r.weight_bytes},
                                 {"kv_bytes", r.kv_bytes},
                                 {"activation_bytes", r.activation_bytes},
                                 {"free_bytes", r.free_bytes}});
  return ranks;
}

}  // namespace

std::string stats_json(const Model& model, const Setup& setup, const Measured& m) {
  const Stats& s = m.stats;
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016" PRIx64, logits_hash(m));
  Json::Object j = setup_json(model, setup);
  const Json::Object run = {{"prompt_threads", prompt_threads(s)},
                            {"decode_threads", decode_threads(s)},
                            {"prompt_tokens", s.prompt_tokens},
                            {"prompt_seconds", s.prompt_seconds},
                            {"prompt_tokens_per_second", ratio(static_cast<double>(s.prompt_tokens), s.prompt_seconds)},
                            {"cached_tokens", s.cached_tokens},
                            {"generated_tokens", s.generated_tokens},
                            {"steps", s.steps},
                            {"decode_steps", s.decode_steps},
                            {"decode_seconds", s.decode_seconds},
                            {"decode_steps_per_second", decode_steps_per_second(s)},
                            {"median_decode_steps_per_second", median_steps_per_second(s)},
                            {"decode_bytes_per_second", decode_bytes_per_second(model, setup, m)},
                            {"total_tokens_per_second", total_tokens_per_second(s)},
                            {"first_token_after_start", m.first_token},
                            {"logits_hash", hash},
                            {"logits_rows", m.logit_rows},
                            {"peak_sequences", s.peak_sequences},
                            {"preemptions", s.preemptions},
                            {"blocks", s.blocks},
                            {"block_size", setup.block_size},
                            {"peak_blocks", s.peak_used},
                            {"peak_shared_blocks", s.peak_shared},
                            {"copied_blocks", s.copies},
                            {"evicted_blocks", s.evicted},
                            {"waste", s.waste},
                            {"first_token_p50", s.first_token.percentile(0.5)},
                            {"first_token_p99", s.first_token.percentile(0.99)},
                            {"between_tokens_p50", s.between_tokens.percentile(0.5)},
                            {"between_tokens_p99", s.between_tokens.percentile(0.99)}};
  j.insert(j.end(), run.begin(), run.end());
  if (m.machine && s.decode_steps > 0) {
    j.emplace_back("probed_bytes_per_second", m.machine->bandwidth);
    j.emplace_back("predicted_decode_steps_per_second", 1 / time_of(decode_work(model, setup, m), *m.machine).total());
  }
  if (setup.ranks.size() > 1) {
    j.emplace_back("ranks", ranks_json(setup));
    j.emplace_back("gathers", m.traffic.gathers);
    j.emplace_back("gathered_bytes", m.traffic.bytes);
    j.emplace_back("gather_seconds", m.traffic.seconds);
  }
  if (m.perplexity) j.emplace_back("perplexity", *m.perplexity);
  return Json(j).text(true) + "\n";
}
