// explain.cpp: one token's step, stage by stage, with the numbers of the running model.
//
// The products are those of the layer that are there, in the order of the forward pass (variants.h, kernels/mlp.cpp),
// so one list serves every variant.
#include "cli/explain.h"

#include <algorithm>

#include "cli/output.h"
#include "kernels/matmul.h"

namespace {

// 1234567 -> "1,234,567"
std::string grouped(double number) {
  std::string digits = format("%.0f", number);
  for (int i = static_cast<int>(digits.size()) - 3; i > 0; i -= 3) digits.insert(static_cast<size_t>(i), ",");
  return digits;
}

struct Cost {
  double multiply_adds = 0, weight_bytes = 0, kv_bytes = 0;
  Cost& operator+=(const Cost& other) {
    multiply_adds += other.multiply_adds, weight_bytes += other.weight_bytes, kv_bytes += other.kv_bytes;
    return *this;
  }
};

// Prints lines, or only counts.
class Table {
 public:
  explicit Table(bool prints) : prints_(prints) {}
  Cost total;

  void line(const char* stage, const std::string& what, const Cost& cost) {
    total += cost;
    if (!prints_) return;
    const double bytes = cost.weight_bytes + cost.kv_bytes;
    print(format("%-10s %-64s %13s %13s%s\n", stage, what.c_str(),
                 cost.multiply_adds > 0 ? grouped(cost.multiply_adds).c_str() : "",
                 bytes > 0 ? grouped(bytes).c_str() : "", cost.kv_bytes > 0 ? " KV" : ""));
  }

  // y = W x for `used` of the matrix's groups (0: all of them).
  void product(const char* stage, const Linear& linear, const char* y, const char* x, int used = 0) {
    const Matrix& w = linear.weight;
    if (!linear) return;
    const int groups = used ? used : w.groups;
    const size_t bias = linear.bias ? static_cast<size_t>(w.n) * sizeof(float) : 0;
    const std::string each = w.groups == 1 ? "" : format("%d x ", groups);
    const std::string of = used ? format(" of %d", w.groups) : "";
    line(stage,
         format("%s%s [%d] = W [%d, %d] %s [%d]%s, %s", each.c_str(), y, w.n, w.n, w.k, x, w.k, of.c_str(),
                std::string(weight_format(w.type).name).c_str()),
         {static_cast<double>(groups) * w.n * w.k,
          static_cast<double>(groups) * static_cast<double>(packed_bytes(w.type, w.n, w.k) + bias), 0});
  }

  void norm(const Norm& w, const char* what) {
    if (w)
      line("norm", format("%s [%d]", what, w.n), {0, static_cast<double>(w.n) * sizeof(float) * (w.bias ? 2 : 1), 0});
  }

 private:
  bool prints_;
};

void attention(Table& table, const Session& s, const Layer& l, const AttentionWidths& w, int layer, int position) {
  const Config& c = s.model.config;
  const int block_size = s.setup.block_size, window = c.window[static_cast<size_t>(layer)];
  const int seen = window > 0 ? std::min(window, position + 1) : position + 1;
  const double row_bytes = static_cast<double>(s.setup.kv_bytes_per_token) / c.n_layers;
  table.norm(l.attention_norm, "h = norm of x");
  table.product("q_a_proj", l.q_a_proj, "q_a", "h");
  table.norm(l.q_a_norm, "q_a = norm of q_a");
  table.product("q_b_proj", l.q_b_proj, "q", "q_a");
  table.product("q_proj", l.q_proj, "q", "h");
  table.product("k_proj", l.k_proj, "k", "h");
  table.product("v_proj", l.v_proj, "v", "h");
  table.product("kv_a_proj", l.kv_a_proj, "latent and shared key", "h");
  table.norm(l.kv_a_norm, "latent = norm of latent");
  table.norm(l.q_norm, "q = norm of q, runs of");
  table.norm(l.k_norm, "k = norm of k, runs of");
  if (c.rope[static_cast<size_t>(layer)] >= 0)
    table.line("rope", format("q and k turned by position %d", position), {});
  const std::string row = w.v_is_k ? format("K [%d, %d], whose first %d are V,", w.n_kv_heads, w.k_dim, w.v_dim)
                                   : format("K [%d, %d] and V [%d, %d]", w.n_kv_heads, w.k_dim, w.n_kv_heads, w.v_dim);
  table.line("append", format("%s to block %d, slot %d", row.c_str(), position / block_size, position % block_size),
             {0, 0, row_bytes});
  table.product("w_uk", l.w_uk_t, "q into latent space", "q");
  table.line("attention",
             format("%d heads look at %d of %d tokens; a row serves %d heads", w.n_heads, seen, position + 1,
                    w.n_heads / w.n_kv_heads),
             {static_cast<double>(w.n_heads) * seen * (w.k_dim + w.v_dim), 0, row_bytes * seen});
  table.product("w_uv", l.w_uv, "value", "latent");
  table.product("o_proj", l.o_proj, "x +", "heads");
  table.norm(l.attention_post_norm, "norm of what is added");
}

void mlp(Table& table, const Mlp& m, const char* x, int used) {
  table.product("gate_proj", m.gate, "gate", x, used);
  table.product("up_proj", m.up, "up", x, used);
  table.product("down_proj", m.down, "x +", "act(gate) * up", used);
}

Cost layer(const Session& s, const AttentionWidths& widths, int index, int position, bool prints) {
  const Layer& l = s.model.layers[static_cast<size_t>(index)];
  Table table(prints);
  attention(table, s, l, widths, index, position);
  table.norm(l.mlp_norm, "h = norm of x");
  table.product("router", l.router, "scores", "h");
  mlp(table, l.experts, "h", s.model.config.num_experts_per_tok);
  mlp(table, l.shared, "h", 0);
  mlp(table, l.mlp, "h", 0);
  table.norm(l.mlp_post_norm, "norm of what is added");
  return table.total;
}

}  // namespace

void explain(const Session& s, const AttentionWidths& widths) {
  const Config& c = s.model.config;
  const int position = static_cast<int>(s.prompt.size()) - 1, id = s.prompt.back(), shown = s.options.layer;
  if (shown >= c.n_layers) fail("--layer %d: this model has layers 0 .. %d", shown, c.n_layers - 1);
  print(format("%-10s %-64s %13s %13s\n", "stage", "what", "multiply-adds", "bytes"));
  Table ends(true);
  ends.line("embed", format("x [%d] = row %d of W [%d, %d]", c.dim, id, c.vocab_size, c.dim), {});
  print(format("layer %d:\n", shown));
  layer(s, widths, shown, position, true);
  Cost total;
  for (int i = 0; i < c.n_layers; i++) total += layer(s, widths, i, position, false);
  print(format("%d layers:\n", c.n_layers));
  ends.norm(s.model.final_norm, "h = norm of x");
  ends.product("lm_head", s.model.lm_head, "logits", "h");
  total += ends.total;
  print(format("a token at position %d: %s multiply-adds; %s bytes of weights, %s of the cache\n", position,
               grouped(total.multiply_adds).c_str(), grouped(total.weight_bytes).c_str(),
               grouped(total.kv_bytes).c_str()));
}
