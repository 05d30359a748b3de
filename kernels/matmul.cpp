// matmul.cpp: linear layers on the CPU.
//
// The packed form: a row block is BLOCK = VECTORS * LANES output rows side by side in vector registers, k in order:
//
//   f32, f16   [k][BLOCK]
//   bf16       [k / 2, rounded up][BLOCK][2]        one 32-bit lane holds 2 k
//   q8         [k / 32] of { [8][BLOCK][4 k] as q + 128, scale [BLOCK] }
//   q4         [k / 32] of { [4][BLOCK][4 k in the low halves, those 16 later in the high ones], scale, min [BLOCK] }
//
// so that a block is one stream of bytes, read in the order in which it lies, in whole cache lines (AVX-512).
//
// The ladder. 2 Zen 4 cores (AVX-512 VNNI and BF16; vpdpbusd peaks at 920 GOP/s, vdpbf16ps at 464, float32 fma at 233),
// 2 threads; GB/s of weights at 1 row, GOP/s at 512 rows, of q8 unless said. Each rung was measured beside the one
// before it: the machine's bandwidth alone wanders between 26 and 55 GB/s.
//
// 1. Blocks as above, tiles of 6 rows x 2 vectors (12 int32 and 12 float32 registers), `omp for` over blocks, inputs
//    converted first, then a barrier. 4096 x 4096: 31 GB/s of 31, 640 GOP/s. (A group's 8 vpdpbusd want the same ports
//    as the multiply and the fma of its scales: the limit is 8 / 10 of the peak, 737.) But 1536 x 576: 29 GB/s of 43,
//    and at 4096 x 4096 float32 150 GOP/s, bfloat16 285.
// 2. Converted rows start an odd number of cache lines apart: 12 rows of 4096 floats want the same 8 ways of L1.
//    float32 150 -> 206 GOP/s, bfloat16 285 -> 417.
// 3. A token's input is converted by every thread for itself: a barrier takes 0.57 us, in which 18 KB could be read.
//    Within the noise of a whole token.
// 4. With few rows one tile runs through all blocks of its thread: its setup, a hundred instructions a block, had
// filled
//    the window in which loads overlap. 1536 x 576: 29 -> 43 GB/s, one thread 18 -> 24.
// 5. A tile asks for its lines of y when it starts. 1536 x 576, one thread: 241-284 -> 270-310 GOP/s (335 where y is
//    always in the cache).
// 6. Without VNNI: q4 sums the 8 steps of a group in 16 bits before it widens them. One core: 71 -> 114 GOP/s. And on
//    AVX2 bfloat16 takes 5 rows instead of 6, one register less than there are: 43 -> 76.
//
// What failed: software prefetch of the weights, 2 to 16 KB ahead: 46 -> 33-40 GB/s at 1 row (the hardware sees a
// single stream, and the instructions cost). Prefetching the next block while the tiles run over this one: no change.
// Tiles over strips of several blocks: as good as rung 5, and more code.
#include "kernels/matmul.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "kernels/simd.h"

using simd::F32;
using simd::I32;
using simd::LANES;

namespace {

constexpr int VECTORS = 2;
constexpr int BLOCK = VECTORS * LANES;
constexpr size_t SMALL = 32 << 10;  // bytes of converted input that every thread makes for itself

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
      const F32 scaled =
          simd::mul(simd::load(x + i), inverse);  // NaN next to an infinity or NaN, which the scale keeps
      const I32 q = simd::to_i32(simd::min(simd::max(scaled, simd::set(-127)), simd::set(127)));
      simd::store_i8(out->q + i, q);
      sums = simd::add(sums, q);
    }
    const int32_t sum = simd::sum(sums);
    out->scale = amax / 127;
    out->scaled_sum = out->scale * static_cast<float>(sum);
    out->minus_128_sum = -128 * sum;
  }
}

[[maybe_unused]] void convert(const float* x, int k, uint16_t* out) {  // to bfloat16, where there is arithmetic for it
  for (int i = 0; i < k; i++) out[i] = float_to_bf16(x[i]);
  if (k % 2) out[k] = 0;
}

void convert(const float* x, int k, float* out) {
  std::memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
}

// Inputs from one converted row to the next. Floats start an odd number of cache lines apart: rows a multiple of 4 KB
// apart would all want the same 8 lines of the L1 cache.
template <class Input>
ptrdiff_t row_stride(int k) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(Input));
  return ((k + LINE - 1) / LINE | 1) * LINE;
}
template <>
ptrdiff_t row_stride<Int8Group>(int k) {
  return k / GROUP;
}

