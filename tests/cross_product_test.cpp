// The engine over the real forward pass, for every variant x kernel x cache: a request's tokens and logits are the
// same, bit for bit, alone or in any batch, after a preemption, after a prefix hit, forked or not, with NaN wherever
// the cache holds no token.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>

#include "device_memory.h"
#include "host/engine.h"
#include "kernels/build.h"
#include "tensor_cores.h"
#include "tiny_model.h"
#include "transformer.h"

namespace {

constexpr int CONTEXT = 64;

// One sample's text and the bits of the logits from the prompt's last position on.
struct Text {
  std::vector<int> ids;
  std::vector<std::vector<float>> logits;
  bool operator==(const Text&) const = default;
};
using Texts = std::vector<std::vector<Text>>;  // [requests][samples]

Request request_of(std::vector<int> prompt, int n, int samples, uint64_t seed) {
  Request r;
  r.prompt = std::move(prompt);
  r.n = n;
  r.samples = samples;
  r.sampler.temperature = 1;
  r.sampler.seed = seed;
  return r;
}

std::vector<int> prefix_and(int shared, const std::vector<int>& own) {
  static const std::vector<int> base = random_tokens(CONTEXT, 5);
  std::vector<int> prompt(base.begin(), base.begin() + shared);
  prompt.insert(prompt.end(), own.begin(), own.end());
  return prompt;
}

// Prompts that share 0, 16, 32 (whole blocks of the default size) and 33 tokens, one that is exactly two blocks, one
// that differs from it in one token of one block, one of one token, lengths around this block size, and three samples
// of one prompt.
std::vector<Request> requests(int block) {
  std::vector<Request> all;
  const auto add = [&](std::vector<int> prompt, int n, int samples) {
    all.push_back(request_of(std::move(prompt), n, samples, all.size() * 10 + 1));
  };
  add(prefix_and(33, random_tokens(4, 1)), 6, 1);
  add(prefix_and(32, {}), 7, 1);
  add(prefix_and(32, {}), 3, 1);
  std::vector<int> other = prefix_and(32, {});
  other[20] = (other[20] + 1) % TINY_VOCAB;
  add(other, 7, 1);
  add(random_tokens(1, 2), 9, 1);
  if (block > 1) add(prefix_and(block - 1, {}), 3, 1);
  if (block > 0) add(prefix_and(block, {}), 2, 1);
  if (block > 0) add(prefix_and(block + 1, {}), 2, 1);
  add(prefix_and(16, random_tokens(9, 3)), 8, 3);
  return all;
}

// Each fits into one block.
std::vector<Request> requests_of_a_block(int block_size) {
  std::vector<Request> all;
  for (const int size : {1, block_size - 1, block_size, block_size})
    if (size > 0) all.push_back(request_of(prefix_and(size, {}), std::min(3, block_size - size), 1, all.size()));
  return all;
}

// A forward pass whose cache holds NaN wherever no token is: at first everywhere, later in what follows a token in its
// block, or lay in the block before.
struct Machine {
  int block_size;
  Engine::Forward forward;
};
using Maker = Machine (*)(const Model&, const Limits&);

template <class Kv, int Block>
void poison(KVCache<Kv, Block>& cache, int block, int first_slot) {
  const CacheShape& shape = cache.shape();
  std::vector<int> slots;
  for (int i = first_slot; i < cache.block_size(); i++) slots.push_back(block * cache.block_size() + i);
  const Buffer<int> slot_mapping = device_copy(slots);
  Batch batch;
  batch.n_tokens = static_cast<int>(slots.size()), batch.slot_mapping = slot_mapping.data();
  const auto nan = [&](int dim) {
    return device_copy(std::vector<float>(slots.size() * area(shape.n_kv_heads, dim), NAN));
  };
  const Buffer<float> k = nan(shape.k_dim), v = nan(shape.v_dim);
  for (int layer = 0; layer < shape.n_layers; layer++) cache.append(Team(), layer, batch, {}, k.data(), v.data());
}

// The slots that the batch writes, and all behind them. A block that is copied first keeps what it holds.
template <class Kv, int Block>
void poison_written(KVCache<Kv, Block>& cache, const Batch& b) {
  for (int t = 0; t < b.n_tokens; t++) {
    const int block = b.slot_mapping[t] / cache.block_size();
    if (std::find(b.copy_from, b.copy_from + b.n_copies, block) == b.copy_from + b.n_copies)
      poison(cache, block, b.slot_mapping[t] % cache.block_size());
  }
}

template <class Attention, class Kernel, class Kv, int Block>
Machine make(const Model& model, const Limits& limits) {
  const auto transformer = std::make_shared<Transformer<Attention, Kernel, Kv, Block>>(model, limits);
  auto& cache = transformer->cache();
  fill(cache.memory(), 0xff, cache.size());
  return {cache.block_size(), [transformer, &cache](const Batch& b, int n_threads) {
            poison_written(cache, b);
            // What is -1 in the tables leads far out of the cache.
            std::vector<int> table(b.block_table, b.block_table + b.n_sequences * b.max_blocks);
            std::replace(table.begin(), table.end(), -1, INT32_MIN);
            Batch poisoned = b;
            poisoned.block_table = table.data();
            return transformer->forward(poisoned, test_threads(), n_threads);
          }};
}

struct Setting {
  int n_blocks, max_sequences, max_tokens;
  BlockHash hash = block_hash;
  int window = 0;  // of the engine: blocks behind it are given back
  MlaForm form = MlaForm::absorbed;
};

// An engine on a machine, and what its requests give.
class World {
 public:
  World(Maker maker, const Model& model, const Setting& s) : vocab_size_(model.config.vocab_size) {
    const Limits limits{s.max_tokens, s.max_sequences, s.max_tokens, CONTEXT, s.n_blocks, 2, s.form};
    const Machine machine = maker(model, limits);
    engine_ = std::make_unique<Engine>(machine.forward, test_threads(), limits, machine.block_size, vocab_size_,
                                       s.window, s.hash);
  }
  void submit(Request r) {
    const size_t i = texts_.size();
    texts_.emplace_back(r.samples);
    r.on_token = [this, i](int sample, int id) {
      texts_[i][static_cast<size_t>(sample)].ids.push_back(id);
      return true;
    };
    r.on_logits = [this, i](int sample, int, const float* logits) {
      texts_[i][static_cast<size_t>(sample)].logits.emplace_back(logits, logits + vocab_size_);
    };
    engine_->submit(std::move(r));
  }
  Engine& engine() { return *engine_; }
  const Texts& texts() const { return texts_; }
  Stats stats() const { return engine_->stats(); }

