// What paging costs one sequence: the same tokens decoded from a contiguous and from a paged cache, a step of each in
// turn within one process, so that a machine that slows down slows both. Paged once with the blocks as the pool hands
// them out to a sequence that is alone, and once in a shuffled order, as after a long time of many sequences. Prints
// JSON: the median of the steps/s, and of the ratios to the contiguous cache's step beside it.
//
//     make build/test/native/paging_bench && build/test/native/paging_bench MODEL.safetensors [context] [steps]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "host/engine.h"
#include "host/loader.h"
#include "transformer.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Side {
  const char* name;
  std::unique_ptr<Engine> engine;
  std::vector<double> seconds = {};  // of each step
};

Limits limits_of(int context, int n_blocks, int n_threads) {
  Limits l;
  l.max_tokens = 512;
  l.max_sequences = l.max_logits = 1;
  l.context = context;
  l.n_blocks = n_blocks;
  l.max_threads = n_threads;
  return l;
}

template <int Block>
Side side(const char* name, const Model& model, Threads& threads, int context, bool shuffled) {
  const int block_size = Block ? Block : context, n_blocks = (context + block_size - 1) / block_size;
  const Limits limits = limits_of(context, n_blocks, threads.most());
  const auto transformer = std::make_shared<Transformer<Gqa, Flash, KvF16, Block>>(model, limits);
  std::vector<int> place(static_cast<size_t>(n_blocks));
  std::iota(place.begin(), place.end(), 0);
  if (shuffled) std::shuffle(place.begin(), place.end(), std::mt19937(1));
  const auto forward = [=, &threads](const Batch& batch, int n_threads) {
    std::vector<int> table(batch.block_table, batch.block_table + batch.max_blocks);
    std::vector<int> slots(batch.slot_mapping, batch.slot_mapping + batch.n_tokens);
    for (int& block : table)
      if (block >= 0) block = place[static_cast<size_t>(block)];
    for (int& slot : slots) slot = place[static_cast<size_t>(slot / block_size)] * block_size + slot % block_size;
    Batch moved = batch;
    moved.block_table = table.data(), moved.slot_mapping = slots.data();
    return transformer->forward(moved, threads, n_threads);
  };
  return {name, std::make_unique<Engine>(forward, threads, limits, block_size, model.config.vocab_size, 0)};
}

void begin(Side& side, const std::vector<int>& prompt, int steps) {
  Request request;
  request.prompt = prompt;
  request.n = steps + 1;
  side.engine->submit(std::move(request));
  while (side.engine->stats().generated_tokens == 0) side.engine->step();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s MODEL.safetensors [context] [steps]\n", argv[0]);
    return 2;
  }
  const int n_prompt = argc > 2 ? std::atoi(argv[2]) : 4096, steps = argc > 3 ? std::atoi(argv[3]) : 512;
  Threads threads(static_cast<int>(std::thread::hardware_concurrency()));
  const Model model = load_model(argv[1], threads);
  const int context = n_prompt + steps + 1;
  Side sides[] = {side<0>("contiguous", model, threads, context, false),
                  side<16>("paged", model, threads, context, false),
                  side<16>("shuffled", model, threads, context, true)};
  std::vector<int> prompt(static_cast<size_t>(n_prompt));
  std::mt19937 random(1);
  for (int& id : prompt) id = static_cast<int>(random() % static_cast<unsigned>(model.config.vocab_size));
  for (Side& s : sides) begin(s, prompt, steps);
  for (int step = 0; step < steps; step++) {
    for (int i = 0; i < 3; i++) {
      Side& s = sides[(step + i) % 3];
      const Clock::time_point start = Clock::now();
      s.engine->step();
      s.seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
  }
  std::printf("{");
  for (const Side& s : sides) {
    std::vector<double> ratios;
    for (size_t i = 0; i < s.seconds.size(); i++) ratios.push_back(sides[0].seconds[i] / s.seconds[i]);
    std::printf("%s\"%s\": {\"tokens_per_second\": %.1f, \"ratio\": %.4f}", &s == sides ? "" : ", ", s.name,
                1 / percentile(s.seconds, 0.5), percentile(ratios, 0.5));
  }
  std::printf("}\n");
}
