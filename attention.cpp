// attention.cpp: the attention kernels of the CPU.
//
// The ladder of flash attention in decode: f16, 4096 tokens, all layers, on Zen 4; 30 layers of 9 query and 3 KV heads
// of 64 (94 MB), and 8 layers of 32 and 8 heads of 128 (134 MB).
//
// 1. K of a tile transposed in squares of eight floats, stored, and multiplied; V used as it lies in the cache. One
//    thread: 13.2 and 21.7 ms.
// 2. The next tile's lines are asked for while this one is computed: 7.4 and 13.3 ms. Into the first cache: only 11.4
//    and 18.2, there are too few places for lines on their way there.
// 3. Elements move while they are narrow, 16 tokens at a time, and a few rows' product takes the columns as they come,
//    in registers: two threads 4.1 -> 4.0 and 6.7 -> 5.2 ms.
// 4. A tile's rows are found without a copy and without a pass over all of them: 4.0 -> 3.8 and 5.3 -> 5.1 ms.
// 5. The cache keeps keys k-major: nothing is transposed, and decode is at the limit of the memory. 4.2 -> 2.8 and
//    5.3 -> 3.7 ms. MLA's keys are its values and stay rows, but a register of scores holds 16
//    heads, and nothing is transposed either: 16 heads of 512 + 64, 16 layers, 16.6 -> 13.9 ms, 70 % of the
//    multiply-add peak.
// 6. A run's K and V lie together: 16-token blocks in a shuffled order, a whole step of decode, 0.86 -> 0.94 of the
//    contiguous cache's speed. Blocks in order: 1.00.
// 7. Values go from the cache into the product for any number of rows, not for the few alone: MLA as in step 5, 14.0 ->
//    13.0 ms, 512 tokens of a prompt the same (with q8 up to 6 % longer).
//
// What failed: 16 x 16 transposes of floats in 512-bit registers (half as long again on Zen 4). Narrow columns that go
// through memory: no gain with rows of 64 that are in the cache. Twelve rows by one register for MLA's scores instead
// of six: 13.9 -> 16.9 ms.
#include "attention.h"

#include "kernels/build.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <utility>

namespace {

using simd::F32;
using simd::LANES;

constexpr int SPLIT = ATTENTION_SPLIT;
constexpr int TILE = 64;          // tokens whose scores are computed at a time
constexpr int ITEM_ROWS = 64;     // query rows (tokens x heads of a group) that share a tile
constexpr float NONE = -FLT_MAX;  // the maximum of no scores: finite, so that NONE - NONE is 0
constexpr int STRIP = 64;         // elements of rows that are expanded at a time: 16 KB stay in the first cache
static_assert(SPLIT % TILE == 0 && TILE % LANES == 0 && STRIP % LANES == 0);

constexpr size_t to_size(int n) {
  return static_cast<size_t>(n);
}
constexpr int round_up(int n, int to) {
  return (n + to - 1) / to * to;
}

// --- where rows lie --------------------------------------------------------------------------------------------------

// The rows of one layer and KV head of one sequence. RUN tokens from a multiple of RUN on lie one after the other, so
// that an address is computed once a run; `end` is how far there are rows of a context of n tokens; `k_major` whether k
// of such a multiple is a matrix of RUN = KEY_LANES tokens.
template <class Kv, int Block>
struct CacheRows {
  using Codec = Kv;
  static constexpr int RUN = KVCache<Kv, Block>::RUN;
  const KVCache<Kv, Block>& cache;
  int layer, kv_head;
  const int* blocks;  // the sequence's row of block_table

  static int end(int n) { return n; }
  bool k_major() const { return cache.k_major(); }
  const std::byte* k(int token) const { return cache.k_row(layer, block(token), kv_head, slot(token)); }
  const std::byte* v(int token) const { return cache.v_row(layer, block(token), kv_head, slot(token)); }
  size_t k_stride() const { return Kv::row_bytes(cache.shape().k_dim); }
  size_t v_stride() const { return Kv::row_bytes(cache.shape().v_dim); }
  void load_k(int token, float* x) const { cache.load_k(layer, block(token), kv_head, slot(token), x); }

 private:
  static int slot(int token) { return Block ? token % std::max(Block, 1) : token; }
  int block(int token) const { return blocks[Block ? token / std::max(Block, 1) : 0]; }
};

// Head kv_head of PlainRows, as bytes.
struct PlainHead {
  using Codec = KvF32;
  static constexpr int RUN = KEY_LANES;
  const PlainRows& rows;
  const AttentionShape& shape;
  int kv_head;

  int end(int n) const { return std::min(n, rows.first + rows.n); }
  static constexpr bool k_major() { return false; }
  const std::byte* k(int token) const { return at(rows.k, k_stride(), shape.k_dim, token); }
  const std::byte* v(int token) const { return at(rows.v, v_stride(), shape.v_dim, token); }
  size_t k_stride() const { return sizeof(float) * to_size(shape.n_kv_heads) * to_size(shape.k_dim); }
  size_t v_stride() const { return sizeof(float) * to_size(shape.n_kv_heads) * to_size(shape.v_dim); }

