#include "host/cpus.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

namespace {

constexpr double NO_QUOTA = std::numeric_limits<double>::infinity();

// Version 2: "QUOTA PERIOD" in microseconds, or "max PERIOD".
double quota_v2(const std::string& folder) {
  double quota = 0, period = 0;
  std::ifstream file(folder + "/cpu.max");
  return file >> quota >> period && quota > 0 && period > 0 ? quota / period : NO_QUOTA;
}

// Version 1: a file each; a quota of -1 is none.
double quota_v1(const std::string& folder) {
  double quota = 0, period = 0;
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  return quota_file >> quota && period_file >> period && quota > 0 && period > 0 ? quota / period : NO_QUOTA;
}

// The smallest quota of the group ("/a/b") and of all above it, since each holds for the groups below.
double smallest(double (*quota)(const std::string&), const std::string& mount, std::string group) {
  double cores = quota(mount);
  for (; group.size() > 1; group.resize(group.rfind('/'))) cores = std::min(cores, quota(mount + group));
  return cores;
}

bool names_cpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

}  // namespace

double cgroup_cores(const std::string& root) {
  double cores = NO_QUOTA;
  const std::string mounts = root + "/sys/fs/cgroup";
  std::ifstream groups(root + "/proc/self/cgroup");
  // A line is "0::GROUP" for version 2, "ID:CONTROLLERS:GROUP" for version 1.
  for (std::string id, controllers, group;
       std::getline(groups, id, ':') && std::getline(groups, controllers, ':') && std::getline(groups, group);) {
    if (group.empty() || group[0] != '/') continue;
    if (id == "0" && controllers.empty()) cores = std::min(cores, smallest(quota_v2, mounts, group));
    if (!names_cpu(controllers)) continue;
    for (const std::string& mount : {std::string("/cpu"), "/" + controllers})
      cores = std::min(cores, smallest(quota_v1, mounts + mount, group));
  }
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
