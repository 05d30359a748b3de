// attention.cu: softmax(q . K^T * scale) V over the cache, on a GPU.
//
// Decode reads every K and V row of its context for one token, so its speed is that of memory; a prompt uses each row
// for many queries, so its speed is that of multiply-adds. Both want a row to be read once for all the queries that
// need it, scores that never leave the chip, all of the GPU busy even for one sequence, products on tensor cores, and
// the next rows on their way meanwhile. The rungs, each for one of these:
//
//     naive           the formula in plain loops: a thread is a query row, and reads every K and V row for itself
//     tiles           TILE tokens' rows come into shared memory once, for 16 query rows or more
//     online softmax  a tile's scores are weighed by the largest so far; what was summed before is rescaled
//                     (FlashAttention, arXiv 2205.14135)
//     splits          the context is cut every ATTENTION_SPLIT tokens; blocks may take one each, and the results are
//                     merged in order of position (Flash-Decoding)
//     tensor cores    a warp multiplies 16 rows by 8 columns at a time, mma.sync (kernels/mma.h)
//     copies ahead    while a tile is at work the next one is copied, and the block table of the one after is read
//
// `naive` below is the first rung; the kernel `flash` stands on all the others, one for prompts and decode, for every
// variant: its query rows are tokens times the heads of a KV head's group (absorbed MLA: all heads).
//
// Why it is right: for any m, softmax(s) V = sum 2^(s - m) v / sum 2^(s - m) (scores in base 2). A State holds both
// sums over the tokens so far and their largest score as m; `join` is the step to a larger m, and all that tiles,
// splits, sinks and launches do is to join. A token that a row does not see has the score -inf and so the weight 0.
// And a row's arithmetic depends on its position and its sequence's rows of the cache alone: tiles and splits begin at
// fixed positions and are joined in order, and a product's row does not look at the other rows. So its bits are the
// same in any batch, in any chunks, with any block size, and however many blocks and warps share the work.
#include "attention.h"

#include <climits>
#include <cmath>

#include "host/error.h"
#include "kernels/build.h"
#include "kernels/gpu.h"
#include "kernels/mma.h"
#include "kernels/tiles.h"

namespace attention {  // a name: nvcc warns of what a build with another KV leaves unused in one without

constexpr int SPLIT = ATTENTION_SPLIT;
constexpr float NONE = -INFINITY;  // the largest of no scores
constexpr float LOG2E = 1.44269504f;

constexpr __host__ __device__ size_t to_size(int n) {
  return static_cast<size_t>(n);
}
constexpr __host__ __device__ int divide_up(int n, int by) {
  return (n + by - 1) / by;
}

// What a token sees.
__device__ Span seen_by(const Batch& batch, const AttentionShape& shape, int token) {
  return {shape.first_seen(batch.positions[token]), batch.positions[token] + 1};
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
  const Span seen = seen_by(batch, shape, t);

  const auto score = [&](int p) {
    const int block = table[p / view.block_size()], slot = p % view.block_size();
    const std::byte *row = rows.k(block, slot), *scales = rows.k_scales(block, slot);
    float s = 0;
    for (int i = 0; i < k_dim; i++) s += query[i] * load_element<Kv>(row, scales, i);
    s *= shape.scale;
    return shape.softcap > 0 ? shape.softcap * tanhf(s / shape.softcap) : s;
  };

  float largest = shape.sinks ? shape.sinks[h] : NONE;
  for (int p = seen.begin; p < seen.end; p++) largest = fmaxf(largest, score(p));

  float sum = shape.sinks ? expf(shape.sinks[h] - largest) : 0;
  for (int i = 0; i < v_dim; i++) result[i] = 0;
  for (int p = seen.begin; p < seen.end; p++) {
    const float weight = expf(score(p) - largest);
    const int block = table[p / view.block_size()], slot = p % view.block_size();
    const std::byte* row = shape.v_is_k ? rows.k(block, slot) : rows.v(block, slot);
    const std::byte* scales = shape.v_is_k ? rows.k_scales(block, slot) : rows.v_scales(block, slot);
    for (int i = 0; i < v_dim; i++) result[i] += weight * load_element<Kv>(row, scales, i);
    sum += weight;
  }
  for (int i = 0; i < v_dim; i++) result[i] /= sum;
}

// --- flash: a block's work and memory --------------------------------------------------------------------------------

constexpr int ROWS = 16;   // query rows of a warp
constexpr int GROUP = 32;  // elements of a row that are one step of the work: they share q8's scale
static_assert(SPLIT % TILE == 0 && GROUP == KvQ8::QUANT_GROUP);

// Sizes for heads up to K wide with values up to V wide, and blocks of up to WARPS warps. SHARERS of them share 16
// query rows: each scores TOKENS of a tile, and makes COLUMNS of the result from the weights of all. Prompts fill a
// block with rows, so that a tile is read once for many, and share them only where a warp has no registers for all
// columns; decode has 16 rows or fewer, and several warps are done with a tile sooner. It does not change a bit.
template <class Kv_, int K_, int V_, int SHARERS_, int WARPS_>
struct Layout {
  using Kv = Kv_;
  using Op = Operands<Kv>;
  using Rows = HeadRows<Kv, 0>;
  static constexpr int K = K_, V = V_, SHARERS = SHARERS_, WARPS = WARPS_, COLUMNS = V / SHARERS,
                       TOKENS = TILE / SHARERS;
  static constexpr int BYTES = sizeof(typename Codec<Kv>::Element);
  static constexpr bool IS_SCALED = Rows::IS_QUANTISED;
  // Of a multiprocessor; the registers of each follow from it.
  static constexpr int WARPS_AT_ONCE = COLUMNS > 32 ? 8 : IS_SCALED ? 12 : 16;
  static_assert(K % GROUP == 0 && COLUMNS % GROUP == 0 && TOKENS % 8 == 0);

