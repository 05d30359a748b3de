// link.cpp: the speed calculation of a model that is cut over ranks.
#include "host/link.h"

#include <algorithm>

#include "variants.h"

namespace {

// What all ranks keep and read whole.
double kept_bytes(const Model& model) {
  double bytes = static_cast<double>(model.vector_bytes);
  for (const Layer& l : model.layers)
    bytes += bytes_of(l.q_a_proj.weight) + bytes_of(l.kv_a_proj.weight) + bytes_of(l.router.weight);
  return bytes;
}

}  // namespace

std::vector<Gathered> gathered_in(const Model& model, const StepShape& s) {
  const Config& c = model.config;
  const double rows = s.sequences * s.tokens;
  int heads = 0, moe = 0, q_rows = 0, k_rows = 0;  // q_rows: layers that norm a row of all heads
  with_variant(c.attention, [&](auto v) {
    const HeadRuns runs = decltype(v)::type::head_runs(c);
    heads = runs.n * runs.width;
  });
  for (int l = 0; l < c.n_layers; l++) moe += c.is_moe(l);
  for (const Layer& l : model.layers) q_rows += l.q_norm.n > c.head_dim, k_rows += l.k_norm.n > c.head_dim;
  const int dense = c.n_layers - moe, shared = c.n_shared_experts > 0 ? moe : 0;
  const std::vector<Gathered> all = {{"embedding", rows * c.dim, 1},
                                     {"q to norm", rows * c.n_heads * c.head_dim, q_rows},
                                     {"k to norm", rows * c.n_kv_heads * c.head_dim, k_rows},
                                     {"heads", rows * heads, c.n_layers},
                                     {"o_proj", rows * c.dim, c.n_layers},
                                     {"hidden", rows * c.hidden_dim, dense},
                                     {"down_proj", rows * c.dim, dense},
                                     {"experts", rows * c.num_experts_per_tok * c.dim, moe},
                                     {"shared hidden", rows * c.n_shared_experts * c.moe_intermediate_size, shared},
                                     {"shared down", rows * c.dim, shared},
                                     {"logits", s.logits * c.vocab_size, 1}};
  std::vector<Gathered> some;
  std::copy_if(all.begin(), all.end(), std::back_inserter(some), [](const Gathered& g) { return g.times > 0; });
  return some;
}

double gather_seconds(const Gathered& g, int ranks, const Link& link) {
  if (ranks == 1) return 0;
  return link.latency + g.floats * sizeof(float) * (ranks - 1) / ranks / link.bandwidth;
}

RanksTime ranks_time(const Model& model, const StepShape& step, const std::string& kv, int ranks,
                     const Machine& machine, const Link& link) {
  Model part = with_attention(model, model.config.attention);
  const Part fullest{ranks - 1, ranks};
  with_variant(model.config.attention, [&](auto v) { decltype(v)::type::take_heads(part.config, fullest); });
  RanksTime t{.ranks = ranks, .kv_bytes_per_token = kv_bytes_per_token(part.config, kv)};
  const auto share = [&](double bytes) { return kept_bytes(model) + (bytes - kept_bytes(model)) / ranks; };
  t.weight_bytes = share(weight_bytes(model));
  Work work = work_of(part, step, t.kv_bytes_per_token);
  work.weight_bytes = share(work.weight_bytes);
  for (double& flop : work.products) flop /= ranks;
  for (const Gathered& g : gathered_in(model, step)) t.gathering += g.times * gather_seconds(g, ranks, link);
  t.step = time_of(work, machine).total() + t.gathering;
  return t;
}
