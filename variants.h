// variants.h: what sets MHA, MQA, GQA and MLA apart: how the query and the rows to store are projected, the
// shape they hand to `attend`, and how the result is projected back. Device-neutral: it only calls the other
// stages.
//
// A new variant costs one struct here, a line in build.h and one in the Makefile.
#pragma once

#include <algorithm>

#include "attention.h"
#include "kernels/step.h"

// Query heads share the rows of n_kv_heads KV heads (arXiv 2305.13245): K and V are projected from the token
// itself.
class Gqa {
 public:
  static constexpr Variant variant = Variant::gqa;

  static CacheShape cache_shape(const Config& c, int n_blocks, int block_size) {
    return {c.n_layers, c.n_kv_heads, c.head_dim, c.head_dim, n_blocks, block_size};
  }

  static size_t bytes(const Config& c, const Limits& limits) {
    return sizeof(float) * area(limits.max_tokens, 2 * (c.n_heads + c.n_kv_heads) * c.head_dim);
  }

  static size_t workspace_bytes(const Config& c, const Limits& limits) {
    return matmul_workspace_bytes(limits.max_tokens, c.n_heads * c.head_dim);
  }

  static size_t attention_bytes(const Config& c, const Limits& limits, int n_threads) {
    return AttentionWorkspace::bytes(shape(c, 0), limits.max_tokens, limits.context, n_threads);
  }

  Gqa(const Config& c, const Limits& limits)
      : q_(area(limits.max_tokens, c.n_heads * c.head_dim)),
        k_(area(limits.max_tokens, c.n_kv_heads * c.head_dim)),
        v_(area(limits.max_tokens, c.n_kv_heads * c.head_dim)),
        out_(area(limits.max_tokens, c.n_heads * c.head_dim)) {}

  // x += o_proj(attention of h); the tokens' rows enter the cache on the way.
  template <class Kernel, class Kv, int Block>
  void forward(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache, AttentionWorkspace& workspace) {
    const Config& c = step.config;
    const int T = step.batch.n_tokens, d = c.head_dim;
    const Product projections[] = {product(w.q_proj, step.h, T, q_.data()), product(w.k_proj, step.h, T, k_.data()),
                                   product(w.v_proj, step.h, T, v_.data())};
    matmul(projections, 3, step.workspace);
    norm_heads(c, w.q_norm, T, c.n_heads * d, q_.data());
    norm_heads(c, w.k_norm, T, c.n_kv_heads * d, k_.data());
    const int table = c.rope[static_cast<size_t>(layer)];
    if (table >= 0) {
      const Angles& a = step.angles[static_cast<size_t>(table)];
      rope(q_.data(), c.n_heads * d, T, c.n_heads, d, a.n, a.cos.data(), a.sin.data());
      rope(k_.data(), c.n_kv_heads * d, T, c.n_kv_heads, d, a.n, a.cos.data(), a.sin.data());
    }
    cache.append(layer, step.batch, k_.data(), v_.data());
    attend<Kernel>(q_.data(), cache, layer, step.batch, shape(c, layer), out_.data(), workspace);
    step.add_product(w.o_proj, out_.data(), w.attention_post_norm);
  }

 private:
  // x [T, width], in runs as long as the norm's weight: heads, or whole rows
  static void norm_heads(const Config& c, const Norm& weights, int T, int width, float* x) {
    const int n = weights.n;
    if (weights) norm(c.norm, c.norm_eps, weights, x, n, T * (width / n), n, x, n);
  }

  static AttentionShape shape(const Config& c, int layer) {
    AttentionShape s;
    s.n_heads = c.n_heads;
    s.n_kv_heads = c.n_kv_heads;
    s.k_dim = s.v_dim = c.head_dim;
    s.scale = c.attention_scale;
    s.softcap = c.attention_softcap;
    s.window = c.window[static_cast<size_t>(layer)];
    return s;
  }

  Buffer<float> q_;    // [T, n_heads, head_dim]
  Buffer<float> k_;    // [T, n_kv_heads, head_dim]
  Buffer<float> v_;    // [T, n_kv_heads, head_dim]
  Buffer<float> out_;  // [T, n_heads, head_dim]
};

// Every query head has rows of its own (arXiv 1706.03762): n_kv_heads = n_heads.
class Mha : public Gqa {
 public:
  static constexpr Variant variant = Variant::mha;
  using Gqa::Gqa;
};

