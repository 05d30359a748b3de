// matmul.cu: linear layers on a GPU: one kernel for any number of rows and any weight type, and for several products.
//
// The weights are the tensor core's 16 rows, the activations its 8 columns. The inputs are cut in slices of a fixed
// length; each slice's sum is made from zero by one warp, and the slices are added in order. Neither the number of
// warps nor that of rows shows in any bit: a token alone and in a prompt of thousands gives the same.
//
// Weights have an arithmetic of their own, into which the inputs are converted: of a prompt's many rows by a kernel of
// its own, once for all panels; of a few rows by each warp for itself, a slice at a time, as launching such a kernel
// would take longer.
#include "kernels/matmul.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "kernels/activate_gpu.h"
#include "kernels/layers.h"
#include "kernels/weights_gpu.h"

namespace {

constexpr int WARP = 32;
constexpr int SLICE = 256;    // inputs, whole steps of every type
constexpr int MAX_WARPS = 8;  // of a block

int whole(int n, int unit) {
  return (n + unit - 1) / unit * unit;
}

// --- the inputs of a call --------------------------------------------------------------------------------------------

// An input's rows in one arithmetic. With an arena that only counts, what they take.
template <class Input>
Input take_rows(Arena& arena, int rows, int k) {
  Input x{};
  x.stride = whole(k, Input::STEP);
  const size_t n = static_cast<size_t>(rows) * static_cast<size_t>(x.stride);
  x.rows = arena.take<std::remove_pointer_t<decltype(x.rows)>>(n);
  if constexpr (std::is_same_v<Input, Int8Rows>) x.scale = arena.take<float>(n / INT8_GROUP);
  return x;
}

// All arithmetics that products of one input may want.
struct Inputs {
  Float32Rows f32;
  Bf16Rows bf16;
  Int8Rows int8;

