#include "host/machine.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <set>

namespace {

// f(folder, version) of the group that `controller` holds this process in, and of all groups above it, since what they
// have holds for the groups below. A container may see its own group as the root: folders may be missing.
template <class F>
void for_each_group(const std::string& root, const std::string& controller, F f) {
  std::ifstream groups(root + "/proc/self/cgroup");
  // A line is "0::GROUP" for version 2, "ID:CONTROLLERS:GROUP" for version 1.
  for (std::string id, controllers, group;
       std::getline(groups, id, ':') && std::getline(groups, controllers, ':') && std::getline(groups, group);) {
    const bool version_2 = id == "0" && controllers.empty();
    const bool held = ("," + controllers + ",").find("," + controller + ",") != std::string::npos;
    if (group.empty() || group[0] != '/' || !(version_2 || held)) continue;
    for (const std::string& mount : {"/" + controller, "/" + controllers}) {
      const std::string top = root + "/sys/fs/cgroup" + (version_2 ? "" : mount);
      for (std::string at = group; !at.empty(); at.resize(at.rfind('/'))) f(top + at, version_2 ? 2 : 1);
      f(top, version_2 ? 2 : 1);
    }
  }
}

// The number after `key` at the start of a line; the first in the file where there is no key. 0: there is none
// (version 2 writes "max" where nothing is limited).
template <class Number>
Number read_number(const std::string& path, const std::string& key = "") {
  std::ifstream file(path);
  Number number = 0;
  if (key.empty()) return file >> number ? number : 0;
  for (std::string word; file >> word; std::getline(file, word))
    if (word == key) return file >> number ? number : 0;
  return 0;
}

double cores_of_group(const std::string& folder, int version) {
  double quota = 0, period = 0;
  if (version == 2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;  // "QUOTA PERIOD", or "max PERIOD"
  } else {
    quota = read_number<double>(folder + "/cpu.cfs_quota_us");  // -1: none
    period = read_number<double>(folder + "/cpu.cfs_period_us");
  }
  return quota > 0 && period > 0 ? quota / period : std::numeric_limits<double>::infinity();
}

// The page cache that is charged to a group is given back when it needs the memory.
size_t memory_of_group(const std::string& folder, int version) {
  const bool v2 = version == 2;
  const auto limit = read_number<size_t>(folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
  const auto usage = read_number<size_t>(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
  if (limit == 0) return std::numeric_limits<size_t>::max();
  const std::string statistics = folder + "/memory.stat", total = v2 ? "" : "total_";
  const size_t cached =
      read_number<size_t>(statistics, total + "inactive_file") + read_number<size_t>(statistics, total + "active_file");
  const size_t taken = usage - std::min(usage, cached);
  return limit - std::min(limit, taken);
}

}  // namespace

double cgroup_cores(const std::string& root) {
  double cores = std::numeric_limits<double>::infinity();
  for_each_group(root, "cpu", [&](const std::string& folder, int version) {
    cores = std::min(cores, cores_of_group(folder, version));
  });
  return cores;
}

int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(static_cast<size_t>(cpu), &allowed)) continue;
    std::ifstream siblings("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string list = std::to_string(cpu);
    std::getline(siblings, list);
    cores.insert(list);
  }
  return std::max(1, static_cast<int>(std::min(static_cast<double>(cores.size()), cgroup_cores())));
}

size_t available_memory(const std::string& root) {
  const auto free_kb = read_number<size_t>(root + "/proc/meminfo", "MemAvailable:");
  size_t bytes = free_kb ? free_kb * 1024 : std::numeric_limits<size_t>::max();
  for_each_group(root, "memory", [&](const std::string& folder, int version) {
    bytes = std::min(bytes, memory_of_group(folder, version));
  });
  return bytes;
}
