// probe.cu: the GPU, measured: the bytes that a copy reads and writes, what matmul makes of large matrices, a launch.
#include <algorithm>
#include <chrono>

#include "cli/probe.h"
#include "kernels/gpu.h"
#include "kernels/step.h"

// Of the calling thread alone, until what f puts on the stream is done; the first time loads the kernels.
double median_seconds(Threads&, int, const std::function<void(const Team&)>& f) {
  constexpr size_t REPEATS = 7;
  std::vector<double> runs;
  while (runs.size() < REPEATS) {
    synchronize();
    const auto began = std::chrono::steady_clock::now();
    f(Team{});
    synchronize();
    runs.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  std::nth_element(runs.begin(), runs.begin() + REPEATS / 2, runs.end());
  return runs[REPEATS / 2];
}

// FLOP/s of a prompt's product, in which all of the GPU has work.
static double matmul_speed(Threads& threads, WeightType type) {
  constexpr int N = 8192, K = 4096, ROWS = 1024;
  const Buffer<std::byte> weights(packed_bytes(type, N, K));
  Linear linear;
  linear.weight = {type, N, K, 1, weights.data()};
  Buffer<float> x(area(ROWS, K)), y(area(ROWS, N));
  Workspace workspace;
  workspace.plan(matmul_workspace_bytes(ROWS, K));
  Arena scratch(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
  workspace.allocate(scratch);
  const Product p = product(linear, x.data(), ROWS, y.data());
  return 2.0 * N * K * ROWS / median_seconds(threads, 1, [&](const Team& team) { matmul(team, &p, 1, workspace); });
}

static double launch_seconds(Threads& threads) {
  constexpr int N = 100;
  Buffer<float> x(2);
  return median_seconds(threads, 1,
                        [&](const Team& team) {
                          for (int i = 0; i < N; i++) add(team, x.data(), x.data() + 1, 1, 1);
                        }) /
         N;
}

Buffer<std::byte> memory_to_read(Threads&) {
  return Buffer<std::byte>(size_t{1} << 29);
}

double read_bandwidth(Threads& threads, int, std::span<const std::byte> memory) {
  Buffer<std::byte> copy(memory.size());
  const double seconds = median_seconds(threads, 1, [&](const Team&) {
    CHECK_CUDA(cudaMemcpyAsync(copy.data(), memory.data(), memory.size(), cudaMemcpyDeviceToDevice, device_stream()));
  });
  return 2 * static_cast<double>(memory.size()) / seconds;
}

Machine probe(Threads& threads, int size, std::span<const std::byte> memory, const Model& model) {
  Machine m{
      .name = kernel_level(),
      .source = "probed now",
      .memory = static_cast<double>(device_memory_available()),
      .bandwidth = read_bandwidth(threads, size, memory),
      .products = work_of(model, {}, 0).products,
      .attention = matmul_speed(threads, *find_weight_type("bf16")),  // both are tensor cores' work of 16-bit numbers
      .launch = launch_seconds(threads)};
  m.prompt_attention = m.attention;
  for (size_t type = 0; type < m.products.size(); type++)
    if (m.products[type] > 0) m.products[type] = matmul_speed(threads, static_cast<WeightType>(type));
  return m;
}

void probe_attention(Machine&, Threads&, int, const Config&, const AttentionSpeed&) {}