  Inputs(Arena& arena, int rows, int k)
      : f32(take_rows<Float32Rows>(arena, rows, k)),
        bf16(take_rows<Bf16Rows>(arena, rows, k)),
        int8(take_rows<Int8Rows>(arena, rows, k)) {}
  template <class Input>
  const Input& get() const {
    if constexpr (std::is_same_v<Input, Float32Rows>)
      return f32;
    else if constexpr (std::is_same_v<Input, Bf16Rows>)
      return bf16;
    else
      return int8;
  }
};

__device__ void convert(float x, const Float32Rows& to, size_t at) {
  to.rows[at] = x;
}

__device__ void convert(float x, const Bf16Rows& to, size_t at) {
  to.rows[at] = float_to_bf16(x);
}

// A warp's 32 numbers are a group.
__device__ void convert(float x, const Int8Rows& to, size_t at) {
  static_assert(WARP == INT8_GROUP);
  uint32_t bits = float_to_bits(fabsf(x));  // compared as integers: a NaN is larger than any number and is not lost
  for (int by = WARP / 2; by > 0; by /= 2) bits = max(bits, __shfl_xor_sync(WHOLE_WARP, bits, by));
  const float amax = bits_to_float(bits);
  // Below this the scale would be subnormal and its inverse may be infinite: such a group counts as zeros.
  const float inverse = amax < 127 * 0x1p-126f ? 0 : 127 / amax;
  const int q = static_cast<int>(rintf(fmaxf(fminf(x * inverse, 127), -127)));  // fminf passes over a NaN
  to.rows[at] = static_cast<int8_t>(q);
  if (threadIdx.x % WARP == 0) to.scale[at / INT8_GROUP] = amax / 127;
}

// grid: rows of x, of all its groups. A row of int8 is whole groups, so that whole warps have a number or none.
template <class Input>
__global__ void convert_rows(const float* x, int x_rows, int x_stride, int x_group, int k, Input to) {
  const int row = static_cast<int>(blockIdx.x), group = row / x_rows;
  const float* from = x + static_cast<ptrdiff_t>(group) * x_group + static_cast<ptrdiff_t>(row % x_rows) * x_stride;
  for (int i = static_cast<int>(threadIdx.x); i < to.stride; i += static_cast<int>(blockDim.x))
    convert(i < k ? from[i] : 0, to,
            static_cast<size_t>(row) * static_cast<size_t>(to.stride) + static_cast<size_t>(i));
}

// Inputs that differ from group to group, or the one that all groups share.
int input_rows(const Product& p) {
  return p.x_group ? p.weight->groups * p.x_rows : p.x_rows;
}

bool same_input(const Product& a, const Product& b) {
  return a.x == b.x && a.x_rows == b.x_rows && a.x_stride == b.x_stride && a.x_group == b.x_group &&
         a.weight->k == b.weight->k && (a.x_group == 0 || a.weight->groups == b.weight->groups);
}

template <class Input>
void launch_convert(const Team& team, const Product& p, const Input& to) {
  const int threads = std::min(256, whole(to.stride, WARP));
  launch(team, convert_rows<Input>, static_cast<unsigned>(input_rows(p)), static_cast<unsigned>(threads), 0, p.x,
         p.x_rows, p.x_stride, p.x_group, p.weight->k, to);
}

// --- the product -----------------------------------------------------------------------------------------------------

constexpr int MOST_TOGETHER = 3;  // products of a launch

// A Product, for one type of weights.
template <class Input>
struct View {
  const std::byte* weight;  // [groups, panels]
  const std::byte* gate;    // the same; null: there is none
  int n, k;
  size_t panel_bytes;
  const float *bias, *gate_bias;
  const float* x;
  int x_rows, x_stride, x_group;
  Input converted;  // all rows of x, of all its groups; a launch with a few rows converts them itself
  const int *gather, *row_start;
  int rows;
  float* y;
  int y_stride, y_group;
  bool add, activates;
  Activation activation;
  float limit;
};

// Products that share a launch: the blocks of product i end before end_block[i].
template <class Input>
struct Views {
  View<Input> product[MOST_TOGETHER];
  int end_block[MOST_TOGETHER];
};

// The rows of a group that a block multiplies: first .. first + n - 1, of those from `start` on.
struct BlockRows {
  int group, start, first, n;
  // Row r's place in x. Rows past the last are the first again: nobody looks at what comes of it.
  template <class Input>
  __device__ int place(const View<Input>& p, int r) const {
    const int at = start + first + (r < n ? r : 0);
    return (p.x_group ? group * p.x_rows : 0) + (p.gather ? p.gather[at] : at);
  }
};

// place(r): where row r of the block is in `input`.
template <int R, class Input, class Place>
__device__ LaneRows<Input, R> lane_rows(const Input& input, Place place) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
  LaneRows<Input, R> x{input, {}, {}, t};
#pragma unroll
  for (int r = 0; r < R; r++) {
    x.column[r] = place(r * TILE_ROWS + g);
    x.own[r][0] = place(r * TILE_ROWS + 2 * t);
    x.own[r][1] = place(r * TILE_ROWS + 2 * t + 1);
  }
  return x;
}

// A warp's converted slice of a few rows, in shared memory. Rows are a step longer than a slice, so that a step of
// eight rows lies in different banks.
template <class Input>
constexpr int SLICE_STRIDE = SLICE + Input::STEP;
template <class Input>
__host__ __device__ Input slice_rows(std::byte* memory, int rows) {
  Input x{};
  x.stride = SLICE_STRIDE<Input>;
  x.rows = reinterpret_cast<decltype(x.rows)>(memory);
  if constexpr (std::is_same_v<Input, Int8Rows>) x.scale = reinterpret_cast<float*>(memory + rows * x.stride);
  return x;
}
template <class Input>
constexpr __host__ __device__ int slice_bytes(int rows) {
  constexpr int OF_A_ROW = SLICE_STRIDE<Input> * int{sizeof(*Input::rows)} +
                           (std::is_same_v<Input, Int8Rows> ? SLICE_STRIDE<Input> / INT8_GROUP * 4 : 0);
  return (rows * OF_A_ROW + 15) / 16 * 16;
}
template <class Input>
__device__ void convert_slice(const View<Input>& p, const BlockRows& rows, int slice, const Input& to) {
  const int begin = slice * SLICE, n = min(SLICE, (p.k - begin + Input::STEP - 1) / Input::STEP * Input::STEP);
  for (int r = 0; r < rows.n; r++) {
    const int place = rows.place(p, r), group = place / p.x_rows;
    const float* x =
        p.x + static_cast<ptrdiff_t>(group) * p.x_group + static_cast<ptrdiff_t>(place % p.x_rows) * p.x_stride;
    for (int i = static_cast<int>(threadIdx.x) % WARP; i < n; i += WARP)
      convert(begin + i < p.k ? x[begin + i] : 0, to, static_cast<size_t>(r * to.stride + i));
  }
}

