// probe_matmul.h: how fast products are, on any device; probe.cpp and probe.cu choose the shape.
#pragma once

#include "cli/probe.h"
#include "kernels/step.h"

// FLOP/s of a team of `size` threads that multiplies `rows` rows by a matrix [n, k].
inline double matmul_speed(Threads& threads, int size, WeightType type, int n, int k, int rows) {
  const Buffer<std::byte> weights(packed_bytes(type, n, k));
  Linear linear;
  linear.weight = {type, n, k, 1, weights.data()};
  Buffer<float> x(area(rows, k)), y(area(rows, n));
  Workspace workspace;
  workspace.plan(matmul_workspace_bytes(rows, k));
  Arena scratch(bytes_of([&](Arena& arena) { workspace.allocate(arena); }));
  workspace.allocate(scratch);
  const Product p = product(linear, x.data(), rows, y.data());
  const int times = std::max(1, 64 / rows);  // one after the other, or starting the team would take a part of the time
  const double seconds = median_seconds(threads, size, [&](const Team& team) {
    for (int i = 0; i < times; i++) matmul(team, &p, 1, workspace);
  });
  return 2.0 * n * k * rows * times / seconds;
}
