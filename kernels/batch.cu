// batch.cu: a step's arrays cross the bus together, in one copy.
#include "kernels/batch.h"

#include <vector>

#include "kernels/device.h"

struct DeviceBatch::Copy {
  Batch batch;            // its arrays lie in memory
  std::vector<int> ints;  // all arrays, one after the other, as they will lie there
  Buffer<int> memory;
};

const Batch& DeviceBatch::upload(const Batch& host) {
  if (!copy_) copy_ = std::make_shared<Copy>();
  Copy& c = *copy_;
  c.batch = host;
  struct Array {
    const int** pointer;
    int n;
  };
  const Array arrays[] = {{&c.batch.tokens, host.n_tokens},
                          {&c.batch.positions, host.n_tokens},
                          {&c.batch.query_start, host.n_sequences + 1},
                          {&c.batch.context_len, host.n_sequences},
                          {&c.batch.block_table, host.n_sequences * host.max_blocks},
                          {&c.batch.slot_mapping, host.n_tokens},
                          {&c.batch.logit_rows, host.n_logits},
                          {&c.batch.copy_from, host.n_copies},
                          {&c.batch.copy_to, host.n_copies}};
  c.ints.clear();
  for (const Array& a : arrays)
    if (*a.pointer) c.ints.insert(c.ints.end(), *a.pointer, *a.pointer + a.n);
  if (c.ints.size() > c.memory.size()) c.memory = Buffer<int>(2 * c.ints.size());
  if (!c.ints.empty()) ::upload(c.memory.data(), c.ints.data(), c.ints.size() * sizeof(int));
  const int* at = c.memory.data();
  for (const Array& a : arrays)
    if (*a.pointer) *a.pointer = at, at += a.n;
  return c.batch;
}
