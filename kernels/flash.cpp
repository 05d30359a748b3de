// flash.cpp: online softmax over tiles of the context, so that a K or V row is read once for all the query rows that
// need it (FlashAttention, arXiv 2205.14135).
//
// Decode is bound by the bytes of the cache: rows go from the cache into the product as they lie, widened in registers,
// while the next tile's lines are on their way. Prompts and MLA are bound by multiply-adds: both products run in panels
// that stay in registers (gemm.h). The context is cut into splits of a fixed size, worked on apart and merged in order
// of position, so no bit depends on who computed what.
//
//     split        ATTENTION_SPLIT tokens of the context: the unit of work, and of merging
//     tile         TILE tokens of a split, whose scores are computed at a time
//     query tile   query rows (tokens x heads of a group) that read the same K and V rows
//     strip        STRIP elements of a tile's rows
//     bundle       BUNDLE tokens whose rows lie together in the cache (kv_cpu.h)
#include <cfloat>
#include <cmath>

#include "attention.h"
#include "kernels/build.h"
#include "kernels/gemm.h"
#include "kernels/kv_cpu.h"

namespace {

using simd::F32;
using simd::LANES;

constexpr int SPLIT = ATTENTION_SPLIT;
constexpr int TILE = 64;
constexpr int QUERY_TILE = 64;  // rows, or those of one token where its group has more
constexpr int STRIP = 64;       // TILE x STRIP floats, 16 KB, stay in the first cache
static_assert(SPLIT % TILE == 0 && TILE % LANES == 0 && STRIP % LANES == 0);

constexpr float NONE = -FLT_MAX;  // the maximum of no scores: finite, so that NONE - NONE is 0

constexpr size_t to_size(int n) {
  return static_cast<size_t>(n);
}
constexpr int round_up(int n, int to) {
  return (n + to - 1) / to * to;
}

// --- one split -------------------------------------------------------------------------------------------------------

// Some tokens of a sequence, times the heads of a KV head's group: row i is token first_token + i / group, head
// kv_head * group + i % group.
struct QueryTile {
  const Batch& batch;
  const AttentionShape& shape;
  int sequence, kv_head, first_token, n_tokens;

  int group() const { return shape.n_heads / shape.n_kv_heads; }
  int n_rows() const { return n_tokens * group(); }
  int head(int row) const { return kv_head * group() + row % group(); }
  // Of the row in an array [T, n_heads].
  size_t index(int row) const { return to_size((first_token + row / group()) * shape.n_heads + head(row)); }
  int position(int row) const { return batch.positions[first_token + row / group()]; }
  int first_seen(int row) const { return shape.window > 0 ? std::max(0, position(row) - shape.window + 1) : 0; }
  // What its rows see is within begin .. end - 1, in splits first_split .. last_split - 1.
  int begin() const { return first_seen(0); }
  int end() const { return position(n_rows() - 1) + 1; }
  int first_split() const { return begin() / SPLIT; }
  int last_split() const { return (end() + SPLIT - 1) / SPLIT; }
};

// The columns (tokens) of a tile that a row sees: from .. to - 1.
struct Mask {
  const QueryTile& queries;
  int start;  // position of column 0
  int to(int row) const { return std::clamp(queries.position(row) + 1 - start, 0, TILE); }
  int from(int row) const { return std::clamp(queries.first_seen(row) - start, 0, to(row)); }
  int registers(int row) const { return (to(row) + LANES - 1) / LANES; }
};

// Row widths, rounded up to whole registers, and the rows of a query tile, to whole cache lines of floats.
struct Widths {
  int group, tokens;  // heads that read the same rows; tokens of a query tile
  size_t k_pad, v_pad, rows;

  explicit Widths(const AttentionShape& shape)
      : group(shape.n_heads / shape.n_kv_heads),
        tokens(std::max(1, QUERY_TILE / group)),
        k_pad(to_size(round_up(shape.k_dim, LANES))),
        v_pad(to_size(round_up(shape.v_dim, LANES))),
        rows(to_size(round_up(tokens * group, 16))) {}
};

// Attention of a query tile over one split, not yet divided by the sum.
struct Partial {
  float* max;  // [rows] largest score; NONE: none was seen
  float* sum;  // [rows] of e^(score - max)
  float* acc;  // [rows, v_pad] sum of e^(score - max) V

  Partial(Arena& arena, const Widths& w)
      : max(arena.take<float>(w.rows)), sum(arena.take<float>(w.rows)), acc(arena.take<float>(w.rows * w.v_pad)) {}
};

// One thread's scratch memory.
struct Scratch {
  float* q;         // [rows, k_pad] the queries times scale; token-major keys: [k_pad, rows]
  float* scores;    // [rows, TILE], then e^(score - max)
  float* scores_t;  // [TILE, rows] what token-major keys give
  float* sums;      // [rows, LANES] the denominators: a lane sums each LANES-th token
  float* rescale;   // [max(rows, TILE)] factor of what was summed before
  float* strip;     // [TILE, STRIP] a strip of the tile's K or V rows
  // For rows with scales:
  float* scale;    // [TILE] of a group of the tile's rows
  float* minimum;  // [TILE]
  float* scaled;   // [rows, TILE] scores times scale
  float* q_sums;   // [groups, rows] of a group's elements of q
  float* minima;   // [rows] of scores times minimum
  Partial partial;

