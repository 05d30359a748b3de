// device.h: memory where the kernels run, and the errors every stage reports.
//
// device.cpp (this build's CPU) and, for DEVICE=cuda, device.cu implement it.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

// What the user did wrong or the machine lacks: one line that names the file, the field, the value and the fix. run.cpp
// prints it and ends with exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// printf-style: throw Error with the formatted line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Zero-filled memory, aligned to 64 bytes, on huge pages where it is large and the kernel allows (fewer TLB misses: the
// weights are streamed once a step). Throws Error when the memory cannot be had. Pages are touched only when used.
void* device_allocate(size_t bytes);
void device_free(void* memory, size_t bytes);

// Bytes of memory that can be taken without swapping (Linux: MemAvailable, bounded by the cgroup's limit).
size_t device_memory_available();

// An owned array in device memory, of elements that need no constructor.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n) : data_(n ? static_cast<T*>(device_allocate(n * sizeof(T))) : nullptr), size_(n) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_) device_free(data_, size_ * sizeof(T));
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};
