// race.cpp: checks every load and store of a kernel. A .cu file compiled with -fsanitize=thread calls a function at
// each of them; this file has these functions, linked instead of libtsan.
//
// Found: two accesses of one address, one of them a write, without what orders them (a barrier of the block, or a
// __syncwarp where both threads are of one warp; for two blocks of a launch that both count on the same address, the
// first behind a fence); shared memory that nobody wrote; what an asynchronous copy has not brought yet; addresses
// outside every allocation, misaligned, or the host's.
#include <dlfcn.h>

#include <cstdio>
#include <unordered_map>

#include "machine.h"

namespace {

using namespace emulation;

struct Access {
  int block = -1;  // serial number of the block's run; -1: none
  int block_epoch = 0, warp_epoch = 0;
  int16_t thread = 0;
  bool by_others_too = false;  // reads: several warps since the last barrier
};

// What is known of a byte.
struct Cell {
  Access write, read;
  int pending_block = -1;  // in which `pending_thread` has begun an asynchronous copy to here
  int pending_thread = 0;
};

class Race : public Observer {
 public:
  void begin_launch() override {
    launch_serial_ = serial_ + 1;
    counted_.clear();
  }
  void begin_block() override {
    serial_++;
    has_fence_ = false;
    seen_.clear();
    if (shared_.size() < machine.shared_bytes) shared_.resize(machine.shared_bytes);
  }
  void free(const void* p, size_t bytes) override {
    const auto first = reinterpret_cast<uintptr_t>(p);
    for (uintptr_t page = first / PAGE; page * PAGE < first + bytes; page++) device_.erase(page);
  }
  void sync_block() override { epoch_++; }
  void sync_warp(int warp) override { warp_epochs_[warp]++; }
  void fence() override { has_fence_ = true; }
  void atomic(const void* p, int thread) override;
  std::string line_of_access() override;

  void access(const void* p, int bytes, bool writes, int thread) override;
  void pending_copy(const void* to, int bytes, int thread) override;
  void set_caller(void* caller) { caller_ = caller; }

 private:
  Cell& device_cell(const void* p);
  Cell& shared_cell(const void* p) {
    return shared_[static_cast<size_t>(static_cast<const std::byte*>(p) - machine.shared)];
  }
  // That a thread has counted on an address, the last barrier of its block before that being `epoch`.
  struct Count {
    int block, epoch, thread;
  };
  bool ordered_by_counts(const Access& before, int thread) const;
  bool ordered(const Access& before, int thread, bool is_shared) const;
  void touch(Cell& c, bool writes, int thread, bool is_shared);

  std::vector<Cell> shared_;
  static constexpr uintptr_t PAGE = 256;
  std::unordered_map<uintptr_t, std::vector<Cell>> device_;  // [address / PAGE][PAGE]
  int serial_ = 0, launch_serial_ = 0, epoch_ = 0, warp_epochs_[WARP] = {};
  bool has_fence_ = false;                                       // this block has executed one
  std::unordered_map<const void*, std::vector<Count>> counted_;  // by blocks of this launch, behind a fence
  std::vector<std::pair<Count, Count>> seen_;                    // by this block: another's count, and its own
  void* caller_ = nullptr;                                       // of the hook: the access's place in the program
};

// A count makes what was stored before it visible to those who count later; the emulation runs blocks in order.
void Race::atomic(const void* p, int thread) {
  const Count own{serial_, epoch_, thread};
  for (const Count& other : counted_[p]) seen_.push_back({other, own});
  if (has_fence_) counted_[p].push_back(own);
}

bool Race::ordered_by_counts(const Access& before, int thread) const {
  for (const auto& [other, own] : seen_)
    if (other.block == before.block && (before.block_epoch < other.epoch || before.thread == other.thread) &&
        (own.epoch < epoch_ || own.thread == thread))
      return true;
  return false;
}

// Whether what orders threads lies between this access and one that `thread` makes now.
bool Race::ordered(const Access& before, int thread, bool is_shared) const {
  if (before.block != serial_) return is_shared || before.block < launch_serial_ || ordered_by_counts(before, thread);
  const bool same_warp = before.thread / WARP == thread / WARP;
  return before.thread == thread || before.block_epoch < epoch_ ||
         (same_warp && before.warp_epoch < warp_epochs_[thread / WARP]);
}

Cell& Race::device_cell(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  std::vector<Cell>& page = device_[address / PAGE];
  if (page.empty()) page.resize(PAGE);
  return page[address % PAGE];
}

void Race::touch(Cell& c, bool writes, int thread, bool is_shared) {
  const auto race = [&](const Access& other, const char* did) {
    stop("race: thread " + std::to_string(other.thread) + did + "here, and nothing orders it and this access");
  };
  if (c.pending_block == serial_) {
    if (!writes || c.pending_thread != thread) stop("an asynchronous copy to this address has not been waited for");
    c.pending_block = -1;
  }
  if (is_shared && !writes && c.write.block != serial_) stop("shared memory is read that nobody wrote");
  if (!ordered(c.write, thread, is_shared)) race(c.write, " wrote ");
  const bool read_now = c.read.block == serial_ && c.read.block_epoch == epoch_;
  const Access now{serial_, epoch_, warp_epochs_[thread / WARP], static_cast<int16_t>(thread), false};
  if (writes) {
    if (!ordered(c.read, thread, is_shared) || (c.read.by_others_too && read_now)) race(c.read, " read ");
    c.write = now;
  } else {
    const bool others = read_now && (c.read.by_others_too || c.read.thread / WARP != thread / WARP);
    c.read = now;
    c.read.by_others_too = others;
  }
}

// Shared memory, and a little behind it.
bool near_shared(const void* p) {
  constexpr size_t RED_ZONE = 128;
  return p >= machine.shared && p < machine.shared + machine.shared_bytes + RED_ZONE;
}

void Race::access(const void* p, int bytes, bool writes, int thread) {
  const auto* b = static_cast<const std::byte*>(p);
  if (near_shared(p)) {
    if (b + bytes > machine.shared + machine.shared_bytes) stop("past the end of dynamic shared memory");
    for (int i = 0; i < bytes; i++) touch(shared_cell(b + i), writes, thread, true);
  } else {
    if (!device_memory().holds(p, static_cast<size_t>(bytes))) stop("outside every allocation of device memory");
    for (int i = 0; i < bytes; i++) touch(device_cell(b + i), writes, thread, false);
  }
}

void Race::pending_copy(const void* to, int bytes, int thread) {
  for (int i = 0; i < bytes; i++) {
    Cell& c = shared_cell(static_cast<const std::byte*>(to) + i);
    if (!ordered(c.read, thread, true) || !ordered(c.write, thread, true))
      stop("race: an asynchronous copy overwrites what others still use");
    c.pending_block = serial_, c.pending_thread = thread;
  }
}

std::string Race::line_of_access() {
  Dl_info info;
  if (!caller_ || !dladdr(caller_, &info)) return "";
  char command[400], line[400] = "";
  std::snprintf(command, sizeof command, "addr2line -e '%s' %#tx 2>/dev/null", info.dli_fname,
                static_cast<char*>(caller_) - 1 - static_cast<char*>(info.dli_fbase));
  if (FILE* f = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, f)) line[0] = 0;
    pclose(f);
  }
  return std::string("\n  the access: ") + line;
}