  Scratch(Arena& arena, const Widths& w)
      : q(arena.take<float>(w.rows * w.k_pad)),
        scores(arena.take<float>(w.rows * TILE)),
        scores_t(arena.take<float>(w.rows * TILE)),
        sums(arena.take<float>(w.rows * LANES)),
        rescale(arena.take<float>(std::max(w.rows, to_size(TILE)))),
        strip(arena.take<float>(TILE * STRIP)),
        scale(arena.take<float>(TILE)),
        minimum(arena.take<float>(TILE)),
        scaled(arena.take<float>(w.rows * TILE)),
        q_sums(arena.take<float>(w.rows * (w.k_pad / LANES))),
        minima(arena.take<float>(w.rows)),
        partial(arena, w) {}
};

// A tile of the context at work. Rows: where K and V rows come from, see below.
template <class Rows>
struct TileRows;
template <class Rows>
struct Tile {
  const TileRows<Rows>&now, &next;  // where its rows lie; and those of the next tile, to be prefetched
  const Mask mask;
  const int first, last;  // some row sees columns first .. last - 1
};
template <class Rows>
void score_bundles(const Tile<Rows>& tile, const Scratch& s);
template <class Rows>
void score_rows(const Tile<Rows>& tile, const Scratch& s);
void softmax_tile(const Mask& mask, const Scratch& s, const Partial& out);
template <class Rows>
void add_values(const Tile<Rows>& tile, const float* rescale, const Scratch& s, const Partial& out);

// out = attention of the query tile over split `split`, from nothing. s.q holds its queries.
template <class Rows>
void attend_split(const Rows& rows, const QueryTile& queries, int split, const Scratch& s, const Partial& out) {
  const int n_rows = queries.n_rows(), begin = queries.begin();
  const int end = std::min(queries.end(), (split + 1) * SPLIT), rows_end = rows.end(queries.end());
  TileRows<Rows> places[2];
  const auto find = [&](int at, TileRows<Rows>& to) {
    to.find(rows, queries.shape, at, std::max(begin, at), std::min(rows_end, at + TILE));
  };
  std::fill_n(out.max, n_rows, NONE);
  std::fill_n(s.sums, n_rows * LANES, 0.0f);
  int at = std::max(split * SPLIT, begin / TILE * TILE);
  find(at, places[0]);
  for (bool odd = false, begun = false; at < end; at += TILE, odd = !odd, begun = true) {
    const bool more = at + TILE < rows_end;  // the next split's first tile included
    if (more) find(at + TILE, places[!odd]);
    const Tile<Rows> tile{
        places[odd], places[more ? !odd : odd], {queries, at}, std::max(begin - at, 0), std::min(end - at, TILE)};
    rows.k_major() ? score_bundles(tile, s) : score_rows(tile, s);
    softmax_tile(tile.mask, s, out);
    add_values(tile, begun ? s.rescale : nullptr, s, out);
  }
  for (int row = 0; row < n_rows; row++) out.sum[row] = simd::sum(simd::load(s.sums + row * LANES));
}

// --- one split: scores -----------------------------------------------------------------------------------------------

// Into the second cache: there are too few places for lines on their way to the first. Worth it a few at a time between
// other work; many at once stall.
inline void prefetch(const std::byte* p) {
  __builtin_prefetch(p, 0, 2);
}

// The rows of the tile at position `start`. Only those of tokens first .. last - 1 may be read: the bundles around them
// repeat the nearest.
template <class Rows>
struct TileRows {
  static constexpr int BUNDLE = Rows::BUNDLE;
  const std::byte* k_bundles[TILE / BUNDLE];
  const std::byte* v[TILE];  // of each token
  size_t k_stride;
  const std::byte* k(size_t i) const { return k_bundles[i / BUNDLE] + i % BUNDLE * k_stride; }  // of the tile's token i

