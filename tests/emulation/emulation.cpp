#include "emulation.h"

#include <stdexcept>

using namespace emulation;

// --- collectives -----------------------------------------------------------------------------------------------------

void __syncwarp(uint32_t mask, Place where) {
  meet("__syncwarp", where, mask, nullptr, [](void**, uint32_t) { observer->sync_warp(machine.self->warp); });
}

uint32_t __ballot_sync(uint32_t mask, int yes, Place where) {
  struct Vote {
    bool yes;
    uint32_t all;
  } mine{yes != 0, 0};
  meet("__ballot_sync", where, mask, &mine, [](void** lanes, uint32_t m) {
    Vote** all = reinterpret_cast<Vote**>(lanes);
    uint32_t votes = 0;
    for (int i = 0; i < WARP; i++)
      if (m >> i & 1) votes |= uint32_t{all[i]->yes} << i;
    for (int i = 0; i < WARP; i++)
      if (m >> i & 1) all[i]->all = votes;
  });
  return mine.all;
}

uint64_t emulation::shuffle(const char* what, Place where, uint32_t mask, uint64_t value, int from) {
  struct Shuffle {
    uint64_t value;
    int from;
    uint64_t result;
  } mine{value, from, value};
  meet(what, where, mask, &mine, [](void** lanes, uint32_t m) {
    Shuffle** all = reinterpret_cast<Shuffle**>(lanes);
    for (int i = 0; i < WARP; i++) {
      if (!(m >> i & 1) || all[i]->from < 0 || all[i]->from >= WARP) continue;
      if (!(m >> all[i]->from & 1)) stop("a shuffle reads a lane that the mask does not name");
      all[i]->result = all[all[i]->from]->value;
    }
  });
  return mine.result;
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

// d [16, 8] += a [16, K] b [K, 8], as fragments: lane 4 g + t holds of a the rows g and g + 8, of b and d the columns g
// and 2 t, 2 t + 1 (PTX manual, "Matrix fragments for mma.m16n8k16" and ".m16n8k32"). A register holds PER elements.
template <class T, int PER, class D, class Widen>
static void multiply_fragments(void** lanes, Widen widen) {
  constexpr int K = PER * 8;
  struct Operands {
    D* d;
    const uint32_t* a;
    uint32_t b[2];
  };
  typedef D Row __attribute__((vector_size(8 * sizeof(D))));
  Operands** all = reinterpret_cast<Operands**>(lanes);
  D a[16][K];
  Row b[K], d[16];
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4;
    const Operands& from = *all[lane];
    for (int i = 0; i < PER; i++) {
      const auto element = [&](uint32_t word) { return widen(static_cast<T>(word >> (32 / PER * i))); };
      for (int r = 0; r < 4; r++) a[g + r % 2 * 8][t * PER + i + r / 2 * (K / 2)] = element(from.a[r]);
      for (int r = 0; r < 2; r++) b[t * PER + i + r * (K / 2)][g] = element(from.b[r]);
    }
    for (int r = 0; r < 4; r++) d[g + r / 2 * 8][t * 2 + r % 2] = from.d[r];
  }
  for (int row = 0; row < 16; row++) {
    Row sum{};
    for (int k = 0; k < K; k++) sum += a[row][k] * b[k];
    d[row] += sum;
  }
  for (int lane = 0; lane < WARP; lane++)
    for (int r = 0; r < 4; r++) all[lane]->d[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

template <class D>
struct MmaOperands {
  D* d;
  const uint32_t* a;
  uint32_t b[2];
};

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place where) {
  MmaOperands<float> mine{d, a, {b0, b1}};
  meet("mma_bf16", where, ~0u, &mine,
       [](void** lanes, uint32_t) { multiply_fragments<uint16_t, 2, float>(lanes, bf16_to_float); });
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place where) {
  MmaOperands<float> mine{d, a, {b0, b1}};
  meet("mma_f16", where, ~0u, &mine,
       [](void** lanes, uint32_t) { multiply_fragments<uint16_t, 2, float>(lanes, f16_to_float); });
}

void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place where) {
  MmaOperands<int> mine{d, a, {b0, b1}};
  meet("mma_s8", where, ~0u, &mine,
       [](void** lanes, uint32_t) { multiply_fragments<int8_t, 4, int>(lanes, [](int8_t x) { return int{x}; }); });
}

// --- memory ----------------------------------------------------------------------------------------------------------

