// run.cpp: parse, load, plan the memory, run, report.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <thread>

#include "cli/estimate.h"
#include "cli/explain.h"
#include "cli/heatmap.h"
#include "cli/probe_attention.h"
#include "cli/session.h"
#include "host/error.h"
#include "host/loader.h"
#include "transformer.h"
#include "variants.h"

namespace {

using Runtime = Transformer<BUILD_ATTENTION, BUILD_KERNEL, BUILD_KV, BUILD_BLOCK>;

constexpr int LOGIT_FLOATS = 4 << 20;  // of a step where every token's logits are wanted

std::string read_template(const std::string& path) {
  constexpr std::streamsize MOST = 1 << 20;
  std::ifstream in(path, std::ios::binary);
  std::string text(MOST + 1, '\0');
  in.read(text.data(), MOST + 1);
  if (!in.eof())
    fail("--chat-template %s: cannot be read, or is no template: give a file of at most 1 MB", path.c_str());
  text.resize(static_cast<size_t>(in.gcount()));
  if (text.empty()) fail("--chat-template %s: the file is empty", path.c_str());
  require_utf8(text, "--chat-template " + path);
  return text;
}

Tokenizer load_tokenizer(const Model& model, const std::string& chat_template) {
  const std::string path = tokenizer_path(model.path);
  Tokenizer tokenizer = Tokenizer::load(path, model.tokenizer_sha256);
  if (tokenizer.vocab_size() > model.config.vocab_size)
    fail("%s has %d tokens, the model's vocabulary %d: export the model again", path.c_str(), tokenizer.vocab_size(),
         model.config.vocab_size);
  return chat_template.empty() ? tokenizer : tokenizer.with_template(chat_template, read_template(chat_template));
}

// Tokens that the layer with the longest sight sees; 0: all.
int longest_window(const Config& config) {
  const auto [shortest, longest] = std::minmax_element(config.window.begin(), config.window.end());
  return *shortest == 0 ? 0 : *longest;
}

// The memory that sequences of this context take. `available` bytes are free for the cache and the activations.
Setup setup_for(const Session& session, int context, size_t available) {
  const int ranks = static_cast<int>(session.ranks.size());
  const Part fullest{ranks - 1, ranks};
  const Options& o = session.options;
  const Config& config = session.model.config;
  Setup s{.cache = BUILD_BLOCK ? "paged" : "contiguous",
          .kernel = BUILD_KERNEL::name,
          .kv = BUILD_KV::name,
          .device = device_name(),
          .block_size = BUILD_BLOCK ? BUILD_BLOCK : context,
          .threads = o.threads,
          .seed = o.sampler.seed,
          .limits = {},
          .kv_bytes_per_token = Runtime::kv_bytes_per_token(session.model, fullest)};
  const int sequences = session.sequences;
  const bool all_logits = !o.logits.empty() || !o.perplexity.empty();
  Limits& l = s.limits;
  l.context = context;
  l.max_sequences = sequences;
  l.max_tokens = std::max(o.batch, sequences);
  l.max_logits = std::max(sequences, all_logits ? std::min(o.batch, LOGIT_FLOATS / config.vocab_size) : 1);
  l.max_threads = o.threads;
  l.mla_form = o.mla == "absorbed" ? MlaForm::absorbed : o.mla == "expanded" ? MlaForm::expanded : MlaForm::automatic;
  l.n_blocks = 1;
  const auto [block_bytes, activations] = Runtime::bytes(session.model, l, fullest);
  s.activation_bytes = activations + Engine::bytes(l, config.vocab_size);
  const size_t rest = available - std::min(available, s.activation_bytes);
  const size_t each = static_cast<size_t>((context + s.block_size - 1) / s.block_size);  // blocks of a sequence
  const size_t most =
      static_cast<size_t>(std::numeric_limits<int>::max() / s.block_size);  // slots are numbered by ints
  const size_t affordable = std::min((o.kv_memory ? o.kv_memory : rest) / block_bytes, most);
  l.n_blocks =
      static_cast<int>(o.kv_memory ? affordable : std::clamp(affordable, each, each * static_cast<size_t>(sequences)));
  s.kv_bytes = Runtime::bytes(session.model, l, fullest).kv;
  return s;
}

bool fits(const Setup& s, size_t available) {
  return static_cast<int64_t>(s.limits.n_blocks) * s.block_size >= s.limits.context &&
         s.kv_bytes + s.activation_bytes <= available;
}

// What is free on the rank that has the least beside its weights, and these.
std::pair<size_t, size_t> least_memory(const Session& session) {
  const auto rest = [](const RankMemory& r) {
    return static_cast<int64_t>(r.free_bytes) - static_cast<int64_t>(r.weight_bytes);
  };
  const auto least = std::min_element(session.ranks.begin(), session.ranks.end(),
                                      [&](const auto& a, const auto& b) { return rest(a) < rest(b); });
  return {least->free_bytes, least->weight_bytes};
}

// The context is -c, or what the mode wants; no more than the model and the free memory allow.
Setup plan(const Session& session) {
  const Options& o = session.options;
  const Config& config = session.model.config;
  const auto& [free_bytes, weights] = least_memory(session);
  if (weights > free_bytes)
    fail(
        "%s: its weights take %.1f MB, %.1f MB of memory are free: what fits has at most %.1f bits a parameter, such "
        "as a smaller --type of export.py (q8_0 has 8.5, q4_0 4.5), or is a smaller model",
        session.model.path.c_str(), static_cast<double>(weights) / 1e6, static_cast<double>(free_bytes) / 1e6,
        8 * static_cast<double>(free_bytes) / session.model.n_parameters);
  const size_t available = free_bytes - weights;
  const WantedContext wanted = wanted_context(session);
  if (o.context > config.seq_len) fail("-c %d: this model's longest context is %d tokens", o.context, config.seq_len);
  const int asked = o.model_context ? config.seq_len : o.context;  // 0: nothing
  int context = asked ? asked : std::min(wanted.most, config.seq_len);
  const char* why = o.context ? "-c" : "the model's longest";
  Setup setup = setup_for(session, context, available);
  if (!fits(setup, available)) {
    const int longest = largest(context, [&](int n) { return fits(setup_for(session, n, available), available); });
    if (asked || longest < wanted.least)
      fail(
          "a context of %d tokens needs %.1f MB for the KV cache and %.1f MB for activations; %s%.1f MB are free "
          "beside "
          "the weights: %s",
          context, static_cast<double>(setup.kv_bytes_per_token) * context / 1e6,
          static_cast<double>(setup.activation_bytes) / 1e6, o.kv_memory ? "--kv-memory is set, " : "",
          static_cast<double>(available) / 1e6,
          longest > 0 ? ("the largest context that fits is -c " + std::to_string(longest)).c_str() : "none fits");
    context = longest;
    setup = setup_for(session, context, available);
  }
  if (!o.perplexity.empty())
    check_perplexity(session, context);
  else if (wanted.least > context)
    fail("the prompt has %zu tokens and %d are to be generated: more than the context of %d tokens (%s)",
         session.prompt.size(), wanted.least - static_cast<int>(session.prompt.size()), context, why);
  setup.free_bytes = free_bytes;
  for (int r = 0, size = static_cast<int>(session.ranks.size()); r < size; r++) {
    const RankMemory& rank = session.ranks[static_cast<size_t>(r)];
    const auto [kv, activations] = Runtime::bytes(session.model, setup.limits, {r, size});
    setup.ranks.push_back({rank.host, rank.threads, rank.weight_bytes, kv, activations, rank.free_bytes});
  }
  return setup;
}

// Of a model of any variant: what its constructors would take.
size_t activation_bytes(const Model& model, const Limits& limits) {
  size_t bytes = Engine::bytes(limits, model.config.vocab_size);
  with_variant(model.config.attention, [&](auto v) {
    using Planned = Transformer<typename decltype(v)::type, BUILD_KERNEL, BUILD_KV, BUILD_BLOCK>;
    bytes += Planned::bytes(model, limits).activations;
  });
  return bytes;
}

// The machine as the last steps of decode had it, for the report's prediction: over the weights themselves.
std::optional<Machine> probed(const Session& session) {
  const Stats& stats = session.measured.stats;
  if (stats.decode_steps == 0) return {};
  const int threads = static_cast<int>((2 * stats.decode_threads / stats.decode_steps + 1) / 2);
  const int rows = static_cast<int>((2 * stats.decode_tokens / stats.decode_steps + 1) / 2);
  Machine machine = probe(session.threads, threads, session.model, rows);
  machine.logit = logit_seconds(session.options.sampler, session.model.config.vocab_size);
  probe_step(machine, session.threads, threads, matrices_of_decode(session.model), session.model.config,
             attention_speed<BUILD_KERNEL, BUILD_KV, BUILD_BLOCK>,
             static_cast<int>(stats.decode_context / stats.decode_tokens));
  return machine;
}

using Mode = void (*)(Session&);
Mode mode(const Options& o) {
  if (o.chat) return chat;
  if (o.bench) return bench;
  if (!o.prompts.empty()) return answer_requests;
  if (!o.perplexity.empty()) return perplexity;
  if (!o.logits.empty()) return write_logits;
  return continue_text;
}

void check_mla(const Options& o, const Config& c) {
  if (!o.mla.empty() && c.attention != "mla") fail("--mla %s: this model uses %s", o.mla.c_str(), c.attention.c_str());
  if (o.mla == "expanded" && !BUILD_KERNEL::takes_rows)
    fail("--mla expanded: the %s kernel has the absorbed form alone: make KERNEL=flash", BUILD_KERNEL::name);
}

void estimate_speed(const Options& o) {
  check_outputs(o);
  ModelFile shapes(o.model);
  estimate(o, shapes.model, BUILD_KV::name, activation_bytes, attention_speed<BUILD_KERNEL, BUILD_KV, BUILD_BLOCK>);
}

void report(Session& session, OutputFile* stats) {
  const Options& o = session.options;
  session.measured.stats = session.engine->stats();
  if (!o.quiet || stats) session.measured.machine = probed(session);
  if (!o.quiet) print_measured(session.model, session.setup, session.measured);
  if (!stats) return;
  const std::string json = stats_json(session.model, session.setup, session.measured);
  stats->write(json.data(), json.size());
  stats->commit();
}

// A rank that is not the first.
void run_part(const Options& o, Ranks& ranks) {
  Threads threads(o.threads);
  ModelFile file(o.model, ranks.part());
  file.require_weights();
  Runtime::check(file.model);
  compare_models(ranks, o, file.model);
  const Limits limits = receive_plan(ranks, o.threads);
  file.pack(threads);
  Runtime runtime(file.model, limits, &ranks);
  follow(
      ranks, [&](const Batch& batch) { runtime.forward(batch, threads, threads.most()); },
      [&] { return runtime.cache().overflowed(); });
}

int run(const Options& o, Ranks& ranks) {
  check_outputs(o);
  Threads threads(o.threads);
  std::optional<OutputFile> stats, output;
  if (!o.stats.empty()) stats.emplace(o.stats);
  if (const std::string& path = o.logits.empty() ? o.heatmap : o.logits; !path.empty()) output.emplace(path);
  std::optional<Editor> editor;
  if (o.chat && isatty(STDIN_FILENO)) editor.emplace();
  blame_for_lost_pages(o.model);
  ModelFile file(o.model, ranks.part());
  file.require_weights();
  const Model& model = file.model;
  Runtime::check(model);
  check_mla(o, model.config);
  const Tokenizer tokenizer = load_tokenizer(model, o.chat_template);
  Session session{.options = o, .model = model, .tokenizer = tokenizer, .threads = threads};
  if (editor) session.editor = &*editor;
  if (output) session.output = &*output;
  read_input(session);
  check_layer(session);
  if (!o.heatmap.empty()) check_heatmap(session);
  session.ranks = compare_models(ranks, o, model);
  session.setup = plan(session);
  if (!o.quiet) print_setup(model, session.setup);

  if (o.explain) return explain(session), 0;
  send_plan(ranks, session.setup.limits);
  file.pack(threads);
  blame_for_lost_pages("");
  if (!o.heatmap.empty()) {
    draw(session, watch<BUILD_ATTENTION, BUILD_KERNEL, BUILD_KV, BUILD_BLOCK>(session));
    return 0;
  }
  Runtime runtime(model, session.setup.limits, &ranks);
  const auto forward = [&](const Batch& batch, int n) {
    send_batch(ranks, batch);
    return runtime.forward(batch, threads, n);
  };
  Engine engine(forward, threads, session.setup.limits, session.setup.block_size, model.config.vocab_size,
                longest_window(model.config), block_hash, o.choose_threads && device_takes_team());
  session.engine = &engine;
  session.kv_overflowed = [&] { return any_overflowed(ranks, runtime.cache().overflowed()); };
  catch_interrupt();
  ranks.forget_traffic();
  mode(o)(session);
  session.measured.traffic = ranks.traffic();
  report(session, stats ? &*stats : nullptr);
  send_end(ranks);
  return interrupted() ? 130 : session.failed;  // 128 + SIGINT
}

// The exit code; throws what ends the run before its time.
int run_rank(int argc, char** argv, Ranks& ranks) {
  prepare_process();
  const auto [rank, size] = ranks.part();
  ranks.hurries = killed;
  if (rank > 0 && !std::freopen("/dev/null", "w", stdout)) fail("cannot open /dev/null");  // rank 0 speaks for all
  Options options = parse(argc, argv);
  if (options.gpu == "list") return list_machines(), 0;
  if (options.model.empty()) return 0;
  if (options.estimate && rank == 0) estimate_speed(options);
  if (options.estimate) return 0;
  if (size == 1) return run(options, ranks);
  if (options.explain || !options.heatmap.empty())
    throw Usage("--explain and --heatmap look at a whole model: run it in one process");
  prepare_rank(rank);
  introduce(ranks, options);
  if (rank == 0) return run(options, ranks);
  return run_part(options, ranks), 0;
}

// What ended this rank ends all of them. Where it is not the first, which may be about to say the same of itself, that
// one goes first.
[[noreturn]] void end_all(Ranks& ranks, const char* why, int exit_code) {
  const int rank = ranks.part().rank;
  if (rank > 0) std::this_thread::sleep_for(std::chrono::seconds(3));
  if (rank > 0)
    std::fprintf(stderr, "run: rank %d: %s\n", rank, why);
  else if (*why)
    std::fprintf(stderr, "run: %s\n", why);
  ranks.end_all(exit_code);
}

}  // namespace

int main(int argc, char** argv) {
  Ranks ranks;
  try {
    return run_rank(argc, argv, ranks);
  } catch (const Usage& e) {
    end_all(ranks, e.what(), 2);
  } catch (const ClosedPipe&) {
    end_all(ranks, "", 141);  // 128 + SIGPIPE
  } catch (const std::exception& e) {
    end_all(ranks, reason(e), 1);
  }
}