  void find(const Rows& rows, const AttentionShape& shape, int start, int first, int last) {
    const int begin = (first - start) / BUNDLE, end = (last - start + BUNDLE - 1) / BUNDLE;
    const size_t v_stride = shape.v_is_k ? rows.k_bytes() : rows.v_bytes();
    k_stride = rows.k_bytes();
    for (int i = 0; i < TILE / BUNDLE; i++) {
      const int token = start + std::clamp(i, begin, end - 1) * BUNDLE;
      k_bundles[i] = rows.k(token);
      const std::byte* const values = shape.v_is_k ? k_bundles[i] : rows.v(token);
      for (int j = 0; j < BUNDLE; j++) v[i * BUNDLE + j] = values + to_size(j) * v_stride;
    }
  }
};

// Columns of a product: the k-major bundles as they are, from element `first` on; those of `next` are prefetched.
template <class Rows>
struct KeyColumns {
  using Kv = typename Rows::KvType;
  const TileRows<Rows>&now, &next;
  int dim, first;
  F32 operator()(size_t p, int j) const {
    const int column = j * LANES, bundle = column / KEY_LANES, lane = column % KEY_LANES;
    const int d = first + static_cast<int>(p);
    prefetch(next.k_bundles[bundle] + Codec<Kv>::place(dim, d, lane, KEY_LANES));
    return Codec<Kv>::keys(now.k_bundles[bundle], dim, d, lane);
  }
};

// Elements of a row that are multiplied at a time: those that share a scale, or as many as there are.
template <class Kv>
constexpr int width_or_group(int width) {
  return Codec<Kv>::GROUP > 0 ? Codec<Kv>::GROUP : width;
}

// How a group's scores join those of the groups before: with scale * (q . numbers) + minimum * (sum of q). Tokens are
// the product's columns and queries its rows, or the other way round.
template <class Kv, bool TOKENS_ARE_COLUMNS>
struct GroupScores {
  const float *scale, *minimum, *q_sums;  // of tokens, tokens, queries
  bool begun;
  F32 start(size_t, const float*) const { return simd::zero(); }
  int column(int j) const { return j * LANES; }
  F32 finish(F32 sum, size_t row, int column, const float* c) const {
    const auto of_token = [&](const float* x) {
      return TOKENS_ARE_COLUMNS ? simd::load(x + column) : simd::set(x[row]);
    };
    const F32 x = simd::fma(sum, of_token(scale), begun ? simd::load(c) : simd::zero());
    if constexpr (!Codec<Kv>::HAS_MINIMUM) return x;
    const F32 q_sum = TOKENS_ARE_COLUMNS ? simd::set(q_sums[row]) : simd::load(q_sums + column);
    return simd::fma(of_token(minimum), q_sum, x);
  }
};

// s.scale and s.minimum of the tile's tokens, in the group of element `at`.
template <class Rows>
void load_scales_of_bundles(const TileRows<Rows>& rows, int at, const Scratch& s) {
  using Codec = Codec<typename Rows::KvType>;
  for (int i = 0; i < TILE; i += LANES) {
    const uint16_t* scale = Codec::scale(rows.k_bundles[i / KEY_LANES], at, KEY_LANES) + i % KEY_LANES;
    simd::store(s.scale + i, simd::load_f16(scale));
    if constexpr (Codec::HAS_MINIMUM) simd::store(s.minimum + i, simd::load_f16(scale + KEY_LANES));
  }
}

// The same of rows; row(i) is that of the tile's token i, first .. last - 1. Zeros for the others.
template <class Kv, class Row>
void load_scales_of_rows(Row row, int first, int last, int at, const Scratch& s) {
  uint16_t scale[TILE] = {}, minimum[TILE] = {};
  for (int i = first; i < last; i++) {
    const uint16_t* from = Codec<Kv>::scale(row(to_size(i)), at, 1);
    scale[i] = from[0];
    if constexpr (Codec<Kv>::HAS_MINIMUM) minimum[i] = from[1];
  }
  for (int i = 0; i < TILE; i += LANES) {
    simd::store(s.scale + i, simd::load_f16(scale + i));
    if constexpr (Codec<Kv>::HAS_MINIMUM) simd::store(s.minimum + i, simd::load_f16(minimum + i));
  }
}

// k-major keys: a register holds a query row's scores of LANES tokens.
template <class Rows>
void score_bundles(const Tile<Rows>& tile, const Scratch& s) {
  using Kv = typename Rows::KvType;
  const Mask& mask = tile.mask;
  const AttentionShape& shape = mask.queries.shape;
  const Widths widths(shape);
  const auto registers = [&](int row) { return std::min(mask.registers(row), (tile.last + LANES - 1) / LANES); };
  const int k_dim = shape.k_dim, width = width_or_group<Kv>(k_dim);
  for (int at = 0; at < k_dim; at += width) {
    const KeyColumns<Rows> keys{tile.now, tile.next, k_dim, at};
    const auto depth = [&](int) { return std::min(width, k_dim - at); };
    const auto multiply = [&](const auto& join) {
      gemm::product(s.q + at, widths.k_pad, mask.queries.n_rows(), keys, registers, depth, join, s.scores, TILE);
    };
    if constexpr (Codec<Kv>::GROUP > 0) {
      load_scales_of_bundles(tile.now, at, s);
      multiply(GroupScores<Kv, true>{s.scale, s.minimum, s.q_sums + to_size(at / width) * widths.rows, at > 0});
    } else {
      multiply(gemm::Rescaled{});
    }
  }
}

// The numbers of elements first .. last - 1 of a row; those of the row `next` are prefetched, unless it is null.
template <class Kv>
void load_strip(const std::byte* row, const std::byte* next, int dim, int first, int last, float* x) {
  for (size_t at = Kv::row_bytes(first); next && at < Kv::row_bytes(last); at += 64) prefetch(next + at);
  load_numbers<Kv>(row, dim, first, last, x);
}

// Token-major keys: a register holds a token's scores of LANES query rows.
template <class Rows>
void score_rows(const Tile<Rows>& tile, const Scratch& s) {
  using Kv = typename Rows::KvType;
  const QueryTile& queries = tile.mask.queries;
  const int k_dim = queries.shape.k_dim, n_rows = queries.n_rows(), first = tile.first, last = tile.last;
  const int width = width_or_group<Kv>(STRIP);
  const size_t stride = Widths(queries.shape).rows;
  const auto registers = [&](int) { return (n_rows + LANES - 1) / LANES; };
  std::fill_n(s.rescale, TILE, 1.0f);  // from strip to strip the sums go on
  for (int strip = 0; strip < k_dim; strip += width) {
    const int end = std::min(k_dim, strip + width);
    for (int i = first; i < last; i++)
      load_strip<Kv>(tile.now.k(to_size(i)), tile.next.k(to_size(i)), k_dim, strip, end, s.strip + (i - first) * STRIP);
    const gemm::PlainColumns q{s.q + to_size(strip) * stride, stride};
    const auto depth = [&](int) { return end - strip; };
    const auto multiply = [&](const auto& join) {
      gemm::product(s.strip, STRIP, last - first, q, registers, depth, join, s.scores_t + to_size(first) * stride,
                    stride);
    };
    if constexpr (Codec<Kv>::GROUP > 0) {
      load_scales_of_rows<Kv>([&](size_t i) { return tile.now.k(i); }, first, last, strip, s);
      multiply(GroupScores<Kv, false>{s.scale + first, s.minimum + first, s.q_sums + to_size(strip / width) * stride,
                                      strip > 0});
    } else {
      multiply(gemm::Rescaled{strip > 0 ? s.rescale : nullptr});
    }
  }
  for (int column = first / LANES * LANES; column < last; column += LANES) {
    const float* from[LANES];
    for (int i = 0; i < LANES; i++) from[i] = s.scores_t + to_size(column + i) * stride;
    for (int row = 0; row < n_rows; row += 8) {
      F32 scores[8];
      simd::columns(from, row, scores);
      for (int i = 0; i < 8; i++) simd::store(s.scores + (row + i) * TILE + column, scores[i]);
    }
  }
}

// --- one split: the softmax of a tile --------------------------------------------------------------------------------

// s -> cap tanh(s / cap), tanh x = 1 - 2 / (e^2x + 1): an absolute error of 2^-23 cap.
void cap_scores(float* s, int n, float cap) {
  for (int i = 0; i < n; i += LANES) {
    const F32 e = simd::exp(simd::min(simd::load(s + i) * (2 / cap), simd::set(80)));
    simd::store(s + i, cap - 2 * cap / (e + 1.0f));
  }
}

// The rows' scores become e^(score - maximum), 0 in the columns that the row does not see; maxima and sums move on. A
// row that sees nothing of the tile keeps its state: its rescale is 1.
void softmax_tile(const Mask& mask, const Scratch& s, const Partial& out) {
  const float cap = mask.queries.shape.softcap;
  const int n_rows = mask.queries.n_rows();
  for (int row = 0; row < n_rows; row++) {
    float* score = s.scores + row * TILE;
    const int n = mask.registers(row) * LANES;
    if (cap > 0) cap_scores(score, n, cap);
    std::fill(score, score + mask.from(row), NONE);
    std::fill(score + mask.to(row), score + n, NONE);
    F32 m = simd::set(NONE);
    for (int i = 0; i < n; i += LANES) m = simd::max(m, simd::load(score + i));
    s.rescale[row] = out.max[row];
    out.max[row] = std::max(out.max[row], simd::largest(m));
  }
  for (int row = 0; row < n_rows; row += LANES)
    simd::store(s.rescale + row, simd::exp(simd::load(s.rescale + row) - simd::load(out.max + row)));
  for (int row = 0; row < n_rows; row++) {
    float *score = s.scores + row * TILE, *sums = s.sums + row * LANES;
    const int n = mask.registers(row) * LANES;
    for (int i = 0; i < n; i += LANES) simd::store(score + i, simd::exp(simd::load(score + i) - out.max[row]));
    std::fill(score, score + mask.from(row), 0.0f);
    std::fill(score + mask.to(row), score + TILE, 0.0f);
    F32 sum = simd::load(sums) * s.rescale[row];
    for (int i = 0; i < n; i += LANES) sum += simd::load(score + i);
    simd::store(sums, sum);
  }
}

// --- one split: values -----------------------------------------------------------------------------------------------

// Columns of a product: V rows as they are, from the tile's row `first` and element `at` on; those of `next` are
// prefetched.
template <class Rows>
struct ValueColumns {
  using Kv = typename Rows::KvType;
  const TileRows<Rows>&now, &next;
  size_t first;
  int dim, at;
  F32 operator()(size_t p, int j) const {
    prefetch(next.v[first + p] + Codec<Kv>::place(dim, at + j * LANES));
    return Codec<Kv>::lanes(now.v[first + p], dim, at + j * LANES);
  }
};

// s.scaled = the weights times s.scale; s.minima = their sum with s.minimum, without what a row does not see.
template <class Kv>
void scale_weights(int n_rows, const Scratch& s) {
  for (int row = 0; row < n_rows; row++) {
    F32 minima = simd::zero();
    for (int i = 0; i < TILE; i += LANES) {
      const F32 weight = simd::load(s.scores + row * TILE + i);
      simd::store(s.scaled + row * TILE + i, weight * simd::load(s.scale + i));
      if constexpr (Codec<Kv>::HAS_MINIMUM) minima += weight > 0.0f ? weight * simd::load(s.minimum + i) : simd::zero();
    }
    if constexpr (Codec<Kv>::HAS_MINIMUM) s.minima[row] = simd::sum(minima);
  }
}

// acc = rescale * acc + weights V, where the rows' scales join the weights. V goes straight from the cache into the
// product, again for every panel of rows: widening keeps other ports busy than fma does. Rows that are not whole
// registers are expanded first.
template <class Rows>
void add_values(const Tile<Rows>& tile, const float* rescale, const Scratch& s, const Partial& out) {
  using Kv = typename Rows::KvType;
  const Mask& mask = tile.mask;
  const AttentionShape& shape = mask.queries.shape;
  const size_t v_pad = Widths(shape).v_pad;
  const int n_rows = mask.queries.n_rows(), first = tile.first, dim = shape.v_is_k ? shape.k_dim : shape.v_dim;
  const auto depth = [&](int row) { return std::max(0, mask.to(row) - first); };
  const bool whole = shape.v_dim % LANES == 0;
  const int width = width_or_group<Kv>(whole ? shape.v_dim : STRIP);
  for (int at = 0; at < shape.v_dim; at += width) {
    const int end = std::min(shape.v_dim, at + width);
    gemm::Rescaled join{rescale};
    if constexpr (Codec<Kv>::GROUP > 0) {
      load_scales_of_rows<Kv>([&](size_t i) { return tile.now.v[i]; }, first, tile.last, at, s);
      scale_weights<Kv>(n_rows, s);
      if constexpr (Codec<Kv>::HAS_MINIMUM) join.added = s.minima;
    }
    const float* weights = (Codec<Kv>::GROUP > 0 ? s.scaled : s.scores) + first;
    const auto registers = [&](int) { return (end - at + LANES - 1) / LANES; };
    const auto multiply = [&](const auto& v) {
      gemm::product(weights, TILE, n_rows, v, registers, depth, join, out.acc + at, v_pad);
    };
    if (whole) {
      multiply(ValueColumns<Rows>{tile.now, tile.next, to_size(first), dim, at});
      continue;
    }
    for (int i = first; i < tile.last; i++)
      load_strip<Kv>(tile.now.v[i], shape.v_is_k ? nullptr : tile.next.v[i], dim, at, end,
                     s.strip + (i - first) * STRIP);
    multiply(gemm::PlainColumns{s.strip, STRIP});
  }
}

// --- one split: what goes in: rows and queries -----------------------------------------------------------------------

// A source of rows for one KV head of one sequence: KvType, BUNDLE, k_major, and addresses of tokens. k and v of a
// multiple of BUNDLE are the first rows of a bundle; `end` is how far there are rows of a context of n tokens.

// Out of the cache.
template <class Kv, int Block>
struct CacheRows : HeadRows<Kv, Block> {
  using KvType = Kv;
  using Head = HeadRows<Kv, Block>;
  const int* blocks;  // the sequence's row of block_table

