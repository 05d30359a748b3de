// explain.h: one token's step as shapes, multiply-adds and bytes: --explain.
#pragma once

#include "cli/session.h"

// Throws Error where the model has no layer --layer: of --explain and --heatmap.
void check_layer(const Session& session);
// Prints the step of the prompt's last token, stage by stage: layer --layer, then all layers together.
void explain(const Session& session);
