// tensor_cores.h: what the tests must know of the device's arithmetic.
#pragma once

#include <type_traits>

#include "attention.h"

// Whether this device's flash multiplies 16-bit numbers. It takes no float32 then, and narrows what MLA expands.
inline bool on_tensor_cores() {
  return Flash::operand_rounding<KvBF16>() > 0;
}
template <class Kernel, class Kv>
bool takes() {
  return !std::is_same_v<Kernel, Flash> || !std::is_same_v<Kv, KvF32> || !on_tensor_cores();
}
