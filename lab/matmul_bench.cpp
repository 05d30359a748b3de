// matmul_bench.cpp: what matmul reaches on this machine: bytes of weights a second and arithmetic a second, for each
// type, at 1, 4, 32 and 512 rows, beside a plain read of the same bytes; then the products of one token of
// SmolLM2-135M.
//
//     matmul_bench [THREADS [TYPE]]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/threads.h"

namespace {

Threads* threads;  // main's

void all_threads(const std::function<void(const Team&)>& f) {
  threads->run(threads->most(), f);
}

const char* name(WeightType type) {
  return weight_format(type).name.data();
}

constexpr size_t WORKING_SET = size_t(192) << 20;  // of weights: past any cache

// The median time of f, in seconds.
double median_time(const std::function<void()>& f) {
  std::vector<double> times;
  double total = 0;
  while (times.size() < 3 || (total < 0.15 && times.size() < 101)) {
    const auto start = std::chrono::steady_clock::now();
    f();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    total += times.back();
  }
  std::nth_element(times.begin(), times.begin() + ptrdiff_t(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// Reads all bytes with every thread: 8 independent registers, so that only the memory is measured.
double read_time(const std::byte* data, size_t bytes) {
  constexpr size_t STEP = 64;
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  std::atomic<uint64_t> total = 0;
  const double t = median_time([&] {
    all_threads([&](const Team& team) {
      uint64_t sum[STEP] = {}, mine = 0;
      const auto [first, last] = team.share(bytes / 8 / STEP);
      for (size_t i = first; i < last; i++)
        for (size_t j = 0; j < STEP; j++) sum[j] += words[i * STEP + j];
      for (uint64_t s : sum) mine += s;
      total += mine;
    });
  });
  if (total == 42) std::printf(" ");  // keeps the loop
  return t;
}

struct Scratch {
  Arena memory;
  Workspace workspace;
  explicit Scratch(size_t bytes) : memory(bytes + 128) {
    workspace.plan(bytes);
    workspace.allocate(memory);
  }
};

Product product_of(const Matrix& w, const float* x, int rows, float* y) {
  Product p;
  p.weight = &w;
  p.x = x, p.x_rows = rows, p.x_stride = w.k;
  p.rows = rows, p.y = y, p.y_stride = w.n;
  return p;
}

// Weights that are numbers in every type: two bytes of 32 to 63 are a half float, 2^-7 to 2.
struct Weights {
  Buffer<std::byte> memory;
  std::vector<Matrix> matrices;
  Weights(WeightType type, int n, int k, int count) : memory(packed_bytes(type, n, k) * size_t(count)) {
    const size_t one = packed_bytes(type, n, k), elements = size_t(n) * size_t(k);
    std::vector<uint8_t> data(elements * 4);
    for (size_t i = 0; i < data.size(); i++) data[i] = uint8_t(32 | (i * 2654435761u >> 7 & 31));
    const TensorView view{type, n, k, data.data()};
    for (int i = 0; i < count; i++) {
      matrices.push_back({type, n, k, 1, memory.data() + one * size_t(i)});
      all_threads([&](const Team& team) {
        team.for_each(panels(n), [&](int p) { pack(view, false, p, memory.data() + one * size_t(i)); });
      });
    }
  }
};

void bench_shape(WeightType type, int n, int k) {
  const int count = std::max(1, int(WORKING_SET / packed_bytes(type, n, k)));
  const Weights weights(type, n, k, count);
  const size_t bytes = weights.memory.size();
  const double read = read_time(weights.memory.data(), bytes);
  std::printf("%-6s %5d x %-5d read %5.1f GB/s |", name(type), n, k, double(bytes) / read / 1e9);
  for (int rows : {1, 4, 32, 512}) {
    const int used = rows == 512 ? std::max(1, count / 8) : count;
    const std::vector<float> x(size_t(rows) * size_t(k), 0.5f);
    std::vector<float> y(size_t(rows) * size_t(n));
    const Scratch scratch(matmul_workspace_bytes(rows, k));
    const double t = median_time([&] {
      all_threads([&](const Team& team) {
        for (int i = 0; i < used; i++) {
          const Product p = product_of(weights.matrices[size_t(i)], x.data(), rows, y.data());
          matmul(team, &p, 1, scratch.workspace);
        }
      });
    });
    const double gb = double(bytes) * used / count / t / 1e9, gop = 2.0 * n * k * rows * used / t / 1e9;
    if (rows <= 4)
      std::printf(" %d row%s %5.1f GB/s (%3.0f %%)", rows, rows == 1 ? "" : "s", gb,
                  100 * gb * read / double(bytes) * 1e9);
    else
      std::printf(" %d rows %5.0f GOP/s", rows, gop);
    std::fflush(stdout);
  }
  std::printf("\n");
}

// The products of one step of SmolLM2-135M: 30 layers of q, k, v; o; gate, up; down; and the classifier.
void bench_smollm2(WeightType type) {
  constexpr int LAYERS = 30, DIM = 576, HIDDEN = 1536, KV = 192, VOCAB = 49152;
  const Weights q(type, DIM, DIM, LAYERS), k(type, KV, DIM, LAYERS), v(type, KV, DIM, LAYERS),
      o(type, DIM, DIM, LAYERS);
  const Weights gate(type, HIDDEN, DIM, LAYERS), up(type, HIDDEN, DIM, LAYERS), down(type, DIM, HIDDEN, LAYERS);
  const Weights classifier(type, VOCAB, DIM, 1);
  size_t bytes = 0;
  double read = 0;
  for (const Weights* w : {&q, &k, &v, &o, &gate, &up, &down, &classifier}) bytes += w->memory.size();
  {
    const Buffer<std::byte> all(bytes);
    std::memset(const_cast<std::byte*>(all.data()), 1, bytes);
    read = read_time(all.data(), bytes);
  }
  for (int rows : {1, 512}) {
    const std::vector<float> x(size_t(rows) * DIM, 0.5f), h(size_t(rows) * HIDDEN, 0.5f);
    std::vector<float> y(size_t(rows) * 4 * HIDDEN), logits(VOCAB);
    const Scratch scratch(matmul_workspace_bytes(rows, HIDDEN));
    const auto product = [&](const Weights& w, size_t l, const std::vector<float>& in, size_t out) {
      return product_of(w.matrices[l], in.data(), rows, y.data() + out * size_t(rows));
    };
    const double t = median_time([&] {
      all_threads([&](const Team& team) {
        for (size_t l = 0; l < LAYERS; l++) {
          const Product qkv[] = {product(q, l, x, 0), product(k, l, x, DIM), product(v, l, x, DIM + KV)};
          matmul(team, qkv, 3, scratch.workspace);
          const Product out = product(o, l, x, 0);
          matmul(team, &out, 1, scratch.workspace);
          const Product gate_up[] = {product(gate, l, x, 0), product(up, l, x, HIDDEN)};
          matmul(team, gate_up, 2, scratch.workspace);
          const Product back = product(down, l, h, 0);
          matmul(team, &back, 1, scratch.workspace);
        }
        const Product last = product_of(classifier.matrices[0], x.data(), 1, logits.data());
        matmul(team, &last, 1, scratch.workspace);
      });
    });
    if (rows == 1)
      std::printf("%-6s SmolLM2, 1 token: %.2f ms, %.0f tokens/s, %.1f GB/s (%.0f %% of a read)", name(type), t * 1e3,
                  1 / t, double(bytes) / t / 1e9, 100 * read / t);
    else
      std::printf("; 512 tokens: %.0f tokens/s\n", rows / t);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Threads all(argc > 1 ? std::max(1, std::atoi(argv[1])) : static_cast<int>(std::thread::hardware_concurrency()));
  threads = &all;
  std::printf("kernels: %s, %d threads\n", kernel_level(), threads->most());
  for (const WeightFormat& format : weight_formats()) {
    if (argc > 2 && argv[2] != format.name) continue;
    const WeightType type = *find_weight_type(format.name);
    bench_shape(type, 4096, 4096);
    if (576 % format.block != 0) continue;  // the shapes of SmolLM2-135M
    bench_shape(type, 1536, 576);
    bench_shape(type, 576, 1536);
    bench_shape(type, 192, 576);
    bench_shape(type, 49152, 576);
    bench_smollm2(type);
  }
}
