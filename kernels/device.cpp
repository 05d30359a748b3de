// device.cpp: the CPU: memory from the kernel, on huge pages where it is large.
#include "kernels/device.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "host/error.h"

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t HUGE_PAGE = 2 << 20;
constexpr size_t RED_ZONE =
    64;  // past the end of every allocation: AddressSanitizer cannot see an mmap's bounds by itself

// What is mapped for an allocation of `bytes`: its red zone included, in whole pages.
size_t mapped_bytes(size_t bytes) {
  return (bytes + RED_ZONE + PAGE - 1) / PAGE * PAGE;
}

// The number after `key` at the start of a line ("MemAvailable:", "inactive_file"; "" for a file that is one
// number). False where there is no such file or line, or no number there (cgroup v2 writes "max" for no
// limit).
bool read_number(const std::string& path, const std::string& key, size_t& value) {
  std::ifstream file(path);
  std::string word;
  if (key.empty()) return static_cast<bool>(file >> value);
  while (file >> word) {
    if (word == key) return static_cast<bool>(file >> value);
    std::getline(file, word);
  }
  return false;
}

// The names that the two versions of cgroups give to the same things.
struct CgroupFiles {
  std::string root, limit, usage, inactive, active;
};
const CgroupFiles CGROUP_V1{"/sys/fs/cgroup/memory", "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                            "total_inactive_file", "total_active_file"};
const CgroupFiles CGROUP_V2{"/sys/fs/cgroup", "/memory.max", "/memory.current", "inactive_file", "active_file"};

// The least that any group from `group` up to the root can still take. The page cache that is charged to a
// group is given back when it needs the memory. A container may see its own group as the root: folders that
// are not there do not count.
size_t cgroup_available(const CgroupFiles& files, std::string group) {
  size_t available = std::numeric_limits<size_t>::max();
  for (;;) {
    const std::string folder = files.root + group;
    size_t limit = 0, usage = 0, inactive = 0, active = 0;
    if (read_number(folder + files.limit, "", limit) && read_number(folder + files.usage, "", usage)) {
      read_number(folder + "/memory.stat", files.inactive, inactive);
      read_number(folder + "/memory.stat", files.active, active);
      const size_t taken = usage - std::min(usage, inactive + active);
      available = std::min(available, limit - std::min(limit, taken));
    }
    if (group.empty()) return available;
    group.resize(group.rfind('/'));
  }
}

}  // namespace

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
  size_t available = std::numeric_limits<size_t>::max();
  if (read_number("/proc/meminfo", "MemAvailable:", available)) available *= 1024;  // it counts in kB
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path" (v2) or "5:cpu,memory:/path" (v1)
    const size_t controllers = line.find(':') + 1, path = line.find(':', controllers);
    if (path == std::string::npos) continue;
    std::string group = line.substr(path + 1);
    if (group == "/") group.clear();
    const std::string names = std::string(",").append(line, controllers, path - controllers) + ",";
    if (names == ",,") available = std::min(available, cgroup_available(CGROUP_V2, group));
    if (names.find(",memory,") != std::string::npos)
      available = std::min(available, cgroup_available(CGROUP_V1, group));
  }
  return available;
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

void device_forbid(void* memory, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(memory, bytes);
}

void device_permit(void* memory, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
}
