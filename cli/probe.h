// probe.h: this machine for the speed calculation (host/roofline.h), found out in a few hundredths of a second.
#pragma once

#include <span>

#include "host/roofline.h"
#include "kernels/threads.h"

// Bytes a second that a team of `size` threads reads of this memory.
double read_bandwidth(Threads& threads, int size, std::span<const std::byte> memory);
// Memory that no cache holds.
Buffer<std::byte> memory_to_read(Threads& threads);

// A team of `size` threads: how it reads `memory`, multiplies matrices of the model's weight types, and waits.
Machine probe(Threads& threads, int size, std::span<const std::byte> memory, const Model& model);
