// attention.cu: softmax(q . K^T * scale) V over the cache, on a GPU.
//
// Why it looks as it does: decode reads every K and V row of its context for one token, so its speed is that of memory;
// a prompt uses each row for many queries, so its speed is that of multiply-adds. Both want a row to be read once for
// all the queries that need it, scores that never leave the chip, all of the GPU busy even for one sequence, products
// on tensor cores, and the next rows on their way meanwhile. The rungs, each for one of these:
//
//     naive           the formula in plain loops: a thread is a query row, and reads every K and V row for itself
//     tiles           TILE tokens' rows come into shared memory once, for 16 query rows or more
//     online softmax  a tile's scores are weighed by the largest so far; what was summed before is rescaled
//                     (FlashAttention, arXiv 2205.14135)
//     splits          the context is cut every ATTENTION_SPLIT tokens; blocks may take one each, and the results are
//                     merged in order of position (Flash-Decoding)
//     tensor cores    a warp multiplies 16 rows by 8 columns at a time, mma.sync
//     copies ahead    while a tile is at work the next one is copied, and the block table of the one after is read
//
// `naive` below is the first rung; `flash` stands on all the others, one routine for prompts and decode, for every
// variant: the rows of a query tile are tokens times the heads of a KV head's group (MLA: all heads). What a row goes
// through depends on its position and its sequence's rows of the cache alone: not on its neighbours, not on who else
// works on the splits. So its bits are the same in any batch, in any chunks, with any block size.
#include "attention.h"

#include <cmath>

#include "host/error.h"
#include "kernels/build.h"
#include "kernels/gpu.h"
#include "kernels/mma.h"

namespace attention {  // a name: nvcc warns of what a build with another KV leaves unused in one without

constexpr int SPLIT = ATTENTION_SPLIT;
constexpr float NONE = -INFINITY;  // the maximum of no scores
constexpr float LOG2E = 1.44269504f;

constexpr __host__ __device__ size_t to_size(int n) {
  return static_cast<size_t>(n);
}
constexpr __host__ __device__ int divide_up(int n, int by) {
  return (n + by - 1) / by;
}
constexpr __host__ __device__ int round_up(int n, int to) {
  return divide_up(n, to) * to;
}
__device__ int warp_id() {
  return static_cast<int>(threadIdx.x) / 32;
}

// --- naive -----------------------------------------------------------------------------------------------------------

// A thread is a query head of a token. It goes over the context twice, for the largest score and for the sums.
template <class Kv>
__global__ void naive(const float* q, CacheView<Kv, 0> view, int layer, Batch batch, AttentionShape shape, float* out) {
  const int H = shape.n_heads, k_dim = shape.k_dim, v_dim = shape.v_dim;
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), h = index % H;
  const int t = batch.query_start[0] + index / H, g = h / (H / shape.n_kv_heads);
  if (t >= batch.query_start[batch.n_sequences]) return;
  int sequence = 0;
  while (t >= batch.query_start[sequence + 1]) sequence++;
  const int* table = batch.block_table + to_size(sequence) * to_size(batch.max_blocks);
  const size_t at = to_size(t) * to_size(H) + to_size(h);
  const float* query = q + at * to_size(k_dim);
  float* result = out + at * to_size(v_dim);
  const HeadRows<Kv, 0> rows(view, layer, g);
  const int last = batch.positions[t], first = shape.window > 0 ? max(0, last - shape.window + 1) : 0;

  const auto score = [&](int p) {
    const int block = table[p / view.block_size()], slot = p % view.block_size();
    const std::byte *row = rows.k(block, slot), *scales = rows.k_scales(block, slot);
    float s = 0;
    for (int i = 0; i < k_dim; i++) s += query[i] * load_element<Kv>(row, scales, i);
    s *= shape.scale;
    return shape.softcap > 0 ? shape.softcap * tanhf(s / shape.softcap) : s;
  };

  float largest = shape.sinks ? shape.sinks[h] : NONE;
  for (int p = first; p <= last; p++) largest = fmaxf(largest, score(p));

