// batch.cu: a step's arrays cross the bus together, in one copy; a step of decode is one launch, of a captured graph.
#include "kernels/batch.h"

#include <utility>
#include <vector>

#include "kernels/device.h"
#include "kernels/gpu.h"

namespace {

// All that tells two steps apart besides what lies in device memory.
struct Sizes {
  int n_tokens = 0, n_sequences = 0, max_blocks = 0, n_logits = 0, n_copies = 0;
  bool operator==(const Sizes&) const = default;
};

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
template <class Pointer>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, DestroyGraph>;
using Graph = Owned<cudaGraphExec_t>;

// What f puts on the stream, as a graph; nothing of it is done.
template <class F>
Graph capture(F f) {
  cudaGraph_t captured = nullptr;
  std::exception_ptr error;
  CHECK_CUDA(cudaStreamBeginCapture(device_stream(), cudaStreamCaptureModeThreadLocal));
  try {
    f();
  } catch (...) {
    error = std::current_exception();
  }
  const cudaError_t ended = cudaStreamEndCapture(device_stream(), &captured);  // in any case, or it would go on
  const Owned<cudaGraph_t> owned(captured);
  if (error) std::rethrow_exception(error);
  check_cuda(ended, "cudaStreamEndCapture", __FILE__, __LINE__);
  cudaGraphExec_t graph = nullptr;
  CHECK_CUDA(cudaGraphInstantiate(&graph, captured, 0));
  return Graph(graph);
}

}  // namespace

struct DeviceBatch::Copy {
  Batch batch;            // its arrays lie in memory
  std::vector<int> ints;  // all arrays, one after the other, as they will lie there
  Buffer<int> memory;
  Sizes sizes;  // of the step before
  Graph graph;  // of decode steps of these sizes; null: not captured yet
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

// Hundreds of launches a token take the CPU longer than the GPU needs for what they start. In decode (a token of each
// sequence) they are the same from step to step, with the same arguments: what changes lies in device memory. So the
// second step of the same sizes is captured, as the first has loaded all the kernels, and from then on the graph is
// launched. It is captured anew when a sequence comes or goes and when the block tables' row length grows, which the
// scheduler doubles.
void DeviceBatch::run(const Batch& host, Threads&, int, const Stages& stages) {
  const Batch& batch = upload(host);
  const Sizes sizes{host.n_tokens, host.n_sequences, host.max_blocks, host.n_logits, host.n_copies};
  const bool again = std::exchange(copy_->sizes, sizes) == sizes;
  if (!again) copy_->graph.reset();
  // The expanded form of MLA launches as many products as the context has splits.
  const bool decode = host.n_tokens == host.n_sequences && mla_form_ != MlaForm::expanded;
  if (!again || !decode) return stages(Team{}, batch);
  if (!copy_->graph) copy_->graph = capture([&] { stages(Team{}, batch); });
  CHECK_CUDA(cudaGraphLaunch(copy_->graph.get(), device_stream()));
}
