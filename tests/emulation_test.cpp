// The emulation's own test: each kind of fault that a kernel can have must be found, with its place, and what is right
// must pass. Compiled with -fsanitize=thread and linked with tests/emulation/race.cpp.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "host/error.h"
#include "kernels/device.h"
#include "kernels/gpu.h"

namespace {

constexpr unsigned THREADS = 64;
constexpr size_t SHARED_BYTES = 256;  // an int a thread

int index() {
  return static_cast<int>(threadIdx.x);
}

// What went wrong in kernel(ints), which are [THREADS] and 0; "" where nothing did.
std::string fault(void (*kernel)(int*), int* ints, unsigned grid = 1) {
  try {
    launch(Team{}, kernel, grid, THREADS, SHARED_BYTES, ints);
    synchronize();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

std::string fault(void (*kernel)(int*), unsigned grid = 1) {
  Buffer<int> ints(THREADS);
  return fault(kernel, ints.data(), grid);
}

#define EXPECT_FAULT(found, reason) EXPECT_NE((found).find(reason), std::string::npos) << "found: " << (found)

// --- collectives -----------------------------------------------------------------------------------------------------

__global__ void different_barriers(int* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    x[0] = 1;
    __syncthreads();
  }
}
__global__ void barrier_of_some(int*) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void missing_lane(int*) {
  if (threadIdx.x != 5) __syncwarp();
}
__global__ void diverged_shuffle(int* x) {
  if (threadIdx.x % 2)
    x[index()] = __shfl_xor_sync(WHOLE_WARP, 1, 1);
  else
    x[index()] = __shfl_xor_sync(WHOLE_WARP, 2, 1);
}
__global__ void shuffle_outside_mask(int* x) {
  if (threadIdx.x % 32 < 16) x[index()] = __shfl_sync(0xffff, 1, 20);
}

TEST(Emulation, FindsFaultsOfCollectives) {
  EXPECT_FAULT(fault(different_barriers), "different barriers");
  EXPECT_FAULT(fault(barrier_of_some), "for ever");
  EXPECT_FAULT(fault(missing_lane), "for ever");
  EXPECT_FAULT(fault(diverged_shuffle), "diverged");
  EXPECT_FAULT(fault(shuffle_outside_mask), "does not name");
}

// --- races -----------------------------------------------------------------------------------------------------------

template <int Distance>
__global__ void neighbour_without_order(int* x) {
  int* s = dynamic_shared<int>();
  s[index()] = 0;
  __syncthreads();
  s[index()] = index();
  x[index()] = s[index() ^ Distance];
}
__global__ void write_after_read(int* x) {
  int* s = dynamic_shared<int>();
  s[index()] = 1;
  __syncthreads();
  x[index()] = s[index() ^ 32];
  s[index()] = 2;
}
__global__ void write_after_many_reads(int* x) {
  int* s = dynamic_shared<int>();
  s[index()] = 1;
  __syncthreads();
  x[index()] = s[0];
  __syncwarp();
  if (threadIdx.x == 63) s[0] = 2;  // its own warp has read, but the other one too
}
__global__ void one_address_for_two_blocks(int* x) {
  x[index()] = static_cast<int>(blockIdx.x);
}
// The last block adds up what all have stored.
template <bool FENCE, bool BARRIER, bool COUNT>
__global__ void last_block_sums(int* x) {
  int* is_last = dynamic_shared<int>();
  if (threadIdx.x < 8) x[1 + blockIdx.x * 8 + threadIdx.x] = 1;
  if (FENCE) __threadfence();
  if (BARRIER) __syncthreads();
  if (threadIdx.x == 32) *is_last = COUNT ? atomicAdd(x, 1) == 1 : blockIdx.x == 1;
  __syncthreads();
  if (!*is_last || threadIdx.x > 0) return;
  int sum = 0;
  for (int i = 1; i < 17; i++) sum += x[i];
  x[17] = sum;
}
__global__ void one_address_for_two_threads(int* x) {
  x[index() / 2] = 1;
}

TEST(Emulation, FindsRaces) {
  EXPECT_FAULT(fault(neighbour_without_order<32>), "race");
  EXPECT_FAULT(fault(neighbour_without_order<1>), "race");
  EXPECT_FAULT(fault(write_after_read), "race");
  EXPECT_FAULT(fault(write_after_many_reads), "race");
  EXPECT_FAULT(fault(one_address_for_two_threads), "race");
  EXPECT_FAULT(fault(one_address_for_two_blocks, 2), "race");
  EXPECT_EQ(fault(one_address_for_two_blocks, 1), "");
  EXPECT_EQ(fault(last_block_sums<true, true, true>, 2), "");
  EXPECT_FAULT(fault(last_block_sums<false, true, true>, 2), "race");
  EXPECT_FAULT(fault(last_block_sums<true, false, true>, 2), "race");
  EXPECT_FAULT(fault(last_block_sums<true, true, false>, 2), "race");
}

// --- memory ----------------------------------------------------------------------------------------------------------

__global__ void unwritten_shared(int* x) {
  int* s = dynamic_shared<int>();
  if (threadIdx.x < 60) s[index()] = 1;
  __syncthreads();
  x[index()] = s[index()];
}
__global__ void past_shared(int*) {
  dynamic_shared<int>()[index() + 1] = 1;
}
__global__ void past_the_allocation(int* x) {
  x[index() + 1] = 1;
}
__global__ void write_own(int* x) {
  x[index()] = 1;
}
int variable_of_the_host = 0;
__global__ void write_variable_of_the_host(int*) {
  variable_of_the_host = index();
}
__global__ void misaligned_vector(int* x) {
  const float4 f = load_vector<float4>(x + index() % 4 * 3);
  if (f.x < 0) x[0] = 1;
}
__global__ void misaligned_number(int* x) {
  *reinterpret_cast<int*>(reinterpret_cast<char*>(x) + 2) = 1;
}

TEST(Emulation, FindsFaultsOfAddresses) {
  EXPECT_FAULT(fault(unwritten_shared), "nobody wrote");
  EXPECT_FAULT(fault(past_shared), "past the end of dynamic shared memory");
  EXPECT_FAULT(fault(past_the_allocation), "outside every allocation");
  std::vector<int> host(THREADS);
  EXPECT_FAULT(fault(write_own, host.data()), "neither device memory");
  EXPECT_FAULT(fault(write_variable_of_the_host), "neither device memory");
  EXPECT_EQ(variable_of_the_host, 0);
  EXPECT_FAULT(fault(misaligned_vector), "not a multiple of 16");
  EXPECT_FAULT(fault(misaligned_number), "misaligned");
  Buffer<int> given_back(THREADS);
  int* ints = given_back.data();
  given_back = Buffer<int>();
  EXPECT_FAULT(fault(write_own, ints), "outside every allocation");
}

// The access is named by file and line.
TEST(Emulation, NamesThePlace) {
  EXPECT_FAULT(fault(past_the_allocation), "emulation_test.cpp:");
  EXPECT_FAULT(fault(different_barriers), "emulation_test.cpp:");
}

TEST(EmulationDeathTest, TheHostCannotTouchDeviceMemory) {
  const Buffer<int> ints(1);
  synchronize();
  EXPECT_DEATH(std::printf("%d\n", *ints.data()), "");
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

// 256 bytes through shared memory.
template <bool Waits, bool Barrier>
__global__ void copy_through_shared(int* x) {
  int* s = dynamic_shared<int>();
  if (threadIdx.x < 16) cp_async_16(s + index() * 4, x + index() * 4, true);
  cp_async_commit();
  if (Waits) cp_async_wait<0>();
  if (Barrier) __syncthreads();
  x[index()] = s[index()] + 1;
  cp_async_wait<0>();
}
__global__ void never_waits(int* x) {
  if (threadIdx.x < 16) cp_async_16(dynamic_shared<int>() + index() * 4, x + index() * 4, true);
  cp_async_commit();
}
__global__ void waits_for_too_few(int* x) {
  int* s = dynamic_shared<int>();
  if (threadIdx.x < 16) cp_async_16(s + index() * 4, x + index() * 4, true);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  x[index()] = s[index()];
  cp_async_wait<0>();
}
__global__ void copies_over_what_is_read(int* x) {
  int* s = dynamic_shared<int>();
  s[index()] = 0;
  __syncthreads();
  x[index()] = s[index() ^ 32];
  if (threadIdx.x < 16) cp_async_16(s + index() * 4, x + index() * 4, true);
  cp_async_commit();
  cp_async_wait<0>();
}

TEST(Emulation, FindsFaultsOfAsynchronousCopies) {
  EXPECT_FAULT(fault(copy_through_shared<false, true>), "has not been waited for");
  EXPECT_FAULT(fault(copy_through_shared<true, false>), "race");
  EXPECT_FAULT(fault(never_waits), "never waited for");
  EXPECT_FAULT(fault(waits_for_too_few), "has not been waited for");
  EXPECT_FAULT(fault(copies_over_what_is_read), "race");
  EXPECT_EQ(fault(copy_through_shared<true, true>), "");
}

// --- what is right passes, and means what CUDA says ------------------------------------------------------------------

__global__ void sum_of_a_block(int* x) {
  int* s = dynamic_shared<int>();
  int sum = index();
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, by);
  if (threadIdx.x % 32 == 0) s[index() / 32] = sum;
  __syncthreads();
  x[index()] = s[0] + s[1];
}

TEST(Emulation, ASumOverABlock) {
  Buffer<int> ints(THREADS);
  EXPECT_EQ(fault(sum_of_a_block, ints.data()), "");
  std::vector<int> host(THREADS);
  download(host.data(), ints.data(), THREADS * sizeof(int));
  EXPECT_EQ(host, std::vector<int>(THREADS, 63 * 64 / 2));
}

// Rows of A are one-hot: row r of A B is row (5 r) % K of B.
__global__ void multiply_bf16(float* d) {
  const int lane = index(), g = lane / 4, t = lane % 4 * 2;
  const auto a_at = [](int row, int k) { return k == 5 * row % 16 ? 1.0f : 0.0f; };
  const auto b_at = [](int k, int column) { return static_cast<float>(k * 8 + column); };
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; r++) {
    const int row = g + r % 2 * 8, k = t + r / 2 * 8;
    a[r] = pack_bf16(a_at(row, k), a_at(row, k + 1));
  }
  for (int r = 0; r < 2; r++) b[r] = pack_bf16(b_at(t + r * 8, g), b_at(t + 1 + r * 8, g));
  float sum[4] = {1, 1, 1, 1};
  mma_bf16(sum, a, b[0], b[1]);
  for (int r = 0; r < 4; r++) d[(g + r / 2 * 8) * 8 + t + r % 2] = sum[r];
}
__global__ void multiply_s8(float* d) {
  const int lane = index(), g = lane / 4, t = lane % 4;
  uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < 4; i++) {
    for (int r = 0; r < 4; r++)
      a[r] |= uint32_t{t * 4 + i + r / 2 * 16 == 5 * (g + r % 2 * 8) % 32 ? 0xffu : 0} << 8 * i;  // -1
    for (int r = 0; r < 2; r++) b[r] |= static_cast<uint32_t>((t * 4 + i + r * 16) * 3 + g) << 8 * i;
  }
  int sum[4] = {};
  mma_s8(sum, a, b[0], b[1]);
  for (int r = 0; r < 4; r++) d[(g + r / 2 * 8) * 8 + t * 2 + r % 2] = static_cast<float>(sum[r]);
}

