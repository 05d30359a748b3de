// probe.cpp: this machine, measured. The median of several runs is taken, since the speed of decode is that of its
// usual step and not of its best one: what disturbs a run here now and then, disturbs steps as often.
#include "cli/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "cli/probe_matmul.h"
#include "kernels/simd.h"

namespace {

constexpr size_t LEAST = 5, MOST = 25;  // repeats: of what takes long, few
constexpr double LONG = 0.05;           // s

std::atomic<float> sink;  // what is computed is used, or the loop would go

// Sum of n floats (a multiple of 4 registers): four chains of additions, so that memory and not the adder is the limit.
float sum_of(const float* x, size_t n) {
  simd::F32 sum[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for (size_t i = 0; i < n; i += 4 * simd::LANES)
    for (int j = 0; j < 4; j++) sum[j] += simd::load(x + i + static_cast<size_t>(j) * simd::LANES);
  return simd::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

double barrier_seconds(Threads& threads, int size) {
  constexpr int N = 100;
  return median_seconds(threads, size,
                        [&](const Team& team) {
                          for (int i = 0; i < N; i++) team.barrier();
                        }) /
         N;
}

}  // namespace

double median_seconds(Threads& threads, int size, const std::function<void(const Team&)>& f) {
  std::vector<double> runs;
  for (double all = 0; runs.size() < LEAST || (runs.size() < MOST && all < LONG); all += runs.back()) {
    const auto began = std::chrono::steady_clock::now();
    threads.run(size, f);
    runs.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  std::nth_element(runs.begin(), runs.begin() + static_cast<ptrdiff_t>(runs.size() / 2), runs.end());
  return runs[runs.size() / 2];
}

Buffer<std::byte> memory_to_read(Threads& threads) {
  constexpr size_t PIECE = size_t{1} << 18, PIECES = 2048;  // 512 MB
  Buffer<std::byte> memory(PIECE * PIECES);
  threads.run(threads.most(), [&](const Team& team) {
    team.for_each(static_cast<int>(PIECES),
                  [&](int i) { std::fill_n(memory.data() + static_cast<size_t>(i) * PIECE, PIECE, std::byte{0}); });
  });
  return memory;
}

double read_bandwidth(Threads& threads, int size, std::span<const std::byte> memory) {
  constexpr size_t PIECE = size_t{1} << 16;
  const int pieces = static_cast<int>(memory.size() / PIECE);
  if (pieces == 0) return 0;
  const double seconds = median_seconds(threads, size, [&](const Team& team) {
    float sum = 0;
    team.for_each(pieces, [&](int i) {
      sum +=
          sum_of(reinterpret_cast<const float*>(memory.data() + static_cast<size_t>(i) * PIECE), PIECE / sizeof(float));
    });
    sink = sink + sum;
  });
  return static_cast<double>(pieces) * PIECE / seconds;
}

Machine probe(Threads& threads, int size, std::span<const std::byte> memory, const Model& model) {
  constexpr int N = 512, ROWS = 64;  // a matrix that a cache holds, and rows that use each weight often enough
  Machine m{.name = "this machine",
            .source = "probed now",
            .memory = static_cast<double>(device_memory_available()),
            .bandwidth = read_bandwidth(threads, size, memory),
            .products = work_of(model, {}, 0).products,
            .launch = barrier_seconds(threads, size)};
  for (size_t type = 0; type < m.products.size(); type++)
    if (m.products[type] > 0) m.products[type] = matmul_speed(threads, size, static_cast<WeightType>(type), N, N, ROWS);
  return m;
}

void probe_attention(Machine& m, Threads& threads, int size, const Config& config, const AttentionSpeed& speed) {
  constexpr int PROMPT_ROWS = 16;  // tokens that share rows as well as more do
  m.attention = speed(threads, size, config, 1);
  m.prompt_attention = speed(threads, size, config, PROMPT_ROWS);
}
