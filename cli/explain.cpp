// explain.cpp: one token's step, stage by stage, with the numbers of the running model.
//
// The products are those of the layer that are there, in the order of the forward pass (variants.h, kernels/mlp.cpp),
// so one list serves every variant. What they take is counted by the speed calculation (host/roofline.h), for which
// shapes are enough: the weights stay in their file.
#include "cli/explain.h"

#include <algorithm>

#include "cli/output.h"
#include "host/roofline.h"
#include "variants.h"

namespace {

// 1234567 -> "1,234,567"
std::string grouped(double number) {
  std::string digits = format("%.0f", number);
  for (int i = static_cast<int>(digits.size()) - 3; i > 0; i -= 3) digits.insert(static_cast<size_t>(i), ",");
  return digits;
}

// Bytes: of weights, or of the cache.
void line(const char* stage, const std::string& what, double adds, double bytes, const char* of = "") {
  print(format("%-10s %-64s %13s %13s%s\n", stage, what.c_str(), adds > 0 ? grouped(adds).c_str() : "",
               bytes > 0 ? grouped(bytes).c_str() : "", of));
}

// y = W x for `used` of the matrix's groups (0: all of them).
void product(const char* stage, const Linear& linear, const char* y, const char* x, int used = 0) {
  const Matrix& w = linear.weight;
  if (w.n == 0) return;
  const int groups = used ? used : w.groups;
  const std::string each = w.groups == 1 ? "" : format("%d x ", groups);
  const std::string of = used ? format(" of %d", w.groups) : "";
  line(stage,
       format("%s%s [%d] = W [%d, %d] %s [%d]%s, %s", each.c_str(), y, w.n, w.n, w.k, x, w.k, of.c_str(),
              std::string(weight_format(w.type).name).c_str()),
       multiply_adds(w) * groups / w.groups, bytes_of(w) * groups / w.groups);
}

void norm(const Norm& w, const char* what) {
  if (w) line("norm", format("%s [%d]", what, w.n), 0, 0);
}

template <class Variant>
void attention(const Session& s, const Layer& l, int layer, int position) {
  const Config& c = s.model.config;
  const CacheShape row = Variant::cache_shape(c, 1, 1);
  const int block_size = s.setup.block_size, window = c.window[static_cast<size_t>(layer)];
  const int seen = window > 0 ? std::min(window, position + 1) : position + 1;
  const double row_bytes = static_cast<double>(s.setup.kv_bytes_per_token) / c.n_layers;
  norm(l.attention_norm, "h = norm of x");
  product("q_a_proj", l.q_a_proj, "q_a", "h");
  norm(l.q_a_norm, "q_a = norm of q_a");
  product("q_b_proj", l.q_b_proj, "q", "q_a");
  product("q_proj", l.q_proj, "q", "h");
  product("k_proj", l.k_proj, "k", "h");
  product("v_proj", l.v_proj, "v", "h");
  product("kv_a_proj", l.kv_a_proj, "latent and shared key", "h");
  norm(l.kv_a_norm, "latent = norm of latent");
  norm(l.q_norm, "q = norm of q, runs of");
  norm(l.k_norm, "k = norm of k, runs of");
  if (c.rope[static_cast<size_t>(layer)] >= 0) line("rope", format("q and k turned by position %d", position), 0, 0);
  const std::string kept =
      row.v_dim == 0 ? format("K [%d, %d], whose first %d are V,", row.n_kv_heads, row.k_dim, c.kv_lora_rank)
                     : format("K [%d, %d] and V [%d, %d]", row.n_kv_heads, row.k_dim, row.n_kv_heads, row.v_dim);
  line("append", format("%s to block %d, slot %d", kept.c_str(), position / block_size, position % block_size), 0,
       row_bytes, " KV written");
  product("w_uk", l.w_uk_t, "q into latent space", "q");
  const double carried = multiply_adds(l.w_uk_t.weight) + multiply_adds(l.w_uv.weight);  // MLA's: lines of their own
  const int serves = c.n_heads / row.n_kv_heads;
  line("attention",
       format("%d heads look at %d of %d tokens; a row serves %d head%s", c.n_heads, seen, position + 1, serves,
              serves == 1 ? "" : "s"),
       Variant::attention_flop(c, 1, seen, seen) / 2 - carried, row_bytes * seen, " KV read");
  product("w_uv", l.w_uv, "value", "latent");
  product("o_proj", l.o_proj, "x +", "heads");
  norm(l.attention_post_norm, "norm of what is added");
}

void mlp(const Mlp& m, int used = 0) {
  product("gate_proj", m.gate, "gate", "h", used);
  product("up_proj", m.up, "up", "h", used);
  product("down_proj", m.down, "x +", "act(gate) * up", used);
}

}  // namespace

void check_layer(const Session& s) {
  const int n = s.model.config.n_layers;
  if (s.options.layer >= n) fail("--layer %d: this model has layers 0 .. %d", s.options.layer, n - 1);
}

void explain(const Session& s) {
  const Model& model = s.model;
  const Config& c = model.config;
  const int position = static_cast<int>(s.prompt.size()) - 1, id = s.prompt.back(), shown = s.options.layer;
  const Layer& l = model.layers[static_cast<size_t>(shown)];
  print(format("%-10s %-64s %13s %13s\n", "stage", "what", "multiply-adds", "bytes"));
  line("embed", format("x [%d] = row %d of W [%d, %d]", c.dim, id, c.vocab_size, c.dim), 0, 0);
  print(format("layer %d:\n", shown));
  with_variant(c.attention, [&](auto v) { attention<typename decltype(v)::type>(s, l, shown, position); });
  norm(l.mlp_norm, "h = norm of x");
  product("router", l.router, "scores", "h");
  mlp(l.experts, c.num_experts_per_tok);
  mlp(l.shared);
  mlp(l.mlp);
  norm(l.mlp_post_norm, "norm of what is added");
  print(format("%d layers:\n", c.n_layers));
  norm(model.final_norm, "h = norm of x");
  product("lm_head", model.lm_head.weight.n ? model.lm_head : Linear{model.embed_tokens}, "logits", "h");
  line("vectors", "norms, biases and tables of all stages", 0, static_cast<double>(model.vector_bytes));
  const double kv = static_cast<double>(s.setup.kv_bytes_per_token);
  const Work all = work_of(model, {.context = double(position + 1)}, kv);
  print(format("a token at position %d: %s multiply-adds; %s bytes of weights, %s of the cache read, %s written\n",
               position, grouped(all.flop() / 2).c_str(), grouped(all.weight_bytes).c_str(),
               grouped(all.kv_bytes).c_str(), grouped(kv).c_str()));
}