 private:
  int vocab_size_;
  Texts texts_;
  std::unique_ptr<Engine> engine_;
};

// Each request in a world of its own.
Texts alone(Maker maker, const Model& model, const Setting& setting, const std::vector<Request>& requests) {
  Texts texts;
  for (const Request& r : requests) {
    World world(maker, model, setting);
    world.submit(r);
    world.engine().run();
    texts.push_back(world.texts()[0]);
  }
  return texts;
}

std::unique_ptr<World> together(Maker maker, const Model& model, const Setting& setting,
                                const std::vector<Request>& requests) {
  auto world = std::make_unique<World>(maker, model, setting);
  for (const Request& r : requests) world->submit(r);
  world->engine().run();
  return world;
}

uint64_t one_bit_hash(uint64_t prefix, const int* tokens, int n) {
  return block_hash(prefix, tokens, n) & 1;
}

// windows: in all layers.
const Model& the_model(const std::string& variant, bool windows = false) {
  static std::map<std::pair<std::string, bool>, Model> models;
  const auto found = models.find({variant, windows});
  if (found != models.end()) return found->second;
  TinyModel tiny = tiny_model(variant, true, 11);
  if (windows) tiny.config["window"] = Json::Array{5, 7};
  return models.emplace(std::pair(variant, windows), load(tiny)).first->second;
}

int blocks_per_sequence(int block) {
  return block ? (CONTEXT + block - 1) / block : 1;
}

void expect_finite(const Texts& texts) {
  for (const auto& request : texts)
    for (const Text& text : request)
      for (const auto& row : text.logits)
        for (const float l : row) ASSERT_TRUE(std::isfinite(l)) << "a slot that holds nothing was read";
}

void check(const Model& model, int block, Maker maker) {
  const int per_sequence = blocks_per_sequence(block);
  const std::vector<Request> all = requests(block);
  const Texts reference = alone(maker, model, {3 * per_sequence, 3, 64}, all);
  expect_finite(reference);
  const auto ample = together(maker, model, {11 * per_sequence, 11, 64}, all);
  EXPECT_EQ(reference, ample->texts()) << "ample memory";
  EXPECT_EQ(ample->stats().preemptions, 0);
  // Chunks of 13 tokens beside decoding sequences, a pool that holds one long sequence and a bit, hashes that collide.
  const auto tight = together(maker, model, {block ? per_sequence + 1 : 1, 8, 13, one_bit_hash}, all);
  EXPECT_EQ(reference, tight->texts()) << "a tight pool";
  if (block) {
    EXPECT_GE(ample->stats().cached_tokens, 3 * 16) << "prefixes are shared";
    EXPECT_GT(tight->stats().preemptions, 0) << "the pool was not tight";
  }
  const std::vector<Request> small = requests_of_a_block(block ? block : CONTEXT);
  EXPECT_EQ(alone(maker, model, {1, 1, 64}, small), together(maker, model, {1, 4, 13}, small)->texts()) << "one block";
}

// A pool that holds what the windows see of two sequences and not two of them whole.
void check_windows(const std::string& variant, int block, Maker maker) {
  const Model& model = the_model(variant, true);
  const std::vector<Request> all = {request_of(random_tokens(40, 21), 20, 1, 1),
                                    request_of(random_tokens(9, 22), 40, 1, 2)};
  for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded}) {
    const Texts kept = alone(maker, model, {blocks_per_sequence(block), 1, 64, block_hash, 0, form}, all);
    expect_finite(kept);
    const int n_blocks = block ? 3 * ((6 + block - 1) / block + 1) : 2;
    const auto given_back = together(maker, model, {n_blocks, 2, 5, block_hash, 7, form}, all);
    EXPECT_EQ(kept, given_back->texts());
    EXPECT_EQ(given_back->stats().preemptions, 0);
    if (variant != "mla") break;
  }
}

