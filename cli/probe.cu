// probe.cu: the GPU, measured: the bytes that a copy reads and writes, what matmul makes of large matrices, a launch.
#include <algorithm>
#include <chrono>

#include "cli/probe_matmul.h"
#include "kernels/gpu.h"

// Of the calling thread alone, until what f puts on the stream is done; the first time loads the kernels.
double median_seconds(Threads&, int, const std::function<void(const Team&)>& f, const std::function<void()>& before) {
  constexpr size_t REPEATS = 7;
  std::vector<double> runs;
  while (runs.size() < REPEATS) {
    before();
    synchronize();
    const auto began = std::chrono::steady_clock::now();
    f(Team{});
    synchronize();
    runs.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  std::nth_element(runs.begin(), runs.begin() + REPEATS / 2, runs.end());
  return runs[REPEATS / 2];
}

static double launch_seconds(Threads& threads) {
  constexpr int N = 100;
  Buffer<float> x(1);
  return median_seconds(threads, 1,
                        [&](const Team& team) {
                          for (int i = 0; i < N; i++) scale_and_cap(team, x.data(), 1, 1, 0);
                        }) /
         N;
}

Buffer<std::byte> memory_to_read(Threads&, size_t bytes) {
  return Buffer<std::byte>(bytes);
}

double read_bandwidth(Threads& threads, int, std::span<const std::byte> memory) {
  constexpr int N = 8;  // so that the way to the GPU and back does not count
  Buffer<std::byte> copy(memory.size());
  const double seconds = median_seconds(threads, 1, [&](const Team&) {
    for (int i = 0; i < N; i++)
      CHECK_CUDA(cudaMemcpyAsync(copy.data(), memory.data(), memory.size(), cudaMemcpyDeviceToDevice, device_stream()));
  });
  return N * 2 * static_cast<double>(memory.size()) / seconds;
}

Machine probe(Threads& threads, int, const Model& model, int) {
  const auto speed = [&](WeightType type) {  // of a prompt's product, in which all of the GPU has work
    return matmul_speed(threads, 1, type, 8192, 4096, 1024);
  };
  Machine m{.name = kernel_level(),
            .source = "probed now",
            .memory = static_cast<double>(device_memory_available()),
            .products = work_of(model, {}, 0).products,
            .prompt_products = {},
            .attention = speed(*find_weight_type("bf16")),  // both are tensor cores' work of 16-bit numbers
            .launch = launch_seconds(threads)};
  m.prompt_attention = m.attention;
  for (size_t type = 0; type < m.products.size(); type++)
    if (m.products[type] > 0) m.products[type] = speed(static_cast<WeightType>(type));
  m.prompt_products = m.products;
  return m;
}

// Over the largest matrix, or a part of it.
void probe_step(Machine& machine, Threads& threads, int, const std::vector<Matrix>& matrices, const Config&,
                const AttentionSpeed&, int) {
  constexpr size_t MOST = size_t{128} << 20;
  const Matrix& m = *std::ranges::max_element(matrices, {}, [](const Matrix& one) { return bytes_of(one); });
  machine.bandwidth = read_bandwidth(threads, 1, {m.data, std::min(MOST, static_cast<size_t>(bytes_of(m)))});
}
