// gpu.h: CUDA as our kernels use it: how one is launched, how errors are reported, and the instructions that C++ has no
// words for, behind names. The only place that knows who compiles: nvcc, or the host compiler for the tests, which run
// the same .cu files without a GPU (tests/emulation/).
//
// A stage is called by every thread of the team, as on the CPU. With CUDA its first thread alone puts work on the
// device's stream, where everything happens in order; nobody waits but upload's and download's callers.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

// --- numbers: halves are kept as bits ---

__device__ inline float bits_to_float(uint32_t x) {
  return __uint_as_float(x);
}
__device__ inline uint32_t float_to_bits(float x) {
  return __float_as_uint(x);
}
__device__ inline float bf16_to_float(uint16_t x) {
  return __uint_as_float(uint32_t{x} << 16);
}
__device__ inline uint16_t float_to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
__device__ inline float f16_to_float(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ inline uint16_t float_to_f16(float x) {  // round to nearest even; what is too large becomes infinity
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// Two in a register, rounded alike.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ inline float exp2_fast(float x) {  // 2^x, to 2 units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- memory ---

// All of a vector (uint2, uint4, float4) at once; p is a multiple of its size.
template <class Vector>
__device__ Vector load_vector(const void* p) {
  return *static_cast<const Vector*>(p);
}
template <class Vector>
__device__ void store_vector(void* p, Vector value) {
  *static_cast<Vector*>(p) = value;
}

// The block's shared memory, as many bytes as the launch gave it.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts a copy of 16 or 4 bytes to shared memory; zeros where it is not valid. They are there, for the thread that
// asked, once all but the last N groups it has committed are waited for.
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- tensor cores: the fragments of a warp, as the PTX manual draws them ---

// Four 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8]
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d [16, 8] += a [16, 32] b [32, 8] of int8
__device__ inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
#include "tests/emulation/emulation.h"
#endif

#include "kernels/team.h"

constexpr uint32_t WHOLE_WARP = 0xffffffff;
__device__ inline int warp_id() {
  return static_cast<int>(threadIdx.x) / 32;
}
__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % 32;
}

// Throws Error, which says what failed, where, and what helps. device.cu
void check_cuda(cudaError_t error, const char* call, const char* file, int line);
#define CHECK_CUDA(call) check_cuda(call, #call, __FILE__, __LINE__)

// The device's one stream: what was put there first is done first. device.cu
cudaStream_t device_stream();

// How many blocks of threads, at least, work at the same time; and the bytes of shared memory that one may have.
// device.cu
int multiprocessors();
size_t shared_memory_per_block();

// Runs kernel(arguments...) on the device's stream, of the team's threads on behalf of the first. An empty grid is no
// work. shared_bytes: of dynamic_shared.
template <class... P, class... A>
void launch(const Team& team, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const A&... arguments) {
  constexpr size_t WITHOUT_ASKING = 48 << 10;
  if (team.rank != 0 || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > WITHOUT_ASKING)
    CHECK_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device_stream();
  CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
}

// Blocks of `size` that hold n.
inline unsigned blocks_of(int n, int size) {
  return static_cast<unsigned>((n + size - 1) / size);
}
