// probe.cpp: this machine, measured. The median of several runs is taken, since the speed of decode is that of its
// usual step and not of its best one: what disturbs a run here now and then, disturbs steps as often.
#include "cli/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "attention.h"
#include "cli/probe_matmul.h"
#include "host/engine.h"
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

// Walks through matrices by products of one row, one after the other and again from the first on, as decode does.
class Walk {
 public:
  Walk(Threads& threads, int size, const std::vector<Matrix>& matrices, double stage)
      : threads_(threads), size_(size), matrices_(matrices), stage_(stage) {
    int n = 0, k = 0;
    for (const Matrix& m : matrices) n = std::max(n, m.n), k = std::max(k, m.k);
    x_ = Buffer<float>(area(1, k)), y_ = Buffer<float>(area(1, n));
    std::fill_n(x_.data(), k, 1.0f);
    workspace_.plan(matmul_workspace_bytes(1, k));
    scratch_ = Arena(bytes_of([&](Arena& arena) { workspace_.allocate(arena); }));
    workspace_.allocate(scratch_);
  }

  // The next part, at most a whole turn: its bytes a second. Of a stage's time what it takes without anything to read
  // is left out, since the calculation counts that apart.
  double go_on() {
    constexpr double MOST_BYTES = 128e6;  // some ms
    std::vector<Linear> part;
    double bytes = 0;
    for (; part.empty() || (part.size() < matrices_.size() && bytes < MOST_BYTES); next_++) {
      part.emplace_back().weight = matrices_[next_ % matrices_.size()];
      bytes += bytes_of(part.back().weight);
    }
    const double seconds = seconds_of(threads_, size_, [&](const Team& team) {
      for (const Linear& linear : part) {
        const Product p = product(linear, x_.data(), 1, y_.data());
        matmul(team, &p, 1, workspace_);
      }
    });
    return bytes / std::max(seconds / 2, seconds - static_cast<double>(part.size()) * stage_);
  }

 private:
  Threads& threads_;
  int size_;
  const std::vector<Matrix>& matrices_;
  double stage_;
  size_t next_ = 0;
  Buffer<float> x_, y_;
  Workspace workspace_;
  Arena scratch_;
};

}  // namespace

double median_seconds(Threads& threads, int size, const std::function<void(const Team&)>& f,
                      const std::function<void()>& before) {
  std::vector<double> runs;
  for (double all = 0; runs.size() < LEAST || (runs.size() < MOST && all < LONG); all += runs.back()) {
    before();
    runs.push_back(seconds_of(threads, size, f));
  }
  return percentile(runs, 0.5);
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

Machine probe(Threads& threads, int size, const Model& model, int decode_rows) {
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
  return m;
}

void probe_step(Machine& m, Threads& threads, int size, const std::vector<Matrix>& matrices, const Config& config,
                const AttentionSpeed& speed, int context) {
  constexpr int PROMPT_ROWS = 16;  // tokens that share rows as well as more do
  constexpr double MOST_CONTEXT = 1 << 16;
  Walk walk(threads, size, matrices, m.launch);
  std::vector<double> bandwidths;
  const int seen = static_cast<int>(std::min(MOST_CONTEXT, tokens_read(config, context)));
  m.attention = speed(threads, size, config, 1, seen, [&] { bandwidths.push_back(walk.go_on()); });
  m.bandwidth = percentile(bandwidths, 0.5);
  m.prompt_attention = speed(threads, size, config, PROMPT_ROWS, 2 * ATTENTION_SPLIT * size, [] {});
}
