// device.h: memory where the kernels run, and the way there and back.
//
// device.cpp (this build's CPU) and, for DEVICE=cuda, device.cu implement it. On the CPU the device's memory is the
// host's.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

// "cpu" or "cuda".
const char* device_name();
// Whether a team's threads compute a step; with CUDA the calling thread alone puts it on the device's stream.
bool device_takes_team();

// Zero-filled memory, aligned to 64 bytes, on huge pages where it is large and the kernel allows (fewer TLB misses: the
// weights are streamed once a step). Throws Error when the memory cannot be had. Pages are touched only when used.
void* device_allocate(size_t bytes);
void device_free(void* memory, size_t bytes);

// Bytes of memory that can be taken without swapping (Linux: MemAvailable, bounded by the cgroup's limit).
size_t device_memory_available();

// Bytes between host and device, in order with the kernels; `upload` and `fill` may return before they are done.
void upload(void* device, const void* host, size_t bytes);
void download(void* host, const void* device, size_t bytes);
void fill(void* device, int byte, size_t bytes);
void synchronize();  // waits for all that was begun

// Has `write` make [bytes] for the device: on the CPU in place, with CUDA in memory of the host, whence they are
// uploaded.
void stage(void* device, size_t bytes, const std::function<void(std::byte*)>& write);

// Numbers that a step computes and the host reads: on the CPU in place, with CUDA as a copy, which is part of the step.
class HostCopy {
 public:
  // device [most]; null: nothing is taken.
  HostCopy(float* device, size_t most);
  void begin(size_t n) const;  // of the first n, once what was begun is done
  // Waits for all that was begun. The numbers stay until the next copy begins, and may be changed.
  float* wait() const;

 private:
  float* device_;
  std::shared_ptr<float[]> copy_;  // null on the CPU
};

// Memory that nobody may touch for now; in a build with AddressSanitizer a touch is reported.
void device_forbid(void* memory, size_t bytes);
void device_permit(void* memory, size_t bytes);

// An owned array in device memory, of elements that need no constructor.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n)
      : memory_(n ? static_cast<T*>(device_allocate(n * sizeof(T))) : nullptr, Free{n * sizeof(T)}) {}

  T* data() { return memory_.get(); }
  const T* data() const { return memory_.get(); }
  size_t size() const { return memory_ ? memory_.get_deleter().bytes / sizeof(T) : 0; }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* memory) const { device_free(memory, bytes); }
  };
  std::unique_ptr<T[], Free> memory_;
};
