// machine.h: the machine below emulation.h: it runs a grid block by block, a block's threads as fibers of one OS
// thread.
//
// A warp runs until each of its lanes waits: lanes that meet at a collective (shuffle, mma, __syncwarp) leave a pointer
// to their operands, and the last to arrive computes for all. What no GPU would do stops the kernel with an exception
// that names block, thread and line: lanes at different collectives, threads at different barriers, waits that never
// end. Device memory is one stretch of addresses that the host cannot touch while no kernel runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <source_location>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

using Place = std::source_location;

constexpr int WARP = 32, MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;  // of a fiber

// An asynchronous copy under way. It lands as late as it may: when somebody waits.
struct Copy {
  std::byte* to;
  const std::byte* from;
  int bytes, valid;  // of them, the first `valid` are copied and the rest are zeros
  int group;
};

// A thread of the block.
struct Fiber {
  void* stack_pointer = nullptr;
  std::byte* stack = nullptr;  // [STACK_BYTES]
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 thread{};
  int index = 0, lane = 0, warp = 0;
  bool ready = false, exited = true, at_barrier = false;
  int quiet = 0;          // > 0: runs the emulation's own code, whose accesses are nobody's business
  const char* what = "";  // where it waits
  Place where;
  std::vector<Copy> copies;
  int copy_groups = 0;  // committed
};

// Lanes of a mask at one collective.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* what = "";
  Place where;
  void* operands[WARP];
};

// What race.cpp looks at; nothing without it.
struct Observer {
  virtual ~Observer() = default;
  virtual void begin_launch() {}
  virtual void begin_block() {}
  virtual void access(const void* /*address*/, int /*bytes*/, bool /*writes*/, int /*thread*/) {}
  virtual void pending_copy(const void* /*to*/, int /*bytes*/, int /*thread*/) {}
  virtual void free(const void* /*memory*/, size_t /*bytes*/) {}
  virtual void sync_warp(int /*warp*/) {}
  virtual void sync_block() {}
  virtual void fence() {}  // of device memory
  virtual void atomic(const void* /*address*/, int /*thread*/) {}
  virtual std::string line_of_access() { return ""; }  // of the one that was refused
};

struct Machine {
  Fiber fibers[MAX_THREADS];
  Meeting meetings[WARP][WARP];  // [warp][first lane of the mask]
  int at_barrier = 0;            // threads
  Place barrier;
  uint3 block{};
  dim3 grid, block_size;
  int n_threads = 0, alive = 0;
  Fiber* self = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  std::byte* shared = nullptr;  // [shared_bytes]
  size_t shared_bytes = 0;
  std::byte* stacks = nullptr;  // [MAX_THREADS, STACK_BYTES]
  void* scheduler = nullptr;    // its stack pointer
  void* scheduler_fake_stack = nullptr;
  void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};
extern Machine machine;
extern Observer* observer;

// Marks what follows as the emulation's own code.
class Quiet {
 public:
  Quiet() : fiber_(machine.self) { fiber_->quiet++; }
  ~Quiet() { fiber_->quiet--; }

 private:
  Fiber* fiber_;
};

// Ends the kernel: whoever waits for it gets an exception with this reason and the place.
[[noreturn]] void stop(const std::string& why);

// Runs every block; throws std::runtime_error as stop does.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// All lanes of mask come together; compute(operands of all [WARP], mask) runs once, when the last has come.
void meet(const char* what, Place where, uint32_t mask, void* operands, void (*compute)(void** all, uint32_t mask));
void barrier(Place where);

// Device memory, one allocation after the other with a gap between them; no address is given twice.
class DeviceMemory {
 public:
  static constexpr size_t TOTAL = size_t{16} << 30;
  DeviceMemory();
  void* allocate(size_t bytes);  // null where there is no more
  bool free(void* memory);       // false: it is not an allocation
  void open() const;             // to the host
  void close() const;
  // Whether an allocation holds all these bytes.
  bool holds(const void* p, size_t bytes) const;
  bool covers(const void* p) const;  // the stretch of addresses does
  size_t live_bytes() const { return live_bytes_; }

 private:
  std::byte* base_;
  size_t used_ = 0, live_bytes_ = 0;
  std::map<std::byte*, size_t, std::less<>> live_;                   // bytes of each allocation
  mutable const std::byte *found_ = nullptr, *found_end_ = nullptr;  // the allocation that holds() saw last
};
DeviceMemory& device_memory();

}  // namespace emulation
