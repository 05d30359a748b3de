// What a decode step is measured against: bytes a second that all threads together read from memory, nothing kept.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "device.h"

int main() {
  const size_t n = (1u << 30) / sizeof(uint64_t);  // far beyond any cache
  Buffer<uint64_t> data(n);
  double best = 0;
  uint64_t sum = 0;
#pragma omp parallel for
  for (size_t i = 0; i < n; ++i) data[i] = i;
  for (int repeat = 0; repeat < 7; ++repeat) {
    const double start = omp_get_wtime();
#pragma omp parallel for simd reduction(+ : sum)
    for (size_t i = 0; i < n; ++i) sum += data[i];
    best = std::max(best, double(n * sizeof(uint64_t)) / (omp_get_wtime() - start) / 1e9);
  }
  printf("read bandwidth: %.1f GB/s (%d threads, sum %llu)\n", best, omp_get_max_threads(),
         static_cast<unsigned long long>(sum));
}
