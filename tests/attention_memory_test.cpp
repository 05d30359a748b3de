// What the CPU's attention alone has: scratch memory for each thread of a team.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention_world.h"

namespace {

// Scratch memory that was planned for a smaller team is refused, on every thread, before anything is written.
template <class Kernel>
void expect_team_refused(int planned, int used) {
  const Data d(make_shape(4, 2, 24, 20), {40});
  World<KvF16, 16> world(d);
  EXPECT_THROW(world.template step<Kernel>({{0, 0, 40}}, used, planned), Error) << Kernel::name;
  for (float x : world.out) ASSERT_EQ(x, -7) << Kernel::name;
  EXPECT_NO_THROW(world.template step<Kernel>({{0, 0, 40}}, planned, planned)) << Kernel::name;
}

TEST(AttentionMemory, ALargerTeamThanPlannedIsRefused) {
  expect_team_refused<Naive>(1, 2);
  expect_team_refused<Naive>(2, 3);
  expect_team_refused<Flash>(1, 2);
  expect_team_refused<Flash>(2, 3);
}

TEST(AttendRows, ALargerTeamThanPlannedIsRefused) {
  const AttentionShape s = make_shape(4, 2, 24, 20);
  Batches batches(1, 1, 0);
  const Batch& batch = batches.batch({{0, 0, 1}});
  const std::vector<float> q(at(4 * 24)), k(at(2 * 24)), v(at(2 * 20));
  std::vector<float> out(at(4 * 20), -7);
  ScratchMemory<Flash> scratch(s, 1, 1, 1);
  Threads threads(2);
  const PlainRows rows{k.data(), v.data(), 0, 1};
  const Workspace& w = scratch.workspace;
  EXPECT_THROW(
      threads.run(2, [&](const Team& t) { Flash::attend_rows(t, q.data(), rows, batch, 0, s, out.data(), w); }), Error);
  for (float x : out) ASSERT_EQ(x, -7);
}

}  // namespace
