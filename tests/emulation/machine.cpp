#include "machine.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#endif

// Keeps the callee-saved registers on the stack and its end in *from, and goes on at `to`.
extern "C" void emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulation_switch,.-emulation_switch
.popsection
)");
constexpr int SAVED_REGISTERS = 6;
#else
#error "the emulation switches fibers on x86-64 alone"
#endif

namespace emulation {

Machine machine;
static Observer nobody;
Observer* observer = &nobody;

// --- fibers ----------------------------------------------------------------------------------------------------------

// fake_stack: AddressSanitizer's state of the side that is left, until it goes on.
static void switch_to(void** from, void** fake_stack, void* to, const void* stack, size_t stack_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, stack_bytes);
  emulation_switch(from, to);
  __sanitizer_finish_switch_fiber(*fake_stack, nullptr, nullptr);
#else
  static_cast<void>(fake_stack), static_cast<void>(stack), static_cast<void>(stack_bytes);
  emulation_switch(from, to);
#endif
}

static void to_scheduler(Fiber* me) {
  switch_to(&me->stack_pointer, &me->fake_stack, machine.scheduler, machine.scheduler_stack,
            machine.scheduler_stack_bytes);
}

static std::string describe(const Fiber& f) {
  char line[300];
  std::snprintf(line, sizeof line, "\n  block (%u, %u, %u) thread (%u, %u, %u), last at %s %s:%u", machine.block.x,
                machine.block.y, machine.block.z, f.thread.x, f.thread.y, f.thread.z, f.what, f.where.file_name(),
                f.where.line());
  return line;
}

void stop(const std::string& why) {
  machine.error = why + describe(*machine.self) + observer->line_of_access();
  for (;;) to_scheduler(machine.self);
}

// Returns once somebody has made `me` ready. The next lane of the warp that is ready goes on at once; where there is
// none, the scheduler looks for another warp.
static void wait(Fiber* me) {
  me->ready = false;
  Fiber* warp = machine.fibers + me->warp * WARP;
  while (!me->ready) {
    Fiber* next = nullptr;
    for (int i = 1; i < WARP && !next; i++) {
      Fiber* f = warp + (me->lane + i) % WARP;
      if (f->ready && !f->exited) next = f;
    }
    if (!next) {
      to_scheduler(me);
      continue;
    }
    machine.self = next;
    switch_to(&me->stack_pointer, &me->fake_stack, next->stack_pointer, next->stack, STACK_BYTES);
  }
}

// What a fiber runs: the kernel, once a block.
static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Fiber* me = machine.self;
    (*machine.kernel)();
    me->what = "its end", me->where = {};
    if (!me->copies.empty()) stop("an asynchronous copy is never waited for");
    me->exited = true;
    machine.alive--;
    wait(me);
  }
}

static void make_stack(Fiber* f, int index) {
  f->stack = machine.stacks + static_cast<size_t>(index) * STACK_BYTES;
  mprotect(f->stack, 4096, PROT_NONE);  // an overflow is a crash, not another fiber's numbers
  void** top = reinterpret_cast<void**>(f->stack + STACK_BYTES) - 3;  // aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int r = 0; r < SAVED_REGISTERS; r++) *--top = nullptr;
  f->stack_pointer = top;
}

// --- a block ---------------------------------------------------------------------------------------------------------

static bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

void meet(const char* what, Place where, uint32_t mask, void* operands, void (*compute)(void** all, uint32_t mask)) {
  const Quiet quiet;
  Fiber* me = machine.self;
  me->what = what, me->where = where;
  if (!(mask >> me->lane & 1)) stop("the mask does not name the calling lane");
  Meeting& m = machine.meetings[me->warp][std::countr_zero(mask)];
  if (m.arrived == 0) m.mask = mask, m.what = what, m.where = where;
  if (m.mask != mask || m.what != what || !same(m.where, where))
    stop("lanes of a warp have diverged: others are in " + std::string(m.what) + " at line " +
         std::to_string(m.where.line()));
  m.operands[me->lane] = operands;
  m.arrived |= 1u << me->lane;
  if (m.arrived != mask) return wait(me);
  compute(m.operands, mask);
  m.arrived = 0;
  for (int i = 0; i < WARP; i++)
    if (mask >> i & 1) machine.fibers[me->warp * WARP + i].ready = true;
}

void barrier(Place where) {
  const Quiet quiet;
  Fiber* me = machine.self;
  me->what = "__syncthreads", me->where = where;
  if (machine.at_barrier == 0) machine.barrier = where;
  if (!same(machine.barrier, where))
    stop("threads wait at different barriers: others are at line " + std::to_string(machine.barrier.line()));
  me->at_barrier = true;
  if (++machine.at_barrier < machine.n_threads) return wait(me);
  machine.at_barrier = 0;
  observer->sync_block();
  for (int i = 0; i < machine.n_threads; i++) machine.fibers[i].ready = true, machine.fibers[i].at_barrier = false;
}

static void begin_block() {
  Machine& m = machine;
  m.alive = m.n_threads, m.at_barrier = 0;
  std::memset(m.shared, 0xff, m.shared_bytes);  // NaN: what nobody wrote shows
  observer->begin_block();
  for (auto& warp : m.meetings)
    for (Meeting& meeting : warp) meeting.arrived = 0;
  for (int i = 0; i < m.n_threads; i++) {
    Fiber& f = m.fibers[i];
    const unsigned x = m.block_size.x, y = m.block_size.y, n = static_cast<unsigned>(i);
    f.thread = {n % x, n / x % y, n / x / y};
    f.index = i, f.lane = i % WARP, f.warp = i / WARP;
    f.ready = true, f.exited = f.at_barrier = false;
    f.quiet = 1;
    f.what = "its beginning", f.where = {};
    f.copies.clear(), f.copy_groups = 0;
    if (!f.stack_pointer) make_stack(&f, i);
  }
}

