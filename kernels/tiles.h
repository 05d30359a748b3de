// tiles.h: rows of the cache on their way into shared memory: while one tile is at work the next is copied, without a
// register and without waiting, and the block table of the one after is read.
#pragma once

#include "kernels/kv_gpu.h"

constexpr int TILE = 32;  // tokens: a lane looks up the block of each

// Positions begin .. end - 1.
struct Span {
  int begin = 0, end = 0;
};

// Rows in shared memory; q8's scales lie behind a row's elements.
struct TileRows {
  std::byte* start;
  int stride, scales;
  __device__ std::byte* row(int token) const { return start + token * stride; }
  __device__ float scale(int token, int group) const {
    return f16_to_float(load_vector<uint16_t>(row(token) + scales + group * 2));
  }
};

// Bytes of n q8 elements' scales.
template <class Kv>
constexpr int scale_bytes(int n) {
  return std::is_same_v<Kv, KvQ8> ? n / KvQ8::QUANT_GROUP * 2 : 0;
}

// n bytes of lane i's `from`, and zeros up to ALL, go to row i of the tile, in pieces, all threads of the block taking
// their share. Rows outside `valid` become zeros.
template <int PIECE, int ALL>
__device__ void copy_rows(const std::byte* from, int n, Span valid, std::byte* to, int stride) {
  constexpr int PIECES = ALL / PIECE;
  static_assert(ALL % PIECE == 0);
  const uint64_t address = reinterpret_cast<uint64_t>(from);
  for (int i = static_cast<int>(threadIdx.x); i < TILE * PIECES; i += static_cast<int>(blockDim.x)) {
    const int row = i / PIECES, at = i % PIECES * PIECE;
    const auto* source = reinterpret_cast<const std::byte*>(__shfl_sync(WHOLE_WARP, address, row));
    const bool is_there = at < n && row >= valid.begin && row < valid.end;
    if constexpr (PIECE == 16)
      cp_async_16(to + row * stride + at, source + (is_there ? at : 0), is_there);
    else
      cp_async_4(to + row * stride + at, source + (is_there ? at : 0), is_there);
  }
}

// The tiles of a context, in memory for two. L: K and V, the widths up to which rows are filled with zeros, and bytes
// from a row to the next, K_STRIDE and V_STRIDE.
template <class L>
struct Tiles {
  using Kv = typename L::Kv;
  using Rows = HeadRows<Kv, 0>;
  Rows rows;
  CacheShape shape;
  const int* table;  // the sequence's; null: there is one block
  Span is_there;     // positions; what lies before or behind may be another's
  bool v_is_k;
  std::byte* memory;  // [2, L::tile_bytes(v_is_k)]
  int block = 0;      // of the lane's token in the next tile

  // Of the tokens first .. first + TILE - 1.
  __device__ std::byte* tile(int first) const { return memory + first / TILE % 2 * L::tile_bytes(v_is_k); }
  __device__ TileRows keys(int first) const { return {tile(first), L::K_STRIDE, L::K * L::BYTES}; }
  __device__ TileRows values(int first) const {
    if (v_is_k) return keys(first);
    return {tile(first) + TILE * L::K_STRIDE, L::V_STRIDE, L::V * L::BYTES};
  }

  __device__ void find_blocks(int first) {
    const int token = first + lane_id();
    block = table && token >= is_there.begin && token < is_there.end ? table[token / shape.block_size] : 0;
  }

  // Begins the copy of a tile whose blocks were found, and finds those of the next. Behind the end it is a copy of
  // nothing, so that a wait for all but the last one means the same.
  __device__ void start_copy(int first) {
    if (first < is_there.end) {
      const int slot = (first + lane_id()) % shape.block_size;
      const Span valid{is_there.begin - first, is_there.end - first};
      copy<L::K>(rows.k(block, slot), rows.k_scales(block, slot), shape.k_dim, valid, keys(first));
      if (!v_is_k) copy<L::V>(rows.v(block, slot), rows.v_scales(block, slot), shape.v_dim, valid, values(first));
    }
    cp_async_commit();
    find_blocks(first + TILE);
  }
  template <int DIM>
  __device__ void copy(const std::byte* row, const std::byte* scales, int dim, Span valid, const TileRows& to) const {
    copy_rows<CHUNK, DIM * L::BYTES>(row, static_cast<int>(Rows::stride(dim)), valid, to.start, to.stride);
    if constexpr (Rows::IS_QUANTISED)
      copy_rows<4, scale_bytes<Kv>(DIM)>(scales, static_cast<int>(Rows::scales(dim)) * 2, valid, to.start + to.scales,
                                         to.stride);
  }
};