  // Bytes from a row in shared memory to the next: an odd number of chunks, so that 8 rows' chunks, which are loaded
  // together, lie in different banks of the memory.
  static constexpr int stride(int bytes) { return divide_up(bytes, 2 * CHUNK) * 2 * CHUNK + CHUNK; }
  static constexpr int K_STRIDE = stride(K * BYTES + scale_bytes<Kv>(K));
  static constexpr int V_STRIDE = stride(V * BYTES + scale_bytes<Kv>(V));
  static constexpr int Q_STRIDE = stride(K * 2), Q_PART = ROWS * Q_STRIDE;

  struct Row {
    float factor;  // of its scores
    Span seen;
  };
  // What the warps of 16 query rows have in common.
  struct alignas(CHUNK) Shared {
    std::byte q[Op::Q_PARTS * Q_PART];  // [parts, ROWS] rows of K 16-bit elements
    Row row[ROWS];
    float largest[SHARERS][ROWS];                    // score of each row
    float4 weights[SHARERS > 1 ? TILE / 8 : 1][32];  // [tokens / 8, lanes] as the lanes hold them
  };
  static constexpr int tile_bytes(bool v_is_k) { return TILE * (K_STRIDE + (v_is_k ? 0 : V_STRIDE)); }
  static size_t shared_bytes(bool v_is_k, int n_warps) {
    return to_size(2 * tile_bytes(v_is_k)) + to_size(n_warps / SHARERS) * sizeof(Shared);
  }
};

// The query rows of a sequence and KV head that a block of threads has: row i is token i / group, head i % group of the
// KV head's.
struct QueryRows {
  int sequence, first_token, group, first_head, n_heads;
  int begin, end;
  __device__ int token(int row) const { return first_token + row / group; }
  __device__ int head(int row) const { return first_head + row % group; }
  __device__ size_t index(int row) const { return to_size(token(row)) * to_size(n_heads) + to_size(head(row)); }
};

// Sequence s has the blocks from (its first row) / n + s on: enough of them, some of nothing, and nobody has to count
// those of the sequences before. The last ones, of the longest context, are begun first. n: rows of a block.
__device__ QueryRows find_rows(const Batch& batch, const AttentionShape& shape, int n) {
  const int group = shape.n_heads / shape.n_kv_heads, me = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const auto first_block = [&](int s) { return (batch.query_start[s] - batch.query_start[0]) * group / n + s; };
  int s = 0;
  for (int past = batch.n_sequences; past - s > 1;) {
    const int middle = (s + past) / 2;
    (first_block(middle) <= me ? s : past) = middle;
  }
  const int start = batch.query_start[s], n_rows = (batch.query_start[s + 1] - start) * group;
  const int begin = (me - first_block(s)) * n;
  return {s, start, group, static_cast<int>(blockIdx.y) * group, shape.n_heads, begin, min(begin + n, n_rows)};
}

// The part of the context that a launch works on, and where results lie that are not whole yet: a split's, until
// they are merged; or with splits = 1 a launch's, which the next one goes on from.
struct ContextPart {
  int first = 0, n = INT_MAX;  // positions: block z of the grid has n, from first + z n on
  int splits = 1;              // blocks of the grid; where there are several, the last one to be done merges them
  int* done = nullptr;         // [blocks of query rows, KV heads] splits that are: splits_done
  float* o = nullptr;          // [T, n_heads, splits, v_dim] State's o
  float* m_l = nullptr;        // [T, n_heads, splits, 2] State's m and l

