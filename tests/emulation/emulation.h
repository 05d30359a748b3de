// emulation.h: CUDA C++ for a host compiler: a .cu file that includes kernels/gpu.h compiles unchanged and runs here,
// under the checks of machine.h (and race.cpp). Exactly what our kernels use is here; the CUDA programming guide and
// the PTX manual say what it means.
//
// Shared memory begins as NaN. Work on a stream waits until somebody waits for the stream:
// results read too early are not there yet. An asynchronous copy lands at its wait, as late as it may.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <tuple>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emulation::machine.self->thread)
inline const uint3& blockIdx = emulation::machine.block;
inline const dim3& blockDim = emulation::machine.block_size;
inline const dim3& gridDim = emulation::machine.grid;

using std::max, std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// --- collectives -----------------------------------------------------------------------------------------------------

// A default argument gives the place of the call.
using Place = emulation::Place;

inline void __syncthreads(Place where = Place::current()) {
  emulation::barrier(where);
}
void __syncwarp(uint32_t mask = ~0u, Place where = Place::current());
uint32_t __ballot_sync(uint32_t mask, int yes, Place where = Place::current());

namespace emulation {
// The value of lane `from` (as bits), or the lane's own where there is no such lane.
uint64_t shuffle(const char* what, Place where, uint32_t mask, uint64_t value, int from);

template <class T>
T shuffle(const char* what, Place where, uint32_t mask, T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(what, where, mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulation

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, Place where = Place::current()) {
  return emulation::shuffle("__shfl_sync", where, mask, value, from % emulation::WARP);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int with, Place where = Place::current()) {
  return emulation::shuffle("__shfl_xor_sync", where, mask, value, emulation::machine.self->lane ^ with);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, Place where = Place::current()) {
  return emulation::shuffle("__shfl_down_sync", where, mask, value, emulation::machine.self->lane + by);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, Place where = Place::current()) {
  return emulation::shuffle("__shfl_up_sync", where, mask, value, emulation::machine.self->lane - by);
}

// --- the instructions behind names in gpu.h --------------------------------------------------------------------------

inline float bf16_to_float(uint16_t x) {
  return std::bit_cast<float>(uint32_t{x} << 16);
}
inline uint16_t float_to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float f16_to_float(uint16_t x) {
  return static_cast<float>(std::bit_cast<_Float16>(x));
}
inline uint16_t float_to_f16(float x) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
inline uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low) | uint32_t{float_to_bf16(high)} << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return float_to_f16(low) | uint32_t{float_to_f16(high)} << 16;
}
inline float exp2_fast(float x) {
  return std::exp2(x);
}
inline float bits_to_float(uint32_t x) {
  return std::bit_cast<float>(x);
}
inline uint32_t float_to_bits(float x) {
  return std::bit_cast<uint32_t>(x);
}

namespace emulation {
// Stops the kernel where `bytes` at p are not aligned, or lie neither in shared nor in device memory.
void check_vector(const char* what, Place where, const void* p, size_t bytes);
}  // namespace emulation

template <class Vector>
Vector load_vector(const void* p, Place where = Place::current()) {
  emulation::check_vector("load_vector", where, p, sizeof(Vector));
  return *static_cast<const Vector*>(p);
}
template <class Vector>
void store_vector(void* p, Vector value, Place where = Place::current()) {
  emulation::check_vector("store_vector", where, p, sizeof(Vector));
  *static_cast<Vector*>(p) = value;
}

// Blocks run one after the other and fibers change at collectives alone: no other thread can come between.
template <class T>
T atomicExch(T* p, T x, Place where = Place::current()) {
  emulation::check_vector("atomicExch", where, p, sizeof(T));
  const emulation::Quiet quiet;
  return std::exchange(*p, x);
}

inline int atomicAdd(int* p, int x, Place where = Place::current()) {
  emulation::check_vector("atomicAdd", where, p, sizeof(int));
  const emulation::Quiet quiet;
  emulation::observer->atomic(p, emulation::machine.self->index);
  const int before = *p;
  *p += x;
  return before;
}
inline void __threadfence() {
  const emulation::Quiet quiet;
  emulation::observer->fence();
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place where = Place::current());
void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place where = Place::current());
void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place where = Place::current());
void ldmatrix_x4(uint32_t (&d)[4], const void* row, Place where = Place::current());
void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, Place where = Place::current());

void cp_async_16(void* to, const void* from, bool valid, Place where = Place::current());
void cp_async_4(void* to, const void* from, bool valid, Place where = Place::current());
void cp_async_commit();
namespace emulation {
void wait_for_copies(int groups_left);
}
template <int N>
void cp_async_wait() {
  emulation::wait_for_copies(N);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::machine.shared);
}

// --- the runtime -----------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorStreamCaptureUnsupported = 900,
};
const char* cudaGetErrorString(cudaError_t error);
struct cudaDeviceProp {
  char name[256] = "emulated";
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDriverGetVersion(int* version);  // there is none

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
constexpr unsigned cudaStreamNonBlocking = 1;

// What was captured, to be done any number of times with the arguments of then.
struct EmulatedGraph {
  std::vector<std::function<void()>> work;
};
using cudaGraph_t = EmulatedGraph*;
struct EmulatedGraphExec : EmulatedGraph {};
using cudaGraphExec_t = EmulatedGraphExec*;

// Work that nobody has waited for, and what went wrong where nobody could be told.
struct EmulatedStream {
  std::vector<std::function<void()>> work;
  std::exception_ptr error;
  cudaGraph_t capture = nullptr;  // where work goes instead, while it is captured
};
using cudaStream_t = EmulatedStream*;

// While a stream is captured, what would wait, or take memory, is refused, and so are copies of pageable memory.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);  // throws what a kernel did wrong, as std::runtime_error
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, size_t bytes);  // pinned: copies to it are done when the stream is waited for
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemGetInfo(size_t* available, size_t* total);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream);

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
// A small GPU, so that work that must fill one and work that does are both seen, with the shared memory of the smallest
// that we compile for, sm_120.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 4 : 99 << 10;
  return cudaSuccess;
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {
void allow_shared(const void* kernel, size_t bytes);
cudaError_t enqueue(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> call);
// How many kernels were launched so far, or captured.
int launches();
}  // namespace emulation

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  emulation::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(P...)) {
  return cudaSuccess;
}

// Arguments are kept by value, as CUDA does.
template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  const auto call = [kernel](P... own) {
    const auto on_this_stack = kernel;
    emulation::machine.self->quiet = 0;
    on_this_stack(own...);
    emulation::machine.self->quiet = 1;
  };
  return emulation::enqueue(*config, reinterpret_cast<const void*>(kernel),
                            [call, kept = std::tuple<P...>(arguments...)] { std::apply(call, kept); });
}
