// transformer.h: the forward pass: one function for prompt chunks, decode tokens and any mix of them.
#pragma once

#include "attention.h"
#include "model.h"
#include "kernels/step.h"

template <class Attention, class Kernel, class Kv, int Block>
class Transformer {
 public:
  // The model must outlive it. Throws Error when the model's variant is not Attention's, or memory cannot be
  // had.
  Transformer(const Model& model, const Limits& limits);
  ~Transformer();

  // One step: appends the batch's tokens to the cache and returns the logits of its logit_rows, [n_logits,
  // vocab_size], which stay until the next call (the sampler may change them). A row's logits depend on its
  // own sequence alone, bit for bit. n_logits 0: the classifier is skipped.
  float* forward(const Batch& batch);

  KVCache<Kv, Block>& cache();

  static CacheShape cache_shape(const Config& config, const Limits& limits);
  static size_t kv_bytes_per_token(const Config& config);
  // Bytes of the cache, and of everything else but the weights, before anything is allocated.
  static size_t kv_bytes(const Config& config, const Limits& limits);
  static size_t activation_bytes(const Config& config, const Limits& limits);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};
