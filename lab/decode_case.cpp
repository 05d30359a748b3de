// The step of decode of a model file, as JSON: its seconds as one graph, and with its kernels launched one by one.
// lab/gpu.py calls it on a GPU; it knows no device.
//
//     decode_case NAME.safetensors CONTEXT ...
//
// One sequence, whose cache is empty: no number changes how long a step takes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "host/error.h"
#include "host/loader.h"
#include "transformer.h"

namespace {

constexpr int STEPS = 32, REPEATS = 5;

// The last token of a context, the only one of its batch.
struct LastToken {
  const int token = 1, position, query_start[2] = {0, 1}, context_len, slot, row = 0;
  const std::vector<int> table;

  // row_length: of the block table, whose first entry alone is read.
  LastToken(int context, int row_length)
      : position(context - 1), context_len(context), slot(context - 1), table(static_cast<size_t>(row_length), 0) {}

  Batch batch() const {
    Batch b;
    b.n_tokens = b.n_sequences = b.n_logits = 1, b.max_blocks = static_cast<int>(table.size());
    b.tokens = &token, b.positions = &position, b.query_start = query_start, b.context_len = &context_len;
    b.block_table = table.data(), b.slot_mapping = &slot, b.logit_rows = &row;
    return b;
  }
};

// Steps of the same sizes are one graph from the second on; where each has a longer table than the one before, none is.
template <class Variant>
double step_seconds(Transformer<Variant, Flash, KvF16, 0>& transformer, Threads& threads, int context, bool graph) {
  double best = 1e9;
  int row_length = 1;
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < STEPS; i++) {
      const LastToken last(context, graph ? 1 : ++row_length);
      transformer.forward(last.batch(), threads, threads.most());  // which waits for the logits
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() / STEPS);
  }
  return best;
}

template <class Variant>
void measure(const Model& model, Threads& threads, const std::vector<int>& contexts) {
  Limits limits;
  limits.max_tokens = limits.max_sequences = limits.max_logits = limits.n_blocks = 1;
  limits.context = *std::max_element(contexts.begin(), contexts.end());
  limits.max_threads = threads.most();
  Transformer<Variant, Flash, KvF16, 0> transformer(model, limits);
  const char* separator = "[";
  for (const int context : contexts) {
    const double graph = step_seconds(transformer, threads, context, true);
    const double launches = step_seconds(transformer, threads, context, false);
    std::printf("%s{\"context\": %d, \"graph\": %.9f, \"launches\": %.9f}", separator, context, graph, launches);
    separator = ", ";
  }
  std::printf("]\n");
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<int> contexts;
  for (int i = 2; i < argc; i++) contexts.push_back(std::atoi(argv[i]));
  if (contexts.empty() || *std::min_element(contexts.begin(), contexts.end()) < 1)
    return std::fprintf(stderr, "usage: decode_case NAME.safetensors CONTEXT ...\n"), 2;
  Threads threads(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  const Model model = load_model(argv[1], threads);
  with_variant(model.config.attention, [&](auto v) { measure<typename decltype(v)::type>(model, threads, contexts); });
} catch (const std::exception& e) {
  return std::fprintf(stderr, "decode_case: %s\n", e.what()), 1;
}
