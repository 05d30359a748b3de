// Quotas and limits of cgroups, in made-up trees of proc/ and sys/.
#include "host/machine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

namespace {

namespace fs = std::filesystem;

using Files = std::map<std::string, std::string>;

// ask(a folder that holds these files)
template <class Ask>
auto answer(Ask ask, const Files& files) {
  std::string folder = (fs::temp_directory_path() / "machine_test_XXXXXX").string();
  if (!mkdtemp(folder.data())) throw std::runtime_error("no folder for the test");
  for (const auto& [path, text] : files) {
    const fs::path file = fs::path(folder) / path;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  const auto result = ask(folder);
  fs::remove_all(folder);
  return result;
}
double cores_of(const Files& files) {
  return answer(cgroup_cores, files);
}
size_t memory_of(const Files& files) {
  return answer(available_memory, files);
}

TEST(Cpus, WithoutQuota) {
  EXPECT_TRUE(std::isinf(cores_of({})));
  EXPECT_TRUE(std::isinf(cores_of({{"proc/self/cgroup", "0::/a\n"}, {"sys/fs/cgroup/a/cpu.max", "max 100000\n"}})));
  EXPECT_TRUE(std::isinf(cores_of({{"proc/self/cgroup", "4:cpu,cpuacct:/a\n"},
                                   {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n"},
                                   {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"}})));
}

TEST(Cpus, Version2OwnGroupAndParents) {
  const std::string groups = "proc/self/cgroup", own = "0::/a/b\n";
  EXPECT_EQ(cores_of({{groups, own}, {"sys/fs/cgroup/a/b/cpu.max", "50000 100000\n"}}), 0.5);
  EXPECT_EQ(cores_of({{groups, own},
                      {"sys/fs/cgroup/a/b/cpu.max", "400000 100000\n"},
                      {"sys/fs/cgroup/a/cpu.max", "150000 100000\n"},
                      {"sys/fs/cgroup/other/cpu.max", "10000 100000\n"}}),
            1.5);
  EXPECT_EQ(cores_of({{groups, "0::/\n"}, {"sys/fs/cgroup/cpu.max", "200000 100000\n"}}), 2);
}

TEST(Cpus, Version1OwnGroupAndParents) {
  for (const std::string mount : {"cpu", "cpu,cpuacct"}) {
    const std::string at = "sys/fs/cgroup/" + mount;
    EXPECT_EQ(cores_of({{"proc/self/cgroup", "5:cpuset:/c\n4:cpu,cpuacct:/a/b:c\n1:name=systemd:/a\n"},
                        {at + "/a/b:c/cpu.cfs_quota_us", "300000\n"},
                        {at + "/a/b:c/cpu.cfs_period_us", "100000\n"},
                        {at + "/a/cpu.cfs_quota_us", "25000\n"},
                        {at + "/a/cpu.cfs_period_us", "50000\n"},
                        {at + "/c/cpu.cfs_quota_us", "1000\n"},
                        {at + "/c/cpu.cfs_period_us", "100000\n"}}),
              0.5);
  }
}

const std::string MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n";

TEST(Memory, WithoutLimits) {
  EXPECT_EQ(memory_of({{"proc/meminfo", MEMINFO}}), 5000u * 1024);
  EXPECT_EQ(memory_of({{"proc/meminfo", MEMINFO},
                       {"proc/self/cgroup", "0::/a\n"},
                       {"sys/fs/cgroup/a/memory.max", "max\n"},
                       {"sys/fs/cgroup/a/memory.current", "1000\n"}}),
            5000u * 1024);
}

// Of the group and those above it the least; the cache of files does not count.
TEST(Memory, OfTheOwnGroupAndParents) {
  EXPECT_EQ(memory_of({{"proc/meminfo", MEMINFO},
                       {"proc/self/cgroup", "0::/a/b\n"},
                       {"sys/fs/cgroup/a/b/memory.max", "100000\n"},
                       {"sys/fs/cgroup/a/b/memory.current", "70000\n"},
                       {"sys/fs/cgroup/a/b/memory.stat", "anon 5\ninactive_file 2000\nactive_file 300\n"},
                       {"sys/fs/cgroup/a/memory.max", "1000\n"},
                       {"sys/fs/cgroup/a/memory.current", "4000\n"},
                       {"sys/fs/cgroup/a/memory.stat", "inactive_file 3500\n"}}),
            500u);
  EXPECT_EQ(memory_of({{"proc/self/cgroup", "7:cpu,memory:/a\n6:memory_of_others:/c\n"},
                       {"sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9000\n"},
                       {"sys/fs/cgroup/memory/a/memory.usage_in_bytes", "8000\n"},
                       {"sys/fs/cgroup/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n"},
                       {"sys/fs/cgroup/memory/c/memory.limit_in_bytes", "10\n"}}),
            1500u);
  EXPECT_EQ(memory_of({{"proc/self/cgroup", "0::/\n"},
                       {"sys/fs/cgroup/memory.max", "10\n"},
                       {"sys/fs/cgroup/memory.current", "20\n"}}),
            0u);
}

}  // namespace
