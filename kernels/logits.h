// logits.h: from the last hidden rows to logits, where somebody wants them.
#pragma once

#include "kernels/step.h"

class LogitsStage {
 public:
  LogitsStage(Arena& arena, Workspace& workspace, const Config& config, const Limits& limits);

  // The logits of the batch's logit_rows of h: classifier, scale and cap. None are wanted: nothing is computed.
  void forward(const Model& model, const Step& step) const;

  // [n_logits, vocab_size] on the host, once the step is done and until the next; the sampler may change them.
  float* host() const { return copy_.wait(); }

 private:
  float* logits_;  // [max_logits, vocab_size]
  HostCopy copy_;  // the same
};
