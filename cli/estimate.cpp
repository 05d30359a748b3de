// estimate.cpp: the speed calculation of a model and of its four variants, as a table and as JSON.
#include "cli/estimate.h"

#include <algorithm>
#include <cstdio>
#include <optional>

#include "cli/output.h"
#include "host/error.h"
#include "host/link.h"

namespace {

constexpr int BLOCK = 16, MOST_SEQUENCES = 65536;
constexpr double SMALL_MODEL = 1e9;  // parameters

// A variant's column of the table.
struct Column {
  Model model;
  double kv_bytes_per_token = 0, weights = 0, parameters = 0, prompt_seconds = 0;
  Work decode;
  StepTime time;
  int ridge = 0, largest_batch = 0, longest_context = 0;
  Machine machine;
};

class Estimate {
 public:
  Estimate(const Options& o, Model& model, const char* kv, const Activations& activations,
           const AttentionSpeed& attention_speed)
      : o_(o), activations_(activations), attention_speed_(attention_speed), kv_(o.kv_type.empty() ? kv : o.kv_type) {
    if (o.context > model.config.seq_len)
      fail("-c %d: this model's longest context is %d tokens", o.context, model.config.seq_len);
    context_ = o.model_context ? model.config.seq_len
               : o.context     ? o.context
                               : std::min(DEFAULT_CONTEXT, model.config.seq_len);
    if (!o.weight_type.empty()) {
      const auto type = find_weight_type(o.weight_type);
      if (!type) throw Usage("--type " + o.weight_type + ": must be one of " + weight_type_names());
      set_weight_type(model, *type);
    }
    machine_ = machine(model);
    for (const char* attention : {"mha", "gqa", "mqa", "mla"})
      columns_.push_back(column(with_attention(model, attention)));
    own_ = static_cast<size_t>(
        std::find_if(columns_.begin(), columns_.end(),
                     [&](const Column& c) { return c.model.config.attention == model.config.attention; }) -
        columns_.begin());
    source_ = model.path;
  }

  std::string table() const { return head() + rows() + notes() + ranks(); }
  Json json() const;

 private:
  std::string head() const;
  std::string rows() const;  // a column for each variant
  std::string notes() const;
  std::string ranks() const;  // the model's own column, cut
  std::vector<RanksTime> ranks_times() const;
  Link link() const { return {o_.link_bandwidth * 1e9, o_.link_latency * 1e-6}; }
  StepShape decode_step() const {
    return {.sequences = double(o_.parallel), .tokens = 1, .context = double(context_), .logits = double(o_.parallel)};
  }

  Machine machine(const Model& model) {
    if (!o_.gpu.empty()) try {
        return machine_of(find_datasheet(o_.gpu));
      } catch (const Error& e) {
        throw Usage(e.what());
      }
    if (o_.bandwidth > 0)
      return machine_of(
          {"as said", o_.memory, o_.bandwidth, o_.flops, o_.flops, o_.flops, "--bandwidth, --flops, --memory"});
    threads_.emplace(o_.threads);
    // As much as the model has: what a cache holds of its weights, it holds of these.
    const size_t bytes = static_cast<size_t>(std::min<double>(NOT_CACHED, weight_bytes(model)));
    memory_ = memory_to_read(*threads_, bytes);
    matrices_ = placed(matrices_of_decode(model), {memory_.data(), memory_.size()});
    Machine best = probed(model, team_ = o_.threads);
    if (!o_.choose_threads || !device_takes_team()) return best;
    const Work work = work_of(model, decode_step(), kv_bytes_per_token(model.config, kv_));
    // A run takes the number of threads that is fastest now.
    for (int size = o_.threads / 2; size > 0; size /= 2) {
      const Machine m = probed(model, size);
      if (time_of(work, m).total() < time_of(work, best).total()) best = m, team_ = size;
    }
    return best;
  }

