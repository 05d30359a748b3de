// Threads and Team: what every stage relies on.
#include "kernels/threads.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "host/error.h"

namespace {

// Sizes up to 4 share the work of the same threads, and change from run to run.
TEST(Team, EachIndexOnce) {
  Threads threads(4);
  for (int round = 0; round < 20; round++) {
    for (int size : {1, 4, 2, 3}) {
      for (int n : {0, 1, 3, 100}) {
        std::vector<std::atomic<int>> shared(100), taken(100), chunks(100);
        std::atomic<int> callers{0};
        threads.run(size, [&](const Team& team) {
          callers += team.size == size;
          team.for_each(n, [&](int i) { ++shared[static_cast<size_t>(i)]; });
          team.for_each_dynamic(n, [&](int i) { ++taken[static_cast<size_t>(i)]; });
          team.for_each_dynamic(
              n, [&](int i) { ++chunks[static_cast<size_t>(i)]; }, 7);
        });
        ASSERT_EQ(callers, size);
        for (int i = 0; i < 100; i++) {
          const auto at = static_cast<size_t>(i);
          ASSERT_EQ(shared[at], i < n) << "size " << size << ", index " << i;
          ASSERT_EQ(taken[at], i < n) << "size " << size << ", index " << i;
          ASSERT_EQ(chunks[at], i < n) << "size " << size << ", index " << i;
        }
      }
    }
  }
}

// What a thread wrote before a barrier, every other one reads after it: plain integers, no atomics.
void expect_ordered(int size) {
  Threads threads(size);
  std::vector<int> written(static_cast<size_t>(size), 0);
  std::atomic<int> wrong{0};
  threads.run(size, [&](const Team& team) {
    for (int round = 1; round <= 200; round++) {
      written[static_cast<size_t>(team.rank)] = round;
      team.barrier();
      for (int value : written) wrong += value != round;
      team.barrier();
    }
  });
  EXPECT_EQ(wrong, 0) << "size " << size;
}

TEST(Team, BarrierOrdersWrites) {
  for (int size = 1; size <= 4; size++) expect_ordered(size);
}

TEST(Team, MoreThreadsThanCoresEnd) {
  expect_ordered(8);
}

TEST(Team, ExceptionReachesTheCaller) {
  Threads threads(4);
  for (int size = 1; size <= 4; size++) {
    for (int thrower = 0; thrower < size; thrower++) {
      EXPECT_THROW(threads.run(size,
                               [&](const Team& team) {
                                 if (team.rank == thrower) throw std::runtime_error("thrown");
                                 team.barrier();
                               }),
                   std::runtime_error);
      std::atomic<int> sum{0};
      threads.run(size, [&](const Team& team) { team.for_each_dynamic(10, [&](int i) { sum += i; }); });
      EXPECT_EQ(sum, 45);
    }
  }
}

#ifndef __SANITIZE_ADDRESS__  // it takes terabytes of addresses
TEST(Team, WhatCannotBeStartedIsSaidInOneLine) {
  const auto start = [] {
    const rlimit addresses{size_t{256} << 20, size_t{256} << 20};  // a thread's stack takes 8 MB of them
    setrlimit(RLIMIT_AS, &addresses);
    try {
      const Threads threads(64);
    } catch (const Error& e) {
      std::fputs(e.what(), stderr);
      std::_Exit(3);
    }
  };
  EXPECT_EXIT(start(), testing::ExitedWithCode(3), "cannot start 64 threads: .*: with -t there are fewer");
}
#endif

}  // namespace