  float sum = shape.sinks ? expf(shape.sinks[h] - largest) : 0;
  for (int i = 0; i < v_dim; i++) result[i] = 0;
  for (int p = first; p <= last; p++) {
    const float weight = expf(score(p) - largest);
    const int block = table[p / view.block_size()], slot = p % view.block_size();
    const std::byte* row = shape.v_is_k ? rows.k(block, slot) : rows.v(block, slot);
    const std::byte* scales = shape.v_is_k ? rows.k_scales(block, slot) : rows.v_scales(block, slot);
    for (int i = 0; i < v_dim; i++) result[i] += weight * load_element<Kv>(row, scales, i);
    sum += weight;
  }
  for (int i = 0; i < v_dim; i++) result[i] /= sum;
}

// --- a tile in shared memory -----------------------------------------------------------------------------------------

constexpr int TILE = 32;   // tokens: a lane looks up the block of each
constexpr int ROWS = 16;   // query rows of a warp
constexpr int GROUP = 32;  // elements of a row that are one step of the work: they share q8's scale
static_assert(SPLIT % TILE == 0 && GROUP == KvQ8::QUANT_GROUP);

// Sizes for heads up to K wide with values up to V wide. Where V is wide, SHARERS warps share 16 query rows: each
// scores TOKENS of a tile, and makes COLUMNS of the result from the weights of all.
template <class Kv_, int K_, int V_>
struct Layout {
  using Kv = Kv_;
  using Op = Operands<Kv>;
  static constexpr int K = K_, V = V_, SHARERS = divide_up(V, 128), COLUMNS = V / SHARERS, TOKENS = TILE / SHARERS;
  static constexpr int BYTES = sizeof(typename Codec<Kv>::Element);
  static constexpr bool IS_SCALED = HeadRows<Kv, 0>::IS_QUANTISED;
  static_assert(K % GROUP == 0 && COLUMNS % GROUP == 0 && TOKENS % 8 == 0);

  // Bytes from a row to the next. What lanes read together must lie in different banks of the memory, which repeat
  // every 8 chunks: of 8 keys each BYTES chunks, of 8 values a chunk, of 8 queries two.
  static constexpr int stride(int bytes, int chunks) { return CHUNK * (round_up(divide_up(bytes, CHUNK), 8) + chunks); }
  static constexpr int scale_bytes(int n) { return IS_SCALED ? n / GROUP * 2 : 0; }
  static constexpr int K_STRIDE = stride(K * BYTES + scale_bytes(K), BYTES);
  static constexpr int V_STRIDE = stride(V * BYTES + scale_bytes(V), 1);
  static constexpr int Q_STRIDE = stride(K * 2, 2);
  static constexpr int Q_PART = ROWS * Q_STRIDE;

  // What the warps of 16 query rows have in common.
  struct alignas(CHUNK) Shared {
    std::byte q[Op::Q_PARTS * Q_PART];               // [parts, ROWS] rows of K 16-bit elements
    float factor[ROWS];                              // of the rows' scores
    float reduced[SHARERS][ROWS];                    // one number of each row
    float4 weights[SHARERS > 1 ? TILE / 8 : 1][32];  // [tokens / 8, lanes] as the lanes hold them
  };
  static constexpr int tile_bytes(bool v_is_k) { return TILE * (K_STRIDE + (v_is_k ? 0 : V_STRIDE)); }
  static size_t shared_bytes(const AttentionShape& shape, int n_warps) {
    return to_size(2 * tile_bytes(shape.v_is_k)) + to_size(n_warps / SHARERS) * sizeof(Shared);
  }
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
template <class L>
__device__ TileRows keys_of(std::byte* tile) {
  return {tile, L::K_STRIDE, L::K * L::BYTES};
}
template <class L>
__device__ TileRows values_of(std::byte* tile, bool v_is_k) {
  if (v_is_k) return keys_of<L>(tile);
  return {tile + TILE * L::K_STRIDE, L::V_STRIDE, L::V * L::BYTES};
}

// The context of a sequence, as far as a block of threads needs it.
template <class Kv>
struct Context {
  HeadRows<Kv, 0> rows;
  CacheShape cache;
  const int* table;
  int begin, end;  // positions; what lies before or behind may be another's

