#include "tests/mma_rows.h"

#include "kernels/gpu.h"
#include "kernels/mma.h"

// As kernels/mma.h draws the operands.
template <class Type>
static __global__ void multiply(MmaTile* tiles) {
  MmaTile& tile = tiles[blockIdx.x];
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = load_vector<uint32_t>(&tile.a[g + i % 2 * 8][2 * t + i / 2 * 8]);
  for (int i = 0; i < 2; i++) b[i] = load_vector<uint32_t>(&tile.b[g][2 * t + i * 8]);
  for (int i = 0; i < 4; i++) d[i] = tile.d[g + i / 2 * 8][2 * t + i % 2];
  Type::mma(d, a, b);
  for (int i = 0; i < 4; i++) tile.d[g + i / 2 * 8][2 * t + i % 2] = d[i];
}

void multiply_tiles(bool bf16, MmaTile* tiles, int n) {
  launch(Team{}, bf16 ? multiply<BF16> : multiply<F16>, dim3(static_cast<unsigned>(n)), dim3(32), 0, tiles);
}
