// matmul.h: linear layers, y = x W^T + b, for every weight type.
//
// W [n, k] is packed when it is loaded so that one vector register holds the same k of LANES *output* rows, k running
// in order: no horizontal sums, and 1 row of activations or 512 take the same reduction order, so decode, prefill and
// any batch agree bit for bit. The number of rows only chooses the register tile. float weights multiply float32
// (bf16 weights, with AVX512-BF16: bfloat16) activations and accumulate in float32; the quantised ones multiply int8
// activations (groups of 32 with a float32 scale), accumulate a group in int32 and the groups in float32, in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "kernels/arena.h"
#include "kernels/team.h"

// Weight types are the structs of weight_types.h; this is a type's place in their list. 0 is f32.
enum class WeightType : int {};

// What the model file holds of a matrix [n, k]: a tensor [n, k / block * block_elements] of dtype.
struct WeightFormat {
  std::string_view name;
  const char* dtype;   // as safetensors spells it
  int block;           // inputs of a row that are stored together; 1: plain floats
  int block_elements;  // that a block takes
};
std::span<const WeightFormat> weight_formats();  // of all types, in order
inline const WeightFormat& weight_format(WeightType type) {
  return weight_formats()[static_cast<size_t>(type)];
}
inline std::optional<WeightType> find_weight_type(std::string_view name) {
  for (size_t i = 0; i < weight_formats().size(); i++)
    if (weight_formats()[i].name == name) return static_cast<WeightType>(i);
  return {};
}
inline std::string weight_type_names() {  // "f32, bf16, ..."
  std::string names;
  for (const WeightFormat& format : weight_formats()) names += (names.empty() ? "" : ", ") + std::string(format.name);
  return names;
}

// A matrix [n, k] of the model file, row-major.
struct TensorView {
  WeightType type{};
  int n = 0, k = 0;
  const void* data = nullptr;
};

// A packed matrix, or `groups` of them that follow each other; does not own its memory.
struct Matrix {
  WeightType type{};
  int n = 0, k = 0;
  int groups = 1;
  const std::byte* data = nullptr;
  explicit operator bool() const { return data != nullptr; }
};

// Bytes of the packed form of one group (n is rounded up to a whole number of panels), a multiple of 64.
size_t packed_bytes(WeightType type, int n, int k);
// Panels of a matrix with n rows: the rows that lie side by side in registers, the unit in which a matrix is packed and
// in which threads share a product.
int panels(int n);
// Packs panel `panel` of source into packed (the start of the whole matrix, 64-byte aligned). Panels are
// independent. transposed: source is [k, n] (float types only); the packed matrix is its transpose [n, k].
// False where a quantised type's scale is infinite or no number.
bool pack(const TensorView& source, bool transposed, int panel, std::byte* packed);
// Row `row` of the matrix as float32, out [k] (the embedding of a token, where the classifier shares its matrix).
void unpack_row(const Matrix& matrix, int row, float* out);

// One product for each group of the weight. Row r of y is row (gather ? gather[r] : r) of x times W^T, plus bias, added
// to y where `add`.
//
// Groups have the rows 0 .. rows - 1 each, of x + g * x_group and y + g * y_group (MLA: a group a head); or, with
// row_start, rows row_start[g] .. row_start[g + 1] - 1 of the one x and y (experts: a group an expert, rows sorted by
// it).
struct Product {
  const Matrix* weight = nullptr;
  const float* bias = nullptr;  // [groups, n] or null
  const float* x = nullptr;     // [x_rows, k], row stride x_stride
  int x_rows = 0, x_stride = 0, x_group = 0;
  const int* gather = nullptr;  // [rows] or null: rows == x_rows
  int rows = 0;
  const int* row_start = nullptr;  // [groups + 1] or null; row_start[groups] <= rows
  float* y = nullptr;              // [rows, n], row stride y_stride
  int y_stride = 0, y_group = 0;
  bool add = false;
};

enum class Activation { silu, gelu, gelu_tanh, swiglu_oai };  // swiglu_oai: gpt-oss's, of gate and up together

// Bytes of workspace, for the activations in the weights' own arithmetic (int8, bfloat16), of a call whose one distinct
// input has `rows` rows (of all groups) of k elements.
size_t matmul_workspace_bytes(int rows, int k);

// Runs the products, which must not depend on each other. Products with the same x, x_rows, x_stride and k that follow
// each other share one conversion of x. Every thread of the team calls it, with the same arguments; ends with a
// barrier. y must not overlap any x.
void matmul(const Team& team, const Product* products, int n_products, const Workspace& workspace);

// The first half of an MLP: runs both, and up.y becomes act(gate.y) * up.y (layers.h's activate); gate.weight null:
// act(up.y). Both have the same input, rows and shape, and rows of y without gaps. gate.y [rows, n] is scratch.
void matmul_activated(const Team& team, const Product& gate, const Product& up, Activation activation, float limit,
                      const Workspace& workspace);

// What multiplies: "avx512-bf16", "avx512-vnni", "avx512", "avx2" or "portable", after what the compiler may use; with
// CUDA the GPU's name. Throws Error where there is no GPU.
const char* kernel_level();
