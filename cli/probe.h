// probe.h: this machine for the speed calculation (host/roofline.h), found out in a few tenths of a second.
#pragma once

#include <functional>
#include <span>

#include "host/roofline.h"
#include "host/sampler.h"
#include "kernels/threads.h"

// Seconds of f(team) on a team of `size` threads: the median of several runs, before() called before each.
double median_seconds(
    Threads& threads, int size, const std::function<void(const Team&)>& f, const std::function<void()>& before = [] {});
// Bytes a second that a team of `size` threads reads of this memory.
double read_bandwidth(Threads& threads, int size, std::span<const std::byte> memory);
constexpr size_t NOT_CACHED = size_t{512} << 20;  // bytes that no cache holds
// Memory of its own, all of it written once.
Buffer<std::byte> memory_to_read(Threads& threads, size_t bytes = NOT_CACHED);

// A team of `size` threads: how it multiplies matrices of the model's weight types by the rows of a decode step and of
// a prompt, and how long a stage takes that has next to nothing to do.
Machine probe(Threads& threads, int size, const Model& model, int decode_rows);
// Seconds for each logit between a step and the next: it is checked and hashed, and a token is drawn.
double logit_seconds(const SamplerOptions& options, int vocab_size);

// FLOP/s of this build's attention, of the last `tokens` of a sequence of `context`: cli/probe_attention.h. before() is
// called before each of its runs.
using AttentionSpeed = std::function<double(Threads& threads, int size, const Config& config, int tokens, int context,
                                            const std::function<void()>& before)>;
// ... and how it gets through the matrices of a decode step and attends to this context, which take turns as in a step:
// what a cache holds of either until its next turn, it holds here.
void probe_step(Machine& machine, Threads& threads, int size, const std::vector<Matrix>& matrices, const Config& config,
                const AttentionSpeed& speed, int context);
