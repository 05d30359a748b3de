// matmul.cu: linear layers on a GPU: converts the inputs, then one kernel for any number of rows and any weight type.
//
// The weights are the tensor core's 16 rows, the activations its 8 columns. The inputs are cut in slices of a fixed
// length; each slice's sum is made from zero by one warp, and the slices are added in order. Neither the number of
// warps nor that of rows shows in any bit: a token alone and in a prompt of thousands gives the same.
#include "kernels/matmul.h"

#include <algorithm>
#include <array>
#include <type_traits>

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

// A Product, for one type of weights.
template <class Input>
struct View {
  const std::byte* weight;  // [groups, panels]
  int n, k;
  size_t panel_bytes;
  const float* bias;
  Input x;
  int x_group_rows;  // rows of x from a group's to the next; 0: all groups share them
  const int *gather, *row_start;
  int rows;
  float* y;
  int y_stride, y_group;
  bool add;
};

// Where lane's rows are, of the tiles from row `first` of the group on. Rows past the last are row 0 again: nobody
// looks at what comes of it.
template <int R, class Input>
__device__ LaneRows<Input, R> lane_rows(const View<Input>& p, int group, int start, int rows, int first) {
  const int lane = static_cast<int>(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
  const auto place = [&](int row) {
    const int at = start + (first + row < rows ? first + row : 0);
    return group * p.x_group_rows + (p.gather ? p.gather[at] : at);
  };
  LaneRows<Input, R> x{p.x, {}, {}, t};
#pragma unroll
  for (int r = 0; r < R; r++) {
    x.column[r] = place(r * TILE_ROWS + g);
    x.own[r][0] = place(r * TILE_ROWS + 2 * t);
    x.own[r][1] = place(r * TILE_ROWS + 2 * t + 1);
  }
  return x;
}

// The sum over slice `slice` of a panel: sums [R * TILE_ROWS, PANEL].
template <class Type, int R>
__device__ void multiply_slice(const std::byte* panel, int k, int slice, const LaneRows<typename Type::Input, R>& x,
                               float* sums) {
  float d[R][4];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) d[r][c] = 0;
  const int end = min(k, (slice + 1) * SLICE);
  for (int i = slice * SLICE; i < end; i += Type::STEP)
    Type::template multiply<R>(panel + static_cast<size_t>(i / Type::STEP) * Type::STEP_BYTES, x, i, d);
  const int g = static_cast<int>(threadIdx.x) % WARP / 4;
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int c = 0; c < 4; c++) sums[(r * TILE_ROWS + 2 * x.t + c % 2) * PANEL + g + c / 2 * 8] = d[r][c];
}

// y (+)= total (+ bias)
template <class Input>
__device__ void finish(const View<Input>& p, int group, int row, int column, float total) {
  if (column >= p.n) return;
  float* y = p.y + static_cast<ptrdiff_t>(row) * p.y_stride + static_cast<ptrdiff_t>(group) * p.y_group + column;
  if (p.bias) total += p.bias[static_cast<ptrdiff_t>(group) * p.n + column];
  *y = p.add ? total + *y : total;
}

// grid: panels, tiles of R * TILE_ROWS rows, groups. A warp a slice, as many at a time as the block has warps.
template <class Type, int R>
__global__ void __launch_bounds__(MAX_WARPS* WARP) multiply(View<typename Type::Input> p) {
  constexpr int OUTPUTS = R * TILE_ROWS * PANEL;
  const int group = static_cast<int>(blockIdx.z), first = static_cast<int>(blockIdx.y) * R * TILE_ROWS;
  const int start = p.row_start ? p.row_start[group] : 0;
  const int rows = p.row_start ? p.row_start[group + 1] - start : p.rows;
  if (first >= rows) return;  // the whole block
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), warps = threads / WARP;
  float* total = dynamic_shared<float>();  // [R * TILE_ROWS, PANEL]
  float* sums = total + OUTPUTS;           // [warps][R * TILE_ROWS, PANEL]
  const std::byte* panel = p.weight + (static_cast<size_t>(group) * gridDim.x + blockIdx.x) * p.panel_bytes;
  const LaneRows<typename Type::Input, R> x = lane_rows<R>(p, group, start, rows, first);
  const int slices = (p.k + SLICE - 1) / SLICE;
  for (int o = thread; o < OUTPUTS; o += threads) total[o] = 0;
  for (int done = 0; done < slices; done += warps) {
    const int slice = done + thread / WARP;
    if (slice < slices) multiply_slice<Type, R>(panel, p.k, slice, x, sums + thread / WARP * OUTPUTS);
    __syncthreads();
    for (int o = thread; o < OUTPUTS; o += threads)
      for (int i = 0; i < min(warps, slices - done); i++) total[o] += sums[i * OUTPUTS + o];
    __syncthreads();
  }
  for (int o = thread; o < OUTPUTS; o += threads)
    if (first + o / PANEL < rows)
      finish(p, group, start + first + o / PANEL, static_cast<int>(blockIdx.x) * PANEL + o % PANEL, total[o]);
}

template <class Type>
void launch_product(const Team& team, const Product& p, const typename Type::Input& x) {
  const Matrix& w = *p.weight;
  const View<typename Type::Input> view{w.data,
                                        w.n,
                                        w.k,
                                        panel_bytes<Type>(w.k),
                                        p.bias,
                                        x,
                                        p.x_group ? p.x_rows : 0,
                                        p.gather,
                                        p.row_start,
                                        p.rows,
                                        p.y,
                                        p.y_stride,
                                        p.y_group,
                                        p.add};
  const int warps = std::min(MAX_WARPS, (w.k + SLICE - 1) / SLICE);
  const auto run = [&]<int R>(std::integral_constant<int, R>) {
    const dim3 grid(static_cast<unsigned>(panels(w.n)), blocks_of(p.rows, R * TILE_ROWS),
                    static_cast<unsigned>(w.groups));
    const size_t shared = static_cast<size_t>((1 + warps) * R * TILE_ROWS * PANEL) * sizeof(float);
    launch(team, multiply<Type, R>, grid, static_cast<unsigned>(warps * WARP), shared, view);
  };
  if (p.rows <= TILE_ROWS) return run(std::integral_constant<int, 1>());
  run(std::integral_constant<int, 2>());
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
  Arena arena = workspace.begin();
  for (int first = 0, end; first < n_products; first = end) {
    const Product& p = products[first];
    const Inputs inputs(arena, input_rows(p), p.weight->k);
    bool f32 = false, bf16 = false, int8 = false;
    for (end = first; end < n_products && same_input(p, products[end]); end++)
      with_type(products[end].weight->type, [&]<class T>(std::type_identity<T>) {
        f32 |= std::is_same_v<typename T::Input, Float32Rows>;
        bf16 |= std::is_same_v<typename T::Input, Bf16Rows>;
        int8 |= std::is_same_v<typename T::Input, Int8Rows>;
      });
    if (f32) launch_convert(team, p, inputs.f32);
    if (bf16) launch_convert(team, p, inputs.bf16);
    if (int8) launch_convert(team, p, inputs.int8);
    for (int i = first; i < end; i++)
      with_type(products[i].weight->type, [&]<class T>(std::type_identity<T>) {
        launch_product<T>(team, products[i], inputs.get<typename T::Input>());
      });
  }
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