  CacheRows(const CacheView<Kv, Block>& view, int layer, const QueryTile& queries)
      : Head(view, layer, queries.kv_head),
        blocks(queries.batch.block_table + to_size(queries.sequence) * to_size(queries.batch.max_blocks)) {}

  static int end(int n) { return n; }
  const std::byte* k(int token) const { return Head::k(block(token), slot(token)); }
  const std::byte* v(int token) const { return Head::v(block(token), slot(token)); }

 private:
  static int slot(int token) { return Block ? token % std::max(Block, 1) : token; }
  int block(int token) const { return blocks[Block ? token / std::max(Block, 1) : 0]; }
};

// One head of PlainRows, as bytes.
struct PlainHead {
  using KvType = KvF32;
  static constexpr int BUNDLE = KEY_LANES;
  const PlainRows& rows;
  const AttentionShape& shape;
  int kv_head;

  int end(int n) const { return std::min(n, rows.first + rows.n); }
  static constexpr bool k_major() { return false; }
  const std::byte* k(int token) const { return at(rows.k, k_bytes(), shape.k_dim, token); }
  const std::byte* v(int token) const { return at(rows.v, v_bytes(), shape.v_dim, token); }
  size_t k_bytes() const { return sizeof(float) * to_size(shape.n_kv_heads) * to_size(shape.k_dim); }
  size_t v_bytes() const { return sizeof(float) * to_size(shape.n_kv_heads) * to_size(shape.v_dim); }

