// Attention alone, beside what the machine can do: bytes of the cache read per second (decode) against the read
// bandwidth, FLOP per second (prefill, MLA) against the multiply-add peak, all measured in this run. Best of several
// repetitions.
//
//     make build/test/native/attention_bench && build/test/native/attention_bench [threads]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "attention.h"
#include "kernels/simd.h"
#include "kernels/threads.h"
#include "tests/batches.h"

namespace {

size_t at(int n) {
  return static_cast<size_t>(n);
}

// The shortest time of `work`, run by all threads of a team, in seconds.
double best_seconds(Threads& threads, const std::function<void(const Team&)>& work, int repetitions = 7) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  threads.run(threads.most(), [&](const Team& team) {
    for (int i = 0; i < repetitions; i++) {
      team.barrier();
      const Clock::time_point start = Clock::now();
      work(team);
      team.barrier();
      if (team.rank == 0) best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
  });
  return best;
}

volatile float sink;

double read_bandwidth(Threads& threads) {
  const int n = 1 << 26, registers = 8;
  const std::vector<float> memory(at(n), 1.0f);
  const double seconds = best_seconds(threads, [&](const Team& team) {
    simd::F32 sum[registers] = {};
    const auto [first, last] = team.share(n / (registers * simd::LANES));
    for (int i = first; i < last; i++)
      for (int j = 0; j < registers; j++)
        sum[j] = sum[j] + simd::load(memory.data() + (i * registers + j) * simd::LANES);
    for (const simd::F32& x : sum) sink = simd::sum(x);
  });
  return 4.0 * n / seconds;
}

double fma_peak(Threads& threads) {
  const int n = 1 << 20, chains = 12;
  const double seconds = best_seconds(threads, [&](const Team&) {
    simd::F32 x[chains];
    for (int j = 0; j < chains; j++) x[j] = simd::set(static_cast<float>(j));
    const simd::F32 a = simd::set(0.999f), b = simd::set(1e-3f);
    for (int i = 0; i < n; i++)
      for (int j = 0; j < chains; j++) x[j] = simd::fma(x[j], a, b);
    for (const simd::F32& y : x) sink = simd::sum(y);
  });
  return 2.0 * n * chains * simd::LANES * threads.most() / seconds;
}

struct Machine {
  double bandwidth, peak;
};

// n_new tokens of one sequence at the end of a context, over `layers` layers, so that the cache is not found in a CPU
// cache.
template <class Kernel, class Kv, int Block>
void bench(const char* name, AttentionShape s, int context, int n_new, int layers, Threads& threads,
           const Machine& machine) {
  s.scale = 0.1f;
  Batches batches(1, context, Block);
  const CacheShape cache_shape{
      layers, s.n_kv_heads, s.k_dim, s.v_is_k ? 0 : s.v_dim, batches.n_blocks(), batches.block_size()};
  Arena memory(bytes_of([&](Arena& arena) { KVCache<Kv, Block>(arena, cache_shape); }));
  KVCache<Kv, Block> cache(memory, cache_shape);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto filled = [&](int n) {
    std::vector<float> x(at(n));
    for (float& v : x) v = normal(random);
    return x;
  };
  const std::vector<float> k = filled(context * s.n_kv_heads * s.k_dim), v = filled(context * s.n_kv_heads * s.v_dim);
  for (int l = 0; l < layers; l++)
    cache.append(Team{}, l, batches.batch({{0, 0, context}}), {}, k.data(), s.v_is_k ? nullptr : v.data());

  const Batch& batch = batches.batch({{0, context - n_new, n_new}});
  const std::vector<float> q = filled(n_new * s.n_heads * s.k_dim);
  std::vector<float> out(at(n_new * s.n_heads * s.v_dim));
  Limits limits;
  limits.max_tokens = n_new, limits.context = context, limits.max_threads = threads.most();
  Workspace workspace;
  workspace.plan(Kernel::workspace_bytes(s, limits));
  Arena scratch(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
  workspace.allocate(scratch);
  const double seconds = best_seconds(threads, [&](const Team& team) {
    for (int l = 0; l < layers; l++) Kernel::attend(team, q.data(), cache, l, batch, s, out.data(), workspace);
  });
  const double bytes = double(cache.bytes_per_token(cache.shape())) * context;
  const double pairs = double(n_new) * (context - (n_new - 1) / 2.0);
  const double flop = 2 * pairs * s.n_heads * (s.k_dim + s.v_dim) * layers;
  const double bound = std::max(bytes / machine.bandwidth, flop / machine.peak);
  std::printf("%-34s %-4s %5s %9.3f ms %7.1f GB/s (%3.0f %%) %7.1f GFLOP/s (%3.0f %%)   %3.0f %% of the bound\n", name,
              Kv::name, Block ? "paged" : "", seconds * 1e3, bytes / seconds / 1e9,
              100 * bytes / seconds / machine.bandwidth, flop / seconds / 1e9, 100 * flop / seconds / machine.peak,
              100 * bound / seconds);
}

AttentionShape shape(int n_heads, int n_kv_heads, int k_dim, int v_dim, bool v_is_k = false) {
  AttentionShape s;
  s.n_heads = n_heads, s.n_kv_heads = n_kv_heads, s.k_dim = k_dim, s.v_dim = v_dim, s.v_is_k = v_is_k;
  return s;
}

}  // namespace

int main(int argc, char** argv) {
  Threads threads(argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency()));
  const Machine machine{read_bandwidth(threads), fma_peak(threads)};
  std::printf("%d threads: reads %.1f GB/s, multiply-add %.1f GFLOP/s\n", threads.most(), machine.bandwidth / 1e9,
              machine.peak / 1e9);
  const AttentionShape smollm2 = shape(9, 3, 64, 64), mha = shape(9, 9, 64, 64), mqa = shape(4, 1, 256, 256);
  const AttentionShape llama = shape(32, 8, 128, 128), mla = shape(16, 1, 576, 512, true),
                       expanded = shape(16, 16, 192, 128), smollm2_as_mla = shape(9, 1, 384, 192, true);
  bench<Flash, KvF16, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, threads, machine);
  bench<Flash, KvF16, 16>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, threads, machine);
  bench<Flash, KvF16, 16>("decode 4096, 32/8 heads of 128", llama, 4096, 1, 8, threads, machine);
  bench<Flash, KvQ8, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, threads, machine);
  bench<Flash, KvQ4, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, threads, machine);
  bench<Flash, KvBF16, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, threads, machine);
  bench<Flash, KvF32, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, threads, machine);
  bench<Flash, KvF16, 0>("decode 128, 9/3 heads of 64", smollm2, 128, 1, 30, threads, machine);
  bench<Flash, KvF16, 0>("decode 4096, 9/9 heads of 64", mha, 4096, 1, 16, threads, machine);
  bench<Flash, KvF16, 0>("decode 4096, 4/1 heads of 256", mqa, 4096, 1, 18, threads, machine);
  bench<Flash, KvF16, 0>("decode 4096, 32/8 heads of 128", llama, 4096, 1, 8, threads, machine);
  bench<Flash, KvF16, 0>("decode 4096, MLA 16, 512 + 64", mla, 4096, 1, 16, threads, machine);
  bench<Flash, KvF32, 0>("decode 4096, MLA 16, 512 + 64", mla, 4096, 1, 16, threads, machine);
  bench<Flash, KvF16, 0>("decode 4096, MLA 9, 192 + 192", smollm2_as_mla, 4096, 1, 30, threads, machine);
  bench<Flash, KvF16, 0>("prefill 512, 9/3 heads of 64", smollm2, 512, 512, 30, threads, machine);
  bench<Flash, KvF16, 0>("prefill 4096, 9/3 heads of 64", smollm2, 4096, 4096, 1, threads, machine);
  bench<Flash, KvF16, 0>("prefill 512, 32/8 heads of 128", llama, 512, 512, 4, threads, machine);
  bench<Flash, KvF16, 0>("prefill 512, 16/16 of 192 and 128", expanded, 512, 512, 4, threads, machine);
  bench<Flash, KvF16, 0>("prefill 512, MLA 16, 512 + 64", mla, 512, 512, 1, threads, machine);
  bench<Naive, KvF16, 0>("naive decode 4096, 9/3 of 64", smollm2, 4096, 1, 30, threads, machine);
}
