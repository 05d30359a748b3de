// batch.cpp: on the CPU the batch lies where it is read.
#include "kernels/batch.h"

const Batch& DeviceBatch::upload(const Batch& host) {
  return host;
}
