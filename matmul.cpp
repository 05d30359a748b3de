// matmul.cpp: linear layers on the CPU.
//
// The packed form: a row block is BLOCK = VECTORS * LANES output rows side by side in vector registers, k in order:
//
//   f32, f16   [k][BLOCK]
//   bf16       [k / 2, rounded up][BLOCK][2]        one 32-bit lane holds 2 k
//   q8         [k / 32] of { [8][BLOCK][4 k] as q + 128, scale [BLOCK] }
//   q4         [k / 32] of { [4][BLOCK][4 k in the low halves, those 16 later in the high ones], scale [BLOCK], min
//   [BLOCK] }
//
// so that a block is one stream of bytes, read in the order in which it lies, in whole cache lines (AVX-512).
#include "matmul.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>

#include "simd.h"

using simd::F32;
using simd::I32;
using simd::LANES;

namespace {

constexpr int VECTORS = 2;
constexpr int BLOCK = VECTORS * LANES;

size_t round_up(size_t n, size_t unit) {
  return (n + unit - 1) / unit * unit;
}

size_t block_bytes(DType type, int k) {
  const size_t inputs = static_cast<size_t>(k), groups = inputs / GROUP;
  switch (type) {
    case DType::f32:
      return round_up(inputs * BLOCK * 4, 64);
    case DType::f16:
      return round_up(inputs * BLOCK * 2, 64);
    case DType::bf16:
      return round_up((inputs + 1) / 2 * BLOCK * 4, 64);
    case DType::q8:
      return round_up(groups * BLOCK * (GROUP + 2), 64);
    case DType::q4:
      return round_up(groups * BLOCK * (GROUP / 2 + 4), 64);
  }
  return 0;
}

// --- activations in the weights' own arithmetic ----------------------------------------------------------------------

// 32 activations as int8: x = scale * q, scale = largest magnitude / 127.
struct Int8Group {
  float scale;
  float scaled_sum;       // scale * sum of q: the factor of a q4 group's minimum
  int32_t minus_128_sum;  // -128 * sum of q: takes back the 128 that q8 weights carry
  int8_t q[GROUP];
};

void convert(const float* x, int k, Int8Group* out) {
  for (int g = 0; g < k / GROUP; g++, x += GROUP, out++) {
    I32 bits = simd::set_i32(0);  // magnitudes compared as integers: a NaN is larger than any number and is not lost
    for (int i = 0; i < GROUP; i += LANES) bits = simd::max(bits, simd::magnitude_bits(simd::load(x + i)));
    const float amax = std::bit_cast<float>(simd::largest(bits));
    // Below this the scale would be subnormal and its inverse may be infinite: such a group counts as zeros.
    const F32 inverse = simd::set(amax < 127 * 0x1p-126f ? 0 : 127 / amax);
    I32 sums = simd::set_i32(0);
    for (int i = 0; i < GROUP; i += LANES) {
      const I32 q = simd::to_i32(simd::mul(simd::load(x + i), inverse));
      simd::store_i8(out->q + i, q);
      sums = simd::add(sums, q);
    }
    const int32_t sum = simd::sum(sums);
    out->scale = amax / 127;
    out->scaled_sum = out->scale * static_cast<float>(sum);
    out->minus_128_sum = -128 * sum;
  }
}

void convert(const float* x, int k, uint16_t* out) {
  for (int i = 0; i < k; i++) out[i] = float_to_bf16(x[i]);
  if (k % 2) out[k] = 0;
}

// --- kernels ---------------------------------------------------------------------------------------------------------
//
// multiply<R> runs one row block over R rows of activations: acc[r][v] = the products of row r with vector v of
// outputs. Per row and output the order of the additions is that of k, whatever R is.

// Register tiles: R rows x VECTORS accumulators, for int8 twice (int32 and float32), beside weights and one activation.
#if defined(SIMD_AVX512)
constexpr int FLOAT_ROWS = 12, INT8_ROWS = 6;
#elif defined(SIMD_AVX2)
constexpr int FLOAT_ROWS = 6, INT8_ROWS = 2;
#else
constexpr int FLOAT_ROWS = 2, INT8_ROWS = 2;
#endif

template <int R>
using Accumulators = F32[R][VECTORS];

// acc += w * x for one k.
template <int R>
void multiply_add(const F32 (&w)[VECTORS], const float* const (&x)[R], int i, Accumulators<R>& acc) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const F32 input = simd::set(x[r][i]);
    for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::fma(w[v], input, acc[r][v]);
  }
}