  Machine probed(const Model& model, int size) {
    Machine m = probe(*threads_, size, model, o_.parallel);
    probe_step(m, *threads_, size, matrices_, model.config, attention_speed_, context_);
    m.source += format(", %d thread%s", size, size == 1 ? "" : "s");
    m.memory += static_cast<double>(memory_.size());
    m.logit = logit_seconds(o_.sampler, model.config.vocab_size);
    return m;
  }

  Column column(Model model) {
    Machine m = machine_;
    if (threads_) probe_step(m, *threads_, team_, matrices_, model.config, attention_speed_, context_);
    m.bandwidth = machine_.bandwidth;  // one for all, so that they differ by their bytes alone
    Column c;
    c.kv_bytes_per_token = kv_bytes_per_token(model.config, kv_);
    c.weights = weight_bytes(model);
    c.parameters = parameters(model);
    c.decode = work_of(model, decode_step(), c.kv_bytes_per_token);
    c.time = time_of(c.decode, m);
    c.prompt_seconds = prompt_seconds(model, context_, o_.batch, c.kv_bytes_per_token, m);
    c.ridge = ridge_batch(model, machine_);
    const auto fits = [&](int n, int context) { return bytes(c, model, n, context) <= machine_.memory; };
    c.largest_batch = largest(MOST_SEQUENCES, [&](int n) { return fits(n, context_); });
    c.longest_context = largest(model.config.seq_len, [&](int n) { return fits(o_.parallel, n); });
    c.model = std::move(model);
    c.machine = m;
    return c;
  }

  // Of n sequences of this context.
  double bytes(const Column& c, const Model& model, int n, int context) const {
    Limits l;
    l.context = context;
    l.max_sequences = l.max_logits = n;
    l.max_tokens = std::max(o_.batch, n);
    l.max_threads = o_.threads;
    l.n_blocks = 1;
    const double slots = double((context + BLOCK - 1) / BLOCK) * BLOCK * n;
    return c.weights + slots * c.kv_bytes_per_token + static_cast<double>(activations_(model, l));
  }

  bool fits(const Column& c) const { return bytes(c, c.model, o_.parallel, context_) <= machine_.memory; }
  double products_speed() const;

