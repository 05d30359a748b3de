// link.h: the speed calculation of a model that is cut over ranks (kernels/ranks.h):
//
//   step     that of a rank with the largest part  +  gathers x (latency + what comes in / bandwidth)
//
// Of N ranks each computes one N-th of what is gathered, and receives the rest.
#pragma once

#include <vector>

#include "host/roofline.h"

// Between each two ranks.
struct Link {
  double bandwidth = 0, latency = 0;  // bytes/s into a rank; s of a message
};

// What ranks gather in a step: its floats, and how often.
struct Gathered {
  const char* what;
  double floats = 0;  // of all ranks together
  int times = 0;
};
std::vector<Gathered> gathered_in(const Model& model, const StepShape& step);

double gather_seconds(const Gathered& gathered, int ranks, const Link& link);  // once

struct RanksTime {
  int ranks = 1;
  double weight_bytes = 0, kv_bytes_per_token = 0;  // of the rank with most
  double step = 0, gathering = 0;                   // s; the second is a part of the first
};
// kv: the KV type's name. Every rank is such a machine.
RanksTime ranks_time(const Model& model, const StepShape& step, const std::string& kv, int ranks,
                     const Machine& machine, const Link& link);