struct F32Kernel {
  using Input = float;
  static constexpr int ROWS = FLOAT_ROWS;
  template <int R>
  static void multiply(const std::byte* block, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    const float* w = reinterpret_cast<const float*>(block);  // [k][BLOCK]
    for (int i = 0; i < k; i++, w += BLOCK) {
      const F32 weights[VECTORS] = {simd::load(w), simd::load(w + LANES)};
      multiply_add(weights, x, i, acc);
    }
  }
};

struct F16Kernel {
  using Input = float;
  static constexpr int ROWS = FLOAT_ROWS;
  template <int R>
  static void multiply(const std::byte* block, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(block);  // [k][BLOCK]
    for (int i = 0; i < k; i++, w += BLOCK) {
      const F32 weights[VECTORS] = {simd::load_f16(w), simd::load_f16(w + LANES)};
      multiply_add(weights, x, i, acc);
    }
  }
};

#if defined(SIMD_BF16_DOT)
constexpr bool BF16_DOT = true;
struct BF16Kernel {
  using Input = uint16_t;
  static constexpr int ROWS = FLOAT_ROWS;
  template <int R>
  static void multiply(const std::byte* block, int k, const uint16_t* const (&x)[R], Accumulators<R>& acc) {
    for (int i = 0; i < k; i += 2, block += BLOCK * 4) {  // [k / 2][BLOCK][2]
      const I32 w[VECTORS] = {simd::load_i32(block), simd::load_i32(block + LANES * 4)};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const I32 input = simd::set_bytes(x[r] + i);
        for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::dot2_bf16(acc[r][v], w[v], input);
      }
    }
  }
};
#else
constexpr bool BF16_DOT = false;
struct BF16Kernel {
  using Input = float;
  static constexpr int ROWS = FLOAT_ROWS;
  template <int R>
  static void multiply(const std::byte* block, int k, const float* const (&x)[R], Accumulators<R>& acc) {
    for (int i = 0; i < k; i += 2, block += BLOCK * 4) {  // [k / 2][BLOCK][2]
      const I32 pairs[VECTORS] = {simd::load_i32(block), simd::load_i32(block + LANES * 4)};
      const F32 even[VECTORS] = {simd::low_bf16(pairs[0]), simd::low_bf16(pairs[1])};
      multiply_add(even, x, i, acc);
      if (i + 1 == k) break;
      const F32 odd[VECTORS] = {simd::high_bf16(pairs[0]), simd::high_bf16(pairs[1])};
      multiply_add(odd, x, i + 1, acc);
    }
  }
};
#endif

// sum += 4 k of weights * activations.
template <int R>
void dot4(const I32 (&w)[VECTORS], const Int8Group* const (&x)[R], int g, int chunk, I32 (&sum)[R][VECTORS]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const I32 input = simd::set_bytes(x[r][g].q + 4 * chunk);
    for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::dot4(sum[r][v], w[v], input);
  }
}

// acc += sum * weight scale * activation scale.
template <int R>
void scale_add(const I32 (&sum)[R][VECTORS], const uint16_t* scale, const Int8Group* const (&x)[R], int g,
               Accumulators<R>& acc) {
  const F32 w[VECTORS] = {simd::load_f16(scale), simd::load_f16(scale + LANES)};
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++)
      acc[r][v] = simd::fma(simd::to_float(sum[r][v]), simd::mul(w[v], simd::set(x[r][g].scale)), acc[r][v]);
}

struct Q8Kernel {
  using Input = Int8Group;
  static constexpr int ROWS = INT8_ROWS;
  template <int R>
  static void multiply(const std::byte* block, int k, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    for (int g = 0; g < k / GROUP; g++) {
      I32 sum[R][VECTORS];
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::set_i32(x[r][g].minus_128_sum);
#pragma GCC unroll 8
      for (int chunk = 0; chunk < 8; chunk++, block += BLOCK * 4) {
        const I32 w[VECTORS] = {simd::load_i32(block), simd::load_i32(block + LANES * 4)};
        dot4(w, x, g, chunk, sum);
      }
      scale_add(sum, reinterpret_cast<const uint16_t*>(block), x, g, acc);
      block += BLOCK * 2;
    }
  }
};