// The room that the rows of an input have (of all groups): one place for each arithmetic that its products may want.
struct Inputs {
  std::byte* room;
  int rows, k;
  int first = 0;  // the row that a group's row 0 is

  template <class Input>
  size_t bytes() const {
    return round_up(static_cast<size_t>(rows * row_stride<Input>(k)) * sizeof(Input), 64);
  }
  size_t all_bytes() const { return bytes<Int8Group>() + bytes<uint16_t>() + bytes<float>(); }
  // Row `row` as Input.
  template <class Input>
  Input* get(int row) const {
    size_t at = 0;
    if (!std::is_same_v<Input, Int8Group>) at += bytes<Int8Group>();
    if (std::is_same_v<Input, float>) at += bytes<uint16_t>();
    return reinterpret_cast<Input*>(room + at) + (first + row) * row_stride<Input>(k);
  }
};

// --- kernels ---------------------------------------------------------------------------------------------------------
//
// multiply<R> runs one row block over R rows of activations: acc[r][v] = the products of row r with vector v of
// outputs. Per row and output the order of the additions is that of k, whatever R is.

// Register tiles: R rows x VECTORS accumulators, for int8 twice (int32 and float32), beside weights and one activation.
#if defined(SIMD_AVX512)
constexpr int FLOAT_ROWS = 12, BF16_ROWS = 12, INT8_ROWS = 6;
#elif defined(SIMD_AVX2)
constexpr int FLOAT_ROWS = 6, BF16_ROWS = 5, INT8_ROWS = 2;
#else
constexpr int FLOAT_ROWS = 2, BF16_ROWS = 2, INT8_ROWS = 2;
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
struct BF16Kernel {
  using Input = uint16_t;
  static constexpr int ROWS = BF16_ROWS;
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
struct BF16Kernel {
  using Input = float;
  static constexpr int ROWS = BF16_ROWS;
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
template <auto DOT4, int R>
void dot4(const I32 (&w)[VECTORS], const Int8Group* const (&x)[R], int g, int chunk, I32 (&sum)[R][VECTORS]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const I32 input = simd::set_bytes(x[r][g].q + 4 * chunk);
    for (int v = 0; v < VECTORS; v++) sum[r][v] = DOT4(sum[r][v], w[v], input);
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
        dot4<simd::dot4>(w, x, g, chunk, sum);
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
        dot4<simd::dot4_halves>(low, x, g, chunk, sum);
        const I32 high[VECTORS] = {simd::high_halves(bytes[0]), simd::high_halves(bytes[1])};
        dot4<simd::dot4_halves>(high, x, g, chunk + 4, sum);
      }
      for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = simd::total_halves(sum[r][v]);
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

// --- one group of a product ------------------------------------------------------------------------------------------

// y's vector at column = sum (+ bias) (+ y), as far as there are columns.
inline void finish(const Product& p, float* y, int column, F32 sum) {
  const int n = std::clamp(p.weight->n - column, 0, LANES);
  if (p.bias) sum = simd::add(sum, simd::load_first(p.bias + column, n));
  if (p.add) sum = simd::add(sum, simd::load_first(y + column, n));
  simd::store_first(y + column, sum, n);
}

// R rows from `row` on, times blocks first .. last - 1.
template <class Kernel, int R>
void run_tile(const Product& p, const Inputs& inputs, int first, int last, int row) {
  const typename Kernel::Input* x[R];
  for (int r = 0; r < R; r++) x[r] = inputs.get<typename Kernel::Input>(p.gather ? p.gather[row + r] : row + r);
  const int k = p.weight->k;
  const size_t bytes = block_bytes(p.weight->type, k);
  const std::byte* w = p.weight->data + static_cast<size_t>(first) * bytes;
  float* y = p.y + static_cast<ptrdiff_t>(row) * p.y_stride;
  for (int column = first * BLOCK; column < last * BLOCK; column += BLOCK, w += bytes) {
    Accumulators<R> acc;
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++) acc[r][v] = simd::zero();
    Kernel::multiply(w, k, x, acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      for (int v = 0; v < VECTORS; v++)
        finish(p, y + static_cast<ptrdiff_t>(r) * p.y_stride, column + v * LANES, acc[r][v]);
  }
}

template <class Kernel, int R = Kernel::ROWS>
void run_rows(int rows, const Product& p, const Inputs& inputs, int first, int last, int row) {
  if constexpr (R > 1)
    if (rows < R) return run_rows<Kernel, R - 1>(rows, p, inputs, first, last, row);
  run_tile<Kernel, R>(p, inputs, first, last, row);
}

// The lines of y that a tile writes when it is done: asked for when it starts, or the stores wait for them.
inline void expect_writes(const Product& p, int row, int rows, int block) {
  for (int r = row; r < row + rows; r++)
    for (int column = block * BLOCK; column < std::min((block + 1) * BLOCK, p.weight->n); column += LANES)
      __builtin_prefetch(p.y + static_cast<ptrdiff_t>(r) * p.y_stride + column, 1);
}

// Blocks first .. last - 1 of a product. Few rows: one tile runs through all blocks. Many: all tiles (as equal as
// possible: 7 rows are 4 + 3 rather than 6 + 1) run over a block while it is in the cache, so weights come from memory
// once.
template <class Kernel>
void run_blocks(const Product& p, const Inputs& inputs, int first, int last) {
  const int tiles = (p.rows + Kernel::ROWS - 1) / Kernel::ROWS;
  if (tiles == 1) return run_rows<Kernel>(p.rows, p, inputs, first, last, 0);
  for (int block = first; block < last; block++) {
    for (int row = 0, left = tiles; left > 0; left--) {
      const int rows = (p.rows - row + left - 1) / left;
      expect_writes(p, row, rows, block);
      run_rows<Kernel>(rows, p, inputs, block, block + 1, row);
      row += rows;
    }
  }
}

void run_blocks(const Product& p, const Inputs& inputs, int first, int last) {
  switch (p.weight->type) {
    case DType::f32:
      return run_blocks<F32Kernel>(p, inputs, first, last);
    case DType::bf16:
      return run_blocks<BF16Kernel>(p, inputs, first, last);
    case DType::f16:
      return run_blocks<F16Kernel>(p, inputs, first, last);
    case DType::q8:
      return run_blocks<Q8Kernel>(p, inputs, first, last);
    case DType::q4:
      return run_blocks<Q4Kernel>(p, inputs, first, last);
  }
}

// --- the inputs of a call --------------------------------------------------------------------------------------------

bool same_input(const Product& a, const Product& b) {
  return a.x == b.x && a.x_rows == b.x_rows && a.x_stride == b.x_stride && a.x_group == b.x_group &&
         a.weight->k == b.weight->k && (a.x_group == 0 || a.weight->groups == b.weight->groups);
}

// Inputs that differ from group to group, or the one that all groups share.
int input_groups(const Product& p) {
  return p.x_group ? p.weight->groups : 1;
}

Inputs inputs_of(const Product& p, std::byte* room = nullptr) {
  return {room, input_groups(p) * p.x_rows, p.weight->k};
}

template <class Kernel>
void convert_row_for(const float* x, const Inputs& inputs, int row) {
  convert(x, inputs.k, inputs.get<typename Kernel::Input>(row));
}

// Converts x once for each arithmetic in use; of all rows of all inputs those whose number modulo `sharers` is `share`.
void convert_inputs(const Product* products, int n_products, std::byte* room, int share, int sharers) {
  int number = 0;
  for (int first = 0, end; first < n_products; first = end) {
    const Product& p = products[first];
    bool wanted[5] = {};
    for (end = first; end < n_products && same_input(p, products[end]); end++)
      wanted[static_cast<int>(products[end].weight->type)] = true;
    const Inputs inputs = inputs_of(p, room);
    for (int row = 0; row < inputs.rows; row++, number++) {
      if (number % sharers != share) continue;
      const ptrdiff_t group = row / p.x_rows, at = row % p.x_rows;
      const float* x = p.x + group * p.x_group + at * p.x_stride;
      const auto is = [&](DType type) { return wanted[static_cast<int>(type)]; };
      if (is(DType::q8) || is(DType::q4)) convert_row_for<Q8Kernel>(x, inputs, row);
      if (is(DType::f32) || is(DType::f16)) convert_row_for<F32Kernel>(x, inputs, row);
      if (is(DType::bf16)) convert_row_for<BF16Kernel>(x, inputs, row);
    }
    room += inputs.all_bytes();
  }
}

// --- groups ----------------------------------------------------------------------------------------------------------

int rows_of(const Product& p, int group) {
  return p.row_start ? p.row_start[group + 1] - p.row_start[group] : p.rows;
}

int groups_with_rows(const Product& p) {
  if (!p.row_start) return p.rows > 0 ? p.weight->groups : 0;
  int n = 0;
  for (int g = 0; g < p.weight->groups; g++) n += rows_of(p, g) > 0;
  return n;
}

// Blocks first .. last - 1 of one group, as a product of its own.
void run_group(const Product& p, Inputs inputs, int group, int first, int last) {
  const int start = p.row_start ? p.row_start[group] : 0;
  Matrix weight = *p.weight;
  weight.data += static_cast<size_t>(group) * packed_bytes(weight.type, weight.n, weight.k);
  Product one = p;
  one.weight = &weight;
  one.rows = rows_of(p, group);
  if (p.bias) one.bias = p.bias + static_cast<ptrdiff_t>(group) * weight.n;
  if (p.gather) one.gather = p.gather + start;
  one.y = p.y + static_cast<ptrdiff_t>(start) * p.y_stride + static_cast<ptrdiff_t>(group) * p.y_group;
  inputs.first = (p.x_group ? group * p.x_rows : 0) + (p.gather ? 0 : start);
  run_blocks(one, inputs, first, last);
}

// --- packing ---------------------------------------------------------------------------------------------------------

// Element (row, k) of a block whose rows keep `pair` neighbouring k together.
size_t float_index(int pair, int row, int k) {
  return static_cast<size_t>((k / pair * BLOCK + row) * pair + k % pair);
}

template <class T, int PAIR>
void pack_floats(const TensorView& source, bool transposed, int block, std::byte* packed) {
  const ptrdiff_t row_step = transposed ? 1 : source.k, k_step = transposed ? source.n : 1;
  constexpr ptrdiff_t SIZE = sizeof(T);
  const std::byte* w = static_cast<const std::byte*>(source.data) + block * BLOCK * row_step * SIZE;  // not aligned
  T* out = reinterpret_cast<T*>(packed);
  for (int row = 0; row < std::min(BLOCK, source.n - block * BLOCK); row++, w += row_step * SIZE)
    for (int k = 0; k < source.k; k++) std::memcpy(&out[float_index(PAIR, row, k)], w + k * k_step * SIZE, SIZE);
}

void pack_bf16(const TensorView& source, bool transposed, int block, std::byte* packed) {
  if (transposed || source.k % 2) return pack_floats<uint16_t, 2>(source, transposed, block, packed);
  TensorView pairs = source;  // two k as one word: twice as fast
  pairs.k /= 2;
  pack_floats<uint32_t, 1>(pairs, transposed, block, packed);
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
  return bytes_of([&](Arena& arena) { arena.take<std::byte>(Inputs{nullptr, rows, k}.all_bytes()); });
}

void matmul(const Team& team, const Product* products, int n_products, const Workspace& workspace) {
  size_t bytes = 0;
  int blocks = 0;
  for (int i = 0; i < n_products; i++) {
    blocks += groups_with_rows(products[i]) * row_blocks(products[i].weight->n);
    if (i == 0 || !same_input(products[i], products[i - 1])) bytes += inputs_of(products[i]).all_bytes();
  }
  // A token's worth of input is converted by every thread for itself: that takes less time than a barrier.
  alignas(64) std::byte own[SMALL];
  const bool small = bytes <= sizeof own;
  std::byte* room = small ? own : workspace.begin().take<std::byte>(bytes);
  convert_inputs(products, n_products, room, small ? 0 : team.rank, small ? 1 : team.size);
  if (!small) team.barrier();
  auto [first, last] = team.share(blocks);  // each thread takes one range of the call's row blocks
  for (int i = 0; i < n_products && last > 0; i++) {
    const Product& p = products[i];
    const int n = row_blocks(p.weight->n);
    if (i > 0 && !same_input(p, products[i - 1])) room += inputs_of(products[i - 1]).all_bytes();
    for (int group = 0; group < p.weight->groups && last > 0; group++) {
      if (rows_of(p, group) == 0) continue;
      if (first < n) run_group(p, inputs_of(p, room), group, std::max(first, 0), std::min(last, n));
      first -= n, last -= n;
    }
  }
  team.barrier();
}

void pack(const TensorView& source, bool transposed, int block, std::byte* packed) {
  const size_t bytes = block_bytes(source.type, source.k);
  std::byte* out = packed + static_cast<size_t>(block) * bytes;
  std::memset(out, 0, bytes);  // rows past the last: zeros; q8's are -128 with a scale of 0
  switch (source.type) {
    case DType::f32:
      return pack_floats<uint32_t, 1>(source, transposed, block, out);
    case DType::f16:
      return pack_floats<uint16_t, 1>(source, transposed, block, out);
    case DType::bf16:
      return pack_bf16(source, transposed, block, out);
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
      out[k] = reinterpret_cast<const float*>(block)[float_index(type == DType::bf16 ? 2 : 1, row, k)];
    } else if (type == DType::f16 || type == DType::bf16) {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(block)[float_index(type == DType::bf16 ? 2 : 1, row, k)];
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