  // The cache's block of the lane's token, one of the tile at `first`; -1: not in the context.
  __device__ int block(int first) const {
    const int token = first + lane_id();
    return token >= begin && token < end ? table[token / cache.block_size] : -1;
  }
};

// Lane i's row goes to row i of the tile, n bytes; zeros up to ALL bytes, and for a null pointer.
template <int ALL>
__device__ void copy_rows(const std::byte* row, int n, const TileRows& to) {
  constexpr int CHUNKS = ALL / CHUNK;
  const uint64_t address = reinterpret_cast<uint64_t>(row);
  for (int i = static_cast<int>(threadIdx.x); i < TILE * CHUNKS; i += static_cast<int>(blockDim.x)) {
    const int at = i % CHUNKS * CHUNK;
    const std::byte* from = reinterpret_cast<const std::byte*>(__shfl_sync(WHOLE_WARP, address, i / CHUNKS));
    cp_async_16(to.row(i / CHUNKS) + at, from + at, from && at < n);
  }
}
// Lane i's n scales, the warps taking turns; zeros up to ALL.
template <int ALL>
__device__ void copy_scales(const std::byte* from, int n, const TileRows& to) {
  for (int i = warp_id(); i < ALL; i += static_cast<int>(blockDim.x) / 32) {
    const uint16_t x = from && i < n ? load_vector<uint16_t>(from + i * 2) : uint16_t{0};
    store_vector<uint16_t>(to.row(lane_id()) + to.scales + i * 2, x);
  }
}

// The rows of tokens first .. first + TILE - 1 set out for a tile. block: the lane's, as Context gives it.
template <class L>
__device__ void start_copy(const Context<typename L::Kv>& context, int first, int block, bool v_is_k, std::byte* tile) {
  using Rows = HeadRows<typename L::Kv, 0>;
  const int slot = (first + lane_id()) % context.cache.block_size, k_dim = context.cache.k_dim,
            v_dim = context.cache.v_dim;
  const bool is_there = block >= 0;
  const TileRows k = keys_of<L>(tile), v = values_of<L>(tile, v_is_k);
  copy_rows<L::K * L::BYTES>(is_there ? context.rows.k(block, slot) : nullptr, static_cast<int>(Rows::stride(k_dim)),
                             k);
  if (!v_is_k)
    copy_rows<L::V * L::BYTES>(is_there ? context.rows.v(block, slot) : nullptr, static_cast<int>(Rows::stride(v_dim)),
                               v);
  if constexpr (Rows::IS_QUANTISED) {
    copy_scales<L::K / GROUP>(is_there ? context.rows.k_scales(block, slot) : nullptr,
                              static_cast<int>(Rows::scales(k_dim)), k);
    if (!v_is_k)
      copy_scales<L::V / GROUP>(is_there ? context.rows.v_scales(block, slot) : nullptr,
                                static_cast<int>(Rows::scales(v_dim)), v);
  }
}

// --- 16 query rows ---------------------------------------------------------------------------------------------------

// The query rows of a sequence and KV head: row i is token i / group, head i % group of the KV head's.
struct Queries {
  int sequence, first_token, n_rows, group, first_head, n_heads, first_row;  // first_row: the block's
  __device__ int token(int row) const { return first_token + row / group; }
  __device__ int head(int row) const { return first_head + row % group; }
  __device__ size_t index(int row) const { return to_size(token(row)) * to_size(n_heads) + to_size(head(row)); }
};

// Positions begin .. end - 1 are what a token sees.
struct Span {
  int begin = 0, end = 0;
};
__device__ Span seen_by(const Batch& batch, const AttentionShape& shape, int token) {
  const int end = batch.positions[token] + 1;
  return {shape.window > 0 ? max(0, end - shape.window) : 0, end};
}

// Attention over a part of the context, not yet divided by the sum. Of a warp's 16 rows a lane has two, lane / 4 + 8 r:
// o[i][2 r + j] is column j of product i.
template <class L>
struct State {
  float o[L::COLUMNS / 8][4];
  float m[2], l[2];  // the largest score (base 2: e^x = 2^(x log2 e)), and the sum of 2^(score - m)
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) o[i][j] = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) m[r] = NONE, l[r] = 0;
  }
};