 private:
  const std::byte* at(const float* x, size_t stride, int dim, int token) const {
    return reinterpret_cast<const std::byte*>(x) + to_size(token - rows.first) * stride +
           sizeof(float) * to_size(kv_head) * to_size(dim);
  }
};

const float* query_row(const float* q, const QueryTile& queries, int row) {
  return q + queries.index(row) * to_size(queries.shape.k_dim);
}

// The query rows times scale, one after the other.
void load_query_rows(const float* q, const QueryTile& queries, const Scratch& s) {
  const AttentionShape& shape = queries.shape;
  const size_t k_pad = Widths(shape).k_pad;
  for (int row = 0; row < queries.n_rows(); row++) {
    const float* from = query_row(q, queries, row);
    for (int i = 0; i < shape.k_dim; i++) s.q[to_size(row) * k_pad + to_size(i)] = from[i] * shape.scale;
  }
}

// The same, transposed; the last row fills the last register.
void load_query_columns(const float* q, const QueryTile& queries, const Scratch& s) {
  const AttentionShape& shape = queries.shape;
  const size_t rows = Widths(shape).rows;
  const int last = queries.n_rows() - 1;
  for (int first = 0; first <= last; first += LANES) {
    const float* from[LANES];
    for (int i = 0; i < LANES; i++) from[i] = query_row(q, queries, std::min(first + i, last));
    float* to = s.q + first;
    int d = 0;
    for (; d + 8 <= shape.k_dim; d += 8) {
      F32 column[8];
      simd::columns(from, d, column);
      for (int i = 0; i < 8; i++) simd::store(to + to_size(d + i) * rows, column[i] * shape.scale);
    }
    for (; d < shape.k_dim; d++)
      for (int i = 0; i < LANES; i++) to[to_size(d) * rows + to_size(i)] = from[i][d] * shape.scale;
  }
}

// What a group's minimum is multiplied by; elements are added up in order, so that it is the same for both.
template <class Kv>
void sum_queries(const QueryTile& queries, bool k_major, const Scratch& s) {
  const Widths widths(queries.shape);
  std::fill_n(s.q_sums, widths.rows * (widths.k_pad / LANES), 0.0f);
  for (size_t d = 0; d < to_size(queries.shape.k_dim); d++)
    for (size_t row = 0; row < to_size(queries.n_rows()); row++)
      s.q_sums[d / Codec<Kv>::GROUP * widths.rows + row] +=
          s.q[k_major ? row * widths.k_pad + d : d * widths.rows + row];
}

template <class Rows>
void load_queries(const float* q, const QueryTile& queries, const Rows& rows, const Scratch& s) {
  rows.k_major() ? load_query_rows(q, queries, s) : load_query_columns(q, queries, s);
  if constexpr (Codec<typename Rows::KvType>::HAS_MINIMUM)
    sum_queries<typename Rows::KvType>(queries, rows.k_major(), s);
}

// --- merging ---------------------------------------------------------------------------------------------------------

float exp_of(float x) {
  return simd::exp(simd::set(x))[0];
}

// What a query row has gathered of its splits.
struct RowState {
  float &max, &sum;
  float* out;  // [v_dim]
  int v_dim;
  const float* sink;  // its head's; null: none

