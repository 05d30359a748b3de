// q4_row.h: what KV q4 makes of a row, written from its definition: the references of the tests read such rows.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

// The nearest float16 in the direction of `to`.
inline _Float16 rounded(float x, float to) {
  const _Float16 nearest = static_cast<_Float16>(x);
  const float y = static_cast<float>(nearest);
  if (y == x || (y < x) == (to < x)) return nearest;
  const int step = (to > y) == (std::bit_cast<uint16_t>(nearest) < 0x8000) ? 1 : -1;
  return std::bit_cast<_Float16>(static_cast<uint16_t>(std::bit_cast<uint16_t>(nearest) + step));
}

inline std::vector<double> q4_row(const std::vector<float>& x) {
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); i += 32) {
    const auto begin = x.begin() + static_cast<ptrdiff_t>(i), end = begin + std::min<ptrdiff_t>(32, x.end() - begin);
    const auto [least, most] = std::minmax_element(begin, end);
    const _Float16 minimum = rounded(*least, -INFINITY);
    const float range = *most - static_cast<float>(minimum);
    const _Float16 scale = rounded(range / 15, INFINITY);
    for (auto at = begin; at < end; ++at) {
      const float steps = range > 0 ? (*at - static_cast<float>(minimum)) * (1 / static_cast<float>(scale)) : 0;
      y.push_back(double(minimum) + double(scale) * std::clamp(std::nearbyint(double(steps)), 0.0, 15.0));
    }
  }
  return y;
}