struct Combination {
  const char *name, *variant;
  bool is_taken;
  int block;
  Maker maker;
};
class CrossProduct : public testing::TestWithParam<Combination> {};
TEST_P(CrossProduct, TextDoesNotDependOnWhatSharesTheMachine) {
  check(the_model(GetParam().variant), GetParam().block, GetParam().maker);
}

TEST_P(CrossProduct, WhatLiesBehindTheWindowsIsNotRead) {
  check_windows(GetParam().variant, GetParam().block, GetParam().maker);
}

#define COMBINATION(Attention, Kernel, Kv, Block)                                                     \
  Combination{#Attention "_" #Kernel "_" #Kv "_" #Block, Attention::name, takes<Kernel, Kv>(), Block, \
              make<Attention, Kernel, Kv, Block>},
// To a GPU's kernels a block's size is a number like others, which CachesAgree varies.
std::vector<Combination> combinations() {
  std::vector<Combination> all = { FOR_EACH_TRANSFORMER(COMBINATION) };
  std::erase_if(all, [](const Combination& c) { return !c.is_taken || (on_tensor_cores() && c.block != 3); });
  return all;
}
INSTANTIATE_TEST_SUITE_P(Engine, CrossProduct, testing::ValuesIn(combinations()),
                         [](const auto& c) { return std::string(c.param.name); });