// Two parts with maxima m and `other` become one with the larger maximum, m: what each is multiplied by. A part in
// which nothing was seen changes the other one in no bit.
struct Factors {
  float mine, others;
};
__device__ Factors join(float& m, float other) {
  const float larger = fmaxf(m, other), base = larger == NONE ? 0 : larger;
  const Factors f{exp2_fast(m - base), exp2_fast(other - base)};
  m = larger;
  return f;
}
__device__ float join(float mine, float others, const Factors& f) {
  return fmaf(mine, f.mine, others * f.others);
}
template <class L>
__device__ void merge(State<L>& earlier, const State<L>& later) {
  Factors f[2];
#pragma unroll
  for (int r = 0; r < 2; r++)
    f[r] = join(earlier.m[r], later.m[r]), earlier.l[r] = join(earlier.l[r], later.l[r], f[r]);
#pragma unroll
  for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) earlier.o[i][j] = join(earlier.o[i][j], later.o[i][j], f[j / 2]);
}
// The last factor of a row's result. Its head's sink joins as one more part, without a value.
__device__ float last_factor(float m, float l, const float* sink) {
  if (!sink) return 1 / l;
  const Factors f = join(m, *sink * LOG2E);
  return f.mine / join(l, 1, f);
}

// x of a row becomes f over all lanes that have a part of it: the quad's, then the sharers'.
template <class L, class F>
__device__ void reduce_row(float (&x)[2], F f, typename L::Shared& shared) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    x[r] = f(x[r], __shfl_xor_sync(WHOLE_WARP, x[r], 1));
    x[r] = f(x[r], __shfl_xor_sync(WHOLE_WARP, x[r], 2));
  }
  if constexpr (L::SHARERS > 1) {
    if (lane_id() % 4 == 0)
      for (int r = 0; r < 2; r++) shared.reduced[warp_id() % L::SHARERS][lane_id() / 4 + 8 * r] = x[r];
    __syncthreads();
    for (int r = 0; r < 2; r++) {
      x[r] = shared.reduced[0][lane_id() / 4 + 8 * r];
      for (int i = 1; i < L::SHARERS; i++) x[r] = f(x[r], shared.reduced[i][lane_id() / 4 + 8 * r]);
    }
  }
}

// A row's elements are divided by the power of two in its largest, so that float16 holds any of them alike; its scores
// are multiplied by it again.
template <class L>
__device__ void load_queries(const float* q, const Queries& queries, int first_row, const AttentionShape& shape,
                             typename L::Shared& shared) {
  using Op = typename L::Op;
  for (int r = warp_id() % L::SHARERS; r < ROWS; r += L::SHARERS) {
    const int row = first_row + r, n = row < queries.n_rows ? shape.k_dim : 0;
    const float* x = q + (n > 0 ? queries.index(row) * to_size(n) : 0);
    float largest = 0;
    for (int i = lane_id(); i < n; i += 32) largest = fmaxf(largest, fabsf(x[i]));
    for (int by = 16; by > 0; by /= 2) largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, by));
    const uint32_t exponent = min(max(float_to_bits(largest) >> 23, 1u), 253u);
    const float inverse = bits_to_float((254 - exponent) << 23);
    for (int i = 2 * lane_id(); i < L::K; i += 64) {
      uint32_t part[Op::Q_PARTS][1];
      set<typename Op::Type>(part, 0, i < n ? x[i] * inverse : 0, i + 1 < n ? x[i + 1] * inverse : 0);
      for (int p = 0; p < Op::Q_PARTS; p++)
        store_vector<uint32_t>(shared.q + p * L::Q_PART + r * L::Q_STRIDE + i * 2, part[p][0]);
    }
    if (lane_id() == 0) shared.factor[r] = bits_to_float(exponent << 23) * (shape.scale * LOG2E);
  }
}

// --- a tile's work ---------------------------------------------------------------------------------------------------

// s = q . K^T of the warp's tokens, the first of them `first` of the tile.
template <class L>
__device__ void multiply_keys(float (&s)[L::TOKENS / 8][4], const std::byte* q, const TileRows& k, int first) {
  using Op = typename L::Op;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < L::TOKENS / 8; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[n][j] = 0;
  for (int group = 0; group < L::K / GROUP; group++) {
    A<Op::Q_PARTS> a[2];
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int i = 0; i < 2 * Op::Q_PARTS; i++) {
        const int part = i / 2, row = g + i % 2 * 8, element = group * GROUP + step * 16 + 4 * t;
        const uint2 x = load_vector<uint2>(q + part * L::Q_PART + row * L::Q_STRIDE + element * 2);
        a[step].part[part][i % 2] = x.x, a[step].part[part][i % 2 + 2] = x.y;
      }
#pragma unroll
    for (int n = 0; n < L::TOKENS / 8; n++) {
      float d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < 2; step++) {
        uint32_t b[2];
        Op::keys(b, k.row(first + n * 8 + g) + (group * GROUP + step * 16 + 4 * t) * L::BYTES);
        multiply<typename Op::Type>(L::IS_SCALED ? d : s[n], a[step], b);
      }
      if constexpr (L::IS_SCALED)
        for (int j = 0; j < 4; j++) s[n][j] = fmaf(d[j], k.scale(first + n * 8 + 2 * t + j % 2, group), s[n][j]);
    }
  }
}