  ContextPart() = default;
  ContextPart(Arena& arena, const AttentionShape& shape, int n_tokens, int n_splits) : n(SPLIT), splits(n_splits) {
    const size_t results = to_size(n_tokens) * to_size(shape.n_heads) * to_size(n_splits);
    o = arena.take<float>(results * to_size(shape.v_dim));
    m_l = arena.take<float>(results * 2);
  }
  __device__ size_t at(size_t row) const { return row * to_size(splits) + blockIdx.z; }
};

template <class L>
struct State;
__device__ bool is_last_of(int n, const ContextPart& part, std::byte* shared_memory);
__device__ void merge_splits(const QueryRows& rows, const Batch& batch, const AttentionShape& shape,
                             const ContextPart& part, float* out);
template <class L>
__device__ void load_queries(const float* q, const QueryRows& rows, int first, const Batch& batch,
                             const AttentionShape& shape, typename L::Shared& shared);
template <class L>
__device__ void attend_tile(State<L>& state, const Tiles<L>& tiles, int first, const AttentionShape& shape,
                            typename L::Shared& shared);

// --- flash: the kernel -----------------------------------------------------------------------------------------------

// A block of threads has 16 query rows for each SHARERS warps; grid: blocks of query rows, KV heads, parts of the
// context. block_table: null where the cache is one block, of one split.
template <class L>
__global__ void __launch_bounds__(L::WARPS * 32, L::WARPS_AT_ONCE / L::WARPS)
    flash(const float* q, CacheView<typename L::Kv, 0> view, int layer, const int* block_table, Batch batch,
          AttentionShape shape, ContextPart part, float* out) {
  const int n_warps = static_cast<int>(blockDim.x) / 32, sixteen = warp_id() / L::SHARERS;
  const QueryRows rows = find_rows(batch, shape, n_warps / L::SHARERS * ROWS);
  if (rows.begin >= rows.end) return;  // the whole block
  const int part_begin = part.first + static_cast<int>(blockIdx.z) * part.n, part_end = part_begin + part.n;
  const Span seen{seen_by(batch, shape, rows.token(rows.begin)).begin,
                  seen_by(batch, shape, rows.token(rows.end - 1)).end};  // by any of the rows
  const int begin = max(seen.begin / TILE * TILE, part_begin), end = min(seen.end, part_end);
  if (begin >= end) return;

  const int* table = block_table ? block_table + to_size(rows.sequence) * to_size(batch.max_blocks) : nullptr;
  std::byte* memory = dynamic_shared<std::byte>();  // two tiles, then what each 16 rows have
  auto& shared = reinterpret_cast<typename L::Shared*>(memory + 2 * L::tile_bytes(shape.v_is_k))[sixteen];
  Tiles<L> tiles{
      {view, layer, static_cast<int>(blockIdx.y)}, view.shape, table, {seen.begin, end}, shape.v_is_k, memory};
  tiles.find_blocks(begin);
  tiles.start_copy(begin);
  const int first_row = rows.begin + sixteen * ROWS;
  load_queries<L>(q, rows, first_row, batch, shape, shared);

  State<L> total, split;
  total.clear(), split.clear();
  if (part.splits == 1 && seen.begin < part_begin) total.load(part, rows, first_row, shape.v_dim);
  for (int at = begin; at < end; at += TILE) {
    tiles.start_copy(at + TILE);
    cp_async_wait<1>();  // all but the copy just begun
    __syncthreads();
    attend_tile(split, tiles, at, shape, shared);
    if ((at + TILE) % SPLIT == 0 || at + TILE >= end) {
      split.add_lanes();
      total.merge(split);
      split.clear();
    }
    __syncthreads();  // nobody reads the tile any more
  }
  total.store(part, rows, first_row, shape, part.splits == 1 && end == seen.end, out);
  if (part.splits > 1 && is_last_of(divide_up(seen.end, SPLIT) - seen.begin / SPLIT, part, memory))
    merge_splits(rows, batch, shape, part, out);
}

// --- flash: sums -----------------------------------------------------------------------------------------------------

// Sums with largest scores m and `other` become sums with the larger one, m: what each is multiplied by. Where one is
// of nothing, the other does not change in any bit.
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
// What a row's o is multiplied by in the end. Its head's sink joins as one more token, without a value.
__device__ float last_factor(float m, float l, const float* sink) {
  if (!sink) return 1 / l;
  const Factors f = join(m, *sink * LOG2E);
  return f.mine / join(l, 1, f);
}

// A warp's sums over a part of the context. Of its 16 rows a lane has two, lane / 4 + 8 r.
template <class L>
struct State {
  float o[L::COLUMNS / 8][4];  // [products, (r, j)] sum of 2^(score - m) v, of column j of each product
  float m[2];                  // the largest score
  float l[2];                  // sum of 2^(score - m); before add_lanes, of the lane's tokens alone

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) o[i][j] = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) m[r] = NONE, l[r] = 0;
  }
  __device__ void add_lanes() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      l[r] += __shfl_xor_sync(WHOLE_WARP, l[r], 1);
      l[r] += __shfl_xor_sync(WHOLE_WARP, l[r], 2);
    }
  }
  __device__ void merge(const State& later) {
    Factors f[2];
#pragma unroll
    for (int r = 0; r < 2; r++) f[r] = join(m[r], later.m[r]), l[r] = join(l[r], later.l[r], f[r]);
#pragma unroll
    for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) o[i][j] = join(o[i][j], later.o[i][j], f[j / 2]);
  }

  // f(element of o, its column) for row r's columns below n.
  template <class F>
  __device__ void for_each_column(int r, int n, F f) {
    const int first = warp_id() % L::SHARERS * L::COLUMNS;
#pragma unroll
    for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = first + i / 4 * GROUP + L::Op::column(i % 4, lane_id() % 4 * 2 + j);
        if (column < n) f(o[i][2 * r + j], column);
      }
  }
  // f(r, row) for those of the lane's rows that there are.
  template <class F>
  __device__ void for_each_row(const QueryRows& rows, int first, F f) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first + lane_id() / 4 + 8 * r;
      if (row < rows.end) f(r, row);
    }
  }
  __device__ void load(const ContextPart& part, const QueryRows& rows, int first, int v_dim) {
    for_each_row(rows, first, [&](int r, int row) {
      const size_t at = part.at(rows.index(row));
      const float* from = part.o + at * to_size(v_dim);
      m[r] = part.m_l[2 * at], l[r] = part.m_l[2 * at + 1];
      for_each_column(r, v_dim, [&](float& x, int column) { x = from[column]; });
    });
  }
  // Into `out`, divided by the sum, where the context is at its end. fmaf(.., 0): a sum of nothing but underflows may
  // be -0 or +0, depending on how many tokens follow that the row does not see.
  __device__ void store(const ContextPart& part, const QueryRows& rows, int first, const AttentionShape& shape,
                        bool is_whole, float* out) {
    for_each_row(rows, first, [&](int r, int row) {
      const size_t at = is_whole ? rows.index(row) : part.at(rows.index(row));
      float* to = (is_whole ? out : part.o) + at * to_size(shape.v_dim);
      if (!is_whole && warp_id() % L::SHARERS == 0 && lane_id() % 4 == 0)
        part.m_l[2 * at] = m[r], part.m_l[2 * at + 1] = l[r];
      const float* sink = shape.sinks ? shape.sinks + rows.head(row) : nullptr;
      const float factor = is_whole ? last_factor(m[r], l[r], sink) : 1;
      for_each_column(r, shape.v_dim, [&](float x, int column) { to[column] = fmaf(x, factor, 0); });
    });
  }
};