static void run_block() {
  Machine& m = machine;
  begin_block();
  while (m.alive > 0 && m.error.empty()) {
    bool moved = false;
    for (int i = 0; i < m.n_threads && m.error.empty(); i++) {
      Fiber& f = m.fibers[i];
      if (!f.ready || f.exited) continue;
      moved = true;
      m.self = &f;
      switch_to(&m.scheduler, &m.scheduler_fake_stack, f.stack_pointer, f.stack, STACK_BYTES);
    }
    m.self = nullptr;
    if (moved || m.alive == 0 || !m.error.empty()) continue;
    m.error = "threads wait for each other for ever:";
    for (int i = 0, shown = 0; i < m.n_threads && shown < 4; i++)
      if (i == 0 || !same(m.fibers[i].where, m.fibers[i - 1].where)) m.error += describe(m.fibers[i]), shown++;
  }
}

// --- a grid ----------------------------------------------------------------------------------------------------------

static void* map_memory(size_t bytes, int protection) {
  return mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void find_scheduler_stack() {
  thread_local void* stack = nullptr;
  thread_local size_t bytes = 0;
  if (!stack) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &bytes);
    pthread_attr_destroy(&attributes);
  }
  machine.scheduler_stack = stack, machine.scheduler_stack_bytes = bytes;
}

// Fibers that stand half-way through a kernel are dropped.
static void drop_fibers() {
  for (Fiber& f : machine.fibers) {
    f.stack_pointer = nullptr;
    f.copies = {};
  }
  ASAN_UNPOISON_MEMORY_REGION(machine.stacks, MAX_THREADS * STACK_BYTES);
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine;
  constexpr size_t RED_ZONE = 256;
  if (!m.stacks) m.stacks = static_cast<std::byte*>(map_memory(MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE));
  find_scheduler_stack();
  m.grid = grid, m.block_size = block, m.kernel = &kernel;
  m.n_threads = static_cast<int>(block.x * block.y * block.z);
  m.error.clear();
  m.shared_bytes = shared_bytes;
  m.shared = static_cast<std::byte*>(std::aligned_alloc(1024, (shared_bytes + RED_ZONE + 1023) / 1024 * 1024));
  ASAN_POISON_MEMORY_REGION(m.shared + shared_bytes, RED_ZONE);
  observer->begin_launch();
  for (unsigned z = 0; z < grid.z && m.error.empty(); z++)
    for (unsigned y = 0; y < grid.y && m.error.empty(); y++)
      for (unsigned x = 0; x < grid.x && m.error.empty(); x++) {
        m.block = {x, y, z};
        run_block();
      }
  ASAN_UNPOISON_MEMORY_REGION(m.shared + shared_bytes, RED_ZONE);
  std::free(m.shared);
  if (m.error.empty()) return;
  drop_fibers();
  throw std::runtime_error(m.error);
}

// --- device memory ---------------------------------------------------------------------------------------------------

DeviceMemory::DeviceMemory() : base_(static_cast<std::byte*>(map_memory(TOTAL, PROT_NONE))) {}

DeviceMemory& device_memory() {
  static DeviceMemory* memory = new DeviceMemory;  // for ever: what ends with the program may still free
  return *memory;
}

// An allocation, and at least half a page that is nobody's.
static size_t whole_pages(size_t bytes) {
  constexpr size_t PAGE = 4096;
  return (bytes + PAGE / 2 + PAGE - 1) / PAGE * PAGE;
}

// What was freed stays closed, to kernels too.
void DeviceMemory::open() const {
  for (const auto& [p, bytes] : live_) mprotect(p, whole_pages(bytes), PROT_READ | PROT_WRITE);
}

void DeviceMemory::close() const {
  for (const auto& [p, bytes] : live_) mprotect(p, whole_pages(bytes), PROT_NONE);
}

void* DeviceMemory::allocate(size_t bytes) {
  const size_t step = whole_pages(bytes);
  if (bytes > TOTAL || step > TOTAL - used_) return nullptr;
  std::byte* p = base_ + used_;
  used_ += step;
  live_[p] = bytes, live_bytes_ += bytes;
  ASAN_POISON_MEMORY_REGION(p + bytes, step - bytes);
  return p;
}

bool DeviceMemory::free(void* memory) {
  const auto at = live_.find(static_cast<std::byte*>(memory));
  if (at == live_.end()) return false;
  ASAN_POISON_MEMORY_REGION(memory, at->second);
  madvise(memory, at->second, MADV_DONTNEED);
  observer->free(memory, at->second);
  live_bytes_ -= at->second;
  live_.erase(at);
  found_ = found_end_ = nullptr;
  return true;
}

bool DeviceMemory::covers(const void* p) const {
  const auto* b = static_cast<const std::byte*>(p);
  return b >= base_ && b < base_ + TOTAL;
}

bool DeviceMemory::holds(const void* p, size_t bytes) const {
  const auto* b = static_cast<const std::byte*>(p);
  if (b >= found_ && b + bytes <= found_end_) return true;
  auto at = live_.upper_bound(b);
  if (at == live_.begin()) return false;
  --at;
  found_ = at->first, found_end_ = at->first + at->second;
  return b + bytes <= found_end_;
}

}  // namespace emulation