// Scores become weights 2^(s - m), 0 where the row does not see the token; the state is rescaled to the new m. first:
// the position of the warp's first token.
template <class L>
__device__ void weigh(float (&s)[L::TOKENS / 8][4], State<L>& state, const Span (&span)[2], int first, float softcap,
                      typename L::Shared& shared) {
  float m[2] = {NONE, NONE};
#pragma unroll
  for (int n = 0; n < L::TOKENS / 8; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int r = j / 2, token = first + n * 8 + lane_id() % 4 * 2 + j % 2;
      float x = s[n][j] * shared.factor[lane_id() / 4 + 8 * r];
      // cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1)
      if (softcap > 0) x = LOG2E * (softcap - 2 * softcap / (exp2_fast(x * (2 / softcap)) + 1));
      s[n][j] = token >= span[r].begin && token < span[r].end ? x : NONE;
      m[r] = fmaxf(m[r], s[n][j]);
    }
  reduce_row<L>(
      m, [](float a, float b) { return fmaxf(a, b); }, shared);
  float base[2], factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    m[r] = fmaxf(m[r], state.m[r]);
    base[r] = m[r] == NONE ? 0 : m[r];
    factor[r] = exp2_fast(state.m[r] - base[r]);
    state.m[r] = m[r], state.l[r] *= factor[r];
  }
#pragma unroll
  for (int n = 0; n < L::TOKENS / 8; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[n][j] = exp2_fast(s[n][j] - base[j / 2]);
      state.l[j / 2] += s[n][j];
    }
#pragma unroll
  for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) state.o[i][j] *= factor[j / 2];
}

// The weights of all sharers' tokens.
template <class L>
__device__ void share_weights(const float (&mine)[L::TOKENS / 8][4], float (&all)[TILE / 8][4],
                              typename L::Shared& shared) {
#pragma unroll
  for (int n = 0; n < L::TOKENS / 8; n++) {
    const float(&x)[4] = mine[n];
    if constexpr (L::SHARERS > 1)
      shared.weights[warp_id() % L::SHARERS * (L::TOKENS / 8) + n][lane_id()] = {x[0], x[1], x[2], x[3]};
    else
      for (int j = 0; j < 4; j++) all[n][j] = x[j];
  }
  if constexpr (L::SHARERS > 1) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
      const float4 x = shared.weights[n][lane_id()];
      all[n][0] = x.x, all[n][1] = x.y, all[n][2] = x.z, all[n][3] = x.w;
    }
  }
}

// state += weights V, the warp's columns.
template <class L>
__device__ void multiply_values(State<L>& state, const float (&weights)[TILE / 8][4], const TileRows& v) {
  using Op = typename L::Op;
  const int first = warp_id() % L::SHARERS * L::COLUMNS;
#pragma unroll
  for (int group = 0; group < L::COLUMNS / GROUP; group++) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
      A<Op::Q_PARTS> a;
#pragma unroll
      for (int i = 0; i < 4; i++) {  // register i: row i % 2, tokens of half i / 2
        const float* x = weights[step * 2 + i / 2] + i % 2 * 2;
        float low = x[0], high = x[1];
        if constexpr (L::IS_SCALED) {
          const int token = step * 16 + i / 2 * 8 + lane_id() % 4 * 2;
          low *= v.scale(token, first / GROUP + group), high *= v.scale(token + 1, first / GROUP + group);
        }
        set<typename Op::Type>(a.part, i, low, high);
      }
      uint32_t b[4][2];
      Op::values(b, v.row(step * 16) + (first + group * GROUP) * L::BYTES, v.stride);
#pragma unroll
      for (int n = 0; n < 4; n++) multiply<typename Op::Type>(state.o[group * 4 + n], a, b[n]);
    }
  }
}

