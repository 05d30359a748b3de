// The engine over the real forward pass, for every variant x kernel x cache: a request's tokens and logits are the
// same, bit for bit, alone or in any batch, after a preemption, after a prefix hit, forked or not, with a cache full of
// NaN.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "engine.h"
#include "tiny_model.h"
#include "transformer.h"
#include "variants.h"

namespace {

constexpr int CONTEXT = 64;

// One sample's text and the bits of the logits from the prompt's last position on.
struct Text {
  std::vector<int> ids;
  std::vector<std::vector<float>> logits;
  bool operator==(const Text&) const = default;
};
using Texts = std::vector<std::vector<Text>>;  // [requests][samples]

std::vector<int> tokens(int n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int> ids;
  for (int i = 0; i < n; i++) ids.push_back(static_cast<int>(random() % 50));
  return ids;
}

// Prompts that share 0, 16, 32 (whole blocks of the default size) and 33 tokens, one that is exactly two blocks, one
// that differs from it in one token of one block, one of one token, and three samples of one prompt.
std::vector<Request> requests() {
  const std::vector<int> base = tokens(40, 5);
  std::vector<Request> all;
  const auto add = [&](std::vector<int> prompt, int n, int samples) {
    Request r;
    r.prompt = std::move(prompt);
    r.n = n;
    r.samples = samples;
    r.sampler.temperature = 1;
    r.sampler.seed = all.size() * 10 + 1;
    all.push_back(std::move(r));
  };
  const auto prefix = [&](int shared, int more, unsigned seed) {
    std::vector<int> prompt(base.begin(), base.begin() + shared);
    for (const int id : tokens(more, seed)) prompt.push_back(id);
    return prompt;
  };
  add(prefix(33, 4, 1), 6, 1);
  add(prefix(32, 0, 0), 7, 1);
  add(prefix(32, 0, 0), 3, 1);
  std::vector<int> other = prefix(32, 0, 0);
  other[20] = (other[20] + 1) % 50;
  add(other, 7, 1);
  add(prefix(0, 1, 2), 9, 1);
  add(prefix(16, 9, 3), 8, 3);
  return all;
}

struct Setting {
  int n_blocks, max_sequences, max_tokens;
};

// A forward pass whose cache began full of NaN.
struct Machine {
  int block_size;
  std::function<float*(const Batch&)> forward;
};
using Maker = Machine (*)(const Model&, const Limits&);

template <class Attention, class Kernel, class Kv, int Block>
Machine make(const Model& model, const Limits& limits) {
  using T = Transformer<Attention, Kernel, Kv, Block>;
  const auto transformer = std::make_shared<T>(model, limits);
  auto& cache = transformer->cache();
  const CacheShape shape = T::cache_shape(model.config, limits);
  const size_t rows = static_cast<size_t>(shape.n_layers) * static_cast<size_t>(shape.n_blocks) *
                      static_cast<size_t>(shape.n_kv_heads) * static_cast<size_t>(cache.block_size());
  std::memset(cache.k_memory(), 0xff, rows * Kv::row_bytes(shape.k_dim));
  if (shape.v_dim > 0) std::memset(cache.v_memory(), 0xff, rows * Kv::row_bytes(shape.v_dim));
  return {cache.block_size(), [transformer](const Batch& b) { return transformer->forward(b); }};
}

// Runs the requests in one engine, or (alone) each in its own.
Texts run(Maker make_machine, const Model& model, const Setting& setting, bool alone, int64_t* preemptions,
          int64_t* cached) {
  std::vector<Request> all = requests();
  Texts texts(all.size());
  Limits limits{setting.max_tokens, setting.max_sequences, setting.max_tokens, CONTEXT,
                setting.n_blocks,   MlaForm::absorbed};
  std::unique_ptr<Engine> engine;
  const auto fresh = [&] {
    const Machine machine = make_machine(model, limits);
    engine = std::make_unique<Engine>(machine.forward, limits, machine.block_size, model.config.vocab_size, 0);
  };
  if (!alone) fresh();
  for (size_t i = 0; i < all.size(); i++) {
    Request& r = all[i];
    texts[i].resize(static_cast<size_t>(r.samples));
    r.on_token = [&texts, i](int sample, int id) {
      texts[i][static_cast<size_t>(sample)].ids.push_back(id);
      return true;
    };
    r.on_logits = [&texts, i, &model](int sample, int, const float* logits) {
      texts[i][static_cast<size_t>(sample)].logits.emplace_back(logits, logits + model.config.vocab_size);
    };
    if (alone) fresh();
    engine->submit(r);
    if (alone) engine->run();
  }
  engine->run();
  *preemptions = engine->stats().preemptions;
  *cached = engine->stats().cached_tokens;
  return texts;
}

const Model& the_model(const char* variant) {
  static std::map<std::string, Model> models;
  const auto found = models.find(variant);
  if (found != models.end()) return found->second;
  const TemporaryFile file(tiny_model(variant, true, 11).bytes());
  return models.emplace(variant, load_model(file.path())).first->second;
}

void check(const char* variant, int block, Maker maker) {
  const Model& model = the_model(variant);
  const int per_sequence = block ? (CONTEXT + block - 1) / block : 1;
  int64_t preemptions = 0, cached = 0;
  const Texts reference = run(maker, model, {3 * per_sequence, 3, 64}, true, &preemptions, &cached);
  for (const auto& request : reference)
    for (const Text& text : request)
      for (const auto& row : text.logits)
        for (const float l : row) ASSERT_TRUE(std::isfinite(l)) << "a slot that was never written was read";
  EXPECT_EQ(reference, run(maker, model, {8 * per_sequence, 8, 64}, false, &preemptions, &cached)) << "ample memory";
  EXPECT_EQ(preemptions, 0);
  if (block) {
    EXPECT_GE(cached, 3 * 16) << "prefixes are shared";
  }
  // Chunks of 5 tokens beside decoding sequences, and a pool that holds one long sequence and a bit.
  EXPECT_EQ(reference, run(maker, model, {block ? per_sequence + 1 : 1, 8, 13}, false, &preemptions, &cached))
      << "a tight pool";
  if (block) {
    EXPECT_GT(preemptions, 0) << "the pool was not tight";
  }
}

struct Combination {
  const char *name, *variant;
  int block;
  Maker maker;
};
class CrossProduct : public testing::TestWithParam<Combination> {};
TEST_P(CrossProduct, TextDoesNotDependOnWhatSharesTheMachine) {
  check(GetParam().variant, GetParam().block, GetParam().maker);
}

#define COMBINATION(Attention, Kernel, Kv, Block)                                         \
  Combination{#Attention "_" #Kernel "_" #Kv "_" #Block, name(Attention::variant), Block, \
              make<Attention, Kernel, Kv, Block>},
const Combination COMBINATIONS[] = {FOR_EACH_TRANSFORMER(COMBINATION)};
INSTANTIATE_TEST_SUITE_P(Engine, CrossProduct, testing::ValuesIn(COMBINATIONS),
                         [](const auto& c) { return std::string(c.param.name); });

// The same text from every cache and block size: only the address of a row differs.
TEST(CrossProduct, CachesAgree) {
  int64_t preemptions, cached;
  const Maker gqa[] = {make<Gqa, Flash, KvF16, 0>, make<Gqa, Flash, KvF16, 1>, make<Gqa, Flash, KvF16, 3>,
                       make<Gqa, Flash, KvF16, 16>};
  const Maker mla[] = {make<Mla, Flash, KvF16, 0>, make<Mla, Flash, KvF16, 1>, make<Mla, Flash, KvF16, 3>,
                       make<Mla, Flash, KvF16, 16>};
  const Setting settings[] = {{8, 8, 64}, {70, 8, 20}, {25, 8, 20}, {5, 8, 20}};
  for (const auto& [variant, makers] : {std::pair("gqa", gqa), std::pair("mla", mla)}) {
    const Texts contiguous = run(makers[0], the_model(variant), settings[0], false, &preemptions, &cached);
    for (int i = 1; i < 4; i++)
      EXPECT_EQ(contiguous, run(makers[i], the_model(variant), settings[i], false, &preemptions, &cached)) << i;
  }
}

}  // namespace
