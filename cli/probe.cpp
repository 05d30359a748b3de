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

constexpr size_t WALKS = 9;  // ... through parts of the model

std::atomic<float> sink;  // what is computed is used, or the loop would go

// Sum of n floats (a multiple of 4 registers): four chains of additions, so that memory and not the adder is the limit.
float sum_of(const float* x, size_t n) {
  simd::F32 sum[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  for (size_t i = 0; i < n; i += 4 * simd::LANES)
    for (int j = 0; j < 4; j++) sum[j] += simd::load(x + i + static_cast<size_t>(j) * simd::LANES);
  return simd::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

double seconds_of(Threads& threads, int size, const std::function<void(const Team&)>& f) {
  const auto began = std::chrono::steady_clock::now();
  threads.run(size, f);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

// Of a product of one small matrix, which is as much a stage as any: a call, its input converted, a barrier.
double stage_seconds(Threads& threads, int size, WeightType type) {
  constexpr int N = 32, K = 256;
  return 2.0 * N * K / matmul_speed(threads, size, type, N, K, 1);
}

// Bytes a second of the products of one row with these matrices, one after the other and again from the first on, as
// decode reads them: what a cache holds of them until their turn comes again, comes out of it. Of a stage's time what
// it takes without anything to read is left out: the calculation counts that apart.
double weight_bandwidth(Threads& threads, int size, const std::vector<Matrix>& matrices, double stage) {
  constexpr double MOST_BYTES = 128e6;  // of a run: some ms
  int n = 0, k = 0;
  for (const Matrix& m : matrices) n = std::max(n, m.n), k = std::max(k, m.k);
  Buffer<float> x(area(1, k)), y(area(1, n));
  std::fill_n(x.data(), k, 1.0f);
  Workspace workspace;
  workspace.plan(matmul_workspace_bytes(1, k));
  Arena scratch(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
  workspace.allocate(scratch);

  std::vector<double> speeds;
  for (size_t next = 0, repeat = 0; repeat < WALKS; repeat++) {
    std::vector<Linear> run;
    double bytes = 0;
    for (; run.empty() || (run.size() < matrices.size() && bytes < MOST_BYTES); next = (next + 1) % matrices.size()) {
      run.emplace_back().weight = matrices[next];
      bytes += bytes_of(matrices[next]);
    }
    const double seconds = seconds_of(threads, size, [&](const Team& team) {
      for (const Linear& linear : run) {
        const Product p = product(linear, x.data(), 1, y.data());
        matmul(team, &p, 1, workspace);
      }
    });
    speeds.push_back(bytes / std::max(seconds / 2, seconds - static_cast<double>(run.size()) * stage));
  }
  std::nth_element(speeds.begin(), speeds.begin() + WALKS / 2, speeds.end());
  return speeds[WALKS / 2];
}

}  // namespace

double median_seconds(Threads& threads, int size, const std::function<void(const Team&)>& f) {
  std::vector<double> runs;
  for (double all = 0; runs.size() < LEAST || (runs.size() < MOST && all < LONG); all += runs.back())
    runs.push_back(seconds_of(threads, size, f));
  std::nth_element(runs.begin(), runs.begin() + static_cast<ptrdiff_t>(runs.size() / 2), runs.end());
  return runs[runs.size() / 2];
}

Buffer<std::byte> memory_to_read(Threads& threads, size_t bytes) {
  Buffer<std::byte> memory(bytes);
  threads.run(threads.most(), [&](const Team& team) {
    const auto [first, last] = team.share(bytes);
    std::fill(memory.data() + first, memory.data() + last, std::byte{0});
  });
  return memory;
}

double read_bandwidth(Threads& threads, int size, std::span<const std::byte> memory) {
  constexpr size_t PIECE = size_t{1} << 16;
  const int pieces = static_cast<int>(memory.size() / PIECE);
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

Machine probe(Threads& threads, int size, const Model& model, const std::vector<Matrix>& matrices, int decode_rows) {
  constexpr int N = 512, ROWS = 64;  // a matrix that a cache holds, and rows that use each weight often enough
  const std::vector<double> used = work_of(model, {}, 0).products;
  Machine m{.name = "this machine",
            .source = "probed now",
            .memory = static_cast<double>(device_memory_available()),
            .products = used,
            .prompt_products = used};
  for (size_t i = 0; i < used.size(); i++) {
    if (used[i] == 0) continue;
    const auto type = static_cast<WeightType>(i);
    m.products[i] = matmul_speed(threads, size, type, N, N, decode_rows);
    m.prompt_products[i] = matmul_speed(threads, size, type, N, N, ROWS);
    m.launch = std::max(m.launch, stage_seconds(threads, size, type));
  }
  m.bandwidth = weight_bandwidth(threads, size, matrices, m.launch);
  return m;
}

void probe_attention(Machine& m, Threads& threads, int size, const Config& config, const AttentionSpeed& speed,
                     int context) {
  constexpr int PROMPT_ROWS = 16, LONG_CONTEXT = 1 << 20;  // tokens that share rows as well as more do
  m.attention = speed(threads, size, config, 1, context);
  m.prompt_attention = speed(threads, size, config, PROMPT_ROWS, LONG_CONTEXT);
}
