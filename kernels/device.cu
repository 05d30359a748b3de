// device.cu: a GPU: its memory, its one stream, and what its errors mean.
#include "kernels/device.h"

#include "host/error.h"
#include "kernels/gpu.h"

// What the user can do about it.
static const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoDevice:
      return "no GPU was found; make DEVICE=cpu needs none";
    case cudaErrorInsufficientDriver:
      return "the driver is older than this CUDA: update it, or make DEVICE=cpu";
    case cudaErrorNoKernelImageForDevice:
      return "compiled for other GPUs: make CUDA_ARCH=..., see make help";
    case cudaErrorMemoryAllocation:
      return "take a smaller context, fewer sequences, or a smaller model";
    default:
      return "a fault of this program or of the machine";
  }
}

void check_cuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  fail("%s:%d: %s: %s: %s", file, line, call, cudaGetErrorString(error), advice(error));
}

cudaStream_t device_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    CHECK_CUDA(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return stream;
}

static int attribute(cudaDeviceAttr which) {
  int value = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

int multiprocessors() {
  static const int n = attribute(cudaDevAttrMultiProcessorCount);
  return n;
}

size_t shared_memory_per_block() {
  static const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return static_cast<size_t>(bytes);
}

void* device_allocate(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation)
    fail("cannot allocate %.1f MB of the GPU's memory, of which %.1f MB are free: %s", double(bytes) / 1e6,
         double(device_memory_available()) / 1e6, advice(error));
  CHECK_CUDA(error);
  fill(memory, 0, bytes);
  return memory;
}

void device_free(void* memory, size_t) {
  cudaFree(memory);  // once what uses it is done; an error is another call's, and is reported there
}

size_t device_memory_available() {
  size_t available = 0, total = 0;
  CHECK_CUDA(cudaMemGetInfo(&available, &total));
  return available;
}

void upload(void* device, const void* host, size_t bytes) {
  CHECK_CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, device_stream()));
}

void download(void* host, const void* device, size_t bytes) {
  CHECK_CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, device_stream()));
  synchronize();
}

void fill(void* device, int byte, size_t bytes) {
  CHECK_CUDA(cudaMemsetAsync(device, byte, bytes, device_stream()));
}

void synchronize() {
  CHECK_CUDA(cudaStreamSynchronize(device_stream()));
}

// The GPU has no such thing.
void device_forbid(void*, size_t) {}
void device_permit(void*, size_t) {}
