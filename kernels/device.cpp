// device.cpp: the CPU: memory from the kernel, on huge pages where it is large.
#include "kernels/device.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>

#include "host/error.h"
#include "host/machine.h"

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t HUGE_PAGE = 2 << 20;
// Past the end of every allocation: AddressSanitizer cannot see an mmap's bounds by itself.
constexpr size_t RED_ZONE = 64;

// What is mapped for an allocation of `bytes`: its red zone included, in whole pages.
size_t mapped_bytes(size_t bytes) {
  return (bytes + RED_ZONE + PAGE - 1) / PAGE * PAGE;
}

}  // namespace

const char* device_name() {
  return "cpu";
}

bool device_takes_team() {
  return true;
}

void* device_allocate(size_t bytes) {
  const bool huge = bytes >= HUGE_PAGE;
  const size_t slack = huge ? HUGE_PAGE : 0;  // the kernel aligns to small pages alone
  if (bytes > std::numeric_limits<size_t>::max() / 2) fail("cannot allocate %zu bytes: no machine has them", bytes);
  const size_t size = mapped_bytes(bytes);
  void* mapping = mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) fail("cannot allocate %.1f MB of memory: %s", double(bytes) / 1e6, strerror(errno));
  char* memory = static_cast<char*>(mapping);
  if (huge) {
    const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(memory) % HUGE_PAGE) % HUGE_PAGE;
    if (before > 0) munmap(memory, before);
    if (before < slack) munmap(memory + before + size, slack - before);
    memory += before;
    madvise(memory, size, MADV_HUGEPAGE);  // a wish: without it all works, slower
  }
  ASAN_POISON_MEMORY_REGION(memory + bytes, size - bytes);
  return memory;
}

void device_free(void* memory, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(memory, mapped_bytes(bytes));
  munmap(memory, mapped_bytes(bytes));
}

size_t device_memory_available() {
  return available_memory();
}

void upload(void* device, const void* host, size_t bytes) {
  std::memcpy(device, host, bytes);
}

void download(void* host, const void* device, size_t bytes) {
  std::memcpy(host, device, bytes);
}

void fill(void* device, int byte, size_t bytes) {
  std::memset(device, byte, bytes);
}

void synchronize() {}

void stage(void* device, size_t, const std::function<void(std::byte*)>& write) {
  write(static_cast<std::byte*>(device));
}

HostCopy::HostCopy(float* device, size_t) : device_(device) {}

void HostCopy::begin(size_t) const {}

float* HostCopy::wait() const {
  return device_;
}

void device_forbid(void* memory, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(memory, bytes);
}

void device_permit(void* memory, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
}