  const Options& o_;
  const Activations& activations_;
  const AttentionSpeed& attention_speed_;
  std::optional<Threads> threads_;  // where this machine is probed
  int team_ = 1;                    // of them
  Buffer<std::byte> memory_;        // in which
  std::vector<Matrix> matrices_;    // lie
  std::string kv_, source_;
  int context_ = 0;
  Machine machine_;
  std::vector<Column> columns_;
  size_t own_ = 0;
};

std::string width_of(const Config& c) {
  if (c.attention == "mla") return format("%d + %d", c.kv_lora_rank, c.qk_rope_head_dim);
  return format("%d x %d", c.n_kv_heads, c.head_dim);
}

std::string count(int n, int most) {
  return n == 0 ? "none" : n == most ? format(">= %d", n) : std::to_string(n);
}

// FLOP/s of the products that the model's own decode step has most of.
double Estimate::products_speed() const {
  const std::vector<double>& flop = columns_[own_].decode.products;
  return machine_.products[static_cast<size_t>(std::max_element(flop.begin(), flop.end()) - flop.begin())];
}

std::string Estimate::head() const {
  const Column& own = columns_[own_];
  const double speed = products_speed();
  std::string out = format("model    %s: %s, %.2f x 10^9 parameters, %.2f GB of weights\n", source_.c_str(),
                           own.model.config.attention.c_str(), own.parameters / 1e9, own.weights / 1e9);
  out += format("machine  %s: %.1f GB, %.1f GB/s, %.2f TFLOP/s; ridge point %.0f FLOP/byte (%s)\n",
                machine_.name.c_str(), machine_.memory / 1e9, machine_.bandwidth / 1e9, speed / 1e12,
                speed / machine_.bandwidth, machine_.source.c_str());
  out += format(
      "plan     %d sequence%s of %d tokens, weights %s, KV %s, %d tokens of a prompt a step; GB are 10^9 bytes\n\n",
      o_.parallel, o_.parallel == 1 ? "" : "s", context_, o_.weight_type.empty() ? "as stored" : o_.weight_type.c_str(),
      kv_.c_str(), o_.batch);
  return out;
}

std::string Estimate::rows() const {
  std::string out;
  const auto row = [&](const std::string& label, const auto& value) {
    out += format("%-34s", label.c_str());
    for (const Column& c : columns_) out += format("%14s", std::string(value(c)).c_str());
    out += '\n';
  };
  const auto ms = [](double seconds) { return format("%.3f", seconds * 1e3); };
  const double sequences = o_.parallel;
  row("", [&](const Column& c) { return c.model.config.attention + (&c == &columns_[own_] ? " *" : ""); });
  row("KV heads x width, or latent + rope", [&](const Column& c) { return width_of(c.model.config); });
  row("weights, GB", [](const Column& c) { return format("%.3f", c.weights / 1e9); });
  row("weights read a step, GB", [](const Column& c) { return format("%.3f", c.decode.weight_bytes / 1e9); });
  row("KV a token, bytes", [](const Column& c) { return format("%.0f", c.kv_bytes_per_token); });
  row("KV read a step, GB", [](const Column& c) { return format("%.3f", c.decode.kv_bytes / 1e9); });
  row("time of a step, ms", [&](const Column& c) { return ms(c.time.total()); });
  row("  reading weights", [&](const Column& c) { return ms(c.time.weights); });
  row("  reading KV", [&](const Column& c) { return ms(c.time.kv); });
  row("  multiplying (meanwhile)", [&](const Column& c) { return ms(c.time.products + c.time.attention); });
  row("  launches", [&](const Column& c) { return ms(c.time.launches); });
  if (threads_) row("  drawing from the logits", [&](const Column& c) { return ms(c.time.logits); });
  row("bound by", [](const Column& c) { return c.time.bound(); });
  row("tokens/s of a sequence", [](const Column& c) { return format("%.1f", 1 / c.time.total()); });
  if (o_.parallel > 1)
    row("tokens/s in all", [&](const Column& c) { return format("%.1f", sequences / c.time.total()); });
  row("arithmetic intensity, FLOP/byte",
      [](const Column& c) { return format("%.1f", c.decode.flop() / c.decode.bytes()); });
  row("products compute-bound from batch", [](const Column& c) { return c.ridge ? std::to_string(c.ridge) : "never"; });
  row(format("prompt of %d tokens, s", context_), [](const Column& c) { return format("%.3f", c.prompt_seconds); });
  row(format("largest batch at %d tokens", context_),
      [](const Column& c) { return count(c.largest_batch, MOST_SEQUENCES); });
  row(format("longest context of %d", o_.parallel),
      [](const Column& c) { return count(c.longest_context, c.model.config.seq_len); });
  return out;
}

std::string Estimate::notes() const {
  const Column& own = columns_[own_];
  std::string out = "\n* the model itself; the others have as many heads as wide, MLA in DeepSeek V2's proportions\n";
  if (!fits(own))
    out += format(
        "does not fit: %.1f GB are needed, %.1f there; the times are those of a machine of this speed that held it\n",
        bytes(own, own.model, o_.parallel, context_) / 1e9, machine_.memory / 1e9);
  if (own.parameters < SMALL_MODEL && !threads_)
    out += "below 10^9 parameters launches and caches rule, and a roofline promises too much: expect less\n";
  if (!o_.gpu.empty())
    out +=
        "datasheet figures: well-made runtimes read at 71 to 92 % of them; --bandwidth plans with what is attained\n";
  return out;
}

std::vector<RanksTime> Estimate::ranks_times() const {
  const Model& model = columns_[own_].model;
  std::vector<RanksTime> times;
  for (int n = 1; n <= std::min(o_.ranks, model.config.n_heads); n++)
    times.push_back(ranks_time(model, decode_step(), kv_, n, columns_[own_].machine, link()));
  return times;
}

std::string Estimate::ranks() const {
  if (o_.ranks == 1) return "";
  std::string out = format("\ncut over ranks, %g GB/s and %g us between each two; gathered in a step, once over %d:\n",
                           o_.link_bandwidth, o_.link_latency, o_.ranks);
  for (const Gathered& g : gathered_in(columns_[own_].model, decode_step()))
    out += format("  %-14s%6d x %10.0f bytes%10.1f us each\n", g.what, g.times, 4 * g.floats,
                  1e6 * gather_seconds(g, o_.ranks, link()));
  out += format("%-7s%18s%18s%14s%18s%14s\n", "ranks", "weights, GB", "KV a token", "step, ms", "of it gathering",
                "tokens/s");
  const std::vector<RanksTime> times = ranks_times();
  const RanksTime* best = &times[0];
  for (const RanksTime& t : times) {
    out += format("%-7d%18.3f%18.0f%14.3f%18.3f%14.1f\n", t.ranks, t.weight_bytes / 1e9, t.kv_bytes_per_token,
                  t.step * 1e3, t.gathering * 1e3, 1 / t.step);
    if (t.step < best->step) best = &t;
  }
  return out + (best->ranks == 1 ? std::string("a second rank does not pay\n")
                                 : format("%d ranks are the fastest of these\n", best->ranks));
}

Json Estimate::json() const {
  Json::Array variants;
  for (const Column& c : columns_)
    variants.push_back(Json::Object{{"attention", c.model.config.attention},
                                    {"own", &c == &columns_[own_]},
                                    {"parameters", c.parameters},
                                    {"weight_bytes", c.weights},
                                    {"weight_bytes_per_step", c.decode.weight_bytes},
                                    {"kv_bytes_per_token", c.kv_bytes_per_token},
                                    {"kv_bytes_per_step", c.decode.kv_bytes},
                                    {"seconds_per_step", c.time.total()},
                                    {"seconds_of_weights", c.time.weights},
                                    {"seconds_of_kv", c.time.kv},
                                    {"seconds_of_products", c.time.products},
                                    {"seconds_of_attention", c.time.attention},
                                    {"seconds_of_launches", c.time.launches},
                                    {"seconds_of_logits", c.time.logits},
                                    {"bound_by", c.time.bound()},
                                    {"flop_per_step", c.decode.flop()},
                                    {"prompt_seconds", c.prompt_seconds},
                                    {"ridge_batch", c.ridge},
                                    {"largest_batch", c.largest_batch},
                                    {"longest_context", c.longest_context},
                                    {"fits", fits(c)}});
  Json::Array ranks;
  for (const RanksTime& t : ranks_times())
    ranks.push_back(Json::Object{{"ranks", t.ranks},
                                 {"weight_bytes", t.weight_bytes},
                                 {"kv_bytes_per_token", t.kv_bytes_per_token},
                                 {"seconds_per_step", t.step},
                                 {"seconds_of_gathering", t.gathering}});
  return Json::Object{{"model", source_},
                      {"machine", machine_.name},
                      {"machine_source", machine_.source},
                      {"memory_bytes", machine_.memory},
                      {"bytes_per_second", machine_.bandwidth},
                      {"flop_per_second", products_speed()},
                      {"context", context_},
                      {"sequences", o_.parallel},
                      {"kv", kv_},
                      {"ranks", ranks},
                      {"variants", variants}};
}

}  // namespace

void estimate(const Options& o, Model& model, const char* kv, const Activations& activations,
              const AttentionSpeed& attention_speed) {
  const Estimate e(o, model, kv, activations, attention_speed);
  if (!o.quiet) print(e.table());
  if (o.stats.empty()) return;
  OutputFile file(o.stats);
  const std::string json = e.json().text(true) + "\n";
  file.write(json.data(), json.size());
  file.commit();
}

void list_machines() {
  std::printf("%-10s %10s %10s %28s  %s\n", "", "memory, GB", "GB/s", "TFLOP/s f32 / bf16 / int8", "source");
  for (const Datasheet& d : datasheets()) {
    const std::string flops = format("%.1f / %.1f / %.1f", d.f32, d.bf16, d.int8);
    std::printf("%-10s %10.0f %10.1f %28s  %s\n", d.name, d.memory, d.bandwidth, flops.c_str(), d.source);
  }
}
