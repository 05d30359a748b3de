// weight_list.h: the weight types in order, and what is the same for each on every device. Included behind the device's
// own structs: weight_types.h, weights_gpu.h.
#pragma once

#include <array>
#include <tuple>

#include "kernels/matmul.h"

using WeightTypes =
    std::tuple<WeightsF32, WeightsBF16, WeightsF16, WeightsQuant<Q8_0>, WeightsQuant<Q4_0>, WeightsQuant<Q4_1>,
               WeightsQuant<Q5_0>, WeightsQuant<Q5_1>, WeightsQuant<Q2_K>, WeightsQuant<Q3_K>, WeightsQuant<Q4_K>,
               WeightsQuant<Q5_K>, WeightsQuant<Q6_K>, WeightsQuant<IQ4_NL>, WeightsQuant<IQ4_XS>, WeightsQuant<MXFP4>>;

inline constexpr auto WEIGHT_FORMATS = []<class... T>(std::type_identity<std::tuple<T...>>) {
  return std::array{WeightFormat{T::NAME, T::DTYPE, T::BLOCK, T::BLOCK_ELEMENTS}...};
}(std::type_identity<WeightTypes>());

// f(std::type_identity<T>) for the type's struct T.
template <class F>
void with_type(WeightType type, F f) {
  const auto try_each = [&]<class... T>(std::type_identity<std::tuple<T...>>) {
    int index = 0;
    static_cast<void>(((index++ == static_cast<int>(type) && (f(std::type_identity<T>()), true)) || ...));
  };
  try_each(std::type_identity<WeightTypes>());
}

// Bytes of a panel with k inputs, whole lines of a cache.
template <class Type>
constexpr size_t panel_bytes(int k) {
  const int steps = (k + Type::STEP - 1) / Type::STEP;
  return (static_cast<size_t>(steps) * Type::STEP_BYTES + 63) / 64 * 64;
}
inline size_t panel_bytes(WeightType type, int k) {
  size_t bytes = 0;
  with_type(type, [&]<class T>(std::type_identity<T>) { bytes = panel_bytes<T>(k); });
  return bytes;
}
