// explain.h: one token's step as shapes, multiply-adds and bytes: --explain.
#pragma once

#include "cli/session.h"

// What attention is handed: heads that ask, heads that are kept, the widths of their rows.
struct AttentionWidths {
  int n_heads, n_kv_heads, k_dim, v_dim;
  bool v_is_k;  // V is a part of K's row, and nothing more is kept (MLA)
};

// Prints the step of the prompt's last token, stage by stage: layer --layer, then all layers together.
void explain(const Session& session, const AttentionWidths& widths);
