// logits.h: from the last hidden rows to logits, where somebody wants them.
#pragma once

#include <memory>

#include "kernels/step.h"

class LogitsStage {
 public:
  LogitsStage(Arena& arena, Workspace& workspace, const Config& config, const Limits& limits);

  // The logits of the batch's logit_rows: norm, classifier, scale and cap. None are wanted: nothing is computed.
  void forward(const Model& model, const Step& step) const;

  // [n_logits, vocab_size] on the host, until the next step; the sampler may change them.
  float* host() const;

 private:
  float* logits_;                  // [max_logits, vocab_size]
  std::shared_ptr<float[]> copy_;  // the same on the host; null on the CPU
};
