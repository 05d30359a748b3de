// logits.cpp: the classifier, one more product; no line here knows the device.
#include "kernels/logits.h"

LogitsStage::LogitsStage(Arena& arena, Workspace& workspace, const Config& c, const Limits& limits)
    : logits_(arena.take<float>(area(limits.max_logits, c.vocab_size))),
      copy_(logits_, area(limits.max_logits, c.vocab_size)) {
  workspace.plan(matmul_workspace_bytes(limits.max_tokens, c.dim));
}

void LogitsStage::forward(const Model& model, const Step& step) const {
  const Config& c = model.config;
  const int n = step.batch.n_logits;
  if (n == 0) return;
  Product classifier = step.columns(model.lm_head, step.h, n, logits_, c.vocab_size);
  classifier.x_rows = step.batch.n_tokens;
  classifier.gather = step.batch.logit_rows;
  matmul(step.team, &classifier, 1, step.workspace);
  step.gather.columns(step.team, logits_, n, c.vocab_size);
  if (c.logit_scale != 1.0f || c.logit_softcap > 0)
    scale_and_cap(step.team, logits_, area(n, c.vocab_size), c.logit_scale, c.logit_softcap);
  if (step.team.rank == 0) copy_.begin(area(n, c.vocab_size));
}
