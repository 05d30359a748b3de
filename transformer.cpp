// transformer.cpp: the forward pass. Device-neutral: every line calls a stage, and every thread of the team
// runs every line (the stages share their work among the team and end with a barrier: one fork a step).
#include "transformer.h"

#include <omp.h>

#include <algorithm>

#include "kernels/mlp.h"
#include "variants.h"

namespace {

template <class Attention>
size_t workspace_bytes(const Config& c, const Limits& limits) {
  return std::max({matmul_workspace_bytes(limits.max_tokens, c.dim), Attention::workspace_bytes(c, limits),
                   MlpBlock::workspace_bytes(c, limits.max_tokens)});
}

}  // namespace

template <class Attention, class Kernel, class Kv, int Block>
struct Transformer<Attention, Kernel, Kv, Block>::Impl {
  const Model& model;
  KVCache<Kv, Block> cache;
  Attention attention;
  MlpBlock mlp;
  MatmulWorkspace matmul_workspace;
  AttentionWorkspace attention_workspace;
  std::vector<Angles> angles;  // one for each RoPE table
  const bool long_context;  // the longest that a sequence may become chooses, so that no key rotates anew as it grows
  Buffer<float> x, h, y;    // [max_tokens, dim]
  Buffer<float> logits;     // [max_logits, vocab_size]

  Impl(const Model& m, const Limits& limits)
      : model(m),
        cache(cache_shape(m.config, limits)),
        attention(m.config, limits),
        mlp(m.config, limits.max_tokens),
        matmul_workspace(workspace_bytes<Attention>(m.config, limits)),
        attention_workspace(Attention::attention_bytes(m.config, limits, omp_get_max_threads())),
        long_context(m.config.original_seq_len > 0 && limits.context > m.config.original_seq_len),
        x(area(limits.max_tokens, m.config.dim)),
        h(area(limits.max_tokens, m.config.dim)),
        y(area(limits.max_tokens, m.config.dim)),
        logits(area(limits.max_logits, m.config.vocab_size)) {
    for (const Model::Rope& table : m.rope)
      angles.push_back(
          {table.n, Buffer<float>(area(limits.max_tokens, table.n)), Buffer<float>(area(limits.max_tokens, table.n))});
  }

  void forward(const Batch& batch) {
    const Config& c = model.config;
    const int T = batch.n_tokens;
    const Step step{c, batch, angles, x.data(), h.data(), y.data(), matmul_workspace};
    cache.copy_blocks(batch);
    embed(model.embed_tokens, model.position_embedding, batch.tokens, batch.positions, T, c.embedding_scale, step.x);
    for (size_t i = 0; i < angles.size(); i++)
      rope_angles(batch.positions, T, long_context ? model.rope[i].long_inv_freq : model.rope[i].inv_freq, angles[i].n,
                  c.rope_scale[i], angles[i].cos.data(), angles[i].sin.data());
    for (int l = 0; l < c.n_layers; l++) {
      const Layer& layer = model.layers[static_cast<size_t>(l)];
      step.norm_x(layer.attention_norm, step.h);
      attention.template forward<Kernel>(l, layer, step, cache, attention_workspace);
      step.norm_x(layer.mlp_norm, step.h);
      mlp.forward(l, layer, step);
    }
    if (batch.n_logits > 0) classify(step);
  }

  void classify(const Step& step) {
    const Config& c = model.config;
    const int n = step.batch.n_logits;
    step.norm_x(model.final_norm, step.h);
    Product classifier = product(model.lm_head, step.h, n, logits.data());
    classifier.x_rows = step.batch.n_tokens;
    classifier.gather = step.batch.logit_rows;
    matmul(&classifier, 1, step.workspace);
    if (c.logit_scale != 1.0f || c.logit_softcap > 0)
      scale_and_cap(logits.data(), area(n, c.vocab_size), c.logit_scale, c.logit_softcap);
  }
};

template <class Attention, class Kernel, class Kv, int Block>
Transformer<Attention, Kernel, Kv, Block>::Transformer(const Model& model, const Limits& limits) {
  if (model.config.attention != Attention::variant)
    fail("%s: this model uses %s, this binary was built for %s: make ATTENTION=%s", model.path.c_str(),
         name(model.config.attention), name(Attention::variant), name(model.config.attention));
  impl_ = std::make_unique<Impl>(model, limits);
}

template <class Attention, class Kernel, class Kv, int Block>
Transformer<Attention, Kernel, Kv, Block>::~Transformer() = default;

template <class Attention, class Kernel, class Kv, int Block>
float* Transformer<Attention, Kernel, Kv, Block>::forward(const Batch& batch) {
#pragma omp parallel
  impl_->forward(batch);
  return impl_->logits.data();
}

template <class Attention, class Kernel, class Kv, int Block>
KVCache<Kv, Block>& Transformer<Attention, Kernel, Kv, Block>::cache() {
  return impl_->cache;
}

template <class Attention, class Kernel, class Kv, int Block>
CacheShape Transformer<Attention, Kernel, Kv, Block>::cache_shape(const Config& config, const Limits& limits) {
  return Attention::cache_shape(config, limits.n_blocks, Block ? Block : limits.context);
}

template <class Attention, class Kernel, class Kv, int Block>
size_t Transformer<Attention, Kernel, Kv, Block>::kv_bytes_per_token(const Config& config) {
  return KVCache<Kv, Block>::bytes_per_token(Attention::cache_shape(config, 1, 1));
}

template <class Attention, class Kernel, class Kv, int Block>
size_t Transformer<Attention, Kernel, Kv, Block>::kv_bytes(const Config& config, const Limits& limits) {
  return KVCache<Kv, Block>::bytes(cache_shape(config, limits));
}

template <class Attention, class Kernel, class Kv, int Block>
size_t Transformer<Attention, Kernel, Kv, Block>::activation_bytes(const Config& config, const Limits& limits) {
  const size_t rope_dim =
      static_cast<size_t>(config.attention == Variant::mla ? config.qk_rope_head_dim : config.head_dim);
  const size_t floats_per_token =
      3 * static_cast<size_t>(config.dim) + MlpBlock::floats_per_token(config) + config.rope_scale.size() * rope_dim;
  return sizeof(float) *
             (static_cast<size_t>(limits.max_tokens) * floats_per_token + area(limits.max_logits, config.vocab_size)) +
         Attention::bytes(config, limits) + workspace_bytes<Attention>(config, limits) +
         Attention::attention_bytes(config, limits, omp_get_max_threads());
}

#define INSTANTIATE(Attention, Kernel, Kv, Block) template class Transformer<Attention, Kernel, Kv, Block>;
FOR_EACH_TRANSFORMER(INSTANTIATE)
