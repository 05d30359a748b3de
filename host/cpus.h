// cpus.h: how many threads this process has cores for.
#pragma once

#include <string>

// Cores that the cgroup quotas (v1 and v2) of this process pay for, its own group's and those of all groups above it;
// infinity where there are none. root: the folder that holds proc/ and sys/.
double cgroup_cores(const std::string& root = "/");

// Physical cores that this process may run on, within its quotas: whole ones, at least 1.
int physical_cores();