 private:
  const std::byte* at(const float* x, size_t stride, int dim, int token) const {
    return reinterpret_cast<const std::byte*>(x) + to_size(token - rows.first) * stride +
           sizeof(float) * to_size(kv_head) * to_size(dim);
  }
};

// --- the work --------------------------------------------------------------------------------------------------------

// Query rows that read the same K and V rows: some tokens of a sequence, times the heads of a group. Row i is token
// first_token + i / group, head kv_head * group + i % group.
struct Item {
  int sequence, kv_head, first_token, n_tokens;
};

int group_size(const AttentionShape& shape) {
  return shape.n_heads / shape.n_kv_heads;
}
int tokens_per_item(const AttentionShape& shape) {
  return std::max(1, ITEM_ROWS / group_size(shape));
}
int rows_per_item(const AttentionShape& shape) {
  return tokens_per_item(shape) * group_size(shape);
}

int n_items(const Batch& batch, int sequence, const AttentionShape& shape) {
  const int n_tokens = batch.query_start[sequence + 1] - batch.query_start[sequence], per_item = tokens_per_item(shape);
  return (n_tokens + per_item - 1) / per_item * shape.n_kv_heads;
}

// Item `index` of the sequence: the KV heads of its first tokens, then those of the next.
Item item_of(const Batch& batch, int sequence, const AttentionShape& shape, int index) {
  const int first = batch.query_start[sequence] + index / shape.n_kv_heads * tokens_per_item(shape);
  const int n = std::min(tokens_per_item(shape), batch.query_start[sequence + 1] - first);
  return {sequence, index % shape.n_kv_heads, first, n};
}

// A token sees first_seen .. its position.
int first_seen(const AttentionShape& shape, int position) {
  return shape.window > 0 ? std::max(0, position - shape.window + 1) : 0;
}

// An item's tokens see first .. last - 1, in splits first_split .. last_split - 1.
struct Range {
  int first, last;
  int first_split() const { return first / SPLIT; }
  int last_split() const { return (last + SPLIT - 1) / SPLIT; }
};

Range range_of(const Batch& batch, const AttentionShape& shape, const Item& item) {
  return {first_seen(shape, batch.positions[item.first_token]),
          batch.positions[item.first_token + item.n_tokens - 1] + 1};
}

// --- scratch ---------------------------------------------------------------------------------------------------------

// Attention of some rows over one split: softmax numerators' maximum, sum, and weighted sum of V.
struct Partial {
  float* max;  // [rows_per_item]
  float* sum;  // [rows_per_item]
  float* acc;  // [rows_per_item, v_pad]
};

// Row widths and their number rounded up to whole registers.
struct Widths {
  size_t k_pad, v_pad, rows;
  explicit Widths(const AttentionShape& shape)
      : k_pad(to_size(round_up(shape.k_dim, LANES))),
        v_pad(to_size(round_up(shape.v_dim, LANES))),
        rows(to_size(round_up(rows_per_item(shape), LANES))) {}
  size_t partial() const { return to_size(round_up(static_cast<int>(rows * (v_pad + 2)), LANES)); }
};

Partial partial_at(float* memory, const Widths& w) {
  return {memory + w.rows * w.v_pad, memory + w.rows * (w.v_pad + 1), memory};
}

// One thread's scratch memory.
struct Scratch {
  float* q;         // [rows, k_pad] times scale; for token-major keys [k_dim, rows]
  float* scores;    // [rows, TILE]
  float* scores_t;  // [TILE, rows] what token-major keys give
  float* rescale;   // [max(rows, TILE)]
  float* sums;      // [rows, LANES] the denominators, a lane each LANES-th token
  float* strip;     // [TILE, STRIP] a strip of the tile's K or V rows
  Partial partial;

  static size_t floats(const AttentionShape& shape) {
    const Widths w(shape);
    return w.rows * (w.k_pad + to_size(2 * TILE + LANES)) + std::max(w.rows, to_size(TILE)) + to_size(TILE * STRIP) +
           w.partial();
  }
};

Scratch scratch_at(float* memory, const AttentionShape& shape) {
  const Widths w(shape);
  Scratch s{};
  const auto take = [&memory](size_t n) { return std::exchange(memory, memory + n); };
  s.q = take(w.rows * w.k_pad);
  s.scores = take(w.rows * to_size(TILE));
  s.scores_t = take(w.rows * to_size(TILE));
  s.sums = take(w.rows * to_size(LANES));
  s.rescale = take(std::max(w.rows, to_size(TILE)));
  s.strip = take(to_size(TILE * STRIP));
  s.partial = partial_at(take(w.partial()), w);
  return s;
}

// The workspace of a call: the rows' running maxima and sums, then the scratch memory of each thread, then the slots in
// which threads leave results of single splits.
constexpr int SLOTS_PER_THREAD = 16;

struct Layout {
  float *max, *sum;  // [T, n_heads]
  float *scratch, *slots;
  size_t scratch_floats, slot_floats;

  Layout(Arena arena, const AttentionShape& shape, int n_tokens, int n_threads)
      : max(arena.take<float>(floats(shape, n_tokens, n_threads))),
        sum(max + state_floats(shape, n_tokens)),
        scratch(sum + state_floats(shape, n_tokens)),
        slots(scratch + to_size(n_threads) * Scratch::floats(shape)),
        scratch_floats(Scratch::floats(shape)),
        slot_floats(Widths(shape).partial()) {}