// Whether this block is the last to be done of the n that have a split of the same rows. What the others have stored
// is visible to it then: each has put a fence between its stores and its count.
__device__ bool is_last_of(int n, const ContextPart& part, std::byte* shared_memory) {
  int* is_last = reinterpret_cast<int*>(shared_memory);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* done = part.done + blockIdx.x * gridDim.y + blockIdx.y;
    *is_last = atomicAdd(done, 1) == n - 1;
    if (*is_last) atomicExch(done, 0);  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return *is_last != 0;
}

// Joins what the blocks of all splits have left, in order. A thread has a column of several rows, as this takes as long
// as loads take to come, unless many are under way.
__device__ void merge_splits(const QueryRows& rows, const Batch& batch, const AttentionShape& shape,
                             const ContextPart& part, float* out) {
  constexpr int TOGETHER = 4;
  const int v_dim = shape.v_dim, all = divide_up(rows.end - rows.begin, TOGETHER) * v_dim;
  for (int i = static_cast<int>(threadIdx.x); i < all; i += static_cast<int>(blockDim.x)) {
    const int first = rows.begin + i / v_dim * TOGETHER, last = min(first + TOGETHER, rows.end) - 1;
    const size_t column = to_size(i % v_dim);
    float o[TOGETHER] = {}, m[TOGETHER] = {NONE, NONE, NONE, NONE}, l[TOGETHER] = {};
    const int begin = seen_by(batch, shape, rows.token(first)).begin, end = seen_by(batch, shape, rows.token(last)).end;
#pragma unroll 4
    for (int split = begin / SPLIT; split < divide_up(end, SPLIT); split++)
#pragma unroll
      for (int r = 0; r < TOGETHER; r++) {  // what is behind the last row is the last again
        const size_t at = rows.index(min(first + r, last)) * to_size(part.splits) + to_size(split);
        const Factors f = join(m[r], part.m_l[2 * at]);
        l[r] = join(l[r], part.m_l[2 * at + 1], f);
        o[r] = join(o[r], part.o[at * to_size(v_dim) + column], f);
      }
#pragma unroll
    for (int r = 0; r < TOGETHER; r++) {
      const float factor =
          last_factor(m[r], l[r], shape.sinks ? shape.sinks + rows.head(min(first + r, last)) : nullptr);
      if (first + r <= last) out[rows.index(first + r) * to_size(v_dim) + column] = fmaf(o[r], factor, 0);
    }
  }
}