struct Q4Kernel {
  using Input = Int8Group;
  static constexpr int ROWS = INT8_ROWS;
  template <int R>
  static void multiply(const std::byte* block, int k, const Int8Group* const (&x)[R], Accumulators<R>& acc) {
    for (int g = 0; g < k / GROUP; g++) {
      I32 sum[R][VECTORS];
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::set_i32(0);
#pragma GCC unroll 4
      for (int chunk = 0; chunk < 4; chunk++, block += BLOCK * 4) {
        const I32 bytes[VECTORS] = {simd::load_i32(block), simd::load_i32(block + LANES * 4)};
        const I32 low[VECTORS] = {simd::low_halves(bytes[0]), simd::low_halves(bytes[1])};
        dot4(low, x, g, chunk, sum);
        const I32 high[VECTORS] = {simd::high_halves(bytes[0]), simd::high_halves(bytes[1])};
        dot4(high, x, g, chunk + 4, sum);
      }
      const uint16_t* scale = reinterpret_cast<const uint16_t*>(block);
      scale_add(sum, scale, x, g, acc);
      const F32 min[VECTORS] = {simd::load_f16(scale + BLOCK), simd::load_f16(scale + BLOCK + LANES)};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::fma(min[v], simd::set(x[r][g].scaled_sum), acc[r][v]);
      block += BLOCK * 4;
    }
  }
};

// --- one row block of one product ------------------------------------------------------------------------------------

// R rows from `row` on: x [x_rows, x_stride] as the kernel wants them.
template <class Kernel, int R>
void run_tile(const Product& p, const typename Kernel::Input* x, ptrdiff_t x_stride, int block, int row) {
  const typename Kernel::Input* rows[R];
  Accumulators<R> acc;
  for (int r = 0; r < R; r++) {
    rows[r] = x + (p.gather ? p.gather[row + r] : row + r) * x_stride;
    for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::zero();
  }
  const Matrix& w = *p.weight;
  Kernel::multiply(w.data + static_cast<size_t>(block) * block_bytes(w.type, w.k), w.k, rows, acc);
  for (int v = 0; v < VECTORS; v++) {
    const int column = block * BLOCK + v * LANES, n = std::min(LANES, w.n - column);
    if (n <= 0) return;
    for (int r = 0; r < R; r++) {
      float* y = p.y + static_cast<size_t>(row + r) * static_cast<size_t>(p.y_stride) + column;
      F32 sum = acc[r][v];
      if (p.bias) sum = simd::add(sum, simd::load_first(p.bias + column, n));
      if (p.add) sum = simd::add(sum, simd::load_first(y, n));
      simd::store_first(y, sum, n);
    }
  }
}

template <class Kernel, int R>
void run_tile_of(int rows, const Product& p, const typename Kernel::Input* x, ptrdiff_t x_stride, int block, int row) {
  if constexpr (R > 1)
    if (rows < R) return run_tile_of<Kernel, R - 1>(rows, p, x, x_stride, block, row);
  run_tile<Kernel, R>(p, x, x_stride, block, row);
}

// All rows, in tiles as equal as possible (7 rows: 4 + 3 rather than 6 + 1). The block stays in the cache.
template <class Kernel>
void run_block(const Product& p, const typename Kernel::Input* x, ptrdiff_t x_stride, int block) {
  int tiles = (p.rows + Kernel::ROWS - 1) / Kernel::ROWS;
  for (int row = 0; row < p.rows; tiles--) {
    const int rows = (p.rows - row + tiles - 1) / tiles;
    run_tile_of<Kernel, Kernel::ROWS>(rows, p, x, x_stride, block, row);
    row += rows;
  }
}

// --- the inputs of a call --------------------------------------------------------------------------------------------

// An input's room in the workspace: its rows as int8, then as bfloat16, for the products that want either.
size_t int8_bytes(int rows, int k) {
  return round_up(static_cast<size_t>(rows) * static_cast<size_t>(k / GROUP) * sizeof(Int8Group), 64);
}
size_t bf16_bytes(int rows, int k) {
  return round_up(static_cast<size_t>(rows) * round_up(static_cast<size_t>(k), 2) * 2, 64);
}

bool same_input(const Product& a, const Product& b) {
  return a.x == b.x && a.x_rows == b.x_rows && a.x_stride == b.x_stride && a.weight->k == b.weight->k;
}

