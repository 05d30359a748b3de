// variants.h: what sets MHA, MQA, GQA and MLA apart, one struct each: what it reads of the config, which tensors it
// takes, the cache's shape, how the query and the rows to store are projected, the shape it hands to attention, and how
// the result is projected back. Device-neutral: it only calls the stages.
//
// A new variant costs one struct here and its name in the list at the end, its fields in model.h, its name in the
// Makefile.
#pragma once

#include <algorithm>
#include <tuple>

#include "attention.h"
#include "kernels/step.h"

// Query heads share the rows of n_kv_heads KV heads (arXiv 2305.13245): K and V are projected from the token itself.
class Gqa {
 public:
  static constexpr const char* name = "gqa";

  // What the model file's config must say (Fields: host/config.cpp).
  template <class Fields>
  static void read(Fields& f, Config& c) {
    f.integer("n_kv_heads", c.n_kv_heads, 1, c.n_heads);
    f.integer("head_dim", c.head_dim, 1, MAX_WIDTH);
    f.require(c.n_heads % c.n_kv_heads == 0, "n_kv_heads", "a divisor of n_heads");
    f.fits("n_heads x head_dim", c.n_heads, c.head_dim);
  }

  // The tensors of layer l, at "layers.N." (Tensors: host/loader.cpp).
  template <class Tensors>
  static void collect(Tensors& t, const std::string& at, const Config& c, Layer& l) {
    const int group = c.n_heads / c.n_kv_heads;
    t.linear(at + "q_proj", c.n_heads * c.head_dim, c.dim, l.q_proj, group * c.head_dim);
    t.linear(at + "k_proj", c.n_kv_heads * c.head_dim, c.dim, l.k_proj, c.head_dim);
    t.linear(at + "v_proj", c.n_kv_heads * c.head_dim, c.dim, l.v_proj, c.head_dim);
    t.linear(at + "o_proj", c.dim, c.n_heads * c.head_dim, l.o_proj);
    t.norm_of_heads(at + "q_norm", c.n_heads, c.head_dim, l.q_norm);
    t.norm_of_heads(at + "k_norm", c.n_kv_heads, c.head_dim, l.k_norm);
    t.optional_vector(at + "sinks", {c.n_heads}, l.sinks, group);
  }

  // Leaves in c the heads of this part of the model: whole groups that share a KV head.
  static void take_heads(Config& c, const Part& part) {
    const int group = c.n_heads / c.n_kv_heads;
    c.n_kv_heads = part.count(c.n_kv_heads);
    c.n_heads = c.n_kv_heads * group;
  }
  static HeadRuns head_runs(const Config& c) { return {c.n_kv_heads, c.n_heads / c.n_kv_heads * c.head_dim}; }

  // Elements of a head that RoPE may rotate.
  static int rotated(const Config& c) { return c.head_dim; }

  static CacheShape cache_shape(const Config& c, int n_blocks, int block_size) {
    return {c.n_layers, c.n_kv_heads, c.head_dim, c.head_dim, n_blocks, block_size};
  }

  // FLOP (2 a multiply-add) of a layer's attention: t query tokens of a context of n, `pairs` of a query and a key that
  // it sees.
  static double attention_flop(const Config& c, double /*t*/, double /*n*/, double pairs) {
    return 4.0 * c.n_heads * c.head_dim * pairs;
  }

  template <class Kernel>
  static size_t workspace_bytes(const Config& c, const Limits& limits) {
    return c.n_heads > 0 ? Kernel::workspace_bytes(shape(c, 0, nullptr), limits) : 0;
  }

  Gqa(Arena& arena, Workspace& workspace, const Config& c, const Limits& limits)
      : q_(arena.take<float>(area(limits.max_tokens, c.n_heads * c.head_dim))),
        k_(arena.take<float>(area(limits.max_tokens, c.n_kv_heads * c.head_dim))),
        v_(arena.take<float>(area(limits.max_tokens, c.n_kv_heads * c.head_dim))),
        out_(arena.take<float>(area(limits.max_tokens, c.n_heads * c.head_dim))) {
    for (const int width : {c.dim, c.n_heads * c.head_dim})
      workspace.plan(matmul_workspace_bytes(limits.max_tokens, width));
  }