Race race;
[[maybe_unused]] const bool installed = (observer = &race, true);

// A kernel's own stack, the machine's state behind threadIdx, and constants of the program: no memory of the device's.
bool is_own(const void* p, bool writes) {
  const auto* b = static_cast<const std::byte*>(p);
  const auto* m = reinterpret_cast<const std::byte*>(&machine);
  if (b >= machine.stacks && b < machine.stacks + MAX_THREADS * STACK_BYTES) return true;
  if (b >= m && b < m + sizeof machine) return true;
  Dl_info info;
  return !writes && dladdr(p, &info) != 0;
}

void seen(const void* p, size_t bytes, bool aligned, bool writes, void* caller) {
  if (!machine.self || machine.self->quiet > 0) return;
  const Quiet quiet;
  race.set_caller(caller);
  if (near_shared(p) || device_memory().covers(p)) {
    if (aligned && reinterpret_cast<uintptr_t>(p) % bytes) stop("misaligned, for " + std::to_string(bytes) + " bytes");
    race.access(p, static_cast<int>(bytes), writes, machine.self->index);
  } else if (!is_own(p, writes)) {
    stop("neither device memory nor shared memory nor the thread's own");
  }
  race.set_caller(nullptr);
}

}  // namespace

// What the compiler calls.
#define HOOK(name, parameters, bytes, aligned, writes)            \
  extern "C" void __tsan_##name parameters {                      \
    seen(p, bytes, aligned, writes, __builtin_return_address(0)); \
  }
#define HOOKS(n)                                      \
  HOOK(read##n, (void* p), n, true, false)            \
  HOOK(write##n, (void* p), n, true, true)            \
  HOOK(unaligned_read##n, (void* p), n, false, false) \
  HOOK(unaligned_write##n, (void* p), n, false, true) \
  HOOK(volatile_read##n, (void* p), n, true, false)   \
  HOOK(volatile_write##n, (void* p), n, true, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK(read_range, (void* p, size_t n), n, false, false)
HOOK(write_range, (void* p, size_t n), n, false, true)
// Atomics of the program around the kernels.
#define ATOMICS(bits)                                                                    \
  using Int##bits = int##bits##_t;                                                       \
  extern "C" Int##bits __tsan_atomic##bits##_load(const Int##bits* p, int) {             \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                         \
  }                                                                                      \
  extern "C" void __tsan_atomic##bits##_store(Int##bits* p, Int##bits x, int) {          \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                            \
  }                                                                                      \
  extern "C" Int##bits __tsan_atomic##bits##_fetch_add(Int##bits* p, Int##bits x, int) { \
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                   \
  }                                                                                      \
  extern "C" Int##bits __tsan_atomic##bits##_fetch_sub(Int##bits* p, Int##bits x, int) { \
    return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST);                                   \
  }
ATOMICS(8)
ATOMICS(32)
ATOMICS(64)
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