  static size_t floats(const AttentionShape& shape, int n_tokens, int n_threads) {
    return 2 * state_floats(shape, n_tokens) +
           to_size(n_threads) * (Scratch::floats(shape) + to_size(SLOTS_PER_THREAD) * Widths(shape).partial());
  }
  static size_t state_floats(const AttentionShape& shape, int n_tokens) {
    return (to_size(n_tokens) * to_size(shape.n_heads) + 15) / 16 * 16;
  }
  Scratch scratch_of(int rank, const AttentionShape& shape) const {
    return scratch_at(scratch + to_size(rank) * scratch_floats, shape);
  }
  Partial slot(const AttentionShape& shape, int index) const {
    return partial_at(slots + to_size(index) * slot_floats, Widths(shape));
  }
};

// --- the small product -----------------------------------------------------------------------------------------------

constexpr int MAX_ROWS = 6, MAX_REGISTERS = LANES == 16 ? 4 : 2;  // what the register file holds, with a column of b

// Into the second cache: there are too few places for lines on their way to the first. Worth it a few at a time between
// other work; many at once stall.
inline void prefetch(const std::byte* p) {
  __builtin_prefetch(p, 0, 2);
}

// Where a product's second factor comes from: row p's j-th register.
struct PlainColumns {  // float32
  const float* b;
  size_t stride;
  F32 operator()(size_t p, int j) const { return simd::load(b + p * stride + j * LANES); }
};
template <class Kv, class TileRows>
struct RowColumns {  // rows of the cache, as they are, from the tile's row `first` on; those of `next` are prefetched
  const TileRows &now, &next;
  size_t first;
  int dim;
  F32 operator()(size_t p, int j) const {
    prefetch(next.v(first + p) + Kv::row_bytes(j * LANES));
    return Kv::lanes(now.v(first + p), dim, j * LANES);
  }
};
template <class Kv, class TileRows>
struct KeyColumns {  // the cache's k-major matrices, as they are; those of `next` are prefetched
  const TileRows &now, &next;
  int dim;
  F32 operator()(size_t p, int j) const {
    const int column = j * LANES, matrix = column / KEY_LANES, lane = column % KEY_LANES, d = static_cast<int>(p);
    prefetch(next.k_runs[matrix] + Kv::row_bytes(d * KEY_LANES + lane));
    return Kv::keys(now.k_runs[matrix], dim, d, lane);
  }
};

// c = rescale * c + a b, or a b where rescale is null: a [M, k], b [k, N registers from register `first`], c [M, N
// registers]. An element is one chain of fma in order of k: how many rows and columns are computed at a time does not
// show.
template <class Columns, int M, int N>
void product_block(const float* a, size_t a_stride, const Columns& b, int first, int k, const float* rescale, float* c,
                   size_t c_stride) {
  F32 sum[M][N];
#pragma GCC unroll 8
  for (size_t i = 0; i < M; i++) {
    const F32 factor = rescale ? simd::set(rescale[i]) : simd::zero();
#pragma GCC unroll 8
    for (int j = 0; j < N; j++)
      sum[i][j] = rescale ? simd::mul(simd::load(c + i * c_stride + j * LANES), factor) : simd::zero();
  }
  for (size_t p = 0; p < to_size(k); p++) {
    F32 column[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) column[j] = simd::in_register(b(p, first + j));
#pragma GCC unroll 8
    for (size_t i = 0; i < M; i++) {
      const F32 x = simd::set(a[i * a_stride + p]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sum[i][j] = simd::fma(x, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) simd::store(c + i * c_stride + j * LANES, sum[i][j]);
}

template <class Columns, int... I>
constexpr auto product_blocks(std::integer_sequence<int, I...>) {
  return std::array{&product_block<Columns, I / MAX_REGISTERS + 1, I % MAX_REGISTERS + 1>...};
}

// The same for any number of rows. A block of rows that ends with row r needs registers(r) of columns, k(r) of the sum.
template <class Columns, class Registers, class Depth>
void small_product(const float* a, size_t a_stride, int rows, const Columns& b, Registers registers, Depth k,
                   const float* rescale, float* c, size_t c_stride) {
  static constexpr auto BLOCKS = product_blocks<Columns>(std::make_integer_sequence<int, MAX_ROWS * MAX_REGISTERS>());
  const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int j = 0; j < registers(rows - 1); j += MAX_REGISTERS) {
    for (int block = 0; block < blocks; block++) {  // of nearly equal heights
      const int first = rows * block / blocks, end = rows * (block + 1) / blocks;
      const int n = std::min(MAX_REGISTERS, registers(end - 1) - j);
      if (n <= 0) continue;
      const size_t i = to_size(first);
      BLOCKS[to_size((end - first - 1) * MAX_REGISTERS + n - 1)](a + i * a_stride, a_stride, b, j, k(end - 1),
                                                                 rescale ? rescale + i : nullptr,
                                                                 c + i * c_stride + j * LANES, c_stride);
    }
  }
}

// --- flash: one split ------------------------------------------------------------------------------------------------

// Where a tile's tokens lie, a run at a time. Only runs of tokens first .. last - 1 may be read: the entries around
// them repeat the nearest of them.
template <class Rows>
struct TileRows {
  static constexpr int RUN = Rows::RUN;
  const std::byte *k_runs[TILE / RUN], *v_runs[TILE / RUN];
  size_t k_stride, v_stride;
  const std::byte* k(size_t i) const { return k_runs[i / RUN] + i % RUN * k_stride; }  // of the tile's i-th token
  const std::byte* v(size_t i) const { return v_runs[i / RUN] + i % RUN * v_stride; }

  void find(const Rows& rows, const AttentionShape& shape, int tile, int first, int last) {
    const int begin = (first - tile) / RUN, end = (last - tile + RUN - 1) / RUN;
    for (int run = begin; run < end; run++) {
      k_runs[run] = rows.k(tile + run * RUN);
      v_runs[run] = shape.v_is_k ? k_runs[run] : rows.v(tile + run * RUN);
    }
    for (const std::byte** runs : {k_runs, v_runs}) {
      std::fill(runs, runs + begin, runs[begin]);
      std::fill(runs + end, runs + TILE / RUN, runs[end - 1]);
    }
    k_stride = rows.k_stride();
    v_stride = shape.v_is_k ? k_stride : rows.v_stride();
  }
};

// s -> cap tanh(s / cap), tanh x = 1 - 2 / (e^2x + 1): an absolute error of 2^-23 cap.
void cap_scores(float* s, int n, float cap) {
  const F32 factor = simd::set(2 / cap), most = simd::set(80);
  for (int i = 0; i < n; i += LANES)
    simd::store(s + i, simd::exp(simd::min(simd::mul(simd::load(s + i), factor), most)));
  for (int i = 0; i < n; i++) s[i] = cap - 2 * cap / (s[i] + 1);
}

// The columns of a tile that a row of the item sees: from .. to - 1.
struct Seen {
  const Batch& batch;
  const AttentionShape& shape;
  const Item& item;
  int tile;
  int n_rows() const { return item.n_tokens * group_size(shape); }
  int position(int row) const { return batch.positions[item.first_token + row / group_size(shape)]; }
  int from(int row) const { return std::clamp(first_seen(shape, position(row)) - tile, 0, to(row)); }
  int to(int row) const { return std::clamp(position(row) + 1 - tile, 0, TILE); }
  int registers(int row) const { return (to(row) + LANES - 1) / LANES; }
};

// The rows' scores become e^(score - maximum), 0 in the columns that the row does not see; maxima and sums move on;
// rescale is the factor of what was summed before. A row that sees nothing of the tile keeps its state: its factor
// is 1.
void softmax_tile(const Seen& seen, const Scratch& s, const Partial& out) {
  const float cap = seen.shape.softcap;
  const int n_rows = seen.n_rows();
  for (int row = 0; row < n_rows; row++) {
    float* score = s.scores + row * TILE;
    const int n = seen.registers(row) * LANES;
    if (cap > 0) cap_scores(score, n, cap);
    std::fill(score, score + seen.from(row), NONE);
    std::fill(score + seen.to(row), score + n, NONE);
    F32 m = simd::set(NONE);
    for (int i = 0; i < n; i += LANES) m = simd::max(m, simd::load(score + i));
    s.rescale[row] = out.max[row];
    out.max[row] = std::max(out.max[row], simd::largest(m));
  }
  for (int row = 0; row < n_rows; row += LANES)
    simd::store(s.rescale + row, simd::exp(simd::sub(simd::load(s.rescale + row), simd::load(out.max + row))));
  for (int row = 0; row < n_rows; row++) {
    float *score = s.scores + row * TILE, *sums = s.sums + row * LANES;
    const int n = seen.registers(row) * LANES;
    const F32 m = simd::set(out.max[row]);
    for (int i = 0; i < n; i += LANES) simd::store(score + i, simd::exp(simd::sub(simd::load(score + i), m)));
    std::fill(score, score + seen.from(row), 0.0f);
    std::fill(score + seen.to(row), score + TILE, 0.0f);
    F32 sum = simd::mul(simd::load(sums), simd::set(s.rescale[row]));
    for (int i = 0; i < n; i += LANES) sum = simd::add(sum, simd::load(score + i));
    simd::store(sums, sum);
  }
}

const float* query_row(const float* q, const AttentionShape& shape, const Item& item, int row) {
  const int group = group_size(shape), token = item.first_token + row / group;
  return q + to_size(token * shape.n_heads + item.kv_head * group + row % group) * to_size(shape.k_dim);
}

// The item's query rows times scale, one after the other.
void load_query_rows(const float* q, const AttentionShape& shape, const Item& item, const Scratch& s) {
  const size_t k_pad = Widths(shape).k_pad;
  for (int row = 0; row < item.n_tokens * group_size(shape); row++) {
    const float* from = query_row(q, shape, item, row);
    for (int i = 0; i < shape.k_dim; i++) s.q[to_size(row) * k_pad + to_size(i)] = from[i] * shape.scale;
  }
}

// The same, transposed; the last row fills the last register.
void load_query_columns(const float* q, const AttentionShape& shape, const Item& item, const Scratch& s) {
  const size_t rows = Widths(shape).rows;
  const int last = item.n_tokens * group_size(shape) - 1;
  for (int first = 0; first <= last; first += LANES) {
    const float* from[LANES];
    for (int i = 0; i < LANES; i++) from[i] = query_row(q, shape, item, std::min(first + i, last));
    float* to = s.q + first;
    int d = 0;
    for (; d + 8 <= shape.k_dim; d += 8) {
      F32 column[8];
      simd::columns(from, d, column);
      for (int i = 0; i < 8; i++) simd::store(to + to_size(d + i) * rows, simd::mul(column[i], simd::set(shape.scale)));
    }
    for (; d < shape.k_dim; d++)
      for (int i = 0; i < LANES; i++) to[to_size(d) * rows + to_size(i)] = from[i][d] * shape.scale;
  }
}

void load_queries(const float* q, const AttentionShape& shape, const Item& item, bool k_major, const Scratch& s) {
  k_major ? load_query_rows(q, shape, item, s) : load_query_columns(q, shape, item, s);
}

// Elements first .. last - 1 of a row; those of the row `next` are asked for, unless it is null.
template <class Kv>
void load_part(const std::byte* row, const std::byte* next, int dim, int first, int last, float* x) {
  for (size_t at = Kv::row_bytes(first); next && at < Kv::row_bytes(last); at += 64) prefetch(next + at);
  load_row<Kv>(row, dim, first, last, x);
}

// Token-major keys: a register holds a token's scores of LANES query rows.
template <class Rows>
void score_rows(const TileRows<Rows>& now, const TileRows<Rows>& next, const Seen& seen, int first, int last,
                const Scratch& s) {
  using Kv = typename Rows::Codec;
  const int k_dim = seen.shape.k_dim, registers = round_up(seen.n_rows(), LANES) / LANES;
  const size_t n_rows = Widths(seen.shape).rows;
  std::fill_n(s.rescale, TILE, 1.0f);  // from strip to strip the sums go on
  for (int strip = 0; strip < k_dim; strip += STRIP) {
    const int end = std::min(k_dim, strip + STRIP);
    for (int i = first; i < last; i++)
      load_part<Kv>(now.k(to_size(i)), next.k(to_size(i)), k_dim, strip, end, s.strip + (i - first) * STRIP);
    small_product(
        s.strip, STRIP, last - first, PlainColumns{s.q + to_size(strip) * n_rows, n_rows},
        [&](int) { return registers; }, [&](int) { return end - strip; }, strip > 0 ? s.rescale : nullptr,
        s.scores_t + to_size(first) * n_rows, n_rows);
  }
  for (int column = first / LANES * LANES; column < last; column += LANES) {
    const float* from[LANES];
    for (int i = 0; i < LANES; i++) from[i] = s.scores_t + to_size(column + i) * n_rows;
    for (int row = 0; row < seen.n_rows(); row += 8) {
      F32 scores[8];
      simd::columns(from, row, scores);
      for (int i = 0; i < 8; i++) simd::store(s.scores + (row + i) * TILE + column, scores[i]);
    }
  }
}

// k-major keys: a register holds a query row's scores of LANES tokens.
template <class Rows>
void score_matrices(const TileRows<Rows>& now, const TileRows<Rows>& next, const Seen& seen, int last,
                    const Scratch& s) {
  using Kv = typename Rows::Codec;
  const auto registers = [&](int row) { return std::min(seen.registers(row), (last + LANES - 1) / LANES); };
  const int k_dim = seen.shape.k_dim;
  small_product(
      s.q, Widths(seen.shape).k_pad, seen.n_rows(), KeyColumns<Kv, TileRows<Rows>>{now, next, k_dim}, registers,
      [&](int) { return k_dim; }, nullptr, s.scores, TILE);
}

// acc = rescale * acc + weights V. V goes straight from the cache into the product, again for every six rows: widening
// keeps other ports busy than fma does. Rows that are not whole registers are expanded first.
template <class Rows>
void add_values(const TileRows<Rows>& now, const TileRows<Rows>& next, const Seen& seen, int first, int last,
                const float* rescale, const Scratch& s, const Partial& out) {
  using Kv = typename Rows::Codec;
  const AttentionShape& shape = seen.shape;
  const Widths w(shape);
  const int n_rows = seen.n_rows(), dim = shape.v_is_k ? shape.k_dim : shape.v_dim;
  const auto registers = [&](int) { return static_cast<int>(w.v_pad) / LANES; };
  const auto depth = [&](int row) { return std::max(0, seen.to(row) - first); };
  const float* weights = s.scores + first;
  if (shape.v_dim % LANES == 0) {
    const RowColumns<Kv, TileRows<Rows>> v{now, next, to_size(first), dim};
    small_product(weights, TILE, n_rows, v, registers, depth, rescale, out.acc, w.v_pad);
    return;
  }
  for (int strip = 0; strip < shape.v_dim; strip += STRIP) {
    const int end = std::min(shape.v_dim, strip + STRIP);
    for (int i = first; i < last; i++) {
      const std::byte* coming = shape.v_is_k ? nullptr : next.v(to_size(i));
      load_part<Kv>(now.v(to_size(i)), coming, dim, strip, end, s.strip + (i - first) * STRIP);
    }
    small_product(
        weights, TILE, n_rows, PlainColumns{s.strip, STRIP}, [&](int) { return (end - strip + LANES - 1) / LANES; },
        depth, rescale, out.acc + strip, w.v_pad);
  }
}

// The item's rows over split `split`, from nothing.
template <class Rows>
void attend_split(const Rows& rows, const Batch& batch, const AttentionShape& shape, const Item& item, int split,
                  const Scratch& s, const Partial& out) {
  const int n_rows = item.n_tokens * group_size(shape);
  const Range range = range_of(batch, shape, item);
  const int end = std::min(range.last, (split + 1) * SPLIT), rows_end = rows.end(range.last);
  TileRows<Rows> tiles[2];
  const auto find = [&](int tile, TileRows<Rows>& to) {
    to.find(rows, shape, tile, std::max(range.first, tile), std::min(rows_end, tile + TILE));
  };
  std::fill_n(out.max, n_rows, NONE);
  std::fill_n(s.sums, n_rows * LANES, 0.0f);
  int tile = std::max(split * SPLIT, range.first / TILE * TILE);
  find(tile, tiles[0]);
  for (bool odd = false, begun = false; tile < end; tile += TILE, odd = !odd, begun = true) {
    const int first = std::max(range.first - tile, 0), last = std::min(end - tile, TILE);
    const Seen seen{batch, shape, item, tile};
    const bool more = tile + TILE < rows_end;
    if (more) find(tile + TILE, tiles[!odd]);
    const TileRows<Rows>&now = tiles[odd], &next = tiles[more ? !odd : odd];
    if (rows.k_major())
      score_matrices(now, next, seen, last, s);
    else
      score_rows(now, next, seen, first, last, s);
    softmax_tile(seen, s, out);
    add_values(now, next, seen, first, last, begun ? s.rescale : nullptr, s, out);
  }
  for (int row = 0; row < n_rows; row++) out.sum[row] = simd::sum(simd::load(s.sums + row * LANES));
}

// --- merging splits --------------------------------------------------------------------------------------------------

float exp_of(float x) {
  float lanes[LANES];
  simd::store(lanes, simd::exp(simd::set(x)));
  return lanes[0];
}

// What a row has gathered so far, in the workspace and in out.
struct Running {
  float *max, *sum;
  float* out;  // [v_dim]
};

Running running(const Layout& layout, const AttentionShape& shape, const Item& item, int row, float* out) {
  const int group = group_size(shape);
  const size_t at = to_size((item.first_token + row / group) * shape.n_heads + item.kv_head * group + row % group);
  return {layout.max + at, layout.sum + at, out + at * to_size(shape.v_dim)};
}

void start(const Running& to, int v_dim) {
  *to.max = NONE;
  *to.sum = 0;
  std::fill_n(to.out, v_dim, 0.0f);
}

// A partial result of nothing, or the first after nothing, changes the other one in no bit.
void merge(const Running& to, const Partial& from, int row, int v_dim, size_t v_pad) {
  const float m = std::max(*to.max, from.max[row]);
  const float old_factor = exp_of(*to.max - m), new_factor = exp_of(from.max[row] - m);
  const float* acc = from.acc + to_size(row) * v_pad;
  *to.max = m;
  *to.sum = *to.sum * old_factor + from.sum[row] * new_factor;
  for (int i = 0; i < v_dim; i++) to.out[i] = to.out[i] * old_factor + acc[i] * new_factor;
}

// + 0: a sum of nothing but underflows may be -0 or +0, depending on how many masked tokens follow it.
void finish(const Running& to, int v_dim) {
  const float factor = *to.sum > 0 ? 1 / *to.sum : 0;
  for (int i = 0; i < v_dim; i++) to.out[i] = to.out[i] * factor + 0.0f;
}

}  // namespace

// --- flash: the context of every item --------------------------------------------------------------------------------

namespace {

[[maybe_unused]] int all_items(const Batch& batch, const AttentionShape& shape) {
  int n = 0;
  for (int s = 0; s < batch.n_sequences; s++) n += n_items(batch, s, shape);
  return n;
}

[[maybe_unused]] Item item_of_batch(const Batch& batch, const AttentionShape& shape, int index) {
  int s = 0;
  for (int n; index >= (n = n_items(batch, s, shape)); s++) index -= n;
  return item_of(batch, s, shape, index);
}

template <class Kv, int Block>
CacheRows<Kv, Block> cache_rows(const KVCache<Kv, Block>& cache, int layer, const Batch& batch, const Item& item) {
  return {cache, layer, item.kv_head, batch.block_table + to_size(item.sequence) * to_size(batch.max_blocks)};
}

// How many splits of an item are worked on at a time, their results kept in slots. 0: a thread takes an item with all
// its splits, where there are enough items to keep all threads busy till the end. It changes no bit of the result.
struct Plan {
  int items = 0, splits_at_once = 0, rounds = 0;
  Plan(const Batch& batch, const AttentionShape& shape, int n_threads) : items(all_items(batch, shape)) {
    int total = 0, longest = 0;
    for (int s = 0; s < batch.n_sequences; s++) {
      const int n = n_items(batch, s, shape);
      for (int i = 0; i < n; i += shape.n_kv_heads) {
        const Range range = range_of(batch, shape, item_of(batch, s, shape, i));
        const int splits = range.last_split() - range.first_split();
        total += splits * shape.n_kv_heads;
        longest = std::max(longest, splits);
      }
    }
    if (n_threads == 1 || longest * n_threads * 4 <= total || items * 2 > SLOTS_PER_THREAD * n_threads) return;
    splits_at_once = std::min(longest, SLOTS_PER_THREAD * n_threads / items);
    rounds = (longest + splits_at_once - 1) / splits_at_once;
  }
};

// Every item with all its splits, the last items (of the longest context) first.
template <class Kv, int Block>
void attend_items(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                  const AttentionShape& shape, float* out, const Layout& layout, int items) {
  const Scratch scratch = layout.scratch_of(team.rank, shape);
  const size_t v_pad = Widths(shape).v_pad;
  team.for_each_dynamic(items, [&](int from_last) {
    const int index = items - 1 - from_last;
    const Item item = item_of_batch(batch, shape, index);
    const Range range = range_of(batch, shape, item);
    const int n_rows = item.n_tokens * group_size(shape);
    load_queries(q, shape, item, cache.k_major(), scratch);
    for (int row = 0; row < n_rows; row++) start(running(layout, shape, item, row, out), shape.v_dim);
    for (int split = range.first_split(); split < range.last_split(); split++) {
      attend_split(cache_rows(cache, layer, batch, item), batch, shape, item, split, scratch, scratch.partial);
      for (int row = 0; row < n_rows; row++)
        merge(running(layout, shape, item, row, out), scratch.partial, row, shape.v_dim, v_pad);
    }
    for (int row = 0; row < n_rows; row++) finish(running(layout, shape, item, row, out), shape.v_dim);
  });
}

// Every item's splits in rounds: first each split on its own (guided: neighbours go to the same thread, which
// prefetches from one to the next), then each row's merge.
template <class Kv, int Block>
void attend_splits(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Layout& layout, const Plan& plan) {
  const Scratch scratch = layout.scratch_of(team.rank, shape);
  const Widths w(shape);
  const int at_once = plan.splits_at_once, rows = rows_per_item(shape);
  for (int round = 0; round < plan.rounds; round++) {
    const int all = plan.items * at_once;
    team.for_each_dynamic(all, [&](int index) {
      const Item item = item_of_batch(batch, shape, index / at_once);
      const Range range = range_of(batch, shape, item);
      const int split = range.first_split() + round * at_once + index % at_once;
      if (split >= range.last_split()) return;
      load_queries(q, shape, item, cache.k_major(), scratch);
      attend_split(cache_rows(cache, layer, batch, item), batch, shape, item, split, scratch,
                   layout.slot(shape, index));
    });
    team.for_each(plan.items * rows, [&](int index) {
      const int row = index % rows;
      const Item item = item_of_batch(batch, shape, index / rows);
      if (row >= item.n_tokens * group_size(shape)) return;
      const Range range = range_of(batch, shape, item);
      const Running to = running(layout, shape, item, row, out);
      const int first = range.first_split() + round * at_once, left = range.last_split() - first;
      if (round == 0) start(to, shape.v_dim);
      for (int i = 0; i < std::min(left, at_once); i++)
        merge(to, layout.slot(shape, index / rows * at_once + i), row, shape.v_dim, w.v_pad);
      if (round == plan.rounds - 1) finish(to, shape.v_dim);
    });
  }
}

}  // namespace

template <class Kv, int Block>
void Flash::attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Workspace& workspace) {
  const Layout layout(workspace.begin(), shape, batch.n_tokens, team.size);
  const Plan plan(batch, shape, team.size);
  if (plan.splits_at_once == 0)
    attend_items(team, q, cache, layer, batch, shape, out, layout, plan.items);
  else
    attend_splits(team, q, cache, layer, batch, shape, out, layout, plan);
}

namespace {}  // namespace

void Flash::begin(const Team& team, const Batch& batch, int sequence, const AttentionShape& shape, float* out,
                  const Workspace& workspace) {
  const Layout layout(workspace.begin(), shape, batch.n_tokens, team.size);
  team.for_each(n_items(batch, sequence, shape), [&](int index) {
    const Item item = item_of(batch, sequence, shape, index);
    for (int row = 0; row < item.n_tokens * group_size(shape); row++)
      start(running(layout, shape, item, row, out), shape.v_dim);
  });
}

void Flash::attend_rows(const Team& team, const float* q, const PlainRows& rows, const Batch& batch, int sequence,
                        const AttentionShape& shape, float* out, const Workspace& workspace) {
  const Layout layout(workspace.begin(), shape, batch.n_tokens, team.size);
  const Scratch scratch = layout.scratch_of(team.rank, shape);
  const int split = rows.first / SPLIT;
  const int items = n_items(batch, sequence, shape);
  team.for_each_dynamic(items, [&](int from_last) {
    const int index = items - 1 - from_last;
    const Item item = item_of(batch, sequence, shape, index);
    const Range range = range_of(batch, shape, item);
    if (split < range.first_split() || split >= range.last_split()) return;
    load_queries(q, shape, item, false, scratch);
    attend_split(PlainHead{rows, shape, item.kv_head}, batch, shape, item, split, scratch, scratch.partial);
    for (int row = 0; row < item.n_tokens * group_size(shape); row++)
      merge(running(layout, shape, item, row, out), scratch.partial, row, shape.v_dim, Widths(shape).v_pad);
  });
}

void Flash::end(const Team& team, const Batch& batch, int sequence, const AttentionShape& shape, float* out,
                const Workspace& workspace) {
  const Layout layout(workspace.begin(), shape, batch.n_tokens, team.size);
  team.for_each(n_items(batch, sequence, shape), [&](int index) {
    const Item item = item_of(batch, sequence, shape, index);
    for (int row = 0; row < item.n_tokens * group_size(shape); row++)
      finish(running(layout, shape, item, row, out), shape.v_dim);
  });
}

// --- naive: the textbook ---------------------------------------------------------------------------------------------

namespace {

[[maybe_unused]] float dot(const float* a, const float* b, int n) {
  F32 sum = simd::zero();
  int i = 0;
  for (; i + LANES <= n; i += LANES) sum = simd::fma(simd::load(a + i), simd::load(b + i), sum);
  if (i < n) sum = simd::fma(simd::load_first(a + i, n - i), simd::load_first(b + i, n - i), sum);
  return simd::sum(sum);
}

// One token and head: the row of scores over the context, its softmax, the sum of V. scores [context], row [max(k_dim,
// v_dim)] are scratch.
template <class Rows>
void attend_naively(const float* q, const Rows& rows, const AttentionShape& shape, int position, float* out,
                    float* scores, float* row) {
  const int first = first_seen(shape, position);
  float largest = NONE, sum = 0;
  for (int t = first; t <= position; t++) {
    rows.load_k(t, row);
    float s = dot(q, row, shape.k_dim) * shape.scale;
    if (shape.softcap > 0) s = shape.softcap * std::tanh(s / shape.softcap);
    scores[t] = s;
    largest = std::max(largest, s);
  }
  for (int t = first; t <= position; t++) sum += scores[t] = std::exp(scores[t] - largest);
  std::fill_n(out, shape.v_dim, 0.0f);
  for (int t = first; t <= position; t++) {
    const std::byte* v = shape.v_is_k ? rows.k(t) : rows.v(t);
    load_row<typename Rows::Codec>(v, shape.v_is_k ? shape.k_dim : shape.v_dim, 0, shape.v_dim, row);
    for (int i = 0; i < shape.v_dim; i++) out[i] += scores[t] / sum * row[i];
  }
}

size_t naive_floats(const AttentionShape& shape, int context) {
  return to_size(round_up(context + std::max(shape.k_dim, shape.v_dim), LANES));
}

}  // namespace

template <class Kv, int Block>
void Naive::attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Workspace& workspace) {
  const int context = std::max(0, *std::max_element(batch.context_len, batch.context_len + batch.n_sequences));
  const size_t each = naive_floats(shape, context);
  float* scores = workspace.begin().take<float>(to_size(team.size) * each) + to_size(team.rank) * each;
  const int first_token = batch.query_start[0], n_tokens = batch.query_start[batch.n_sequences] - first_token;
  team.for_each_dynamic(n_tokens * shape.n_heads, [&](int index) {
    const int t = first_token + index / shape.n_heads, h = index % shape.n_heads;
    {
      const int* end = batch.query_start + batch.n_sequences + 1;
      const int sequence = static_cast<int>(std::upper_bound(batch.query_start, end, t) - batch.query_start) - 1;
      const Item item{sequence, h / group_size(shape), t, 1};
      const size_t at = to_size(t) * to_size(shape.n_heads) + to_size(h);
      attend_naively(q + at * to_size(shape.k_dim), cache_rows(cache, layer, batch, item), shape, batch.positions[t],
                     out + at * to_size(shape.v_dim), scores, scores + context);
    }
  });
}

namespace {}  // namespace

size_t Flash::workspace_bytes(const AttentionShape& shape, const Limits& limits) {
  const size_t floats = Layout::floats(shape, limits.max_tokens, limits.max_threads);
  return bytes_of([&](Arena& arena) { arena.take<float>(floats); });
}

size_t Naive::workspace_bytes(const AttentionShape& shape, const Limits& limits) {
  const size_t floats = to_size(limits.max_threads) * naive_floats(shape, limits.context);
  return bytes_of([&](Arena& arena) { arena.take<float>(floats); });
}

#define INSTANTIATE(Kernel, Kv, Block)                                                                             \
  template void Kernel::attend<Kv, Block>(const Team&, const float*, const KVCache<Kv, Block>&, int, const Batch&, \
                                          const AttentionShape&, float*, const Workspace&);
FOR_EACH_KERNEL(INSTANTIATE)