  void start() const {
    max = NONE;
    sum = 0;
    std::fill_n(out, v_dim, 0.0f);
  }

  // A partial result of nothing, or the first after nothing, changes the other one in no bit.
  void merge(const Partial& from, int row, size_t v_pad) const {
    const float m = std::max(max, from.max[row]);
    const float old_factor = exp_of(max - m), new_factor = exp_of(from.max[row] - m);
    const float* acc = from.acc + to_size(row) * v_pad;
    max = m;
    sum = sum * old_factor + from.sum[row] * new_factor;
    for (int i = 0; i < v_dim; i++) out[i] = out[i] * old_factor + acc[i] * new_factor;
  }

  // The sink joins as one more split, without a value. + 0: a sum of nothing but underflows may be -0 or +0, depending
  // on how many masked tokens follow it.
  void finish() const {
    float old_factor = 1;
    if (sink) {
      const float m = std::max(max, *sink);
      old_factor = exp_of(max - m);
      sum = sum * old_factor + exp_of(*sink - m);
    }
    const float factor = sum > 0 ? old_factor / sum : 0;
    for (int i = 0; i < v_dim; i++) out[i] = out[i] * factor + 0.0f;
  }
};

// --- memory ----------------------------------------------------------------------------------------------------------

constexpr int SLOTS_PER_THREAD = 16;  // splits that are worked on at a time, where threads share a query tile

// The workspace of a call. Throws Error where less was planned.
struct Memory {
  Widths widths;
  float *max, *sum;  // [T, n_heads] of the rows' states; first, where the next attend_rows finds them again
  size_t scratch_bytes, slot_bytes;
  std::byte* scratches;  // [n_threads, scratch_bytes]
  std::byte* slots;      // [n_threads * SLOTS_PER_THREAD, slot_bytes] in which threads leave results of single splits