// --- flash -----------------------------------------------------------------------------------------------------------

// Where blocks leave their splits' results for merge_splits, or null: then each goes over all splits by itself.
struct Partials {
  float* o = nullptr;    // [T, n_heads, n_splits, v_dim]
  float* m_l = nullptr;  // [T, n_heads, n_splits, 2]
  int n_splits = 1;

  Partials() = default;
  Partials(Arena& arena, const AttentionShape& shape, int n_tokens, int n) : n_splits(n) {
    const size_t results = to_size(n_tokens) * to_size(shape.n_heads) * to_size(n);
    o = arena.take<float>(results * to_size(shape.v_dim));
    m_l = arena.take<float>(results * 2);
  }
};

// The rows of block blockIdx.x. Sequence s has the blocks from (its first row) / rows + s on: enough of them, some of
// nothing, and nobody has to count those of the sequences before.
__device__ Queries find_queries(const Batch& batch, const AttentionShape& shape, int rows) {
  const int group = shape.n_heads / shape.n_kv_heads, me = static_cast<int>(blockIdx.x);
  const int kv_head = static_cast<int>(blockIdx.y);
  const auto first_block = [&](int s) { return (batch.query_start[s] - batch.query_start[0]) * group / rows + s; };
  int s = 0;
  for (int past = batch.n_sequences; past - s > 1;) {
    const int middle = (s + past) / 2;
    (first_block(middle) <= me ? s : past) = middle;
  }
  const int start = batch.query_start[s], n_tokens = batch.query_start[s + 1] - start;
  return {s, start, n_tokens * group, group, kv_head * group, shape.n_heads, (me - first_block(s)) * rows};
}

template <class L>
__device__ void store(const State<L>& state, const Queries& queries, int first_row, const AttentionShape& shape,
                      const Partials& partials, float* out) {
  const int first_column = warp_id() % L::SHARERS * L::COLUMNS, t = lane_id() % 4, v_dim = shape.v_dim;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + lane_id() / 4 + 8 * r;
    if (row >= queries.n_rows) continue;
    size_t at = queries.index(row);
    float factor = 1;
    if (partials.o) {
      at = at * to_size(partials.n_splits) + blockIdx.z;
      if (first_column == 0 && t == 0) partials.m_l[2 * at] = state.m[r], partials.m_l[2 * at + 1] = state.l[r];
    } else {
      factor = last_factor(state.m[r], state.l[r], shape.sinks ? shape.sinks + queries.head(row) : nullptr);
    }
    float* to = (partials.o ? partials.o : out) + at * to_size(v_dim);
#pragma unroll
    for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = first_column + i / 4 * GROUP + L::Op::column(i % 4, 2 * t + j);
        if (column < v_dim) to[column] = fmaf(state.o[i][2 * r + j], factor, 0);
      }
  }
}

constexpr int MOST_WARPS = 4;