static bool in_shared(const void* p, size_t bytes) {
  const auto* b = static_cast<const std::byte*>(p);
  return b >= machine.shared && b + bytes <= machine.shared + machine.shared_bytes;
}

static void at(const char* what, Place where) {
  machine.self->what = what, machine.self->where = where;
}

void emulation::check_vector(const char* what, Place where, const void* p, size_t bytes) {
  const Quiet quiet;
  at(what, where);
  if (reinterpret_cast<uintptr_t>(p) % bytes) stop("the address is not a multiple of " + std::to_string(bytes));
  if (!in_shared(p, bytes) && !device_memory().holds(p, bytes)) stop("neither shared nor device memory");
}

static void load_matrices(const char* what, Place where, uint32_t* d, const void* row, bool transposed) {
  struct Load {
    uint32_t* d;
    const uint16_t* row;
    bool transposed;
  } mine{d, static_cast<const uint16_t*>(row), transposed};
  {
    const Quiet quiet;
    at(what, where);
    if (!in_shared(row, 16)) stop("not in shared memory");
    if (reinterpret_cast<uintptr_t>(row) % 16) stop("the address is not a multiple of 16");
    observer->access(row, 16, false, machine.self->index);
  }
  meet(what, where, ~0u, &mine, [](void** lanes, uint32_t) {
    Load** all = reinterpret_cast<Load**>(lanes);
    for (int lane = 0; lane < WARP; lane++)
      for (int matrix = 0; matrix < 4; matrix++) {
        const int g = lane / 4, k = lane % 4 * 2;
        const auto element = [&](int i) {
          return uint32_t{all[lane]->transposed ? all[matrix * 8 + k + i]->row[g] : all[matrix * 8 + g]->row[k + i]};
        };
        all[lane]->d[matrix] = element(0) | element(1) << 16;
      }
  });
}

void ldmatrix_x4(uint32_t (&d)[4], const void* row, Place where) {
  load_matrices("ldmatrix_x4", where, d, row, false);
}

void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, Place where) {
  load_matrices("ldmatrix_x4_trans", where, d, row, true);
}

template <int BYTES>
static void start_copy(const char* what, void* to, const void* from, bool valid, Place where) {
  const Quiet quiet;
  Fiber* me = machine.self;
  at(what, where);
  if (!in_shared(to, BYTES)) stop("the target is not in shared memory");
  if (reinterpret_cast<uintptr_t>(to) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES)
    stop("an address is not a multiple of its bytes");
  if (valid && !device_memory().holds(from, BYTES)) stop("the source is not in device memory");
  observer->pending_copy(to, BYTES, me->index);
  std::memset(to, 0xff, BYTES);
  me->copies.push_back(
      {static_cast<std::byte*>(to), static_cast<const std::byte*>(from), BYTES, valid ? BYTES : 0, me->copy_groups});
}

void cp_async_16(void* to, const void* from, bool valid, Place where) {
  start_copy<16>("cp_async_16", to, from, valid, where);
}

void cp_async_4(void* to, const void* from, bool valid, Place where) {
  start_copy<4>("cp_async_4", to, from, valid, where);
}

void cp_async_commit() {
  machine.self->copy_groups++;
}

void emulation::wait_for_copies(int groups_left) {
  const Quiet quiet;
  Fiber* me = machine.self;
  std::erase_if(me->copies, [&](const Copy& c) {
    if (c.group >= me->copy_groups - groups_left) return false;
    std::memset(c.to, 0, static_cast<size_t>(c.bytes));
    std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    observer->access(c.to, c.bytes, true, me->index);
    return true;
  });
}

// --- the runtime -----------------------------------------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "not emulated";
  }
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

// With device memory open to the host.
template <class F>
static void in_device_memory(F f) {
  device_memory().open();
  try {
    f();
  } catch (...) {
    device_memory().close();
    throw;
  }
  device_memory().close();
}

static std::vector<EmulatedStream*>& all_streams() {
  static auto* streams = new std::vector<EmulatedStream*>;  // as long as the program, like the memory
  return *streams;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  all_streams().push_back(*stream = new EmulatedStream);
  return cudaSuccess;
}

static void put(cudaStream_t stream, std::function<void()> work) {
  (stream->capture ? stream->capture->work : stream->work).push_back(std::move(work));
}