// All query heads share one head's rows (arXiv 1911.02150): n_kv_heads = 1.
class Mqa : public Gqa {
 public:
  static constexpr Variant variant = Variant::mqa;
  using Gqa::Gqa;
};

// The cache holds one row a token: the latent c [kv_lora_rank], normed, and a rotated key [qk_rope_head_dim] that all
// heads share (arXiv 2405.04434, section 2.1). Two forms of one attention read it:
//   absorbed  q_nope . (W_UK c) = (W_UK^T q_nope) . c: W_UK carries the query into the latent space, and attention runs
//             on the latent rows themselves, as one KV head of width r + p whose V is the first r elements of K's row;
//             W_UV is applied to the result. Decode: no row is ever expanded.
//   expanded  K = W_UK c and V = W_UV c are rebuilt for every head, a split of the context at a time, and attention
//             runs on H heads of width nope + p. Long prompts: a row is expanded once for all the prompt's queries.
//             The rows of the whole context never exist together, which the naive kernel would need: this form runs
//             on flash attention, also where the build's kernel, which the absorbed form takes, is naive.
class Mla {
 public:
  static constexpr Variant variant = Variant::mla;

  static CacheShape cache_shape(const Config& c, int n_blocks, int block_size) {
    return {c.n_layers, 1, c.kv_lora_rank + c.qk_rope_head_dim, 0, n_blocks, block_size};
  }

  static size_t bytes(const Config& c, const Limits& limits) {
    const auto H = static_cast<size_t>(c.n_heads), r = static_cast<size_t>(c.kv_lora_rank);
    const auto p = static_cast<size_t>(c.qk_rope_head_dim), v = static_cast<size_t>(c.v_head_dim);
    const size_t q = static_cast<size_t>(c.qk_nope_head_dim) + p;
    return sizeof(float) * (static_cast<size_t>(limits.max_tokens) *
                                (static_cast<size_t>(c.q_lora_rank) + r + p + H * (q + r + p + r + v)) +
                            ATTENTION_SPLIT * (r + p + H * (q + v)));
  }

  static size_t workspace_bytes(const Config& c, const Limits& limits) {
    const auto H = static_cast<size_t>(c.n_heads);
    const int T = limits.max_tokens;
    return std::max({H * matmul_workspace_bytes(T, std::max(c.kv_lora_rank, c.qk_nope_head_dim)),
                     matmul_workspace_bytes(T, c.n_heads * c.v_head_dim), matmul_workspace_bytes(T, c.q_lora_rank),
                     matmul_workspace_bytes(ATTENTION_SPLIT, c.kv_lora_rank)});
  }

  static size_t attention_bytes(const Config& c, const Limits& limits, int n_threads) {
    return std::max(AttentionWorkspace::bytes(absorbed(c, 0), limits.max_tokens, limits.context, n_threads),
                    AttentionWorkspace::bytes(expanded(c, 0), limits.max_tokens, limits.context, n_threads));
  }

