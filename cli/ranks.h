// ranks.h: what the ranks of a run tell each other beside what they gather in a step: who they are, what each takes,
// the batches. Rank 0 is the program; the others follow it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cli/options.h"
#include "kernels/batch.h"
#include "kernels/ranks.h"
#include "model.h"

// What a rank says of itself, once it has looked at the model file. Sent as it lies in memory.
struct RankMemory {
  char host[64] = {};
  uint64_t machine = 0, file = 0;             // hashes
  uint64_t free_bytes = 0, weight_bytes = 0;  // free: its share, where ranks share a machine
  int64_t threads = 0;
};

// First: rank 0 throws Error where another one runs another program, or on a machine with another byte order. Ranks
// that may use the same cores share them, where -t does not say otherwise.
void introduce(Ranks& ranks, Options& options);
// Rank 0 throws Error where another one has another file, or there are more ranks than heads.
std::vector<RankMemory> compare_models(Ranks& ranks, const Options& options, const Model& model);

void send_plan(Ranks& ranks, const Limits& limits);
Limits receive_plan(Ranks& ranks, int threads);

void send_batch(Ranks& ranks, const Batch& batch);
// Whether any rank's cache met what its type cannot hold.
bool any_overflowed(Ranks& ranks, bool own);
void send_end(Ranks& ranks);

// A rank that is not the first: computes each batch that comes, until the end does.
void follow(Ranks& ranks, const std::function<void(const Batch&)>& forward, const std::function<bool()>& overflowed);