  // y = o_proj(attention of h); the tokens' rows enter the cache on the way.
  template <class Kernel, class Kv, int Block>
  void forward(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache, const Workspace& workspace) {
    const Config& c = step.config;
    project(w, step);
    if (c.n_heads > 0) {  // of more ranks than KV heads some have none
      const int d = c.head_dim, q_width = c.n_heads * d, k_width = c.n_kv_heads * d;
      const Turn turn = step.turn(layer, c.norm_eps, {q_, q_width, c.n_heads, d, norm_of_a_head(w.q_norm, d), 0},
                                  {k_, k_width, c.n_kv_heads, d, norm_of_a_head(w.k_norm, d), 0});
      cache.append(step.team, layer, step.batch, turn, k_, v_);
      Kernel::attend(step.team, q_, cache, layer, step.batch, shape(c, layer, w.sinks), out_, workspace);
    }
    step.compute(w.o_proj, step.gather.heads(step.team, out_, step.batch.n_tokens, w.o_proj.weight.k), false, step.y);
  }

 private:
  static AttentionShape shape(const Config& c, int layer, const float* sinks) {
    return {.n_heads = c.n_heads,
            .n_kv_heads = c.n_kv_heads,
            .k_dim = c.head_dim,
            .v_dim = c.head_dim,
            .scale = c.attention_scale,
            .softcap = c.attention_softcap,
            .window = c.window[static_cast<size_t>(layer)],
            .sinks = sinks};
  }

  static Norm norm_of_a_head(const Norm& weights, int head_dim) { return weights.n == head_dim ? weights : Norm{}; }

  // x [T, this rank's heads] normed, where the norm is over a row of all heads (OLMo 2): the ranks' come together.
  static void norm_rows(const Step& step, const Norm& weights, float* x) {
    const Config& c = step.config;
    const int n = weights.n, T = step.batch.n_tokens;
    if (!weights || n == c.head_dim) return;
    float* whole = step.gather.heads(step.team, x, T, n);
    norm(step.team, c.norm, c.norm_eps, weights, whole, n, T, n, whole, n);
    if (whole != x) step.gather.own_heads(step.team, whole, T, n, x);
  }

  // q, k and v of the tokens, not yet turned.
  void project(const Layer& w, const Step& step) {
    const int T = step.batch.n_tokens;
    const Product projections[] = {product(w.q_proj, step.h, T, q_), product(w.k_proj, step.h, T, k_),
                                   product(w.v_proj, step.h, T, v_)};
    matmul(step.team, projections, 3, step.workspace);
    norm_rows(step, w.q_norm, q_);
    norm_rows(step, w.k_norm, k_);
  }

  float* q_;    // [T, n_heads, head_dim]
  float* k_;    // [T, n_kv_heads, head_dim]
  float* v_;    // [T, n_kv_heads, head_dim]
  float* out_;  // [T, n_heads, head_dim]
};

// Every query head has rows of its own (arXiv 1706.03762): n_kv_heads = n_heads.
class Mha : public Gqa {
 public:
  static constexpr const char* name = "mha";
  using Gqa::Gqa;
  template <class Fields>
  static void read(Fields& f, Config& c) {
    Gqa::read(f, c);
    f.require(c.n_kv_heads == c.n_heads, "n_kv_heads", "n_heads for mha");
  }
};

// All query heads share one head's rows (arXiv 1911.02150): n_kv_heads = 1.
class Mqa : public Gqa {
 public:
  static constexpr const char* name = "mqa";
  using Gqa::Gqa;
  template <class Fields>
  static void read(Fields& f, Config& c) {
    Gqa::read(f, c);
    f.require(c.n_kv_heads == 1, "n_kv_heads", "1 for mqa");
  }
};

// The cache holds one row a token: the latent c [kv_lora_rank], normed, and a rotated key [qk_rope_head_dim] that all
// heads share (arXiv 2405.04434, section 2.1). Two forms of one attention read it:
//   absorbed  q_nope . (W_UK c) = (W_UK^T q_nope) . c: W_UK carries the query into the latent space, and attention runs
//             on the latent rows themselves, as one KV head of width r + p whose V is the first r elements of K's row;
//             W_UV is applied to the result. Decode: no row is ever expanded.
//   expanded  K = W_UK c and V = W_UV c are rebuilt for every head, a split of the context at a time, and attention
//             runs on H heads of width nope + p. Long prompts: a row is expanded once for all the prompt's queries.
//             The rows of the whole context never exist together, which the naive kernel would need: it has the
//             absorbed form alone.
class Mla {
 public:
  static constexpr const char* name = "mla";

