// Quotas of cgroups, in made-up trees of proc/ and sys/.
#include "host/cpus.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

namespace {

namespace fs = std::filesystem;

double cores_of(const std::map<std::string, std::string>& files) {
  std::string folder = (fs::temp_directory_path() / "cpus_test_XXXXXX").string();
  if (!mkdtemp(folder.data())) throw std::runtime_error("no folder for the test");
  for (const auto& [path, text] : files) {
    const fs::path file = fs::path(folder) / path;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  const double cores = cgroup_cores(folder);
  fs::remove_all(folder);
  return cores;
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

}  // namespace