  Memory(Arena& arena, const AttentionShape& shape, int n_tokens, int n_threads)
      : widths(shape),
        max(arena.take<float>(area(n_tokens, shape.n_heads))),
        sum(arena.take<float>(area(n_tokens, shape.n_heads))),
        scratch_bytes(bytes_of([&](Arena& piece) { Scratch(piece, widths); })),
        slot_bytes(bytes_of([&](Arena& piece) { Partial(piece, widths); })),
        scratches(arena.take<std::byte>(to_size(n_threads) * scratch_bytes)),
        slots(arena.take<std::byte>(area(n_threads, SLOTS_PER_THREAD) * slot_bytes)) {}

  Scratch scratch(int rank) const {
    Arena piece(scratches + to_size(rank) * scratch_bytes, scratch_bytes);
    return Scratch(piece, widths);
  }
  Partial slot(int i) const {
    Arena piece(slots + to_size(i) * slot_bytes, slot_bytes);
    return Partial(piece, widths);
  }
};

// --- who works on what -----------------------------------------------------------------------------------------------

// What a thread knows of the call that it is in.
struct Call {
  const Team& team;
  const Batch& batch;
  const AttentionShape& shape;
  const float* q;  // [T, n_heads, k_dim]
  float* out;      // [T, n_heads, v_dim]
  const Memory& memory;
  Scratch scratch;

  int n_query_tiles(int sequence) const {
    const int n_tokens = batch.query_start[sequence + 1] - batch.query_start[sequence];
    return round_up(n_tokens, memory.widths.tokens) / memory.widths.tokens * shape.n_kv_heads;
  }
  // The KV heads of the sequence's first tokens, then those of the next.
  QueryTile query_tile(int sequence, int index) const {
    const int each = memory.widths.tokens;
    const int first = batch.query_start[sequence] + index / shape.n_kv_heads * each;
    const int n = std::min(each, batch.query_start[sequence + 1] - first);
    return {batch, shape, sequence, index % shape.n_kv_heads, first, n};
  }
  QueryTile query_tile(int index) const {  // of the whole batch
    int s = 0;
    for (int n; index >= (n = n_query_tiles(s)); s++) index -= n;
    return query_tile(s, index);
  }

  // A split's result joins the row's: the first of those that the query tile sees starts it, the last finishes it.
  void merge(const QueryTile& queries, int row, int split, const Partial& partial) const {
    const size_t i = queries.index(row);
    const RowState state{memory.max[i], memory.sum[i], out + i * to_size(shape.v_dim), shape.v_dim,
                         shape.sinks ? shape.sinks + queries.head(row) : nullptr};
    if (split == queries.first_split()) state.start();
    state.merge(partial, row, memory.widths.v_pad);
    if (split == queries.last_split() - 1) state.finish();
  }

  // Those of splits first .. last - 1 that the query tile sees, by one thread.
  template <class Rows>
  void attend(const Rows& rows, const QueryTile& queries, int first, int last) const {
    first = std::max(first, queries.first_split());
    last = std::min(last, queries.last_split());
    if (first < last) load_queries(q, queries, rows, scratch);
    for (int split = first; split < last; split++) {
      attend_split(rows, queries, split, scratch, scratch.partial);
      for (int row = 0; row < queries.n_rows(); row++) merge(queries, row, split, scratch.partial);
    }
  }
};

// Whether a thread takes a query tile with all its splits: where there are enough query tiles to keep all threads busy
// till the end. If not, so many splits of each are worked on at a time, their results kept in slots. It changes no bit.
struct Schedule {
  int query_tiles = 0, splits_at_once = 0, rounds = 0;  // splits_at_once 0: all of a tile's by one thread