// A block of threads has 16 query rows for each SHARERS warps; grid: blocks of query rows, KV heads, splits (or 1).
template <class L>
__global__ void __launch_bounds__(MOST_WARPS * 32)
    flash(const float* q, CacheView<typename L::Kv, 0> view, int layer, Batch batch, AttentionShape shape,
          Partials partials, float* out) {
  const int n_row_groups = static_cast<int>(blockDim.x) / 32 / L::SHARERS, row_group = warp_id() / L::SHARERS;
  const Queries queries = find_queries(batch, shape, n_row_groups * ROWS);
  if (queries.first_row >= queries.n_rows) return;  // the whole block
  const int last_row = min(queries.first_row + n_row_groups * ROWS, queries.n_rows) - 1;
  const int begin = seen_by(batch, shape, queries.token(queries.first_row)).begin;
  const int end = seen_by(batch, shape, queries.token(last_row)).end, split = static_cast<int>(blockIdx.z);
  const Context<typename L::Kv> context{{view, layer, static_cast<int>(blockIdx.y)},
                                        view.shape,
                                        batch.block_table + to_size(queries.sequence) * to_size(batch.max_blocks),
                                        begin,
                                        end};
  int at = max(begin / TILE * TILE, partials.o ? split * SPLIT : 0);
  const int stop = min(end, partials.o ? (split + 1) * SPLIT : end);
  if (at >= stop) return;

  const int tile_bytes = L::tile_bytes(shape.v_is_k);
  std::byte* tiles = dynamic_shared<std::byte>();  // [2] tiles, then what row groups have in common
  auto& shared = reinterpret_cast<typename L::Shared*>(tiles + 2 * tile_bytes)[row_group];
  const auto start_tile = [&](int first, int block) {
    start_copy<L>(context, first, block, shape.v_is_k, tiles + first / TILE % 2 * tile_bytes);
  };
  const int first_row = queries.first_row + row_group * ROWS, first_token = warp_id() % L::SHARERS * L::TOKENS;
  start_tile(at, context.block(at));
  cp_async_commit();
  int block = context.block(at + TILE);
  load_queries<L>(q, queries, first_row, shape, shared);
  Span span[2];
  for (int r = 0; r < 2; r++) {
    const int row = first_row + lane_id() / 4 + 8 * r;
    if (row < queries.n_rows) span[r] = seen_by(batch, shape, queries.token(row));
  }

  State<L> total, part;
  total.clear(), part.clear();
  for (; at < stop; at += TILE) {
    if (at + TILE < stop) start_tile(at + TILE, block);
    block = context.block(at + 2 * TILE);
    cp_async_commit();  // at the end a group of nothing, so that the wait below means the same
    cp_async_wait<1>();
    __syncthreads();
    std::byte* tile = tiles + at / TILE % 2 * tile_bytes;
    float scores[L::TOKENS / 8][4], weights[TILE / 8][4];
    multiply_keys<L>(scores, shared.q, keys_of<L>(tile), first_token);
    weigh<L>(scores, part, span, at + first_token, shape.softcap, shared);
    share_weights<L>(scores, weights, shared);
    multiply_values<L>(part, weights, values_of<L>(tile, shape.v_is_k));
    if ((at + TILE) % SPLIT == 0 || at + TILE >= stop) {
      reduce_row<L>(
          part.l, [](float a, float b) { return a + b; }, shared);
      merge(total, part);
      part.clear();
    }
    __syncthreads();
  }
  store<L>(total, queries, first_row, shape, partials, out);
}

// The same merge for results that lie in memory. grid: query rows [T, n_heads]; a thread is a column.
__global__ void merge_splits(Batch batch, AttentionShape shape, Partials partials, float* out) {
  const int H = shape.n_heads, h = static_cast<int>(blockIdx.x) % H, v_dim = shape.v_dim;
  const int token = batch.query_start[0] + static_cast<int>(blockIdx.x) / H;
  if (token >= batch.query_start[batch.n_sequences]) return;
  const Span span = seen_by(batch, shape, token);
  const size_t row = to_size(token) * to_size(H) + to_size(h);
  for (int column = static_cast<int>(threadIdx.x); column < v_dim; column += static_cast<int>(blockDim.x)) {
    float o = 0, m = NONE, l = 0;
#pragma unroll 8
    for (int split = span.begin / SPLIT; split < divide_up(span.end, SPLIT); split++) {
      const size_t at = row * to_size(partials.n_splits) + to_size(split);
      const Factors f = join(m, partials.m_l[2 * at]);
      l = join(l, partials.m_l[2 * at + 1], f);
      o = join(o, partials.o[at * to_size(v_dim) + to_size(column)], f);
    }
    const float factor = last_factor(m, l, shape.sinks ? shape.sinks + h : nullptr);
    out[row * to_size(v_dim) + to_size(column)] = fmaf(o, factor, 0);
  }
}

// --- launching -------------------------------------------------------------------------------------------------------

// Kernels know a block's size as data: one kernel for every cache.
template <class Kv, int Block>
CacheView<Kv, 0> any_block_size(const CacheView<Kv, Block>& view) {
  return {view.memory, view.shape, view.block_bytes};
}

// f<K, V>() of the narrowest widths that hold the heads.
template <class F>
void with_widths(const AttentionShape& shape, F f) {
  const auto holds = [&](int k, int v) { return shape.k_dim <= k && shape.v_dim <= v; };
  if (holds(64, 64)) return f.template operator()<64, 64>();
  if (holds(96, 96)) return f.template operator()<96, 96>();
  if (holds(128, 128)) return f.template operator()<128, 128>();
  if (holds(192, 128)) return f.template operator()<192, 128>();
  if (holds(256, 256)) return f.template operator()<256, 256>();
  if (holds(576, 512)) return f.template operator()<576, 512>();
  fail("attention: heads are %d wide and their values %d: flash holds 576 and 512, make KERNEL=naive any", shape.k_dim,
       shape.v_dim);
}