std::vector<float> product(void (*kernel)(float*)) {
  Buffer<float> d(16 * 8);
  launch(Team{}, kernel, 1, 32, 0, d.data());
  std::vector<float> host(d.size());
  download(host.data(), d.data(), host.size() * sizeof(float));
  return host;
}

TEST(Emulation, MatrixProducts) {
  const std::vector<float> bf16 = product(multiply_bf16), s8 = product(multiply_s8);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++) {
      const auto at = static_cast<size_t>(row * 8 + column);
      EXPECT_EQ(bf16[at], static_cast<float>(5 * row % 16 * 8 + column + 1));
      EXPECT_EQ(s8[at], static_cast<float>(-(5 * row % 32 * 3 + column)));
    }
}

// --- launches --------------------------------------------------------------------------------------------------------

TEST(Emulation, LaunchesThatNoGpuTakes) {
  EXPECT_THROW(launch(Team{}, write_own, 1, 33, 0, nullptr), Error) << "no whole warps";
  EXPECT_THROW(launch(Team{}, write_own, 1, 2048, 0, nullptr), Error) << "too many threads";
  EXPECT_THROW(launch(Team{}, write_own, 1, 32, 200 << 10, nullptr), Error) << "too much shared memory";
  EXPECT_NO_THROW(launch(Team{}, write_own, 0, 32, 0, nullptr)) << "an empty grid is no work";
}