  explicit Schedule(const Call& call) {
    int total = 0, longest = 0;
    for (int s = 0; s < call.batch.n_sequences; s++) {
      const int n = call.n_query_tiles(s), G = call.shape.n_kv_heads;
      query_tiles += n;
      for (int i = 0; i < n; i += G) {
        const QueryTile queries = call.query_tile(s, i);
        const int splits = queries.last_split() - queries.first_split();
        total += splits * G;
        longest = std::max(longest, splits);
      }
    }
    const int threads = call.team.size, slots = SLOTS_PER_THREAD * threads;
    if (threads == 1 || longest * threads * 4 <= total || query_tiles * 2 > slots) return;
    const int most = slots / query_tiles;
    rounds = (longest + most - 1) / most;
    splits_at_once = (longest + rounds - 1) / rounds;
  }
};

// The query tiles' splits in rounds: first each split on its own, then each row's merge.
template <class Kv, int Block>
void attend_in_rounds(const Call& call, const KVCache<Kv, Block>& cache, int layer, const Schedule& schedule) {
  const int at_once = schedule.splits_at_once, rows_each = call.memory.widths.tokens * call.memory.widths.group;
  const int n_slots = schedule.query_tiles * at_once;
  // Neighbours go to the same thread, which prefetches from one into the next; half of a slow thread's share can still
  // go to another.
  const int half_a_share = std::max(1, n_slots / (2 * call.team.size));
  for (int round = 0; round < schedule.rounds; round++) {
    const auto fill_slot = [&](int slot) {
      const QueryTile queries = call.query_tile(slot / at_once);
      const int split = queries.first_split() + round * at_once + slot % at_once;
      if (split >= queries.last_split()) return;
      const CacheRows rows(cache.view(), layer, queries);
      load_queries(call.q, queries, rows, call.scratch);
      attend_split(rows, queries, split, call.scratch, call.memory.slot(slot));
    };
    const auto merge_row = [&](int index) {
      const int tile = index / rows_each, row = index % rows_each;
      const QueryTile queries = call.query_tile(tile);
      if (row >= queries.n_rows()) return;
      const int first = queries.first_split() + round * at_once;
      for (int i = 0; i < at_once && first + i < queries.last_split(); i++)
        call.merge(queries, row, first + i, call.memory.slot(tile * at_once + i));
    };
    call.team.for_each_dynamic(n_slots, fill_slot, half_a_share);
    call.team.for_each(schedule.query_tiles * rows_each, merge_row);
  }
}

}  // namespace

template <class Kv, int Block>
void Flash::attend(const Team& team, const float* q, const KVCache<Kv, Block>& cache, int layer, const Batch& batch,
                   const AttentionShape& shape, float* out, const Workspace& workspace) {
  Arena arena = workspace.begin();
  const Memory memory(arena, shape, batch.n_tokens, team.size);
  const Call call{team, batch, shape, q, out, memory, memory.scratch(team.rank)};
  const Schedule schedule(call);
  if (schedule.splits_at_once > 0) return attend_in_rounds(call, cache, layer, schedule);
  team.for_each_dynamic(schedule.query_tiles, [&](int i) {  // the last ones, of the longest context, first
    const QueryTile queries = call.query_tile(schedule.query_tiles - 1 - i);
    call.attend(CacheRows(cache.view(), layer, queries), queries, 0, queries.last_split());
  });
}

void Flash::attend_rows(const Team& team, const float* q, const PlainRows& rows, const Batch& batch, int sequence,
                        const AttentionShape& shape, float* out, const Workspace& workspace) {
  Arena arena = workspace.begin();
  const Memory memory(arena, shape, batch.n_tokens, team.size);
  const Call call{team, batch, shape, q, out, memory, memory.scratch(team.rank)};
  const int split = rows.first / SPLIT, n = call.n_query_tiles(sequence);
  team.for_each_dynamic(n, [&](int i) {
    const QueryTile queries = call.query_tile(sequence, n - 1 - i);
    call.attend(PlainHead{rows, shape, queries.kv_head}, queries, split, split + 1);
  });
}

size_t Flash::workspace_bytes(const AttentionShape& shape, const Limits& limits) {
  return bytes_of([&](Arena& arena) { Memory(arena, shape, limits.max_tokens, limits.max_threads); });
}

template <class>
double Flash::operand_rounding() {
  return 0;
}
template double Flash::operand_rounding<KvF32>();
template double Flash::operand_rounding<KvF16>();
template double Flash::operand_rounding<KvBF16>();
template double Flash::operand_rounding<KvQ8>();
template double Flash::operand_rounding<KvQ4>();

#define INSTANTIATE(Kv, Block)                                                                                    \
  template void Flash::attend<Kv, Block>(const Team&, const float*, const KVCache<Kv, Block>&, int, const Batch&, \
                                         const AttentionShape&, float*, const Workspace&);
FOR_EACH_CPU_CACHE(INSTANTIATE)
