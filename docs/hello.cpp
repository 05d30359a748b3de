// hello.cpp: a text in one screen: load, encode, step, sample, print. `make hello` builds it;
// ./run adds the plan of the memory, many requests at once and a report.
#include <cstdio>
#include <numeric>

#include "host/loader.h"
#include "host/sampler.h"
#include "host/tokenizer.h"
#include "transformer.h"

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: hello NAME.safetensors PROMPT\n"), 2;
  Threads threads(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  const Model model = load_model(argv[1], threads);
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path(argv[1]), model.tokenizer_sha256);
  std::vector<int> tokens = tokenizer.encode(argv[2], false, true);  // control tokens stay text; BOS where usual
  const int context = std::min(model.config.seq_len, static_cast<int>(tokens.size()) + 64);
  const int block_size = BUILD_BLOCK ? BUILD_BLOCK : context, n_blocks = (context - 1) / block_size + 1;
  Limits limits;
  limits.max_tokens = limits.context = context, limits.n_blocks = n_blocks, limits.max_threads = threads.most();
  limits.max_sequences = limits.max_logits = 1;
  Transformer<BUILD_ATTENTION, BUILD_KERNEL, BUILD_KV, BUILD_BLOCK> transformer(model, limits);
  Sampler sampler({.temperature = 0});
  SamplerScratch scratch(model.config.vocab_size);

  std::vector<int> count(static_cast<size_t>(context));  // 0 1 2 ...: token t is at position t and in slot t of
  std::iota(count.begin(), count.end(), 0);              // the cache, whose blocks are taken in order
  for (int computed = 0, length; (length = static_cast<int>(tokens.size())) < context; computed = length) {
    const int n = length - computed, last = n - 1, query_start[] = {0, n};  // the whole prompt, then a token at a time
    Batch batch;
    batch.n_tokens = n, batch.n_sequences = batch.n_logits = 1, batch.max_blocks = n_blocks, batch.logit_rows = &last;
    batch.tokens = tokens.data() + computed, batch.query_start = query_start, batch.context_len = &length;
    batch.positions = batch.slot_mapping = count.data() + computed, batch.block_table = count.data();
    const float* logits = transformer.forward(batch, threads, threads.most());
    const int id = sampler.sample(logits, model.config.vocab_size, tokens.data(), length, scratch);
    if (tokenizer.is_end_of_generation(id)) break;
    tokens.push_back(id);
    std::fwrite(tokenizer.bytes(id).data(), 1, tokenizer.bytes(id).size(), stdout);
  }
  std::puts("");
} catch (const std::exception& e) {
  return std::fprintf(stderr, "hello: %s\n", e.what()), 1;
}