// --- flash: a tile's work: attend_tile, below, and before it its steps -----------------------------------------------

// The 16 rows from `first` on. A row's elements are divided by the power of two in its largest, so that float16 holds
// any of them alike; its scores are multiplied by it again.
template <class L>
__device__ void load_queries(const float* q, const QueryRows& rows, int first, const Batch& batch,
                             const AttentionShape& shape, typename L::Shared& shared) {
  using Op = typename L::Op;
  for (int r = warp_id() % L::SHARERS; r < ROWS; r += L::SHARERS) {
    const int row = first + r, n = row < rows.end ? shape.k_dim : 0;
    const float* x = q + (n > 0 ? rows.index(row) * to_size(n) : 0);
    float largest = 0;
    for (int i = lane_id(); i < n; i += 32) largest = fmaxf(largest, fabsf(x[i]));
    for (int by = 16; by > 0; by /= 2) largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, by));
    const uint32_t exponent = min(max(float_to_bits(largest) >> 23, 1u), 253u);
    const float inverse = bits_to_float((254 - exponent) << 23);
    for (int i = 2 * lane_id(); i < L::K; i += 64) {
      uint32_t part[Op::Q_PARTS][1];
      set<typename Op::Type>(part, 0, i < n ? x[i] * inverse : 0, i + 1 < n ? x[i + 1] * inverse : 0);
      for (int p = 0; p < Op::Q_PARTS; p++)
        store_vector<uint32_t>(shared.q + p * L::Q_PART + r * L::Q_STRIDE + Op::place(i) * 2, part[p][0]);
    }
    if (lane_id() == 0)
      shared.row[r] = {bits_to_float(exponent << 23) * (shape.scale * LOG2E),
                       n > 0 ? seen_by(batch, shape, rows.token(row)) : Span{}};
  }
}

// s = q . K^T of the warp's tokens, the tile's from `first` on; n: groups of elements. Where a group has a scale, it is
// summed on its own.
template <class L>
__device__ void multiply_keys(float (&s)[L::TOKENS / 8][4], const std::byte* q, const TileRows& k, int first, int n) {
  using Op = typename L::Op;
#pragma unroll
  for (int i = 0; i < L::TOKENS / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[i][j] = 0;
  const std::byte* query = q + lane_id() % 16 * L::Q_STRIDE + lane_id() / 16 * 16;
#pragma unroll(L::IS_SCALED ? 1 : 4)
  for (int group = 0; group < n; group++) {
    A<Op::Q_PARTS> a[2];
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int p = 0; p < Op::Q_PARTS; p++)
        ldmatrix_x4(a[step].part[p], query + p * L::Q_PART + (group * GROUP + step * 16) * 2);
#pragma unroll
    for (int i = 0; i < L::TOKENS / 8; i++) {
      uint32_t b[2][2];
      Op::keys(b, k.row(first + i * 8) + group * GROUP * L::BYTES, k.stride);
      float d[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = 0; step < 2; step++) multiply<typename Op::Type>(L::IS_SCALED ? d : s[i], a[step], b[step]);
      if constexpr (L::IS_SCALED)
        for (int j = 0; j < 4; j++)
          s[i][j] = fmaf(d[j], k.scale(first + i * 8 + lane_id() % 4 * 2 + j % 2, group), s[i][j]);
    }
  }
}

