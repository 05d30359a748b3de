// Attention alone, beside what the machine can do: bytes of the cache read per second (decode) against the read
// bandwidth, FLOP per second (prefill, MLA) against the multiply-add peak, all measured in this run. Best of several
// repetitions.
//
//     make build/test/native/attention_bench && build/test/native/attention_bench [threads]
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "attention.h"

namespace {

size_t at(int n) {
  return static_cast<size_t>(n);
}

// The shortest time of `work`, run by all threads of a team, in seconds.
double best_seconds(int n_threads, const std::function<void()>& work, int repetitions = 7) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
#pragma omp parallel num_threads(n_threads)
  for (int i = 0; i < repetitions; i++) {
#pragma omp barrier
    const Clock::time_point start = Clock::now();
    work();
#pragma omp barrier
#pragma omp master
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

volatile float sink;

double read_bandwidth(int n_threads) {
  const int n = 1 << 26;
  Buffer<float> memory(at(n));
  std::fill_n(memory.data(), n, 1.0f);
  const double seconds = best_seconds(n_threads, [&] {
    simd::F32 sum[8] = {};
#pragma omp for schedule(static)
    for (int i = 0; i < n; i += 8 * simd::LANES)
      for (int j = 0; j < 8; j++) sum[j] = simd::add(sum[j], simd::load(memory.data() + i + j * simd::LANES));
    for (const simd::F32& x : sum) sink = simd::sum(x);
  });
  return 4.0 * n / seconds;
}

double fma_peak(int n_threads) {
  const int n = 1 << 20, chains = 12;
  const double seconds = best_seconds(n_threads, [&] {
    simd::F32 x[chains];
    for (int j = 0; j < chains; j++) x[j] = simd::set(static_cast<float>(j));
    const simd::F32 a = simd::set(0.999f), b = simd::set(1e-3f);
    for (int i = 0; i < n; i++)
      for (int j = 0; j < chains; j++) x[j] = simd::fma(x[j], a, b);
    for (const simd::F32& y : x) sink = simd::sum(y);
  });
  return 2.0 * n * chains * simd::LANES * n_threads / seconds;
}

struct Limits {
  double bandwidth, peak;
};

// n_new tokens of one sequence at the end of a context, over `layers` layers, so that the cache is not found in a CPU
// cache.
template <class Kernel, class Kv, int Block>
void bench(const char* name, AttentionShape s, int context, int n_new, int layers, int n_threads,
           const Limits& limits) {
  s.scale = 0.1f;
  const int block_size = Block ? Block : context, n_blocks = (context + block_size - 1) / block_size;
  KVCache<Kv, Block> cache({layers, s.n_kv_heads, s.k_dim, s.v_is_k ? 0 : s.v_dim, n_blocks, block_size});
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto filled = [&](int n) {
    std::vector<float> x(at(n));
    for (float& v : x) v = normal(random);
    return x;
  };
  std::vector<int> table(at(n_blocks)), slots(at(context)), positions(at(context));
  for (int b = 0; b < n_blocks; b++) table[at(b)] = b;
  std::shuffle(table.begin(), table.end(), random);
  for (int t = 0; t < context; t++)
    slots[at(t)] = table[at(t / block_size)] * block_size + t % block_size, positions[at(t)] = t;
  Batch batch;
  batch.n_tokens = context, batch.n_sequences = 1, batch.slot_mapping = slots.data();
  const std::vector<float> k = filled(context * s.n_kv_heads * s.k_dim), v = filled(context * s.n_kv_heads * s.v_dim);
  for (int l = 0; l < layers; l++) cache.append(l, batch, k.data(), s.v_is_k ? nullptr : v.data());

  const int starts[] = {0, n_new}, lengths[] = {context};
  batch.n_tokens = n_new, batch.positions = positions.data() + context - n_new, batch.query_start = starts;
  batch.context_len = lengths, batch.block_table = table.data(), batch.max_blocks = n_blocks;
  const std::vector<float> q = filled(n_new * s.n_heads * s.k_dim);
  std::vector<float> out(at(n_new * s.n_heads * s.v_dim));
  AttentionWorkspace workspace(AttentionWorkspace::bytes(s, n_new, context, n_threads));
  const double seconds = best_seconds(n_threads, [&] {
    for (int l = 0; l < layers; l++) attend<Kernel>(q.data(), cache, l, batch, s, out.data(), workspace);
  });
  const double bytes = double(cache.bytes_per_token(cache.shape())) * context;
  const double pairs = double(n_new) * (context - (n_new - 1) / 2.0);
  const double flop = 2 * pairs * s.n_heads * (s.k_dim + s.v_dim) * layers;
  const double bound = std::max(bytes / limits.bandwidth, flop / limits.peak);
  std::printf("%-34s %-4s %5s %9.3f ms %7.1f GB/s (%3.0f %%) %7.1f GFLOP/s (%3.0f %%)   %3.0f %% of the bound\n", name,
              Kv::name, Block ? "paged" : "", seconds * 1e3, bytes / seconds / 1e9,
              100 * bytes / seconds / limits.bandwidth, flop / seconds / 1e9, 100 * flop / seconds / limits.peak,
              100 * bound / seconds);
}

AttentionShape shape(int n_heads, int n_kv_heads, int k_dim, int v_dim, bool v_is_k = false) {
  AttentionShape s;
  s.n_heads = n_heads, s.n_kv_heads = n_kv_heads, s.k_dim = k_dim, s.v_dim = v_dim, s.v_is_k = v_is_k;
  return s;
}

}  // namespace

int main(int argc, char** argv) {
  const int n = argc > 1 ? std::atoi(argv[1]) : omp_get_num_procs();
  const Limits limits{read_bandwidth(n), fma_peak(n)};
  std::printf("%d threads: reads %.1f GB/s, multiply-add %.1f GFLOP/s\n", n, limits.bandwidth / 1e9, limits.peak / 1e9);
  const AttentionShape smollm2 = shape(9, 3, 64, 64), mha = shape(9, 9, 64, 64), mqa = shape(4, 1, 256, 256);
  const AttentionShape llama = shape(32, 8, 128, 128), mla = shape(16, 1, 576, 512, true),
                       expanded = shape(16, 16, 192, 128), smollm2_as_mla = shape(9, 1, 384, 192, true);
  bench<Flash, KvF16, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, n, limits);
  bench<Flash, KvF16, 16>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, n, limits);
  bench<Flash, KvF16, 16>("decode 4096, 32/8 heads of 128", llama, 4096, 1, 8, n, limits);
  bench<Flash, KvQ8, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, n, limits);
  bench<Flash, KvBF16, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, n, limits);
  bench<Flash, KvF32, 0>("decode 4096, 9/3 heads of 64", smollm2, 4096, 1, 30, n, limits);
  bench<Flash, KvF16, 0>("decode 128, 9/3 heads of 64", smollm2, 128, 1, 30, n, limits);
  bench<Flash, KvF16, 0>("decode 4096, 9/9 heads of 64", mha, 4096, 1, 16, n, limits);
  bench<Flash, KvF16, 0>("decode 4096, 4/1 heads of 256", mqa, 4096, 1, 18, n, limits);
  bench<Flash, KvF16, 0>("decode 4096, 32/8 heads of 128", llama, 4096, 1, 8, n, limits);
  bench<Flash, KvF16, 0>("decode 4096, MLA 16, 512 + 64", mla, 4096, 1, 16, n, limits);
  bench<Flash, KvF32, 0>("decode 4096, MLA 16, 512 + 64", mla, 4096, 1, 16, n, limits);
  bench<Flash, KvF16, 0>("decode 4096, MLA 9, 192 + 192", smollm2_as_mla, 4096, 1, 30, n, limits);
  bench<Flash, KvF16, 0>("prefill 512, 9/3 heads of 64", smollm2, 512, 512, 30, n, limits);
  bench<Flash, KvF16, 0>("prefill 4096, 9/3 heads of 64", smollm2, 4096, 4096, 1, n, limits);
  bench<Flash, KvF16, 0>("prefill 512, 32/8 heads of 128", llama, 512, 512, 4, n, limits);
  bench<Flash, KvF16, 0>("prefill 512, 16/16 of 192 and 128", expanded, 512, 512, 4, n, limits);
  bench<Flash, KvF16, 0>("prefill 512, MLA 16, 512 + 64", mla, 512, 512, 1, n, limits);
  bench<Naive, KvF16, 0>("naive decode 4096, 9/3 of 64", smollm2, 4096, 1, 30, n, limits);
}