// Converts each input, once for each arithmetic in use. Ends with a barrier.
void convert_inputs(const Product* products, int n_products, std::byte* room) {
  for (int first = 0, end; first < n_products; first = end) {
    const Product& p = products[first];
    const int k = p.weight->k;
    bool to_int8 = false, to_bf16 = false;
    for (end = first; end < n_products && same_input(p, products[end]); end++) {
      const DType type = products[end].weight->type;
      to_int8 |= type == DType::q8 || type == DType::q4;
      to_bf16 |= type == DType::bf16 && BF16_DOT;
    }
    Int8Group* int8 = reinterpret_cast<Int8Group*>(room);                          // [x_rows, k / 32]
    uint16_t* bf16 = reinterpret_cast<uint16_t*>(room + int8_bytes(p.x_rows, k));  // [x_rows, k rounded up to even]
#pragma omp for schedule(static) nowait
    for (int row = 0; row < p.x_rows; row++) {
      const float* x = p.x + static_cast<ptrdiff_t>(row) * p.x_stride;
      if (to_int8) convert(x, k, int8 + static_cast<ptrdiff_t>(row) * (k / GROUP));
      if (to_bf16) convert(x, k, bf16 + static_cast<ptrdiff_t>(row) * (k + k % 2));
    }
    room += matmul_workspace_bytes(p.x_rows, k);
  }
#pragma omp barrier
}

// Block `block` of p; room: its input's.
void run_block_of_type(const Product& p, const std::byte* room, int block) {
  const int k = p.weight->k;
  const Int8Group* int8 = reinterpret_cast<const Int8Group*>(room);
  switch (p.weight->type) {
    case DType::f32:
      return run_block<F32Kernel>(p, p.x, p.x_stride, block);
    case DType::f16:
      return run_block<F16Kernel>(p, p.x, p.x_stride, block);
    case DType::q8:
      return run_block<Q8Kernel>(p, int8, k / GROUP, block);
    case DType::q4:
      return run_block<Q4Kernel>(p, int8, k / GROUP, block);
    case DType::bf16:
      if constexpr (BF16_DOT) {
        const std::byte* bf16 = room + int8_bytes(p.x_rows, k);
        return run_block<BF16Kernel>(p, reinterpret_cast<const BF16Kernel::Input*>(bf16), k + k % 2, block);
      } else {
        return run_block<BF16Kernel>(p, reinterpret_cast<const BF16Kernel::Input*>(p.x), p.x_stride, block);
      }
  }
}

// --- packing ---------------------------------------------------------------------------------------------------------

// Element (row, k) of a float block, counted in elements: bf16 holds pairs of k together.
size_t float_index(DType type, int row, int k) {
  const int pair = type == DType::bf16 ? 2 : 1;
  return static_cast<size_t>((k / pair * BLOCK + row) * pair + k % pair);
}

template <class T>
void pack_floats(const TensorView& source, bool transposed, int block, T* out) {
  const T* w = static_cast<const T*>(source.data);
  for (int row = 0; row < BLOCK; row++) {
    const ptrdiff_t n = block * BLOCK + row;
    for (int k = 0; k < source.k; k++) {
      const ptrdiff_t from = transposed ? static_cast<ptrdiff_t>(k) * source.n + n : n * source.k + k;
      out[float_index(source.type, row, k)] = n < source.n ? w[from] : T(0);
    }
  }
}

// 4 half bytes become the low halves of 4 bytes.
uint32_t spread(uint32_t halves) {
  return (halves & 0xf) | (halves & 0xf0) << 4 | (halves & 0xf00) << 8 | (halves & 0xf000) << 12;
}

// The 32 weights of one output row and group, as words that are BLOCK words apart.
void pack_q8_group(const uint8_t* from, std::byte* out) {
  for (int chunk = 0; chunk < 8; chunk++) {
    uint32_t word;
    std::memcpy(&word, from + 4 * chunk, 4);
    word ^= 0x80808080u;
    std::memcpy(out + chunk * BLOCK * 4, &word, 4);
  }
}
void pack_q4_group(const uint8_t* from, std::byte* out) {
  for (int chunk = 0; chunk < 4; chunk++) {
    uint16_t low, high;
    std::memcpy(&low, from + 2 * chunk, 2);
    std::memcpy(&high, from + 2 * (chunk + 4), 2);
    const uint32_t word = spread(low) | spread(high) << 4;
    std::memcpy(out + chunk * BLOCK * 4, &word, 4);
  }
}

