// What a large copy reads and writes of the device's memory a second, as JSON: what lab/gpu.py compares with.
//
//     copy_case
#include <algorithm>
#include <cstdio>
#include <thread>

#include "cli/probe.h"
#include "host/error.h"

int main() try {
  Threads threads(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  Buffer<std::byte> memory(size_t{1} << 30);
  fill(memory.data(), 1, memory.size());
  std::printf("{\"bytes/s\": %.0f}\n", read_bandwidth(threads, threads.most(), {memory.data(), memory.size()}));
} catch (const std::exception& e) {
  return std::fprintf(stderr, "copy_case: %s\n", e.what()), 1;
}