// The same text from every cache and block size: only the address of a row differs.
TEST(CrossProduct, CachesAgree) {
  const Maker gqa[] = {make<Gqa, Flash, KvF16, 0>, make<Gqa, Flash, KvF16, 1>, make<Gqa, Flash, KvF16, 3>,
                       make<Gqa, Flash, KvF16, 16>};
  const Maker mla[] = {make<Mla, Flash, KvF16, 0>, make<Mla, Flash, KvF16, 1>, make<Mla, Flash, KvF16, 3>,
                       make<Mla, Flash, KvF16, 16>};
  const Setting settings[] = {{8, 8, 64}, {70, 8, 20}, {25, 8, 20}, {5, 8, 20}};
  for (const auto& [variant, makers] : {std::pair("gqa", gqa), std::pair("mla", mla)}) {
    const Texts contiguous = together(makers[0], the_model(variant), settings[0], requests(16))->texts();
    for (int i = 1; i < 4; i++)
      EXPECT_EQ(contiguous, together(makers[i], the_model(variant), settings[i], requests(16))->texts()) << i;
  }
}

// ---- random schedules: engine_test.cpp runs more of them, on a model without attention.

int pick(std::mt19937& random, int low, int high) {
  return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
}

// What was cancelled has the beginning of its text.
void expect_beginning(const std::vector<Text>& texts, std::vector<Text> whole) {
  for (size_t k = 0; k < texts.size(); k++) {
    ASSERT_LE(texts[k].ids.size(), whole[k].ids.size());
    whole[k].ids.resize(texts[k].ids.size());
    whole[k].logits.resize(texts[k].logits.size());
    EXPECT_EQ(texts[k], whole[k]);
  }
}

int64_t run_schedule(const Combination& c, unsigned seed) {
  std::mt19937 random(seed);
  const Model& model = the_model(c.variant);
  const int per_sequence = blocks_per_sequence(c.block);
  World world(c.maker, model,
              {per_sequence + pick(random, 0, per_sequence), pick(random, 1, 6), pick(random, 1, 24),
               pick(random, 0, 1) ? block_hash : one_bit_hash});
  std::vector<Request> all;
  std::set<int> cancelled;
  for (int i = pick(random, 2, 7); i > 0; i--) {
    const int shared = pick(random, 1, 45), own = pick(random, 0, 4), n = pick(random, 0, 12);
    const int samples = n > 0 ? std::max(1, pick(random, -2, 3)) : 1;
    all.push_back(
        request_of(prefix_and(shared, random_tokens(own, seed * 8 + static_cast<unsigned>(i))), n, samples, seed));
    world.submit(all.back());
    for (int steps = pick(random, 0, 5); steps > 0; steps--) world.engine().step();
    if (pick(random, 0, 9) == 0) {
      const int victim = pick(random, 0, static_cast<int>(all.size()) - 1);
      cancelled.insert(victim);
      world.engine().cancel(victim);
    }
  }
  world.engine().run();
  const Texts whole = alone(c.maker, model, {3 * per_sequence, 3, 64}, all);
  for (size_t i = 0; i < all.size(); i++) {
    if (cancelled.count(static_cast<int>(i)))
      expect_beginning(world.texts()[i], whole[i]);
    else
      EXPECT_EQ(world.texts()[i], whole[i]) << "request " << i;
  }
  EXPECT_EQ(world.stats().used, 0);
  return world.stats().preemptions;
}

TEST(CrossProduct, RandomSchedules) {
  int64_t preemptions = 0;
  unsigned seed = 0;
  for (const Combination& c : combinations()) {
    SCOPED_TRACE(c.name);
    preemptions += run_schedule(c, seed++);
    if (HasFailure()) return;
  }
  EXPECT_GT(preemptions, seed / 8);
}

}  // namespace
