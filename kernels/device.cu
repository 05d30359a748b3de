// device.cu: a GPU: its memory, its one stream, and what its errors mean.
#include "kernels/device.h"

#include <algorithm>

#include "host/error.h"
#include "kernels/gpu.h"

// What the user can do about it.
static const char* advice(cudaError_t error) {
  int driver = 0;  // version; without a driver 0, and CUDA calls even that too old
  switch (error) {
    case cudaErrorNoDevice:
      return "no GPU is here, or CUDA_VISIBLE_DEVICES hides it: a program of make DEVICE=cpu needs none";
    case cudaErrorInsufficientDriver:
      cudaDriverGetVersion(&driver);
      return driver == 0 ? "no GPU's driver is here: a program of make DEVICE=cpu needs none"
                         : "update the GPU's driver, or take a program of make DEVICE=cpu";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "compiled for other GPUs: make CUDA_ARCH=N, N as of nvidia-smi --query-gpu=compute_cap --format=csv, "
             "without the point";
    case cudaErrorDevicesUnavailable:
      return "other processes have the GPU: wait for them, or choose another with CUDA_VISIBLE_DEVICES";
    case cudaErrorMemoryAllocation:
      return "take a smaller context (-c), fewer sequences, or a smaller model";
    default:
      return "a fault of this program, or of the GPU: please report it with this line";
  }
}

void check_cuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  fail("%s:%d: %s: %s: %s", file, line, call, cudaGetErrorString(error), advice(error));
}

static __global__ void any_kernel() {}

cudaStream_t device_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    CHECK_CUDA(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    cudaFuncAttributes attributes;
    CHECK_CUDA(cudaFuncGetAttributes(&attributes, any_kernel));  // whether this GPU has code here, before much is done
    return made;
  }();
  return stream;
}

const char* device_name() {
  return "cuda";
}

bool device_takes_team() {
  return false;
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
  check_cuda(error, "cudaMalloc", __FILE__, __LINE__);
  fill(memory, 0, bytes);
  return memory;
}

void device_free(void* memory, size_t) {
  cudaFree(memory);  // once what uses it is done; an error is another call's, and is reported there
}

size_t device_memory_available() {
  device_stream();
  constexpr size_t LEFT_TO_CUDA = size_t{128} << 20;  // for kernels and graphs, which it loads at their first use
  size_t available = 0, total = 0;
  CHECK_CUDA(cudaMemGetInfo(&available, &total));
  return available - std::min(available, LEFT_TO_CUDA);
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

void stage(void* device, size_t bytes, const std::function<void(std::byte*)>& write) {
  const auto host = std::make_unique_for_overwrite<std::byte[]>(bytes);
  write(host.get());
  upload(device, host.get(), bytes);
  synchronize();
}

// Pinned: a copy to any other memory would not be a piece of the stream like the kernels.
HostCopy::HostCopy(float* device, size_t most) : device_(device) {
  if (!device) return;
  void* memory = nullptr;
  CHECK_CUDA(cudaMallocHost(&memory, most * sizeof(float)));
  copy_ = {static_cast<float*>(memory), [](float* p) { cudaFreeHost(p); }};
}

void HostCopy::begin(size_t n) const {
  CHECK_CUDA(cudaMemcpyAsync(copy_.get(), device_, n * sizeof(float), cudaMemcpyDeviceToHost, device_stream()));
}

float* HostCopy::wait() const {
  synchronize();
  return copy_.get();
}

// The GPU has no such thing.
void device_forbid(void*, size_t) {}
void device_permit(void*, size_t) {}