// Products become scores in base 2, the warp's tokens from position `first` on; NONE where the row does not see the
// token. m: the largest of the row's in the whole tile.
template <class L>
__device__ void score(float (&s)[L::TOKENS / 8][4], float (&m)[2], int first, float softcap,
                      typename L::Shared& shared) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const typename L::Row row = shared.row[lane_id() / 4 + 8 * r];
    m[r] = NONE;
#pragma unroll
    for (int i = 0; i < L::TOKENS / 8; i++)
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; j++) {
        const int token = first + i * 8 + lane_id() % 4 * 2 + j % 2;
        float x = s[i][j] * row.factor;
        // cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1)
        if (softcap > 0) x = LOG2E * (softcap - 2 * softcap / (exp2_fast(x * (2 / softcap)) + 1));
        s[i][j] = token >= row.seen.begin && token < row.seen.end ? x : NONE;
        m[r] = fmaxf(m[r], s[i][j]);
      }
    m[r] = fmaxf(m[r], __shfl_xor_sync(WHOLE_WARP, m[r], 1));
    m[r] = fmaxf(m[r], __shfl_xor_sync(WHOLE_WARP, m[r], 2));
  }
  if constexpr (L::SHARERS > 1) {
    if (lane_id() % 4 == 0)
      for (int r = 0; r < 2; r++) shared.largest[warp_id() % L::SHARERS][lane_id() / 4 + 8 * r] = m[r];
    __syncthreads();
    for (int r = 0; r < 2; r++)
      for (int i = 0; i < L::SHARERS; i++) m[r] = fmaxf(m[r], shared.largest[i][lane_id() / 4 + 8 * r]);
  }
}

// The weights of the whole tile, of those that each sharer has computed.
template <class L>
__device__ void share_weights(const float (&mine)[L::TOKENS / 8][4], float (&all)[TILE / 8][4],
                              typename L::Shared& shared) {
#pragma unroll
  for (int i = 0; i < L::TOKENS / 8; i++) {
    const float(&x)[4] = mine[i];
    if constexpr (L::SHARERS > 1)
      shared.weights[warp_id() % L::SHARERS * (L::TOKENS / 8) + i][lane_id()] = {x[0], x[1], x[2], x[3]};
    else
      for (int j = 0; j < 4; j++) all[i][j] = x[j];
  }
  if constexpr (L::SHARERS > 1) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILE / 8; i++) {
      const float4 x = shared.weights[i][lane_id()];
      all[i][0] = x.x, all[i][1] = x.y, all[i][2] = x.z, all[i][3] = x.w;
    }
  }
}

// state.o += weights V, the warp's columns. Scales go into the weights: a token's is the same for all columns of a
// group.
template <class L>
__device__ void multiply_values(State<L>& state, const float (&weights)[TILE / 8][4], const TileRows& v) {
  using Op = typename L::Op;
  const int first = warp_id() % L::SHARERS * L::COLUMNS;
#pragma unroll
  for (int group = 0; group < L::COLUMNS / GROUP; group++)
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
      for (int i = 0; i < 4; i++) multiply<typename Op::Type>(state.o[group * 4 + i], a, b[i]);
    }
}

// Joins the tile of positions first .. first + TILE - 1 to the state: the online softmax. Most tiles have no larger
// score, and then nothing is to be rescaled.
template <class L>
__device__ void attend_tile(State<L>& state, const Tiles<L>& tiles, int first, const AttentionShape& shape,
                            typename L::Shared& shared) {
  const int mine = warp_id() % L::SHARERS * L::TOKENS;
  float s[L::TOKENS / 8][4], m[2], weights[TILE / 8][4];
  multiply_keys<L>(s, shared.q, tiles.keys(first), mine, divide_up(shape.k_dim, GROUP));
  score<L>(s, m, first + mine, shape.softcap, shared);

  float base[2], factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    m[r] = fmaxf(m[r], state.m[r]);
    base[r] = m[r] == NONE ? 0 : m[r];
    factor[r] = m[r] == state.m[r] ? 1 : exp2_fast(state.m[r] - base[r]);
    state.m[r] = m[r], state.l[r] *= factor[r];
  }
  if (__ballot_sync(WHOLE_WARP, factor[0] != 1 || factor[1] != 1))