  template <class Fields>
  static void read(Fields& f, Config& c) {
    f.integer("q_lora_rank", c.q_lora_rank, 0, MAX_WIDTH);
    f.integer("kv_lora_rank", c.kv_lora_rank, 1, MAX_WIDTH);
    f.integer("qk_nope_head_dim", c.qk_nope_head_dim, 1, MAX_WIDTH);
    f.integer("qk_rope_head_dim", c.qk_rope_head_dim, 1, MAX_WIDTH);
    f.integer("v_head_dim", c.v_head_dim, 1, MAX_WIDTH);
    f.fits("n_heads x (qk_nope_head_dim + qk_rope_head_dim)", c.n_heads, c.qk_nope_head_dim + c.qk_rope_head_dim);
    f.fits("n_heads x (kv_lora_rank + qk_rope_head_dim)", c.n_heads, c.kv_lora_rank + c.qk_rope_head_dim);
    f.fits("n_heads x v_head_dim", c.n_heads, c.v_head_dim);
  }

  template <class Tensors>
  static void collect(Tensors& t, const std::string& at, const Config& c, Layer& l) {
    const int q_width = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
    if (c.q_lora_rank) {
      t.linear(at + "q_a_proj", c.q_lora_rank, c.dim, l.q_a_proj, KEPT);
      t.norm(at + "q_a_norm", c.q_lora_rank, l.q_a_norm);
      t.linear(at + "q_b_proj", q_width, c.q_lora_rank, l.q_b_proj, q_width / c.n_heads);
    } else {
      t.linear(at + "q_proj", q_width, c.dim, l.q_proj, q_width / c.n_heads);
    }
    t.linear(at + "kv_a_proj", c.kv_lora_rank + c.qk_rope_head_dim, c.dim, l.kv_a_proj, KEPT);
    t.norm(at + "kv_a_norm", c.kv_lora_rank, l.kv_a_norm);
    t.linear(at + "o_proj", c.dim, c.n_heads * c.v_head_dim, l.o_proj);
    t.heads(at + "w_uk", c.n_heads, c.qk_nope_head_dim, c.kv_lora_rank, false, l.w_uk);
    t.heads(at + "w_uk", c.n_heads, c.qk_nope_head_dim, c.kv_lora_rank, true, l.w_uk_t);
    t.heads(at + "w_uv", c.n_heads, c.v_head_dim, c.kv_lora_rank, false, l.w_uv);
  }

  // The latent rows are small: all keep them.
  static void take_heads(Config& c, const Part& part) { c.n_heads = part.count(c.n_heads); }
  static HeadRuns head_runs(const Config& c) { return {c.n_heads, c.v_head_dim}; }

  static int rotated(const Config& c) { return c.qk_rope_head_dim; }

  static double attention_flop(const Config& c, double t, double n, double pairs) {
    return std::min(form_flop(c, false, t, n, pairs), form_flop(c, true, t, n, pairs));
  }

  static CacheShape cache_shape(const Config& c, int n_blocks, int block_size) {
    return {c.n_layers, 1, c.kv_lora_rank + c.qk_rope_head_dim, 0, n_blocks, block_size};
  }

  template <class Kernel>
  static size_t workspace_bytes(const Config& c, const Limits& limits) {
    if (c.n_heads == 0) return 0;
    const size_t bytes = Kernel::workspace_bytes(absorbed(c, 0), limits);
    return Kernel::takes_rows ? std::max(bytes, Kernel::workspace_bytes(expanded(c, 0), limits)) : bytes;
  }

  Mla(Arena& arena, Workspace& workspace, const Config& c, const Limits& limits) : form_(limits.mla_form) {
    const int T = limits.max_tokens, H = c.n_heads, nope = c.qk_nope_head_dim, r = c.kv_lora_rank;
    const int p = c.qk_rope_head_dim, v = c.v_head_dim;
    q_a_ = arena.take<float>(area(T, c.q_lora_rank));
    q_ = arena.take<float>(area(T, H * (nope + p)));
    kv_ = arena.take<float>(area(T, r + p));
    q_latent_ = arena.take<float>(area(T, H * (r + p)));
    out_latent_ = arena.take<float>(area(T, H * r));
    out_ = arena.take<float>(area(T, H * v));
    rows_ = arena.take<float>(area(ATTENTION_SPLIT, r + p));
    k_ = arena.take<float>(area(ATTENTION_SPLIT, H * (nope + p)));
    v_ = arena.take<float>(area(ATTENTION_SPLIT, H * v));
    for (const int width : {c.dim, c.q_lora_rank, H * v}) workspace.plan(matmul_workspace_bytes(T, width));
    for (const int width : {nope, r}) workspace.plan(matmul_workspace_bytes(T * H, width));
    workspace.plan(matmul_workspace_bytes(ATTENTION_SPLIT, r));
  }

