// estimate.h: --estimate: what a model takes of a machine, and how fast it can be there, before anything runs.
#pragma once

#include <functional>

#include "cli/options.h"
#include "cli/probe.h"
#include "host/roofline.h"
#include "kernels/batch.h"

// Bytes of a model's activations, of any variant: the plan of the memory.
using Activations = std::function<size_t(const Model&, const Limits&)>;

// Prints the table, and writes --stats. kv: the KV type without --kv-type. Throws Usage, Error.
void estimate(const Options& options, Model& model, const char* kv, const Activations& activations,
              const AttentionSpeed& attention_speed);
// --gpu list
void list_machines();