constexpr size_t MOST_PARTIAL_BYTES = size_t{128} << 20;

// Blocks of threads take a split each where they would be too few otherwise, and the workspace holds their results.
// Neither this nor the number of rows of a block changes a bit.
template <class L, int Block>
void launch_flash(const Team& team, const float* q, const KVCache<typename L::Kv, Block>& cache, int layer,
                  const Batch& batch, const AttentionShape& shape, float* out, const Workspace& workspace) {
  const int n_rows = batch.n_tokens * (shape.n_heads / shape.n_kv_heads), G = shape.n_kv_heads;
  const int n_warps = n_rows > ROWS * batch.n_sequences ? MOST_WARPS : L::SHARERS;
  const int n_blocks = n_rows / (n_warps / L::SHARERS * ROWS) + batch.n_sequences;
  const int n_splits = divide_up(Block ? batch.max_blocks * Block : cache.block_size(), SPLIT);
  const auto partials_in = [&](Arena& arena) { return Partials(arena, shape, batch.n_tokens, n_splits); };
  Partials partials;
  if (n_splits > 1 && n_blocks * G < 2 * multiprocessors() && bytes_of(partials_in) <= workspace.bytes()) {
    Arena arena = workspace.begin();
    partials = partials_in(arena);
  }
  const dim3 grid(static_cast<unsigned>(n_blocks), static_cast<unsigned>(G), static_cast<unsigned>(partials.n_splits));
  launch(team, flash<L>, grid, static_cast<unsigned>(n_warps) * 32, L::shared_bytes(shape, n_warps), q,
         any_block_size(cache.view()), layer, batch, shape, partials, out);
  const unsigned merges = partials.o ? static_cast<unsigned>(batch.n_tokens * shape.n_heads) : 0;
  launch(team, merge_splits, merges, 128, 0, batch, shape, partials, out);
}

}  // namespace attention

using namespace attention;

template <class Kv, int Block>
void Naive::attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Workspace&) {
  constexpr int THREADS = 128;
  launch(team, naive<Kv>, blocks_of(batch.n_tokens * shape.n_heads, THREADS), THREADS, 0, q,
         any_block_size(cache.view()), layer, batch, shape, out);
}

size_t Naive::workspace_bytes(const AttentionShape&, const Limits&) {
  return 0;
}

template <class Kv, int Block>
void Flash::attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Workspace& workspace) {
  if constexpr (std::is_same_v<Kv, KvF32>)  // tensor cores have none
    Naive::attend(team, q, cache, layer, batch, shape, out, workspace);
  else
    with_widths(shape, [&]<int K, int V>() {
      launch_flash<Layout<Kv, K, V>>(team, q, cache, layer, batch, shape, out, workspace);
    });
}

size_t Flash::workspace_bytes(const AttentionShape& shape, const Limits& limits) {
  with_widths(shape, [&]<int, int>() {});  // refuses what is too wide
  const int n_splits = divide_up(limits.context, SPLIT);
  return min(MOST_PARTIAL_BYTES, bytes_of([&](Arena& arena) { Partials(arena, shape, limits.max_tokens, n_splits); }));
}

template <class Kv>
double Flash::operand_rounding() {
  if constexpr (std::is_same_v<Kv, KvF32>)
    return 0;
  else
    return Operands<Kv>::ROUNDING;
}
template double Flash::operand_rounding<KvF32>();
template double Flash::operand_rounding<KvF16>();
template double Flash::operand_rounding<KvBF16>();
template double Flash::operand_rounding<KvQ8>();

#define INSTANTIATE(Kv, Block)                                                                                    \
  template void Naive::attend<Kv, Block>(const Team&, const float*, const KVCache<Kv, Block>&, int, const Batch&, \
                                         const AttentionShape&, float*, const Workspace&);                        \
  template void Flash::attend<Kv, Block>(const Team&, const float*, const KVCache<Kv, Block>&, int, const Batch&, \
                                         const AttentionShape&, float*, const Workspace&);
FOR_EACH_CACHE(INSTANTIATE)
