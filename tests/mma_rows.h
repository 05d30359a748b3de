// mma_rows.h: many small products on tensor cores, for mma_test.
#pragma once

#include <cstdint>

// a times b, added to d. Elements of a and b are 16 bits: f16, or bf16.
struct MmaTile {
  uint16_t a[16][16];  // [rows, k]
  uint16_t b[8][16];   // [columns, k]
  float d[16][8];      // [rows, columns]
};

// tiles [n], in device memory: a warp each.
void multiply_tiles(bool bf16, MmaTile* tiles, int n);