  Mla(const Config& c, const Limits& limits)
      : form_(limits.mla_form),
        q_a_(area(limits.max_tokens, c.q_lora_rank)),
        q_(area(limits.max_tokens, c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))),
        kv_(area(limits.max_tokens, c.kv_lora_rank + c.qk_rope_head_dim)),
        q_latent_(area(limits.max_tokens, c.n_heads * (c.kv_lora_rank + c.qk_rope_head_dim))),
        out_latent_(area(limits.max_tokens, c.n_heads * c.kv_lora_rank)),
        out_(area(limits.max_tokens, c.n_heads * c.v_head_dim)),
        rows_(area(ATTENTION_SPLIT, c.kv_lora_rank + c.qk_rope_head_dim)),
        k_(area(ATTENTION_SPLIT, c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))),
        v_(area(ATTENTION_SPLIT, c.n_heads * c.v_head_dim)),
        products_(2 * static_cast<size_t>(c.n_heads)) {}

  template <class Kernel, class Kv, int Block>
  void forward(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache, AttentionWorkspace& workspace) {
    project(layer, w, step);
    cache.append(layer, step.batch, kv_.data(), nullptr);
    for (int s = 0, end = 0; s < step.batch.n_sequences; s = end) {
      end = s + 1;
      if (expands(step, s)) {
        attend_expanded(layer, w, step, s, cache, workspace);
        continue;
      }
      while (end < step.batch.n_sequences && !expands(step, end)) end++;
      attend_absorbed<Kernel>(layer, w, step, s, end, cache, workspace);
    }
    step.add_product(w.o_proj, out_.data(), w.attention_post_norm);
  }

 private:
  static AttentionShape absorbed(const Config& c, int layer) {
    AttentionShape s = expanded(c, layer);
    s.n_kv_heads = 1;
    s.k_dim = c.kv_lora_rank + c.qk_rope_head_dim;
    s.v_dim = c.kv_lora_rank;
    s.v_is_k = true;
    return s;
  }

  static AttentionShape expanded(const Config& c, int layer) {
    AttentionShape s;
    s.n_heads = s.n_kv_heads = c.n_heads;
    s.k_dim = c.qk_nope_head_dim + c.qk_rope_head_dim;
    s.v_dim = c.v_head_dim;
    s.scale = c.attention_scale;
    s.softcap = c.attention_softcap;
    s.window = c.window[static_cast<size_t>(layer)];
    return s;
  }

  // Whether sequence s takes the expanded form: the one with fewer FLOP. For t query tokens, a context of n tokens, of
  // which a query sees n - t / 2 on average, and a head (times 2 for multiply and add, which both have):
  //   absorbed  t (nope r + r v)  +  t (n - t / 2) ((r + p) + r)
  //   expanded  n (nope r + r v)  +  t (n - t / 2) ((nope + p) + v)
  bool expands(const Step& step, int s) const {
    if (form_ != MlaForm::automatic) return form_ == MlaForm::expanded;
    const Config& c = step.config;
    const double t = step.batch.query_start[s + 1] - step.batch.query_start[s], n = step.batch.context_len[s];
    const double r = c.kv_lora_rank, p = c.qk_rope_head_dim, nope = c.qk_nope_head_dim, v = c.v_head_dim;
    const double pairs = t * (n - t / 2), carry = nope * r + r * v;
    return n * carry + pairs * (nope + p + v) < t * carry + pairs * (2 * r + p);
  }

  // q [T, n_heads, nope + p] and kv [T, r + p], normed and rotated.
  void project(int layer, const Layer& w, const Step& step) {
    const Config& c = step.config;
    const int T = step.batch.n_tokens, r = c.kv_lora_rank, p = c.qk_rope_head_dim, q_width = c.qk_nope_head_dim + p;
    const Product first[] = {
        product(w.kv_a_proj, step.h, T, kv_.data()),
        c.q_lora_rank ? product(w.q_a_proj, step.h, T, q_a_.data()) : product(w.q_proj, step.h, T, q_.data())};
    matmul(first, 2, step.workspace);
    if (w.kv_a_norm) norm(c.norm, c.norm_eps, w.kv_a_norm, kv_.data(), r + p, T, r, kv_.data(), r + p);
    if (c.q_lora_rank) {
      const int rank = c.q_lora_rank;
      if (w.q_a_norm) norm(c.norm, c.norm_eps, w.q_a_norm, q_a_.data(), rank, T, rank, q_a_.data(), rank);
      const Product second = product(w.q_b_proj, q_a_.data(), T, q_.data());
      matmul(&second, 1, step.workspace);
    }
    const int table = c.rope[static_cast<size_t>(layer)];
    if (table < 0) return;
    const Angles& a = step.angles[static_cast<size_t>(table)];
    rope(q_.data() + c.qk_nope_head_dim, c.n_heads * q_width, T, c.n_heads, q_width, a.n, a.cos.data(), a.sin.data());
    rope(kv_.data() + r, r + p, T, 1, p, a.n, a.cos.data(), a.sin.data());
  }

  // out of sequences first .. last - 1, in the absorbed form.
  template <class Kernel, class Kv, int Block>
  void attend_absorbed(int layer, const Layer& w, const Step& step, int first, int last,
                       const KVCache<Kv, Block>& cache, AttentionWorkspace& workspace) {
    const Config& c = step.config;
    const int H = c.n_heads, nope = c.qk_nope_head_dim, r = c.kv_lora_rank, p = c.qk_rope_head_dim, v = c.v_head_dim;
    const int start = step.batch.query_start[first], T = step.batch.query_start[last] - start;
    const float* q = q_.data() + area(start, H * (nope + p));
    float* q_latent = q_latent_.data() + area(start, H * (r + p));

    per_head(0, w.w_uk_t, T, q, H * (nope + p), nope + p, q_latent, r + p);
    matmul(products_.data(), H, step.workspace);
    copy_rows(q + nope, nope + p, T * H, p, 1, q_latent + r, r + p);

    Batch batch = step.batch;  // its rows first .. last - 1
    batch.n_sequences = last - first;
    batch.query_start += first;
    batch.context_len += first;
    batch.block_table += area(first, batch.max_blocks);
    attend<Kernel>(q_latent_.data(), cache, layer, batch, absorbed(c, layer), out_latent_.data(), workspace);

    per_head(0, w.w_uv, T, out_latent_.data() + area(start, H * r), H * r, r, out_.data() + area(start, H * v), v);
    matmul(products_.data(), H, step.workspace);
  }

  // out of sequence s, in the expanded form.
  template <class Kv, int Block>
  void attend_expanded(int layer, const Layer& w, const Step& step, int s, const KVCache<Kv, Block>& cache,
                       AttentionWorkspace& workspace) {
    const Config& c = step.config;
    const int H = c.n_heads, nope = c.qk_nope_head_dim, r = c.kv_lora_rank, p = c.qk_rope_head_dim, v = c.v_head_dim;
    const AttentionShape shape = expanded(c, layer);
    // What lies behind the window of its first query may have been given back.
    const int first_query = step.batch.positions[step.batch.query_start[s]];
    const int seen = shape.window > 0 ? std::max(0, first_query - shape.window + 1) : 0;
    attend_begin(step.batch, s, shape, out_.data(), workspace);
    for (int split = seen / ATTENTION_SPLIT * ATTENTION_SPLIT; split < step.batch.context_len[s];
         split += ATTENTION_SPLIT) {
      const int rows = std::min(ATTENTION_SPLIT, step.batch.context_len[s] - split);
      const int unseen = std::max(0, seen - split), n = rows - unseen;
      float* k = k_.data() + area(unseen, H * (nope + p));
      cache.read_k(layer, step.batch, s, split + unseen, n, rows_.data());
      per_head(0, w.w_uk, n, rows_.data(), r + p, 0, k, nope + p);
      per_head(H, w.w_uv, n, rows_.data(), r + p, 0, v_.data() + area(unseen, H * v), v);
      matmul(products_.data(), 2 * H, step.workspace);
      copy_rows(rows_.data() + r, r + p, n, p, H, k + nope, nope + p);
      attend_rows(q_.data(), {k_.data(), v_.data(), split, rows}, step.batch, s, shape, out_.data(), workspace);
    }
    attend_end(step.batch, s, shape, out_.data(), workspace);
  }

  // products_[at + h]: head h of y [rows, n_heads, y_width] = matrices[h] times x, whose rows are x_stride apart and
  // whose heads x_width (0: all heads read the same).
  void per_head(int at, const std::vector<Matrix>& matrices, int rows, const float* x, int x_stride, int x_width,
                float* y, int y_width) {
    const int H = static_cast<int>(matrices.size());
#pragma omp for schedule(static)
    for (int h = 0; h < H; h++) {
      Product& product = products_[static_cast<size_t>(at + h)];
      product.weight = &matrices[static_cast<size_t>(h)];
      product.x = x + h * x_width;
      product.x_rows = product.rows = rows;
      product.x_stride = x_stride;
      product.y = y + h * y_width;
      product.y_stride = H * y_width;
    }
  }

  MlaForm form_;
  Buffer<float> q_a_;              // [T, q_lora_rank]
  Buffer<float> q_;                // [T, n_heads, nope + p]
  Buffer<float> kv_;               // [T, r + p]
  Buffer<float> q_latent_;         // [T, n_heads, r + p]
  Buffer<float> out_latent_;       // [T, n_heads, r]
  Buffer<float> out_;              // [T, n_heads, v_head_dim]
  Buffer<float> rows_;             // [ATTENTION_SPLIT, r + p] latents out of the cache
  Buffer<float> k_;                // [ATTENTION_SPLIT, n_heads, nope + p]
  Buffer<float> v_;                // [ATTENTION_SPLIT, n_heads, v_head_dim]
  std::vector<Product> products_;  // [2 n_heads]
};
