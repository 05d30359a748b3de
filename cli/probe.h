// probe.h: this machine for the speed calculation (host/roofline.h), found out in a few hundredths of a second.
#pragma once

#include <functional>
#include <span>

#include "host/roofline.h"
#include "kernels/threads.h"

// Seconds of f(team) on a team of `size` threads: the median of several runs.
double median_seconds(Threads& threads, int size, const std::function<void(const Team&)>& f);
// Bytes a second that a team of `size` threads reads of this memory.
double read_bandwidth(Threads& threads, int size, std::span<const std::byte> memory);
// Memory that no cache holds.
Buffer<std::byte> memory_to_read(Threads& threads);

// A team of `size` threads: how it reads `memory`, multiplies matrices of the model's weight types, and waits. On a GPU
// attention too.
Machine probe(Threads& threads, int size, std::span<const std::byte> memory, const Model& model);

// FLOP/s of this build's attention, of the last `tokens` of a sequence: cli/probe_attention.h.
using AttentionSpeed = std::function<double(Threads& threads, int size, const Config& config, int tokens)>;
// On the CPU: how fast the heads of this model attend.
void probe_attention(Machine& machine, Threads& threads, int size, const Config& config, const AttentionSpeed& speed);