#pragma unroll
    for (int i = 0; i < L::COLUMNS / 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) state.o[i][j] *= factor[j / 2];
#pragma unroll
  for (int i = 0; i < L::TOKENS / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[i][j] = exp2_fast(s[i][j] - base[j / 2]);

  share_weights<L>(s, weights, shared);
#pragma unroll
  for (int i = 0; i < TILE / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) state.l[j / 2] += weights[i][j];
  multiply_values(state, weights, tiles.values(first));
}

// --- MLA's expanded form ---------------------------------------------------------------------------------------------

// Float32 rows [n, n_kv_heads, ...] become those of a cache of one block. grid: rows, KV heads
__global__ void narrow_rows(PlainRows rows, CacheView<KvBF16, 0> view) {
  const HeadRows<KvBF16, 0> to(view, 0, static_cast<int>(blockIdx.y));
  const int slot = static_cast<int>(blockIdx.x);
  const auto narrow = [&](const float* from, int dim, std::byte* row) {
    from += (to_size(slot) * gridDim.y + blockIdx.y) * to_size(dim);
    const int n = static_cast<int>(HeadRows<KvBF16, 0>::stride(dim) / sizeof(uint16_t));
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
      reinterpret_cast<uint16_t*>(row)[i] = Codec<KvBF16>::narrow(i < dim ? from[i] : 0);
  };
  narrow(rows.k, view.shape.k_dim, to.k(0, slot));
  narrow(rows.v, view.shape.v_dim, to.v(0, slot));
}

// The workspace of attend_rows: a split's rows, and m and l of all query rows, whose o is in `out`.
struct RowsMemory {
  CacheView<KvBF16, 0> view;
  float* m_l;  // [T, n_heads, 2]
  RowsMemory(Arena& arena, const AttentionShape& shape, int n_tokens)
      : view{nullptr, {1, shape.n_kv_heads, shape.k_dim, shape.v_dim, 1, SPLIT}},
        m_l(arena.take<float>(to_size(n_tokens) * to_size(shape.n_heads) * 2)) {
    view.block_bytes = HeadRows<KvBF16, 0>::block_bytes(view.shape);
    view.memory = arena.take<std::byte>(to_size(shape.n_kv_heads) * view.block_bytes);
  }
};

// --- launching -------------------------------------------------------------------------------------------------------

#define NO_F32 "flash multiplies 16-bit numbers on a GPU: make KV=f16, bf16 or q8, or KERNEL=naive"
#ifndef BUILD_EVERY_COMBINATION
static_assert(!std::is_same_v<BUILD_KERNEL, Flash> || !std::is_same_v<BUILD_KV, KvF32>, NO_F32);
#endif

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
  if (holds(128, 128)) return f.template operator()<128, 128>();
  if (holds(192, 128)) return f.template operator()<192, 128>();
  if (holds(256, 256)) return f.template operator()<256, 256>();
  if (holds(576, 512)) return f.template operator()<576, 512>();
  fail("attention: heads are %d wide and their values %d: flash holds 576 and 512, make KERNEL=naive any", shape.k_dim,
       shape.v_dim);
}
// Warps that share 16 query rows and have `columns` of V each, or more where that were over four.
constexpr int sharers(int V, int columns) {
  return divide_up(V, columns) < 4 ? divide_up(V, columns) : 4;
}
template <class Kv, int K, int V>
using ForDecode = Layout<Kv, K, V, sharers(V, 32), (V > 128 ? 8 : sharers(V, 32))>;
template <class Kv, int K, int V>
using ForPrompts = Layout<Kv, K, V, sharers(V, std::is_same_v<Kv, KvQ8> ? 64 : 128), 8>;

int rows_of(const Batch& batch, const AttentionShape& shape) {
  return batch.n_tokens * (shape.n_heads / shape.n_kv_heads);
}

