// matmul.cpp: linear layers on the CPU: converts the inputs, shares the panels of all products among the team, and runs
// the weight type's inner loop (weight_types.h) over register tiles of rows.
//
// At one row the limit is the memory's bandwidth, so nothing may stand between two loads of weights: one tile runs
// through all panels of its thread. At many rows it is the arithmetic: a panel stays in the cache while all tiles run
// over it. docs/ladder.md has what each step of this brought, and what failed.
#include "kernels/matmul.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "kernels/layers.h"
#include "kernels/weight_types.h"

namespace {

constexpr int BLOCK_ROWS = 192;     // of int8 inputs, for which a panel is expanded: about what the L2 cache holds
constexpr size_t SMALL = 32 << 10;  // bytes of converted input that every thread makes for itself

size_t round_up(size_t n, size_t unit) {
  return (n + unit - 1) / unit * unit;
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

// --- one group of a product ------------------------------------------------------------------------------------------

// y's rows at a panel = sums [rows][PANEL] (+ bias) (+ y), as far as there are columns.
void finish(const Product& p, int panel, int row, int rows, const float (*sums)[PANEL]) {
  for (int v = 0; v < VECTORS; v++) {
    const int column = panel * PANEL + v * LANES, n = std::clamp(p.weight->n - column, 0, LANES);
    float* y = p.y + static_cast<ptrdiff_t>(row) * p.y_stride + column;
    for (int r = 0; r < rows; r++, y += p.y_stride) {
      F32 sum = simd::load(sums[r] + v * LANES);
      if (p.bias) sum = sum + simd::load_first(p.bias + column, n);
      if (p.add) sum = sum + simd::load_first(y, n);
      simd::store_first(y, sum, n);
    }
  }
}

template <int R>
void store(const Accumulators<R>& acc, int rows, float (*sums)[PANEL]) {
#pragma GCC unroll 16
  for (int r = 0; r < R && r < rows; r++)
    for (int v = 0; v < VECTORS; v++) simd::store(sums[r] + v * LANES, acc[r][v]);
}

// f(std::integral_constant<int, R>) for a tile height R of MOST, MOST - 2, .. 2, 1 that has room for `rows`. What is
// not there is computed from another row and not stored: fewer heights compile in less time.
template <int MOST, class F>
void with_height(int rows, F f) {
  constexpr int LESS = std::max(1, MOST - 2);
  if constexpr (MOST > LESS)
    if (rows <= LESS) return with_height<LESS>(rows, f);
  f(std::integral_constant<int, MOST>());
}

// Row r of a product's input.
template <class Input>
const Input* input_row(const Product& p, const Inputs& inputs, int r) {
  return inputs.get<Input>(p.gather ? p.gather[r] : r);
}

// `rows` rows from `row` on, times panels first .. last - 1.
template <class Type, int R>
void run_tile(const Product& p, const Inputs& inputs, int first, int last, int row, int rows) {
  const typename Type::Input* x[R];
  for (int r = 0; r < R; r++) x[r] = input_row<typename Type::Input>(p, inputs, row + std::min(r, rows - 1));
  const int k = p.weight->k;
  const size_t bytes = panel_bytes<Type>(k);
  const std::byte* w = p.weight->data + static_cast<size_t>(first) * bytes;
  for (int panel = first; panel < last; panel++, w += bytes) {
    Accumulators<R> acc = {};
    Type::multiply(w, k, x, acc);
    alignas(64) float sums[R][PANEL];
    store<R>(acc, rows, sums);
    finish(p, panel, row, rows, sums);
  }
}

template <class Type>
void run_rows(int rows, const Product& p, const Inputs& inputs, int first, int last, int row) {
  with_height<Type::ROWS>(
      rows, [&]<int R>(std::integral_constant<int, R>) { run_tile<Type, R>(p, inputs, first, last, row, rows); });
}

// The lines of y that a tile writes when it is done: asked for when it starts, or the stores wait for them.
inline void expect_writes(const Product& p, int row, int rows, int panel) {
  for (int r = row; r < row + rows; r++)
    for (int column = panel * PANEL; column < std::min((panel + 1) * PANEL, p.weight->n); column += LANES)
      __builtin_prefetch(p.y + static_cast<ptrdiff_t>(r) * p.y_stride + column, 1);
}

// Of a chunk of a panel, expanded, and what comes after it: the memory that is asked for meanwhile.
template <class Loop>
struct Chunk {
  const typename Loop::Unit* units;
  int n;
  bool first, last;  // of its panel
  const std::byte* next;
  size_t next_bytes;
};

// sums [rows][PANEL], which begin with the first chunk, += a chunk times rows x[0] .. x[rows - 1].
template <class Loop, int R>
void run_expanded_tile(const Chunk<Loop>& chunk, int rows, const Int8Group* const* x, float (*sums)[PANEL]) {
  Accumulators<R> acc;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++) acc[r][v] = chunk.first ? simd::zero() : simd::load(sums[r] + v * LANES);
  Loop::template multiply<R>(chunk.units, chunk.n, x, acc);
  store<R>(acc, rows, sums);
}

// The same of any number of rows.
template <class Loop>
void run_expanded_rows(const Product& p, Chunk<Loop> chunk, int panel, int row, int rows, const Int8Group* const* x,
                       float (*sums)[PANEL]) {
  for (int r = 0, left = (rows + INT8_ROWS - 1) / INT8_ROWS; left > 0; left--) {
    const int height = (rows - r + left - 1) / left;
    const size_t share = chunk.next_bytes / static_cast<size_t>(left);
    for (size_t i = 0; i < share; i += 64) __builtin_prefetch(chunk.next + i);
    chunk.next += share, chunk.next_bytes -= share;
    if (chunk.last) expect_writes(p, row + r, height, panel);
    with_height<INT8_ROWS>(height, [&]<int R>(std::integral_constant<int, R>) {
      run_expanded_tile<Loop, R>(chunk, height, x + r, sums + r);
    });
    if (chunk.last) finish(p, panel, row + r, height, sums + r);
    r += height;
  }
}

// Rows row .. row + rows - 1, at most BLOCK_ROWS, times panels first .. last - 1: each chunk of a panel is expanded
// once, and stays in the cache while all rows are multiplied with it.
template <class Type>
void run_block(const Product& p, const Inputs& inputs, int first, int last, int row, int rows) {
  constexpr int K = 1024;  // inputs of a chunk, whole steps of every type
  constexpr size_t BYTES = K / Type::STEP * Type::STEP_BYTES;
  typename Type::Unit units[K / INT8_GROUP];
  alignas(64) float sums[BLOCK_ROWS + INT8_ROWS][PANEL];  // the last tile may be higher than its rows
  std::memset(sums[rows], 0, sizeof *sums * INT8_ROWS);
  const Int8Group *start[BLOCK_ROWS + INT8_ROWS], *x[BLOCK_ROWS + INT8_ROWS];
  for (int r = 0; r < rows + INT8_ROWS; r++) start[r] = input_row<Int8Group>(p, inputs, row + std::min(r, rows - 1));
  for (int panel = first; panel < last; panel++) {
    const std::byte* w = p.weight->data + static_cast<size_t>(panel) * panel_bytes<Type>(p.weight->k);
    for (int at = 0; at < p.weight->k; at += K, w += BYTES) {
      const int k = std::min(K, p.weight->k - at);
      Type::expand(w, k, units);
      for (int r = 0; r < rows + INT8_ROWS; r++) x[r] = start[r] + at / INT8_GROUP;
      run_expanded_rows<typename Type::Expanded>(
          p, {units, k / INT8_GROUP, at == 0, at + K >= p.weight->k, w + BYTES, BYTES}, panel, row, rows, x, sums);
    }
  }
}

template <class Type>
void run_expanded(const Product& p, const Inputs& inputs, int first, int last) {
  for (int row = 0, left = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS; left > 0; left--) {
    const int rows = (p.rows - row + left - 1) / left;
    run_block<Type>(p, inputs, first, last, row, rows);
    row += rows;
  }
}

// Panels first .. last - 1 of a product. Few rows: one tile runs through all panels. More: all tiles (as equal as
// possible: 7 rows are 4 + 3 rather than 6 + 1) run over a panel while it is in the cache, so weights come from memory
// once. Many: a panel is expanded for a block of rows.
template <class Type>
void run_panels(const Product& p, const Inputs& inputs, int first, int last) {
  const int tiles = (p.rows + Type::ROWS - 1) / Type::ROWS;
  if (tiles == 1) return run_rows<Type>(p.rows, p, inputs, first, last, 0);
  if constexpr (Type::WORTH_EXPANDING)
    if (tiles > 4) return run_expanded<Type>(p, inputs, first, last);
  for (int panel = first; panel < last; panel++) {
    for (int row = 0, left = tiles; left > 0; left--) {
      const int rows = (p.rows - row + left - 1) / left;
      expect_writes(p, row, rows, panel);
      run_rows<Type>(rows, p, inputs, panel, panel + 1, row);
      row += rows;
    }
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

// Converts x once for each arithmetic in use; of all rows of all inputs those whose number modulo `sharers` is `share`.
void convert_inputs(const Product* products, int n_products, std::byte* room, int share, int sharers) {
  int number = 0;
  for (int first = 0, end; first < n_products; first = end) {
    const Product& p = products[first];
    bool int8 = false, bf16 = false, f32 = false;
    for (end = first; end < n_products && same_input(p, products[end]); end++)
      with_type(products[end].weight->type, [&]<class T>(std::type_identity<T>) {
        int8 |= std::is_same_v<typename T::Input, Int8Group>;
        bf16 |= std::is_same_v<typename T::Input, uint16_t>;
        f32 |= std::is_same_v<typename T::Input, float>;
      });
    const Inputs inputs = inputs_of(p, room);
    for (int row = 0; row < inputs.rows; row++, number++) {
      if (number % sharers != share) continue;
      const ptrdiff_t group = row / p.x_rows, at = row % p.x_rows;
      const float* x = p.x + group * p.x_group + at * p.x_stride;
      if (int8) convert(x, inputs.k, inputs.get<Int8Group>(row));
      if (bf16) convert(x, inputs.k, inputs.get<uint16_t>(row));
      if (f32) convert(x, inputs.k, inputs.get<float>(row));
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

// Panels first .. last - 1 of one group, as a product of its own.
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
  with_type(weight.type, [&]<class T>(std::type_identity<T>) { run_panels<T>(one, inputs, first, last); });
}

}  // namespace

std::span<const WeightFormat> weight_formats() {
  return WEIGHT_FORMATS;
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

int panels(int n) {
  return (n + PANEL - 1) / PANEL;
}

size_t packed_bytes(WeightType type, int n, int k) {
  return static_cast<size_t>(panels(n)) * panel_bytes(type, k);
}

size_t matmul_workspace_bytes(int rows, int k) {
  return bytes_of([&](Arena& arena) { arena.take<std::byte>(Inputs{nullptr, rows, k}.all_bytes()); });
}

void matmul(const Team& team, const Product* products, int n_products, const Workspace& workspace) {
  size_t bytes = 0;
  int total = 0;
  for (int i = 0; i < n_products; i++) {
    total += groups_with_rows(products[i]) * panels(products[i].weight->n);
    if (i == 0 || !same_input(products[i], products[i - 1])) bytes += inputs_of(products[i]).all_bytes();
  }
  // A token's worth of input is converted by every thread for itself: that takes less time than a barrier.
  alignas(64) std::byte own[SMALL];
  const bool small = bytes <= sizeof own;
  std::byte* room = small ? own : workspace.begin().take<std::byte>(bytes);
  convert_inputs(products, n_products, room, small ? 0 : team.rank, small ? 1 : team.size);
  if (!small) team.barrier();
  auto [first, last] = team.share(total);  // each thread takes one range of the call's panels
  for (int i = 0; i < n_products && last > 0; i++) {
    const Product& p = products[i];
    const int n = panels(p.weight->n);
    if (i > 0 && !same_input(p, products[i - 1])) room += inputs_of(products[i - 1]).all_bytes();
    for (int group = 0; group < p.weight->groups && last > 0; group++) {
      if (rows_of(p, group) == 0) continue;
      if (first < n) run_group(p, inputs_of(p, room), group, std::max(first, 0), std::min(last, n));
      first -= n, last -= n;
    }
  }
  team.barrier();
}

void matmul_activated(const Team& team, const Product& gate, const Product& up, Activation activation, float limit,
                      const Workspace& workspace) {
  const Product both[] = {up, gate};
  matmul(team, both, gate.weight ? 2 : 1, workspace);
  activate(team, activation, limit, gate.weight ? gate.y : nullptr, up.y, up.rows, up.weight->n, up.y);
}

bool pack(const TensorView& source, bool transposed, int panel, std::byte* packed) {
  const size_t bytes = panel_bytes(source.type, source.k);
  std::byte* out = packed + static_cast<size_t>(panel) * bytes;
  std::memset(out, 0, bytes);  // rows past the last: a scale of 0
  bool finite = false;
  with_type(source.type, [&]<class T>(std::type_identity<T>) { finite = T::pack(source, transposed, panel, out); });
  return finite;
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const std::byte* panel = matrix.data + static_cast<size_t>(row / PANEL) * panel_bytes(matrix.type, matrix.k);
  with_type(matrix.type, [&]<class T>(std::type_identity<T>) { T::unpack(panel, row % PANEL, matrix.k, out); });
}