  template <class Kernel, class Kv, int Block>
  void forward(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache, const Workspace& workspace) {
    if (step.config.n_heads > 0) attend_all<Kernel>(layer, w, step, cache, workspace);
    step.compute(w.o_proj, step.gather.heads(step.team, out_, step.batch.n_tokens, w.o_proj.weight.k), false, step.y);
  }

 private:
  template <class Kernel, class Kv, int Block>
  void attend_all(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache, const Workspace& workspace) {
    project(w, step);
    const Config& c = step.config;
    const int r = c.kv_lora_rank, p = c.qk_rope_head_dim, nope = c.qk_nope_head_dim, q_width = nope + p;
    const Turn turn = step.turn(layer, c.latent_norm_eps, {q_, c.n_heads * q_width, c.n_heads, q_width, Norm{}, nope},
                                {kv_, r + p, 1, r + p, w.kv_a_norm, r});
    cache.append(step.team, layer, step.batch, turn, kv_, nullptr);
    for (int s = 0, end = 0; s < step.host.n_sequences; s = end) {
      end = s + 1;
      if constexpr (Kernel::takes_rows) {
        if (expands(step, s)) {
          attend_expanded<Kernel>(layer, w, step, s, cache, workspace);
          continue;
        }
      }
      while (end < step.host.n_sequences && !(Kernel::takes_rows && expands(step, end))) end++;
      attend_absorbed<Kernel>(layer, w, step, s, end, cache, workspace);
    }
  }

  static AttentionShape absorbed(const Config& c, int layer) {
    AttentionShape s = expanded(c, layer);
    s.n_kv_heads = 1;
    s.k_dim = c.kv_lora_rank + c.qk_rope_head_dim;
    s.v_dim = c.kv_lora_rank;
    s.v_is_k = true;
    return s;
  }

  static AttentionShape expanded(const Config& c, int layer) {
    return {.n_heads = c.n_heads,
            .n_kv_heads = c.n_heads,
            .k_dim = c.qk_nope_head_dim + c.qk_rope_head_dim,
            .v_dim = c.v_head_dim,
            .scale = c.attention_scale,
            .softcap = c.attention_softcap,
            .window = c.window[static_cast<size_t>(layer)]};
  }

  // Whether sequence s takes the expanded form: the one with fewer FLOP. A query sees n - t / 2 tokens on average. A
  // single token takes the absorbed form: to expand a context for it never pays.
  bool expands(const Step& step, int s) const {
    if (form_ != MlaForm::automatic) return form_ == MlaForm::expanded;
    const double t = step.host.query_start[s + 1] - step.host.query_start[s], n = step.host.context_len[s];
    if (t == 1) return false;
    const double pairs = t * (n - t / 2);
    return form_flop(step.config, true, t, n, pairs) < form_flop(step.config, false, t, n, pairs);
  }

  // The attention itself, and the products that carry queries and results (absorbed), or rebuild K and V (expanded):
  //   absorbed  t (nope r + r v)  +  pairs ((r + p) + r)
  //   expanded  n (nope r + r v)  +  pairs ((nope + p) + v)        multiply-adds of each head
  static double form_flop(const Config& c, bool expanded, double t, double n, double pairs) {
    const double r = c.kv_lora_rank, p = c.qk_rope_head_dim, nope = c.qk_nope_head_dim, v = c.v_head_dim;
    const double carry = nope * r + r * v;
    return 2.0 * c.n_heads * (expanded ? n * carry + pairs * (nope + p + v) : t * carry + pairs * (2 * r + p));
  }

  // q [T, n_heads, nope + p] and kv [T, r + p], not yet turned.
  void project(const Layer& w, const Step& step) {
    const Team& team = step.team;
    const Config& c = step.config;
    const int T = step.batch.n_tokens, rank = c.q_lora_rank;
    const Product first[] = {product(w.kv_a_proj, step.h, T, kv_),
                             rank ? product(w.q_a_proj, step.h, T, q_a_) : product(w.q_proj, step.h, T, q_)};
    matmul(team, first, 2, step.workspace);
    if (!rank) return;
    if (w.q_a_norm) norm(team, c.norm, c.latent_norm_eps, w.q_a_norm, q_a_, rank, T, rank, q_a_, rank);
    const Product second = product(w.q_b_proj, q_a_, T, q_);
    matmul(team, &second, 1, step.workspace);
  }

