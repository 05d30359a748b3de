// The number of threads on machines that are simulated, with a clock of their own: the whole run takes at most 5 %
// longer than with the best number that never changes.
#include "host/thread_count.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

namespace {

// A step's seconds with n threads, whether the kernel took a core away meanwhile, and the cores that idle beside it.
struct Machine {
  std::function<double(int n, int step)> seconds;
  std::function<int(int n, int step)> preemptions = [](int, int) { return 0; };
  std::function<double(int n, int step)> idle = [](int, int) { return 0.0; };
};

double fixed(const Machine& machine, int n, int steps) {
  double total = 0;
  for (int i = 0; i < steps; i++) total += machine.seconds(n, i);
  return total;
}

double chosen(const Machine& machine, int most, int steps, int n_tokens = 1) {
  ThreadCount count(most);
  MachineLoad load;
  load.now = 1;
  const double start = load.now;
  for (int i = 0; i < steps; i++) {
    const int n = count.next(n_tokens, load);
    EXPECT_TRUE(n >= 1 && n <= most) << n;
    const double seconds = machine.seconds(n, i);
    count.note(seconds);
    load.now += seconds;
    load.preemptions += machine.preemptions(n, i);
    load.idle_cores = machine.idle(n, i);
  }
  return load.now - start;
}

void expect_as_good_as(const Machine& machine, int best, int most, int steps, int n_tokens = 1) {
  EXPECT_LT(chosen(machine, most, steps, n_tokens), 1.05 * fixed(machine, best, steps));
}

// Two cores: two threads are faster by a half.
const Machine IDLE = {.seconds = [](int n, int) { return n == 1 ? 0.003 : 0.002; },
                      .idle = [](int n, int) { return 2.0 - n; }};
// One of them has another program: of two threads one waits for its core every sixth step.
const Machine BUSY = {.seconds = [](int n, int i) { return n == 1       ? 0.0025
                                                           : i % 6 == 0 ? 0.03
                                                                        : 0.0016; },
                      .preemptions = [](int n, int i) { return n == 1 ? 0 : 1 + i % 2; }};

TEST(ThreadCount, AnIdleMachineIsUsedWhole) {
  expect_as_good_as(IDLE, 2, 2, 256);
  expect_as_good_as(IDLE, 2, 2, 4000);
}

TEST(ThreadCount, ABusyCoreIsLeftAlone) {
  expect_as_good_as(BUSY, 1, 2, 4000);
}

TEST(ThreadCount, FollowsWhenOthersComeAndGo) {
  const auto busy = [](int i) { return i / 2000 % 2 == 1; };
  const Machine machine = {.seconds = [&](int n, int i) { return (busy(i) ? BUSY : IDLE).seconds(n, i); },
                           .preemptions = [&](int n, int i) { return busy(i) ? BUSY.preemptions(n, i) : 0; },
                           .idle = [&](int n, int i) { return busy(i) ? 0 : IDLE.idle(n, i); }};
  double best = 0;  // the better number in each part
  for (int i = 0; i < 8000; i++) best += machine.seconds(busy(i) ? 1 : 2, i);
  EXPECT_LT(chosen(machine, 2, 8000), 1.05 * best);
}

// Sixteen cores whose memory eight of them keep busy; each more costs at the barriers.
TEST(ThreadCount, FindsWhereMemoryIsTheLimit) {
  const Machine machine = {.seconds = [](int n, int) { return 0.016 / std::min(n, 8) + 0.00005 * n; },
                           .idle = [](int n, int) { return 16.0 - n; }};
  expect_as_good_as(machine, 8, 16, 4000);
}

TEST(ThreadCount, PromptsHaveTheirOwnNumber) {
  const Machine prompts = {.seconds = [](int n, int) { return 0.4 / n; }, .idle = [](int n, int) { return 2.0 - n; }};
  expect_as_good_as(prompts, 2, 2, 200, 512);
}

TEST(ThreadCount, OneCoreHasNoChoice) {
  EXPECT_NEAR(chosen(IDLE, 1, 100), fixed(IDLE, 1, 100), 1e-9);  // a hundred sums, rounded
}

TEST(MachineLoad, MovesOn) {
  const MachineLoad first = machine_load(), second = machine_load();
  EXPECT_GE(second.now, first.now);
  EXPECT_GE(second.preemptions, first.preemptions);
  EXPECT_GE(second.idle_cores, 0);
}

}  // namespace