// The sum over slice `slice` of a panel: sums [R * TILE_ROWS, PANEL]. x_begin: the input that x begins with.
template <class Type, int R>
__device__ void multiply_slice(const std::byte* panel, int k, int slice, const LaneRows<typename Type::Input, R>& x,
                               int x_begin, float* sums) {
  float d[R][4];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) d[r][c] = 0;
  const int end = min(k, (slice + 1) * SLICE);
  for (int i = slice * SLICE; i < end; i += Type::STEP)
    Type::template multiply<R>(panel + static_cast<size_t>(i / Type::STEP) * Type::STEP_BYTES, x, i - x_begin, d);
  const int g = static_cast<int>(threadIdx.x) % WARP / 4;
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) sums[(r * TILE_ROWS + 2 * x.t + c % 2) * PANEL + g + c / 2 * 8] = d[r][c];
}

// The same of the panel's `gate` too, where there is one: sums [weight, gate].
template <class Type, int R>
__device__ void multiply_slices(const View<typename Type::Input>& p, const BlockRows& rows, size_t panel, int slice,
                                std::byte* slice_memory, float* sums) {
  using Input = typename Type::Input;
  const auto multiply_both = [&](const LaneRows<Input, R>& x, int x_begin) {
#pragma unroll 1  // one after the other: no registers for both
    for (const std::byte* weight = p.weight; weight; weight = weight == p.weight ? p.gate : nullptr)
      multiply_slice<Type, R>(weight + panel, p.k, slice, x, x_begin,
                              weight == p.weight ? sums : sums + R * TILE_ROWS * PANEL);
  };
  if constexpr (R == 1) {
    const Input x = slice_rows<Input>(slice_memory, rows.n);
    convert_slice(p, rows, slice, x);
    __syncwarp();
    multiply_both(lane_rows<R>(x, [&](int r) { return r < rows.n ? r : 0; }), slice * SLICE);
  } else {
    multiply_both(lane_rows<R>(p.converted, [&](int r) { return rows.place(p, r); }), 0);
  }
}

// y (+)= total (+ bias), or activated
template <class Input>
__device__ void finish(const View<Input>& p, int group, int row, int column, float total, float gate) {
  if (column >= p.n) return;
  float* y = p.y + static_cast<ptrdiff_t>(row) * p.y_stride + static_cast<ptrdiff_t>(group) * p.y_group + column;
  const ptrdiff_t output = static_cast<ptrdiff_t>(group) * p.n + column;
  if (p.bias) total += p.bias[output];
  if (p.gate_bias) gate += p.gate_bias[output];
  if (p.activates) total = activated(p.activation, p.limit, p.gate ? &gate : nullptr, total);
  *y = p.add ? total + *y : total;
}

// grid: panels of all products, tiles of R * TILE_ROWS rows, groups. A warp a slice, as many at a time as the block has
// warps.
template <class Type, int R>
__global__ void __launch_bounds__(MAX_WARPS* WARP, R == 1 ? 2 : 1)
    multiply(const __grid_constant__ Views<typename Type::Input> views) {
  constexpr int OUTPUTS = R * TILE_ROWS * PANEL;
  const int block = static_cast<int>(blockIdx.x);
  int index = 0;
  while (block >= views.end_block[index]) index++;
  const View<typename Type::Input>& p = views.product[index];
  const int panel = block - (index > 0 ? views.end_block[index - 1] : 0), n_panels = (p.n + PANEL - 1) / PANEL;
  const int group = static_cast<int>(blockIdx.z), first = static_cast<int>(blockIdx.y) * R * TILE_ROWS;
  const int start = p.row_start ? p.row_start[group] : 0;
  const int n_rows = (p.row_start ? p.row_start[group + 1] - start : p.rows) - first;
  if (n_rows <= 0) return;  // the whole block
  const BlockRows rows{group, start, first, min(n_rows, R * TILE_ROWS)};
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), warps = threads / WARP;
  const int outputs = p.gate ? 2 * OUTPUTS : OUTPUTS, warp = thread / WARP;
  float* total = dynamic_shared<float>();  // [weight, gate][R * TILE_ROWS, PANEL]
  float* sums = total + outputs;           // [warps][weight, gate][R * TILE_ROWS, PANEL]
  std::byte* slice_memory =
      reinterpret_cast<std::byte*>(sums + warps * outputs) + warp * slice_bytes<typename Type::Input>(rows.n);
  const size_t at = static_cast<size_t>(group * n_panels + panel) * p.panel_bytes;
  const int slices = (p.k + SLICE - 1) / SLICE;
  for (int o = thread; o < outputs; o += threads) total[o] = 0;
  for (int done = 0; done < slices; done += warps) {
    const int slice = done + warp;
    if (slice < slices) multiply_slices<Type, R>(p, rows, at, slice, slice_memory, sums + warp * outputs);
    __syncthreads();
    for (int o = thread; o < outputs; o += threads)
      for (int i = 0; i < min(warps, slices - done); i++) total[o] += sums[i * outputs + o];
    __syncthreads();
  }
  for (int o = thread; o < rows.n * PANEL; o += threads)
    finish(p, group, start + first + o / PANEL, panel * PANEL + o % PANEL, total[o], p.gate ? total[OUTPUTS + o] : 0);
}