  // out of sequences first .. last - 1, in the absorbed form.
  template <class Kernel, class Kv, int Block>
  void attend_absorbed(int layer, const Layer& w, const Step& step, int first, int last,
                       const KVCache<Kv, Block>& cache, const Workspace& workspace) {
    const Team& team = step.team;
    const Config& c = step.config;
    const int H = c.n_heads, nope = c.qk_nope_head_dim, r = c.kv_lora_rank, p = c.qk_rope_head_dim, v = c.v_head_dim;
    const int start = step.host.query_start[first], T = step.host.query_start[last] - start;
    const float* q = q_ + area(start, H * (nope + p));
    float* q_latent = q_latent_ + area(start, H * (r + p));

    const Product carry = per_head(w.w_uk_t, T, q, H * (nope + p), nope + p, q_latent, r + p);
    matmul(team, &carry, 1, step.workspace);
    copy_rows(team, q + nope, nope + p, T * H, p, 1, q_latent + r, r + p);

    Batch batch = step.batch;  // its sequences first .. last - 1
    batch.n_sequences = last - first;
    batch.query_start += first;
    batch.context_len += first;
    batch.block_table += area(first, batch.max_blocks);
    Kernel::attend(team, q_latent_, cache, layer, batch, absorbed(c, layer), out_latent_, workspace);

    const Product back = per_head(w.w_uv, T, out_latent_ + area(start, H * r), H * r, r, out_ + area(start, H * v), v);
    matmul(team, &back, 1, step.workspace);
  }

  // out of sequence s, in the expanded form.
  template <class Kernel, class Kv, int Block>
  void attend_expanded(int layer, const Layer& w, const Step& step, int s, const KVCache<Kv, Block>& cache,
                       const Workspace& workspace) {
    const Team& team = step.team;
    const Config& c = step.config;
    const int H = c.n_heads, nope = c.qk_nope_head_dim, r = c.kv_lora_rank, p = c.qk_rope_head_dim, v = c.v_head_dim;
    const AttentionShape shape = expanded(c, layer);
    // What lies behind the window of its first query may have been given back.
    const int first_query = step.host.positions[step.host.query_start[s]];
    const int seen = shape.window > 0 ? std::max(0, first_query - shape.window + 1) : 0;
    const int context = step.host.context_len[s];
    for (int split = seen / ATTENTION_SPLIT * ATTENTION_SPLIT; split < context; split += ATTENTION_SPLIT) {
      const int rows = std::min(ATTENTION_SPLIT, context - split), unseen = std::max(0, seen - split);
      const int n = rows - unseen;
      float* k = k_ + area(unseen, H * (nope + p));
      cache.read_k(team, layer, step.batch, s, split + unseen, n, rows_);
      const Product expand[] = {per_head(w.w_uk, n, rows_, r + p, 0, k, nope + p),
                                per_head(w.w_uv, n, rows_, r + p, 0, v_ + area(unseen, H * v), v)};
      matmul(team, expand, 2, step.workspace);
      copy_rows(team, rows_ + r, r + p, n, p, H, k + nope, nope + p);
      Kernel::attend_rows(team, q_, {k_, v_, split, rows}, step.batch, s, shape, out_, workspace);
    }
  }

  // Head h of y [rows, n_heads, y_width] = group h of the weight times x, whose rows are x_stride apart and whose heads
  // x_width (0: all heads read the same).
  static Product per_head(const Linear& linear, int rows, const float* x, int x_stride, int x_width, float* y,
                          int y_width) {
    Product p = product(linear, x, rows, y);
    p.x_stride = x_stride;
    p.x_group = x_width;
    p.y_stride = linear.weight.groups * y_width;
    p.y_group = y_width;
    return p;
  }

  MlaForm form_;
  float* q_a_;         // [T, q_lora_rank]
  float* q_;           // [T, n_heads, nope + p]
  float* kv_;          // [T, r + p]
  float* q_latent_;    // [T, n_heads, r + p]
  float* out_latent_;  // [T, n_heads, r]
  float* out_;         // [T, n_heads, v_head_dim]
  float* rows_;        // [ATTENTION_SPLIT, r + p] latents out of the cache
  float* k_;           // [ATTENTION_SPLIT, n_heads, nope + p]
  float* v_;           // [ATTENTION_SPLIT, n_heads, v_head_dim]
};

using Variants = std::tuple<Mha, Mqa, Gqa, Mla>;

// f(std::type_identity<V>()) for the variant V of this name; false: there is none.
template <class F>
bool with_variant(const std::string& name, F f) {
  const auto try_each = [&]<class... V>(std::type_identity<std::tuple<V...>>) {
    return ((name == V::name && (f(std::type_identity<V>()), true)) || ...);
  };
  return try_each(std::type_identity<Variants>());
}
