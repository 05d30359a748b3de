// batch.cpp: on the CPU the batch lies where it is read, and the team computes the step.
#include "kernels/batch.h"

#include "kernels/threads.h"

const Batch& DeviceBatch::upload(const Batch& host) {
  return host;
}

void DeviceBatch::run(const Batch& host, Threads& threads, int n_threads, const Stages& stages) {
  threads.run(n_threads, [&](const Team& team) { stages(team, host); });
}
