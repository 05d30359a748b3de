// What the CPU's attention alone has: rows in plain memory, and scratch memory for each thread of a team.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention_world.h"

namespace {

// Rows in plain memory, a split at a time, give what attend gives for a float32 cache of the same rows.
TEST(AttendRows, SameBitsAsAttend) {
  const float sinks[] = {1, -3, 20, 0};
  for (int window : {0, 300}) {
    AttentionShape s = make_shape(4, 2, 24, 20);
    s.window = window;
    s.sinks = window > 0 ? sinks : nullptr;
    const int context = 700, first = 640, n = context - first;
    const Data d(s, {context});
    const std::vector<float> expected = attention_of<Flash, KvF32, 0>(d, {{0, first, n}}, 2);
    Batches batches(2, context, 0);
    const Batch& batch = batches.batch({{0, 0, 1}, {1, first, n}});
    const int q_width = s.n_heads * s.k_dim, out_width = s.n_heads * s.v_dim;
    std::vector<float> q(at(q_width)), out(at((n + 1) * out_width), -7);
    q.insert(q.end(), d.q[0].begin() + first * q_width, d.q[0].end());
    ScratchMemory<Flash> scratch(s, n + 1, context, 2);
    Threads(2).run(2, [&](const Team& team) {
      for (int at_token = 0; at_token < context; at_token += ATTENTION_SPLIT) {
        const PlainRows rows{d.k[0].data() + at_token * s.n_kv_heads * s.k_dim,
                             d.v[0].data() + at_token * s.n_kv_heads * s.v_dim, at_token,
                             std::min(ATTENTION_SPLIT, context - at_token)};
        Flash::attend_rows(team, q.data(), rows, batch, 1, s, out.data(), scratch.workspace);
      }
    });
    for (int i = 0; i < out_width; i++) ASSERT_EQ(out[at(i)], -7) << "sequence 0 is not ours";
    out.erase(out.begin(), out.begin() + out_width);
    expect_same_bits(out, expected, "window " + std::to_string(window));
  }
}

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