// With as many warps in a block as there are rows and shared memory for.
template <class L>
void launch_flash(const Team& team, const float* q, const CacheView<typename L::Kv, 0>& view, int layer,
                  const int* block_table, const Batch& batch, const AttentionShape& shape, const ContextPart& part,
                  float* out) {
  const int n_rows = rows_of(batch, shape);
  int n_warps = L::WARPS;
  while (n_warps > L::SHARERS &&
         (n_rows <= ROWS * batch.n_sequences || L::shared_bytes(shape.v_is_k, n_warps) > shared_memory_per_block()))
    n_warps /= 2;
  const int n_blocks = n_rows / (n_warps / L::SHARERS * ROWS) + batch.n_sequences;
  const dim3 grid(static_cast<unsigned>(n_blocks), static_cast<unsigned>(shape.n_kv_heads),
                  static_cast<unsigned>(part.splits));
  launch(team, flash<L>, grid, static_cast<unsigned>(n_warps) * 32, L::shared_bytes(shape.v_is_k, n_warps), q, view,
         layer, block_table, batch, shape, part, out);
}

// Splits that are done, of each block of query rows and KV head: 0 between launches, of any shape.
constexpr int MOST_SPLIT_BLOCKS = 4096;
int* splits_done() {
  static Buffer<int> done(MOST_SPLIT_BLOCKS);
  return done.data();
}

// Blocks of threads take a split each where there would be too few to fill the GPU otherwise, and the workspace holds
// their results.
template <class L, int Block>
void attend_cache(const Team& team, const float* q, const KVCache<typename L::Kv, Block>& cache, int layer,
                  const Batch& batch, const AttentionShape& shape, float* out, const Workspace& workspace) {
  constexpr int WARPS_TO_FILL = 32;  // of a multiprocessor
  const int n_warps = divide_up(rows_of(batch, shape), ROWS) * L::SHARERS * shape.n_kv_heads;
  const int n_blocks = (divide_up(rows_of(batch, shape), ROWS) + batch.n_sequences) * shape.n_kv_heads;  // or fewer
  const int n_splits = divide_up(Block ? batch.max_blocks * Block : cache.block_size(), SPLIT);
  const auto parts = [&](Arena& arena) { return ContextPart(arena, shape, batch.n_tokens, n_splits); };
  ContextPart part;
  if (team.rank == 0 && n_splits > 1 && n_warps < WARPS_TO_FILL * multiprocessors() && n_blocks <= MOST_SPLIT_BLOCKS &&
      bytes_of(parts) <= workspace.bytes()) {
    Arena arena = workspace.begin();
    part = parts(arena);
    part.done = splits_done();
  }
  launch_flash<L>(team, q, any_block_size(cache.view()), layer, batch.block_table, batch, shape, part, out);
}

constexpr size_t MOST_PARTIAL_BYTES = size_t{128} << 20;

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
  if constexpr (std::is_same_v<Kv, KvF32>)
    fail(NO_F32);
  else
    with_widths(shape, [&]<int K, int V>() {
      if (rows_of(batch, shape) > ROWS * batch.n_sequences)
        attend_cache<ForPrompts<Kv, K, V>>(team, q, cache, layer, batch, shape, out, workspace);
      else
        attend_cache<ForDecode<Kv, K, V>>(team, q, cache, layer, batch, shape, out, workspace);
    });
}

// A split's rows go into a cache of one block, and the sums go on from launch to launch.
void Flash::attend_rows(const Team& team, const float* q, const PlainRows& rows, const Batch& batch, int sequence,
                        const AttentionShape& shape, float* out, const Workspace& workspace) {
  Arena arena = workspace.begin();
  const RowsMemory memory(arena, shape, batch.n_tokens);
  const dim3 grid(static_cast<unsigned>(rows.n), static_cast<unsigned>(shape.n_kv_heads));
  launch(team, narrow_rows, grid, 128, 0, rows, memory.view);
  ContextPart part;
  part.first = rows.first, part.n = SPLIT, part.o = out, part.m_l = memory.m_l;
  Batch one = batch;
  one.n_sequences = 1, one.query_start += sequence;
  with_widths(shape, [&]<int K, int V>() {
    launch_flash<ForPrompts<KvBF16, K, V>>(team, q, memory.view, 0, nullptr, one, shape, part, out);
  });
}

size_t Flash::workspace_bytes(const AttentionShape& shape, const Limits& limits) {
  with_widths(shape, [&]<int, int>() {});  // refuses what is too wide
  const int T = limits.max_tokens, n_splits = divide_up(limits.context, SPLIT);
  return max(min(MOST_PARTIAL_BYTES, bytes_of([&](Arena& arena) { ContextPart(arena, shape, T, n_splits); })),
             bytes_of([&](Arena& arena) { RowsMemory(arena, shape, T); }));
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
