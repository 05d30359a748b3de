// variants.h: what sets MHA, MQA, GQA and MLA apart: how the query and the rows to store are projected, the
// shape they hand to `attend`, and how the result is projected back. Device-neutral: it only calls the other
// stages.
//
// A new variant costs one struct here, a line in build.h and one in the Makefile.
#pragma once

#include <algorithm>

#include "attention.h"
#include "step.h"

// Query heads share the rows of n_kv_heads KV heads (arXiv 2305.13245): K and V are projected from the token
// itself.
class Gqa {
 public:
  static constexpr Variant variant = Variant::gqa;

  static CacheShape cache_shape(const Config& c, int n_blocks, int block_size) {
    return {c.n_layers, c.n_kv_heads, c.head_dim, c.head_dim, n_blocks, block_size};
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

  // Floats of the buffers a token needs, and the widest input of a product.
  static size_t floats_per_token(const Config& c) {
    return static_cast<size_t>(c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads));
  }
  static int widest_input(const Config& c) { return c.n_heads * c.head_dim; }

  Gqa(const Config& c, int max_tokens)
      : q_(rows(max_tokens, c.n_heads * c.head_dim)),
        k_(rows(max_tokens, c.n_kv_heads * c.head_dim)),
        v_(rows(max_tokens, c.n_kv_heads * c.head_dim)),
        out_(rows(max_tokens, c.n_heads * c.head_dim)) {}

