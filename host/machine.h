// machine.h: what this process may take of the machine: its cgroups (v1 and v2), its own and all above it, may leave it
// fewer cores and less memory than there are.
#pragma once

#include <cstddef>
#include <string>

// Cores that the quotas pay for; infinity where there are none. root: the folder that holds proc/ and sys/.
double cgroup_cores(const std::string& root = "/");

// Physical cores that this process may run on, within its quotas: whole ones, at least 1.
int physical_cores();

// Bytes of memory that can be taken without swapping, within the limits.
size_t available_memory(const std::string& root = "/");
