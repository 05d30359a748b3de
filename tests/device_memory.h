// device_memory.h: how the tests hand a stage its operands and see what it made of them. On the CPU these are copies
// from memory to memory; on a GPU (or an emulated one) the host cannot touch what the stages work on.
#pragma once

#include <vector>

#include "kernels/device.h"

template <class T>
Buffer<T> device_copy(const std::vector<T>& x) {
  Buffer<T> copy(x.size());
  if (!x.empty()) upload(copy.data(), x.data(), x.size() * sizeof(T));
  return copy;
}

// Once all that was begun is done.
template <class T>
std::vector<T> host_copy(const Buffer<T>& x) {
  std::vector<T> copy(x.size());
  if (!copy.empty()) download(copy.data(), x.data(), copy.size() * sizeof(T));
  return copy;
}