  // x += o_proj(attention of h); the tokens' rows enter the cache on the way.
  template <class Kernel, class Kv, int Block>
  void forward(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache,
               AttentionWorkspace& workspace) {
    const Config& c = step.config;
    const int T = step.batch.n_tokens, d = c.head_dim;
    const Product projections[] = {product(w.q_proj, step.h, T, q_.data()),
                                   product(w.k_proj, step.h, T, k_.data()),
                                   product(w.v_proj, step.h, T, v_.data())};
    matmul(projections, 3, step.workspace);
    if (w.q_norm) norm(c.norm, c.norm_eps, w.q_norm, q_.data(), d, T * c.n_heads, d, q_.data(), d);
    if (w.k_norm) norm(c.norm, c.norm_eps, w.k_norm, k_.data(), d, T * c.n_kv_heads, d, k_.data(), d);
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
  static size_t rows(int n, int width) { return static_cast<size_t>(n) * static_cast<size_t>(width); }

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

// The cache holds one row a token: the latent [kv_lora_rank], normed, and a rotated key [qk_rope_head_dim]
// that all heads share (arXiv 2405.04434, section 2.1). Absorbed form: W_UK carries the query into the latent
// space instead of every latent out of it, q_nope . (W_UK c) = (W_UK^T q_nope) . c, so attention runs on the
// latent rows themselves as one KV head of width r + p whose V is the first r elements of K's row; W_UV is
// applied to the result.
class Mla {
 public:
  static constexpr Variant variant = Variant::mla;

  static CacheShape cache_shape(const Config& c, int n_blocks, int block_size) {
    return {c.n_layers, 1, c.kv_lora_rank + c.qk_rope_head_dim, 0, n_blocks, block_size};
  }

  static AttentionShape shape(const Config& c, int layer) {
    AttentionShape s;
    s.n_heads = c.n_heads;
    s.n_kv_heads = 1;
    s.k_dim = c.kv_lora_rank + c.qk_rope_head_dim;
    s.v_dim = c.kv_lora_rank;
    s.v_is_k = true;
    s.scale = c.attention_scale;
    s.softcap = c.attention_softcap;
    s.window = c.window[static_cast<size_t>(layer)];
    return s;
  }

  static size_t floats_per_token(const Config& c) {
    const int r = c.kv_lora_rank, p = c.qk_rope_head_dim;
    const int per_head = c.qk_nope_head_dim + p + r + p + r + c.v_head_dim;
    return static_cast<size_t>(c.q_lora_rank) + static_cast<size_t>(r + p) +
           static_cast<size_t>(c.n_heads) * static_cast<size_t>(per_head);
  }
  static int widest_input(const Config& c) {
    return c.n_heads * std::max({c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim});
  }

  Mla(const Config& c, int max_tokens)
      : q_a_(rows(max_tokens, c.q_lora_rank)),
        q_(rows(max_tokens, c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))),
        q_latent_(rows(max_tokens, c.n_heads * (c.kv_lora_rank + c.qk_rope_head_dim))),
        kv_(rows(max_tokens, c.kv_lora_rank + c.qk_rope_head_dim)),
        out_latent_(rows(max_tokens, c.n_heads * c.kv_lora_rank)),
        out_(rows(max_tokens, c.n_heads * c.v_head_dim)),
        per_head_(static_cast<size_t>(c.n_heads)) {}

  template <class Kernel, class Kv, int Block>
  void forward(int layer, const Layer& w, const Step& step, KVCache<Kv, Block>& cache,
               AttentionWorkspace& workspace) {
    project(layer, w, step);
    cache.append(layer, step.batch, kv_.data(), nullptr);
    absorb_query(w, step);
    attend<Kernel>(q_latent_.data(), cache, layer, step.batch, shape(step.config, layer), out_latent_.data(),
                   workspace);
    expand_output(w, step);
    step.add_product(w.o_proj, out_.data(), w.attention_post_norm);
  }

 private:
  static size_t rows(int n, int width) { return static_cast<size_t>(n) * static_cast<size_t>(width); }

  // q [T, n_heads, nope + p] and kv [T, r + p], rotated.
  void project(int layer, const Layer& w, const Step& step) {
    const Config& c = step.config;
    const int T = step.batch.n_tokens, r = c.kv_lora_rank, p = c.qk_rope_head_dim,
              q_width = c.qk_nope_head_dim + p;
    const Product first[] = {product(w.kv_a_proj, step.h, T, kv_.data()),
                             c.q_lora_rank ? product(w.q_a_proj, step.h, T, q_a_.data())
                                           : product(w.q_proj, step.h, T, q_.data())};
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
    rope(q_.data() + c.qk_nope_head_dim, c.n_heads * q_width, T, c.n_heads, q_width, a.n, a.cos.data(),
         a.sin.data());
    rope(kv_.data() + r, r + p, T, 1, p, a.n, a.cos.data(), a.sin.data());
  }

  // q_latent [T, n_heads, r + p]: W_UK^T q_nope, then the rotated part as it is.
  void absorb_query(const Layer& w, const Step& step) {
    const Config& c = step.config;
    const int nope = c.qk_nope_head_dim, r = c.kv_lora_rank, p = c.qk_rope_head_dim;
    per_head_product(w.w_uk_t, step, q_.data(), nope + p, q_latent_.data(), r + p);
    copy_rows(q_.data() + nope, nope + p, step.batch.n_tokens * c.n_heads, p, q_latent_.data() + r, r + p);
  }

  // out [T, n_heads, v_head_dim] = W_UV out_latent
  void expand_output(const Layer& w, const Step& step) {
    const Config& c = step.config;
    per_head_product(w.w_uv, step, out_latent_.data(), c.kv_lora_rank, out_.data(), c.v_head_dim);
  }

  // Head h of y [T, n_heads, y_width] = matrices[h] times head h of x [T, n_heads, x_width].
  void per_head_product(const std::vector<Matrix>& matrices, const Step& step, const float* x, int x_width,
                        float* y, int y_width) {
    const int T = step.batch.n_tokens, H = step.config.n_heads;
#pragma omp for schedule(static)
    for (int h = 0; h < H; h++) {
      Product& p = per_head_[static_cast<size_t>(h)];
      p.weight = &matrices[static_cast<size_t>(h)];
      p.x = x + h * x_width;
      p.x_rows = p.rows = T;
      p.x_stride = H * x_width;
      p.y = y + h * y_width;
      p.y_stride = H * y_width;
    }
    matmul(per_head_.data(), H, step.workspace);
  }

  Buffer<float> q_a_;              // [T, q_lora_rank]
  Buffer<float> q_;                // [T, n_heads, nope + p]
  Buffer<float> q_latent_;         // [T, n_heads, r + p]
  Buffer<float> kv_;               // [T, r + p]
  Buffer<float> out_latent_;       // [T, n_heads, r]
  Buffer<float> out_;              // [T, n_heads, v_head_dim]
  std::vector<Product> per_head_;  // [n_heads]
};
