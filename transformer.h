// transformer.h: the forward pass: one function for prompt chunks, decode tokens and any mix of them.
//
// Device-neutral: every line calls a stage, and every thread of the team runs every line (the stages share their work
// among the team and end with a barrier).
#pragma once

#include "kernels/logits.h"
#include "kernels/mlp.h"
#include "kernels/threads.h"
#include "variants.h"

template <class Attention, class Kernel, class Kv, int Block>
class Transformer {
 public:
  // Bytes of the cache, and of everything else but the weights.
  struct Bytes {
    size_t kv, activations;
  };
  // Of a rank with this part of the model. Throws Error as check does.
  static Bytes bytes(const Model& model, const Limits& limits, const Part& part) {
    check(model);
    Arena kv, activations;
    Parts(model, own_config(model, part), limits, kv, activations, nullptr);
    return {kv.bytes(), activations.bytes()};
  }
  static Bytes bytes(const Model& model, const Limits& limits) { return bytes(model, limits, model.part); }
  static size_t kv_bytes_per_token(const Model& model, const Part& part) {
    return KVCache<Kv, Block>::bytes_per_token(Attention::cache_shape(own_config(model, part), 1, 1));
  }

  // Throws Error where the model's variant is not Attention.
  static void check(const Model& model) {
    if (model.config.attention != Attention::name)
      fail("%s: this model uses %s, this binary was built for %s: make ATTENTION=%s", model.path.c_str(),
           model.config.attention.c_str(), Attention::name, model.config.attention.c_str());
  }

  // The model must outlive it, and so must the ranks, which a part of a model needs. Throws Error as check does, or
  // where memory cannot be had.
  Transformer(const Model& model, const Limits& limits, Ranks* ranks = nullptr)
      : Transformer(model, limits, bytes(model, limits), ranks) {}

  // One step: appends the batch's tokens to the cache and returns the logits of its logit_rows, [n_logits,
  // vocab_size], which stay until the next call. A row's logits depend on its own sequence alone, bit for bit. n_logits
  // 0: the classifier is skipped. Throws Error for more threads than limits.max_threads.
  const float* forward(const Batch& batch, Threads& threads, int n_threads) {
    if (n_threads > limits_.max_threads)
      fail("a step of %d threads, in memory that was made for %d", n_threads, limits_.max_threads);
    parts_.batch.run(batch, threads, n_threads,
                     [&](const Team& team, const Batch& on_device) { step(team, on_device, batch); });
    return parts_.logits.host();
  }

  KVCache<Kv, Block>& cache() { return parts_.cache; }
  // Taken: what bytes() said.
  Bytes taken() const { return {kv_.bytes(), activations_.bytes()}; }

 private:
  Transformer(const Model& model, const Limits& limits, const Bytes& planned, Ranks* ranks)
      : model_(model),
        own_(own_config(model, model.part)),
        limits_(limits),
        kv_(planned.kv),
        activations_(planned.activations),
        parts_(model, own_, limits, kv_, activations_, ranks) {}

  // The config with the heads of this part alone.
  static Config own_config(const Model& model, const Part& part) {
    Config own = model.config;
    Attention::take_heads(own, part);
    return own;
  }

  void step(const Team& team, const Batch& batch, const Batch& host) {
    Parts& p = parts_;
    const Config& c = own_;
    const Step step{team, c, batch, host, p.angles, p.x, p.h, p.y, p.matmul_workspace, p.gather};
    p.cache.copy_blocks(team, batch);
    p.gather.embed(team, model_, batch, p.x);
    // The longest that a sequence may become chooses, so that no key has to rotate anew as a text grows.
    const bool long_context = c.original_seq_len > 0 && limits_.context > c.original_seq_len;
    for (size_t i = 0; i < p.angles.size(); i++)
      rope_angles(team, batch, long_context ? model_.rope[i].long_inv_freq : model_.rope[i].inv_freq, p.angles[i].n,
                  c.rope_scale[i], p.angles[i].cos, p.angles[i].sin);
    const auto input_norm = [&](int l) {  // of layer l; behind the last one of the classifier
      return l < c.n_layers ? model_.layers[static_cast<size_t>(l)].attention_norm : model_.final_norm;
    };
    step.norm_x(input_norm(0));
    for (int l = 0; l < c.n_layers; l++) {  // each stage makes y of h, which is added to x
      const Layer& layer = model_.layers[static_cast<size_t>(l)];
      p.attention.template forward<Kernel>(l, layer, step, p.cache, p.attention_workspace);
      step.add_y(layer.attention_post_norm, layer.mlp_norm);
      p.mlp.forward(l, layer, step);
      step.add_y(layer.mlp_post_norm, input_norm(l + 1));
    }
    p.logits.forward(model_, step);
  }

  // All that takes memory; with arenas that only count, what it would take.
  struct Parts {
    Workspace matmul_workspace, attention_workspace;
    DeviceBatch batch;
    KVCache<Kv, Block> cache;
    Attention attention;
    MlpStage mlp;
    LogitsStage logits;
    Gather gather;
    float *x, *h, *y;            // [max_tokens, dim]
    std::vector<Angles> angles;  // one for each RoPE table

    Parts(const Model& m, const Config& own, const Limits& limits, Arena& kv, Arena& arena, Ranks* ranks)
        : batch(limits),
          cache(kv, Attention::cache_shape(own, limits.n_blocks, Block ? Block : limits.context)),
          attention(arena, matmul_workspace, own, limits),
          mlp(arena, matmul_workspace, m.config, limits),
          logits(arena, matmul_workspace, m.config, limits),
          gather(arena, matmul_workspace, m, Attention::head_runs(m.config), limits, ranks),
          x(arena.take<float>(area(limits.max_tokens, m.config.dim))),
          h(arena.take<float>(area(limits.max_tokens, m.config.dim))),
          y(arena.take<float>(area(limits.max_tokens, m.config.dim))) {
      for (const Model::Rope& table : m.rope) {
        const size_t n = area(limits.max_tokens, table.n);
        angles.push_back({table.n, arena.take<float>(n), arena.take<float>(n)});
      }
      attention_workspace.plan(Attention::template workspace_bytes<Kernel>(own, limits));
      matmul_workspace.allocate(arena);
      attention_workspace.allocate(arena);
    }
  };

  const Model& model_;
  Config own_;
  Limits limits_;
  Arena kv_, activations_;
  Parts parts_;
};