// What a product's gate and activation add to it; for a plain one nothing.
struct Ending {
  const Product* gate = nullptr;
  bool activates = false;
  Activation activation{};
  float limit = 0;
};

template <class Input>
View<Input> view_of(const Product& p, size_t panel_bytes, const Input& converted, const Ending& ending) {
  const Matrix& w = *p.weight;
  const Product* gate = ending.gate;
  return {w.data,
          gate ? gate->weight->data : nullptr,
          w.n,
          w.k,
          panel_bytes,
          p.bias,
          gate ? gate->bias : nullptr,
          p.x,
          p.x_rows,
          p.x_stride,
          p.x_group,
          converted,
          p.gather,
          p.row_start,
          p.rows,
          p.y,
          p.y_stride,
          p.y_group,
          p.add,
          ending.activates,
          ending.activation,
          ending.limit};
}

bool few_rows(const Product& p) {
  return p.rows <= TILE_ROWS;
}

// Whether a launch can have both; products without rows have none.
bool go_together(const Product& a, const Product& b) {
  return a.weight->type == b.weight->type && a.weight->groups == b.weight->groups && few_rows(a) == few_rows(b) &&
         a.rows > 0 && b.rows > 0;
}

// products [n], n <= MOST_TOGETHER, which go together; converted [n]
template <class Type>
void launch_products(const Team& team, const Product* products, int n, const typename Type::Input* converted,
                     const Ending& ending) {
  using Input = typename Type::Input;
  Views<Input> views{};
  int blocks = 0, rows = 0, slices = 0;
  for (int i = 0; i < n; i++) {
    const Product& p = products[i];
    views.product[i] = view_of(p, panel_bytes<Type>(p.weight->k), converted[i], ending);
    views.end_block[i] = blocks += panels(p.weight->n);
    rows = std::max(rows, p.rows), slices = std::max(slices, (p.weight->k + SLICE - 1) / SLICE);
  }
  const int warps = std::min(MAX_WARPS, slices);
  const auto run = [&]<int R>(std::integral_constant<int, R>) {
    const dim3 grid(static_cast<unsigned>(blocks), blocks_of(rows, R * TILE_ROWS),
                    static_cast<unsigned>(products->weight->groups));
    const int sums = (1 + warps) * R * TILE_ROWS * PANEL * int{sizeof(float)} * (ending.gate ? 2 : 1);
    const int slice_memory = R == 1 ? warps * slice_bytes<Input>(rows) : 0;
    launch(team, multiply<Type, R>, grid, static_cast<unsigned>(warps * WARP), static_cast<size_t>(sums + slice_memory),
           views);
  };
  if (few_rows(*products)) return run(std::integral_constant<int, 1>());
  run(std::integral_constant<int, 2>());
}