// Nothing is done before somebody waits, and then in order.
TEST(Emulation, WorkWaitsOnItsStream) {
  Buffer<int> ints(THREADS);
  std::vector<int> host(THREADS, 5);
  upload(ints.data(), host.data(), THREADS * sizeof(int));
  host.assign(THREADS, 7);  // upload has read it
  fill(ints.data(), 0, sizeof(int));
  download(host.data(), ints.data(), THREADS * sizeof(int));
  EXPECT_EQ(host[0], 0);
  EXPECT_EQ(host[1], 5);
}

// --- graphs ----------------------------------------------------------------------------------------------------------

__global__ void add_first(const int* from, int* to) {
  to[threadIdx.x] += from[0];
}

// A graph is done as often as it is launched, with what memory holds then and the arguments of when it was captured.
TEST(Emulation, GraphsReadMemoryAnew) {
  Buffer<int> from(1), to(THREADS);
  const auto set = [&](int x) { upload(from.data(), &x, sizeof x); };
  set(1);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CHECK_CUDA(cudaStreamBeginCapture(device_stream(), cudaStreamCaptureModeThreadLocal));
  launch(Team{}, add_first, 1, THREADS, 0, from.data(), to.data());
  CHECK_CUDA(cudaStreamEndCapture(device_stream(), &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  CHECK_CUDA(cudaGraphDestroy(graph));
  for (const int x : {10, 100}) {
    set(x);
    CHECK_CUDA(cudaGraphLaunch(exec, device_stream()));
  }
  int sum = 0;
  download(&sum, to.data() + THREADS - 1, sizeof sum);
  EXPECT_EQ(sum, 110) << "10 and 100; not 1, which was only captured";
  CHECK_CUDA(cudaGraphExecDestroy(exec));
}

TEST(Emulation, CaptureRefusesWhatWaits) {
  Buffer<int> ints(1);
  int x = 0;
  cudaGraph_t graph = nullptr;
  CHECK_CUDA(cudaStreamBeginCapture(device_stream(), cudaStreamCaptureModeThreadLocal));
  EXPECT_THROW(synchronize(), Error);
  EXPECT_THROW(download(&x, ints.data(), sizeof x), Error);
  EXPECT_THROW(Buffer<int>(1), Error);
  CHECK_CUDA(cudaStreamEndCapture(device_stream(), &graph));
  CHECK_CUDA(cudaGraphDestroy(graph));
}

// --- errors ----------------------------------------------------------------------------------------------------------

TEST(Cuda, ErrorsSayWhereAndWhatHelps) {
  const auto line = [](cudaError_t error) -> std::string {
    try {
      check_cuda(error, "cudaCall(x)", "file.cu", 7);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(line(cudaSuccess), "");
  const std::pair<cudaError_t, const char*> helps[] = {{cudaErrorNoDevice, "make DEVICE=cpu"},
                                                       {cudaErrorInsufficientDriver, "make DEVICE=cpu"},
                                                       {cudaErrorNoKernelImageForDevice, "make CUDA_ARCH="},
                                                       {cudaErrorInvalidDeviceFunction, "make CUDA_ARCH="},
                                                       {cudaErrorDevicesUnavailable, "CUDA_VISIBLE_DEVICES"},
                                                       {cudaErrorMemoryAllocation, "-c"},
                                                       {cudaErrorInvalidValue, "report"}};
  for (const auto& [error, help] : helps) {
    EXPECT_EQ(line(error).find("file.cu:7: cudaCall(x): "), 0u) << line(error);
    EXPECT_FAULT(line(error), help);
  }
  std::string too_much;
  try {
    device_allocate(size_t{1} << 45);
  } catch (const Error& e) {
    too_much = e.what();
  }
  EXPECT_FAULT(too_much, "35184372.1 MB");
  EXPECT_FAULT(too_much, "are free");
}

}  // namespace