static bool captures() {
  return std::ranges::any_of(all_streams(), [](const EmulatedStream* s) { return s->capture != nullptr; });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream->capture) return cudaErrorStreamCaptureUnsupported;
  if (stream->error) std::rethrow_exception(std::exchange(stream->error, nullptr));
  const std::vector<std::function<void()>> work = std::exchange(stream->work, {});
  in_device_memory([&] {
    for (const auto& f : work) f();
  });
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (captures()) return cudaErrorStreamCaptureUnsupported;
  *memory = device_memory().allocate(bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

// Waits for all work first, as CUDA does. Who frees in a destructor cannot catch: the next wait throws.
cudaError_t cudaFree(void* memory) {
  if (captures()) return cudaErrorStreamCaptureUnsupported;
  for (EmulatedStream* stream : all_streams()) {
    try {
      cudaStreamSynchronize(stream);
    } catch (...) {
      stream->error = std::current_exception();
    }
  }
  return device_memory().free(memory) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = DeviceMemory::TOTAL;
  *available = DeviceMemory::TOTAL - device_memory().live_bytes();
  return cudaSuccess;
}

static std::map<const std::byte*, size_t>& pinned_memory() {
  static std::map<const std::byte*, size_t> bytes;
  return bytes;
}

static bool is_pinned(const void* p, size_t bytes) {
  const auto* start = static_cast<const std::byte*>(p);
  const auto past = pinned_memory().upper_bound(start);
  return past != pinned_memory().begin() && start + bytes <= std::prev(past)->first + std::prev(past)->second;
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  if (captures()) return cudaErrorStreamCaptureUnsupported;
  auto* made = new std::byte[bytes];
  pinned_memory()[made] = bytes;
  *memory = made;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  if (!pinned_memory().erase(static_cast<std::byte*>(memory))) return cudaErrorInvalidValue;
  delete[] static_cast<std::byte*>(memory);
  return cudaSuccess;
}

// The host's side, where it is not pinned, is read before the call returns, and written before it returns.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const void* on_device = kind == cudaMemcpyDeviceToHost ? from : to;
  if (bytes == 0) return cudaSuccess;
  if (!device_memory().holds(on_device, bytes)) return cudaErrorInvalidValue;
  if (kind == cudaMemcpyDeviceToHost && is_pinned(to, bytes)) {
    put(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
  }
  if (kind == cudaMemcpyDeviceToDevice) {
    if (!device_memory().holds(from, bytes)) return cudaErrorInvalidValue;
    put(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
  }
  if (stream->capture) return cudaErrorStreamCaptureUnsupported;
  if (kind == cudaMemcpyHostToDevice) {
    const auto* start = static_cast<const std::byte*>(from);
    stream->work.push_back(
        [to, staged = std::vector<std::byte>(start, start + bytes)] { std::memcpy(to, staged.data(), staged.size()); });
    return cudaSuccess;
  }
  const cudaError_t error = cudaStreamSynchronize(stream);
  in_device_memory([&] { std::memcpy(to, from, bytes); });
  return error;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream) {
  if (!device_memory().holds(memory, bytes)) return cudaErrorInvalidValue;
  put(stream, [=] { std::memset(memory, byte, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream->capture) return cudaErrorStreamCaptureUnsupported;
  stream->capture = new EmulatedGraph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = std::exchange(stream->capture, nullptr);
  return *graph ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = new EmulatedGraphExec{*graph};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const std::function<void()>& work : graph->work) put(stream, work);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}

// --- launches --------------------------------------------------------------------------------------------------------

static std::map<const void*, size_t>& allowed_shared() {
  static std::map<const void*, size_t> bytes;  // of kernels that asked for more than a kernel has without asking
  return bytes;
}

void emulation::allow_shared(const void* kernel, size_t bytes) {
  allowed_shared()[kernel] = bytes;
}

static int launched = 0;
int emulation::launches() {
  return launched;
}

cudaError_t emulation::enqueue(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> call) {
  constexpr size_t MOST_SHARED = 99 << 10;  // of the smallest GPU that we compile for, sm_120
  const auto found = allowed_shared().find(kernel);
  const size_t shared = found == allowed_shared().end() ? 48 << 10 : found->second;
  const dim3 g = config.gridDim, b = config.blockDim;
  if (!g.x || !g.y || !g.z || !b.x || g.y > 65535 || g.z > 65535 || b.x * b.y * b.z > MAX_THREADS ||
      b.x * b.y * b.z % WARP || config.dynamicSmemBytes > std::min(shared, MOST_SHARED))
    return cudaErrorInvalidConfiguration;
  launched++;
  put(config.stream,
      [config, call = std::move(call)] { run_grid(config.gridDim, config.blockDim, config.dynamicSmemBytes, call); });
  return cudaSuccess;
}