void pack_groups(const TensorView& source, int block, std::byte* out) {
  const bool q8 = source.type == DType::q8;
  const int groups = source.k / GROUP, weight_bytes = q8 ? GROUP : GROUP / 2;
  const uint8_t* w = static_cast<const uint8_t*>(source.data);
  for (int g = 0; g < groups; g++, out += BLOCK * (weight_bytes + (q8 ? 2 : 4))) {
    uint16_t* scale = reinterpret_cast<uint16_t*>(out + BLOCK * weight_bytes);
    for (int row = 0; row < BLOCK; row++) {
      const ptrdiff_t n = block * BLOCK + row, from = n * groups + g;
      if (n >= source.n) continue;
      (q8 ? pack_q8_group : pack_q4_group)(w + from * weight_bytes, out + row * 4);
      scale[row] = source.scale[from];
      if (!q8) scale[BLOCK + row] = source.min[from];
    }
  }
}

}  // namespace

const char* name(DType type) {
  switch (type) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    case DType::q8:
      return "q8";
    case DType::q4:
      return "q4";
  }
  return "?";
}

const char* kernel_level() {
#if defined(SIMD_BF16_DOT)
  return "avx512-bf16";
#elif defined(SIMD_AVX512) && defined(__AVX512VNNI__)
  return "avx512-vnni";
#elif defined(SIMD_AVX512)
  return "avx512";
#elif defined(SIMD_AVX2)
  return "avx2";
#else
  return "portable";
#endif
}

int row_blocks(int n) {
  return (n + BLOCK - 1) / BLOCK;
}

size_t packed_bytes(DType type, int n, int k) {
  return static_cast<size_t>(row_blocks(n)) * block_bytes(type, k);
}

size_t matmul_workspace_bytes(int rows, int k) {
  return int8_bytes(rows, k) + bf16_bytes(rows, k);
}

void matmul(const Product* products, int n_products, MatmulWorkspace& workspace) {
  std::byte* room = workspace.memory.data();
  convert_inputs(products, n_products, room);
  int blocks = 0;
  for (int i = 0; i < n_products; i++) blocks += row_blocks(products[i].weight->n);
  int i = 0, first_block = 0;  // the product that a block belongs to, and its first
#pragma omp for schedule(static)
  for (int block = 0; block < blocks; block++) {
    for (int n; block - first_block >= (n = row_blocks(products[i].weight->n)); i++) {
      first_block += n;
      if (!same_input(products[i], products[i + 1]))
        room += matmul_workspace_bytes(products[i].x_rows, products[i].weight->k);
    }
    run_block_of_type(products[i], room, block - first_block);
  }
}

void pack(const TensorView& source, bool transposed, int block, std::byte* packed) {
  const size_t bytes = block_bytes(source.type, source.k);
  std::byte* out = packed + static_cast<size_t>(block) * bytes;
  std::memset(out, 0, bytes);  // rows past the last: zeros; q8's are -128 with a scale of 0
  switch (source.type) {
    case DType::f32:
      return pack_floats<uint32_t>(source, transposed, block, reinterpret_cast<uint32_t*>(out));
    case DType::f16:
    case DType::bf16:
      return pack_floats<uint16_t>(source, transposed, block, reinterpret_cast<uint16_t*>(out));
    case DType::q8:
    case DType::q4:
      return pack_groups(source, block, out);
  }
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const DType type = matrix.type;
  const std::byte* block = matrix.data + static_cast<size_t>(row / BLOCK) * block_bytes(type, matrix.k);
  row %= BLOCK;
  for (int k = 0; k < matrix.k; k++) {
    if (type == DType::f32) {
      out[k] = reinterpret_cast<const float*>(block)[float_index(type, row, k)];
    } else if (type == DType::f16 || type == DType::bf16) {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(block)[float_index(type, row, k)];
      out[k] = type == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
    } else if (type == DType::q8) {
      const std::byte* group = block + k / GROUP * BLOCK * (GROUP + 2);
      const int chunk = k % GROUP / 4;
      const int q = static_cast<int>(group[(chunk * BLOCK + row) * 4 + k % 4]) - 128;
      out[k] = f16_to_float(reinterpret_cast<const uint16_t*>(group + BLOCK * GROUP)[row]) * static_cast<float>(q);
    } else {
      const std::byte* group = block + k / GROUP * BLOCK * (GROUP / 2 + 4);
      const int chunk = k % GROUP / 4;
      const int q = static_cast<int>(group[(chunk % 4 * BLOCK + row) * 4 + k % 4]) >> (chunk / 4 * 4) & 15;
      const uint16_t* scale = reinterpret_cast<const uint16_t*>(group + BLOCK * GROUP / 2);
      out[k] = f16_to_float(scale[row]) * static_cast<float>(q) + f16_to_float(scale[BLOCK + row]);
    }
  }
}
