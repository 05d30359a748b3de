// dequantize TYPE N K: a matrix [N, K] as the model file holds it, from standard input; its weights as float32, after
// it was packed and unpacked, to standard output.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/device.h"
#include "kernels/matmul.h"

int main(int argc, char** argv) {
  const auto type = argc == 4 ? find_weight_type(argv[1]) : std::nullopt;
  if (!type) return 2;
  const int n = std::atoi(argv[2]), k = std::atoi(argv[3]);
  std::vector<char> source(static_cast<size_t>(n) * static_cast<size_t>(k) * 4);
  source.resize(std::fread(source.data(), 1, source.size(), stdin));
  Buffer<std::byte> packed(packed_bytes(*type, n, k));
  for (int panel = 0; panel < panels(n); panel++)
    if (!pack({*type, n, k, source.data()}, false, panel, packed.data())) return 1;
  std::fprintf(stderr, "%zu", packed.size());
  std::vector<float> row(static_cast<size_t>(k));
  for (int i = 0; i < n; i++) {
    unpack_row({*type, n, k, 1, packed.data()}, i, row.data());
    std::fwrite(row.data(), sizeof(float), row.size(), stdout);
  }
}