void run_products(const Team& team, const Product* products, int n_products, const Workspace& workspace,
                  const Ending& ending) {
  Arena arena = workspace.begin();
  std::vector<Inputs> inputs;  // of each product
  for (int first = 0, end; first < n_products; first = end) {
    const Product& p = products[first];
    const Inputs converted(arena, input_rows(p), p.weight->k);
    bool f32 = false, bf16 = false, int8 = false;
    for (end = first; end < n_products && same_input(p, products[end]); end++) {
      inputs.push_back(converted);
      if (few_rows(products[end])) continue;
      with_type(products[end].weight->type, [&]<class T>(std::type_identity<T>) {
        f32 |= std::is_same_v<typename T::Input, Float32Rows>;
        bf16 |= std::is_same_v<typename T::Input, Bf16Rows>;
        int8 |= std::is_same_v<typename T::Input, Int8Rows>;
      });
    }
    if (f32) launch_convert(team, p, converted.f32);
    if (bf16) launch_convert(team, p, converted.bf16);
    if (int8) launch_convert(team, p, converted.int8);
  }
  for (int first = 0, end; first < n_products; first = end) {
    end = first + 1;
    while (end < n_products && end - first < MOST_TOGETHER && go_together(products[first], products[end])) end++;
    with_type(products[first].weight->type, [&]<class T>(std::type_identity<T>) {
      typename T::Input converted[MOST_TOGETHER];
      for (int i = first; i < end; i++) converted[i - first] = inputs[static_cast<size_t>(i)].get<typename T::Input>();
      launch_products<T>(team, products + first, end - first, converted, ending);
    });
  }
}

// --- one row of weights ----------------------------------------------------------------------------------------------

template <class Type>
__global__ void unpack(const std::byte* data, int k, int row, float* out) {
  for (int i = static_cast<int>(threadIdx.x); i < k; i += static_cast<int>(blockDim.x))
    out[i] = weight_element<Type>(data, k, row, i);
}

}  // namespace

std::span<const WeightFormat> weight_formats() {
  return WEIGHT_FORMATS;
}

const char* kernel_level() {
  static const cudaDeviceProp properties = [] {
    cudaDeviceProp found;
    CHECK_CUDA(cudaGetDeviceProperties(&found, 0));
    return found;
  }();
  return properties.name;
}

int panels(int n) {
  return (n + PANEL - 1) / PANEL;
}

size_t packed_bytes(WeightType type, int n, int k) {
  return static_cast<size_t>(panels(n)) * panel_bytes(type, k);
}

size_t matmul_workspace_bytes(int rows, int k) {
  return bytes_of([&](Arena& arena) { Inputs(arena, rows, k); });
}

void matmul(const Team& team, const Product* products, int n_products, const Workspace& workspace) {
  run_products(team, products, n_products, workspace, {});
}

// Of two types, each product has a launch of its own, and so has the activation.
void matmul_activated(const Team& team, const Product& gate, const Product& up, Activation activation, float limit,
                      const Workspace& workspace) {
  if (!gate.weight || gate.weight->type == up.weight->type)
    return run_products(team, &up, 1, workspace, {gate.weight ? &gate : nullptr, true, activation, limit});
  const Product both[] = {up, gate};
  matmul(team, both, 2, workspace);
  activate(team, activation, limit, gate.y, up.y, up.rows, up.weight->n, up.y);
}

bool pack(const TensorView& source, bool transposed, int panel, std::byte* packed) {
  const ptrdiff_t row_step = transposed ? 1 : source.k, k_step = transposed ? source.n : 1;
  bool finite = true;
  with_type(source.type, [&]<class T>(std::type_identity<T>) {
    std::byte* out = packed + static_cast<size_t>(panel) * panel_bytes<T>(source.k);
    std::fill_n(out, panel_bytes<T>(source.k), std::byte(0));
    for (int k = 0; k < source.k; k += T::STEP, out += T::STEP_BYTES)
      for (int row = 0; row < std::min(PANEL, source.n - panel * PANEL); row++)
        finite &= T::pack(source, (panel * PANEL + row) * row_step + k * k_step, k_step,
                          std::min(T::STEP, source.k - k), out, row);
  });
  return finite;
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  Buffer<float> on_device(static_cast<size_t>(matrix.k));
  with_type(matrix.type, [&]<class T>(std::type_identity<T>) {
    launch(Team{}, unpack<T>, 1, 128, 0, matrix.data, matrix.k, row, on_device.data());
  });
  download(out, on_device.data(), on_device.size() * sizeof(float));
}
