// The engine against a model without attention: every slot of a fake cache holds a hash of its token, its position and
// everything that the token sees, read through the block table. Whatever is addressed wrongly, stale, written while
// shared, not copied or not computed shows up as another text than the one a sequence has alone, which
// `Alone` works out without any cache.
#include "host/engine.h"
#include "host/error.h"
#include "kernels/threads.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace {

constexpr int kVocab = 23;
constexpr uint64_t kPoison = 0xdeadbeefdeadbeef;

uint64_t mix(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 29);
}

// The slot of a token at position p which sees see(0) ... see(n - 1).
template <class See>
uint64_t slot_value(int token, int p, int n, See see) {
  uint64_t h = mix(static_cast<uint64_t>(token) + 1, static_cast<uint64_t>(p));
  for (int i = 0; i < n; ++i) h = mix(h, see(i));
  return h;
}

void logits_of(uint64_t h, float* logits) {
  for (int i = 0; i < kVocab; ++i) {
    logits[i] = static_cast<float>(mix(h, static_cast<uint64_t>(i) + 7) % 4096) / 512.0f;
  }
}

int first_seen(int p, int window) {
  return window == 0 ? 0 : std::max(0, p - window + 1);
}

// A sequence without engine, cache or batch.
struct Alone {
  int window;
  std::vector<uint64_t> slots = {};

  std::vector<float> push(int token) {
    auto p = static_cast<int>(slots.size());
    int first = first_seen(p, window);
    slots.push_back(slot_value(token, p, p - first, [&](int i) { return slots[static_cast<size_t>(first + i)]; }));
    std::vector<float> logits(kVocab);
    logits_of(slots.back(), logits.data());
    return logits;
  }
};

struct Text {
  std::vector<int> ids;
  Finish finish = Finish::length;
  std::vector<std::vector<float>> logits;  // of each position that was computed
};

// What sample i of the request must give; on_token ends it after `most` tokens.
Text alone(const Request& request, int sample, int window, int most = 1 << 30) {
  Alone model{window};
  Text text;
  std::vector<int> ids = request.prompt;
  for (int id : ids) text.logits.push_back(model.push(id));
  SamplerOptions options = request.sampler;
  options.seed += static_cast<uint64_t>(sample);
  Sampler sampler(options);
  SamplerScratch scratch(kVocab);
  while (static_cast<int>(text.ids.size()) < request.n) {
    std::vector<float> logits = text.logits.back();
    int id = sampler.sample(logits.data(), kVocab, ids.data(), static_cast<int>(ids.size()), scratch);
    if (std::find(request.stop.begin(), request.stop.end(), id) != request.stop.end()) {
      text.finish = Finish::stop;
      break;
    }
    text.ids.push_back(id);
    ids.push_back(id);
    if (static_cast<int>(text.ids.size()) == most) {
      text.finish = Finish::callback;
      break;
    }
    if (static_cast<int>(text.ids.size()) < request.n) text.logits.push_back(model.push(id));
  }
  return text;
}

// The forward pass over the fake cache. Checks the batch's form.
struct Fake {
  Limits limits;
  int block_size, window;
  std::vector<uint64_t> cache =
      std::vector<uint64_t>(static_cast<size_t>(limits.n_blocks) * static_cast<size_t>(block_size), kPoison);
  std::vector<float> logits = {};
  std::vector<std::vector<int>> step_positions = {};  // of each step: the positions in the batch
  uint64_t trace = 0;                                 // of all batches
  int tokens = 0;

  uint64_t& slot(int block, int offset) {
    EXPECT_TRUE(block >= 0 && block < limits.n_blocks) << "block " << block;
    return cache[static_cast<size_t>(std::max(block, 0)) * static_cast<size_t>(block_size) +
                 static_cast<size_t>(offset)];
  }

  void copy(const Batch& b) {
    std::set<int> to(b.copy_to, b.copy_to + b.n_copies);
    EXPECT_EQ(static_cast<int>(to.size()), b.n_copies);
    for (int i = 0; i < b.n_copies; ++i) {
      EXPECT_EQ(to.count(b.copy_from[i]), 0u) << "copies must not depend on their order";
      for (int o = 0; o < block_size; ++o) slot(b.copy_to[i], o) = slot(b.copy_from[i], o);
    }
  }

  void check(const Batch& b) {
    EXPECT_LE(b.n_tokens, limits.max_tokens);
    EXPECT_LE(b.n_sequences, limits.max_sequences);
    EXPECT_LE(b.n_logits, limits.max_logits);
    EXPECT_EQ(b.query_start[0], 0);
    EXPECT_EQ(b.query_start[b.n_sequences], b.n_tokens);
    for (int s = 0; s < b.n_sequences; ++s) {
      EXPECT_LT(b.query_start[s], b.query_start[s + 1]);
      EXPECT_LE(b.context_len[s], limits.context);
      EXPECT_EQ(b.positions[b.query_start[s + 1] - 1], b.context_len[s] - 1);
      for (int t = b.query_start[s] + 1; t < b.query_start[s + 1]; ++t) {
        EXPECT_EQ(b.positions[t], b.positions[t - 1] + 1);
      }
      int gone = first_seen(b.positions[b.query_start[s]], window) / block_size;
      for (int i = 0; i < b.max_blocks; ++i) {
        bool seen = i >= gone && i * block_size < b.context_len[s];
        EXPECT_EQ(b.block_table[s * b.max_blocks + i] >= 0, seen) << "entry " << i << " of " << b.max_blocks;
      }
    }
    for (int i = 1; i < b.n_logits; ++i) EXPECT_LT(b.logit_rows[i - 1], b.logit_rows[i]);
  }

  // The blocks that the batch writes are each in one table of it.
  void check_exclusive(const Batch& b) {
    std::map<int, int> holders;
    for (int i = 0; i < b.n_sequences * b.max_blocks; ++i) ++holders[b.block_table[i]];
    for (int t = 0; t < b.n_tokens; ++t) EXPECT_EQ(holders[b.slot_mapping[t] / block_size], 1);
  }

  float* forward(const Batch& b) {
    if (b.n_tokens == 0) throw std::logic_error("an empty batch: the engine would go on for ever");
    check(b);
    check_exclusive(b);
    copy(b);
    logits.assign(static_cast<size_t>(b.n_logits) * kVocab, 0);
    step_positions.emplace_back(b.positions, b.positions + b.n_tokens);
    tokens += b.n_tokens;
    int row = 0;
    for (int s = 0; s < b.n_sequences; ++s) {
      const int* table = b.block_table + s * b.max_blocks;
      for (int t = b.query_start[s]; t < b.query_start[s + 1]; ++t) {
        int p = b.positions[t], first = first_seen(p, window), block = b.slot_mapping[t] / block_size;
        EXPECT_EQ(b.slot_mapping[t], table[p / block_size] * block_size + p % block_size);
        uint64_t value = slot_value(b.tokens[t], p, p - first, [&](int i) {
          uint64_t seen = slot(table[(first + i) / block_size], (first + i) % block_size);
          EXPECT_NE(seen, kPoison) << "position " << p << " sees a slot that holds nothing";
          return seen;
        });
        // What follows the token in its block belongs to nobody.
        for (int o = p % block_size; o < block_size; ++o) slot(block, o) = kPoison;
        slot(block, p % block_size) = value;
        trace = mix(mix(trace, value), static_cast<uint64_t>(b.slot_mapping[t]));
        if (row < b.n_logits && b.logit_rows[row] == t) {
          logits_of(value, logits.data() + static_cast<size_t>(row++) * kVocab);
        }
      }
    }
    EXPECT_EQ(row, b.n_logits);
    return logits.data();
  }
};

Threads threads(2);

// An engine on the fake, and the results by (request, sample).
struct World {
  Fake fake;
  Engine engine;
  std::map<std::pair<int, int>, Result> results;

  World(const Limits& limits, int block_size, int window = 0, BlockHash hash = block_hash)
      : fake{limits, block_size, window},
        engine([this](const Batch& b, int) { return fake.forward(b); }, threads, limits, block_size, kVocab, window,
               hash) {}

  int submit(Request request) {
    request.on_finish = [this](const Result& r) {
      EXPECT_TRUE(results.emplace(std::pair(r.request, r.sample), r).second) << "finished twice";
    };
    return engine.submit(std::move(request));
  }
  const Result& result(int request, int sample = 0) { return results.at({request, sample}); }
};

std::vector<int> random_ids(std::mt19937& random, int n) {
  std::vector<int> ids;
  for (int i = 0; i < n; ++i) ids.push_back(static_cast<int>(random() % kVocab));
  return ids;
}

Request request_of(std::vector<int> prompt, int n) {
  Request request;
  request.prompt = std::move(prompt);
  request.n = n;
  return request;
}

std::vector<int> joined(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

uint64_t one_bit_hash(uint64_t prefix, const int* tokens, int n) {
  return block_hash(prefix, tokens, n) & 1;
}

constexpr Limits kRoomy{.max_tokens = 64, .max_sequences = 8, .max_logits = 16, .context = 64, .n_blocks = 64};

TEST(Engine, OneSequenceGivesItsText) {
  World world(kRoomy, 4);
  Request request = request_of({1, 2, 3}, 20);
  std::vector<int> streamed;
  request.on_token = [&](int, int id) {
    streamed.push_back(id);
    return true;
  };
  world.submit(request);
  world.engine.run();
  Text expected = alone(request, 0, 0);
  EXPECT_EQ(world.result(0).ids, expected.ids);
  EXPECT_EQ(streamed, expected.ids);
  EXPECT_EQ(world.result(0).finish, Finish::length);
  EXPECT_EQ(world.fake.tokens, 3 + 19);  // the last generated token is never computed
  EXPECT_EQ(world.engine.stats().used, 0);
  EXPECT_EQ(world.engine.stats().generated_tokens, 20);
  EXPECT_EQ(world.engine.stats().steps, 20);
  EXPECT_EQ(world.engine.stats().decode_steps, 19);
  EXPECT_FALSE(world.engine.step());
}

TEST(Engine, StopIdsAndCallbacksEndASample) {
  World world(kRoomy, 4);
  Request free = request_of({5, 6}, 12);
  Text text = alone(free, 0, 0);
  Request stops = free;
  stops.stop = {text.ids[5]};
  Request ends = free;
  int seen = 0;
  ends.on_token = [&](int, int) { return ++seen < 3; };
  world.submit(stops);
  world.submit(ends);
  world.engine.run();
  auto first = std::find(text.ids.begin(), text.ids.end(), text.ids[5]);
  EXPECT_EQ(world.result(0).finish, Finish::stop);
  EXPECT_EQ(world.result(0).ids, std::vector<int>(text.ids.begin(), first));
  EXPECT_EQ(world.result(1).finish, Finish::callback);
  EXPECT_EQ(world.result(1).ids, std::vector<int>(text.ids.begin(), text.ids.begin() + 3));
}

// Every position from logits_from on, once, in order, in steps of at most max_logits rows.
TEST(Engine, LogitsOfPromptPositions) {
  Limits limits = kRoomy;
  limits.max_logits = 3;
  for (int from : {-1, 0, 7, 19}) {
    World world(limits, 4);
    std::mt19937 random(1);
    Request request = request_of(random_ids(random, 20), 5);
    world.submit(request);  // leaves the whole prompt in the cache
    world.engine.run();
    Text expected = alone(request, 0, 0);
    int next = from < 0 ? 19 : from;
    request.logits_from = from;
    request.on_logits = [&](int sample, int position, const float* logits) {
      EXPECT_EQ(sample, 0);
      EXPECT_EQ(position, next++);
      EXPECT_EQ(std::vector<float>(logits, logits + kVocab), expected.logits[static_cast<size_t>(position)]);
    };
    world.submit(request);
    request.n = 0;
    world.engine.run();
    EXPECT_EQ(next, 24);  // 20 + 5 - 1: nobody wants the logits after the last token
    next = from < 0 ? 19 : from;
    world.submit(request);
    world.engine.run();
    EXPECT_EQ(next, 20);
    EXPECT_TRUE(world.result(2).ids.empty());
    EXPECT_EQ(world.result(2).finish, Finish::length);
  }
}

TEST(Engine, CachedPromptOfWholeBlocksStillComputesItsLastToken) {
  for (int n_blocks : {3, 4, 20}) {  // 3: just the prompt; the block is written in place. Else copied or evicted
    Limits limits = kRoomy;
    limits.n_blocks = n_blocks;
    World world(limits, 4);
    std::mt19937 random(2);
    std::vector<int> prompt = random_ids(random, 12);
    Request request = request_of(prompt, 0);
    world.submit(request);
    world.engine.run();
    EXPECT_EQ(world.fake.tokens, 12);
    std::vector<float> last;
    request.on_logits = [&](int, int, const float* logits) { last.assign(logits, logits + kVocab); };
    world.submit(request);
    world.engine.run();
    EXPECT_EQ(world.fake.tokens, 13);
    EXPECT_EQ(last, alone(request, 0, 0).logits.back());
    EXPECT_EQ(world.result(1).n_cached, 11);
  }
}

TEST(Engine, FullyCachedPromptIsCopiedWhereOthersUseIt) {
  World world(kRoomy, 4);
  std::mt19937 random(3);
  std::vector<int> prompt = random_ids(random, 8);
  world.submit(request_of(prompt, 10));
  world.engine.step();  // computes the prompt and goes on using its two blocks
  world.submit(request_of(prompt, 10));
  world.engine.run();
  EXPECT_EQ(world.engine.stats().copies, 1);
  EXPECT_EQ(world.engine.stats().cached_tokens, 7);
  EXPECT_EQ(world.result(0).ids, alone(request_of(prompt, 10), 0, 0).ids);
  EXPECT_EQ(world.result(1).ids, world.result(0).ids);
}

TEST(Engine, PromptsThatDifferInOneTokenOfOneBlock) {
  for (int differs = 0; differs < 12; ++differs) {
    for (BlockHash hash : {block_hash, one_bit_hash}) {
      World world(kRoomy, 4, 0, hash);
      std::mt19937 random(4);
      std::vector<int> a = random_ids(random, 13), b = a;
      b[static_cast<size_t>(differs)] = (b[static_cast<size_t>(differs)] + 1) % kVocab;
      world.submit(request_of(a, 6));
      world.submit(request_of(b, 6));
      world.engine.run();
      EXPECT_EQ(world.result(0).ids, alone(request_of(a, 6), 0, 0).ids);
      EXPECT_EQ(world.result(1).ids, alone(request_of(b, 6), 0, 0).ids);
      EXPECT_EQ(world.result(1).n_cached, differs / 4 * 4);
    }
  }
}

// Fresh, found in the cache, and forked; with hashes that collide.
TEST(Engine, LengthsAroundABlock) {
  for (int block_size : {1, 4, 16}) {
    for (BlockHash hash : {block_hash, one_bit_hash}) {
      World world(kRoomy, block_size, 0, hash);
      std::mt19937 random(17);
      std::vector<int> ids = random_ids(random, 2 * block_size + 1);
      std::vector<Request> requests;
      for (int n : {1, block_size - 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 1}) {
        if (n == 0) continue;  // refused: RefusesWhatNeverFits
        for (int samples : {1, 1, 3}) {
          requests.push_back(request_of({ids.begin(), ids.begin() + n}, block_size + 1));
          requests.back().samples = samples;
          requests.back().sampler.temperature = 1;
        }
      }
      for (const Request& r : requests) world.submit(r);
      world.engine.run();
      for (size_t i = 0; i < requests.size(); ++i) {
        for (int k = 0; k < requests[i].samples; ++k) {
          EXPECT_EQ(world.result(static_cast<int>(i), k).ids, alone(requests[i], k, 0).ids) << block_size << " " << i;
        }
      }
    }
  }
}

TEST(Engine, PoolOfOneBlock) {
  Limits limits = kRoomy;
  limits.n_blocks = 1;
  World world(limits, 8);
  EXPECT_EQ(world.engine.max_request_tokens(), 8);
  std::mt19937 random(5);
  std::vector<Request> requests;
  for (int i = 0; i < 20; ++i) {
    int size = 1 + static_cast<int>(random() % 8);
    requests.push_back(request_of(random_ids(random, size), 8 - size));
    requests.push_back(requests.back());
  }
  for (const Request& r : requests) world.submit(r);
  world.engine.run();
  for (int i = 0; i < 40; ++i) EXPECT_EQ(world.result(i).ids, alone(requests[static_cast<size_t>(i)], 0, 0).ids);
}

// 256 requests at once, a common prefix of 512 tokens: it is computed once.
TEST(Engine, CommonPrefixIsComputedOnce) {
  Limits limits{.max_tokens = 600, .max_sequences = 256, .max_logits = 256, .context = 1024, .n_blocks = 2000};
  World world(limits, 16);
  std::mt19937 random(6);
  std::vector<int> prefix = random_ids(random, 512);
  for (int i = 0; i < 256; ++i) world.submit(request_of(joined(prefix, {i % kVocab, i / kVocab, 3}), 4));
  world.engine.run();
  EXPECT_EQ(world.fake.tokens, 512 + 256 * 3 + 256 * 3);
  EXPECT_EQ(world.engine.stats().cached_tokens, 255 * 512);
  EXPECT_EQ(world.engine.stats().peak_shared, 32);
  EXPECT_EQ(world.results.size(), 256u);
  EXPECT_EQ(world.result(255).ids, alone(request_of(joined(prefix, {255 % kVocab, 255 / kVocab, 3}), 4), 0, 0).ids);
}

// What bench/requests.py runs: 512 shared + 192 + 64 tokens. The contiguous cache reserves 4096 for each.
TEST(Engine, PagingFitsMoreSequencesInAGigabyte) {
  const int tokens = 1000000000 / 23040;  // SmolLM2-135M, float16
  int at_once[2];
  for (bool paged : {false, true}) {
    int block_size = paged ? 16 : 4096;
    Limits limits{
        .max_tokens = 512, .max_sequences = 256, .max_logits = 256, .context = 4096, .n_blocks = tokens / block_size};
    World world(limits, block_size);
    std::mt19937 random(18);
    std::vector<int> prefix = random_ids(random, 512);
    for (int i = 0; i < 256; ++i) world.submit(request_of(joined(prefix, random_ids(random, 192)), 64));
    for (int i = 0; i < 100; ++i) world.engine.step();
    at_once[paged] = world.engine.stats().peak_sequences;
    if (paged) {
      EXPECT_LT(world.engine.stats().waste, 0.04);
    }
  }
  EXPECT_GE(at_once[true], 8 * at_once[false]);
}

// A block that several sequences hold counts once.
TEST(Engine, WasteIsWhatIsEmptyOfTheBlocksInUse) {
  Request request = request_of({1, 2, 3, 4, 5, 6}, 3);
  request.samples = 3;
  // 6 tokens in 2 blocks of 4; then one full block is shared and each sample has a second, of 3 and of 4 tokens.
  const std::vector<double> together = {2 / 8.0, 3 / 16.0, 0};
  // A token a step: the prompt, then one sample after the other, while those behind it share the prompt's last block.
  const std::vector<double> one_by_one = {3 / 4.0,  2 / 4.0,  1 / 4.0,  0,        3 / 8.0, 2 / 8.0,
                                          3 / 12.0, 2 / 12.0, 3 / 12.0, 2 / 12.0, 1 / 8.0, 0};
  for (const auto& [max_tokens, expected] : {std::pair(64, together), std::pair(1, one_by_one)}) {
    Limits limits = kRoomy;
    limits.max_tokens = max_tokens;
    World world(limits, 4);
    world.submit(request);
    double sum = 0;
    for (size_t step = 0; world.engine.step(); ++step) {
      ASSERT_LT(step, expected.size());
      sum += expected[step];
      EXPECT_DOUBLE_EQ(world.engine.stats().waste, sum / static_cast<double>(step + 1)) << "step " << step;
    }
  }
}

TEST(Engine, SamplesForkOverSharedBlocks) {
  for (int block_size : {4, 64}) {  // 64: contiguous, a slot each
    World world(kRoomy, block_size);
    std::mt19937 random(7);
    Request request = request_of(random_ids(random, 10), 8);
    request.samples = 6;
    request.sampler.temperature = 2;
    request.sampler.seed = 100;
    world.submit(request);
    world.engine.run();
    std::set<std::vector<int>> texts;
    for (int i = 0; i < 6; ++i) {
      EXPECT_EQ(world.result(0, i).ids, alone(request, i, 0).ids);
      texts.insert(world.result(0, i).ids);
    }
    EXPECT_GT(texts.size(), 1u);
    EXPECT_EQ(world.fake.tokens, 10 + 6 * 7);   // the prompt once
    EXPECT_EQ(world.engine.stats().copies, 5);  // of the part-filled block; the last to write has it alone
    EXPECT_EQ(world.engine.stats().peak_shared, (10 + block_size - 1) / block_size);
    EXPECT_EQ(world.engine.stats().used, 0);
  }
}

// Samples that find no room to fork wait for their turn, with the same text.
TEST(Engine, MoreSamplesThanSequences) {
  Limits limits = kRoomy;
  limits.max_sequences = 2;
  World world(limits, 4);
  Request request = request_of({1, 2, 3, 4, 5, 6}, 5);
  request.samples = 5;
  request.sampler.temperature = 1;
  world.submit(request);
  world.engine.run();
  for (int i = 0; i < 5; ++i) EXPECT_EQ(world.result(0, i).ids, alone(request, i, 0).ids);
}

TEST(Engine, WindowGivesBlocksBack) {
  Limits limits = kRoomy;
  limits.n_blocks = 4;  // a window of 7 tokens needs 3 blocks of 4
  World world(limits, 4, 7);
  EXPECT_EQ(world.engine.max_request_tokens(), 64);
  std::mt19937 random(8);
  Request request = request_of(random_ids(random, 30), 34);
  world.submit(request);
  world.engine.run();
  EXPECT_EQ(world.result(0).ids, alone(request, 0, 7).ids);
  EXPECT_EQ(world.engine.stats().preemptions, 0);
  EXPECT_EQ(World(limits, 4, 14).engine.max_request_tokens(), 16);  // 5 blocks: every token is kept
}

TEST(Engine, RefusesWhatNeverFits) {
  Limits limits = kRoomy;
  limits.n_blocks = 5;
  World world(limits, 4);
  EXPECT_EQ(world.engine.max_request_tokens(), 20);
  world.submit(request_of(std::vector<int>(15, 1), 5));
  try {
    world.submit(request_of(std::vector<int>(15, 1), 6));
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(" 20 "), std::string::npos) << e.what();
  }
  EXPECT_THROW(world.submit(request_of({}, 1)), Error);
  EXPECT_THROW(world.submit(request_of({kVocab}, 1)), Error);
  EXPECT_THROW(world.submit(request_of({-1}, 1)), Error);
  EXPECT_THROW(world.submit(request_of({1}, -1)), Error);
  EXPECT_THROW(world.submit(request_of({1}, 1 << 30)), Error);
  EXPECT_EQ(world.engine.unfinished(), 1);
  world.engine.run();
  EXPECT_EQ(world.results.size(), 1u);
}

TEST(Engine, PreemptsTheYoungestAndItsTextIsTheSame) {
  Limits limits = kRoomy;
  limits.n_blocks = 8;
  World world(limits, 4);
  std::mt19937 random(9);
  std::vector<Request> requests;
  std::vector<int> finished;
  for (int i = 0; i < 4; ++i) {
    requests.push_back(request_of(random_ids(random, 5), 15));
    requests.back().sampler = {.temperature = 1.5f, .seed = static_cast<uint64_t>(i)};
    world.submit(requests.back());
  }
  while (world.engine.step()) {
    for (int i = 0; i < 4; ++i) {
      if (world.results.count({i, 0}) && std::count(finished.begin(), finished.end(), i) == 0) finished.push_back(i);
    }
  }
  EXPECT_EQ(finished, (std::vector<int>{0, 1, 2, 3}));  // the oldest is never the one that goes
  EXPECT_GT(world.engine.stats().preemptions, 0);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(world.result(i).ids, alone(requests[static_cast<size_t>(i)], 0, 0).ids);
}

// Who would only be preempted again is not begun: what is not cached of a prompt is computed once.
TEST(Engine, WaitsUntilThePromptFits) {
  Limits limits = kRoomy;
  limits.n_blocks = 4;
  World world(limits, 4);
  std::mt19937 random(14);
  world.submit(request_of(random_ids(random, 4), 12));  // grows from 1 block to 4
  world.submit(request_of(random_ids(random, 14), 1));  // 4 blocks
  world.submit(request_of(random_ids(random, 1), 1));   // would fit at once, but came later
  int steps = 0;
  while (world.results.size() < 1) world.engine.step(), ++steps;
  EXPECT_EQ(steps, 12);
  world.engine.run();
  EXPECT_EQ(world.fake.tokens, 4 + 11 + 14 + 1);
  EXPECT_EQ(world.engine.stats().preemptions, 0);
}

// The copy that a fully cached prompt needs counts, too.
TEST(Engine, WaitsUntilTheCopyFits) {
  Limits limits = kRoomy;
  limits.n_blocks = 3;
  World world(limits, 4);
  std::mt19937 random(15);
  std::vector<int> prompt = random_ids(random, 8);
  world.submit(request_of(prompt, 4));
  world.engine.step();
  world.submit(request_of(prompt, 1));
  world.engine.run();
  EXPECT_EQ(world.engine.stats().preemptions, 0);
  EXPECT_EQ(world.result(1).ids[0], world.result(0).ids[0]);
}

// A block that was copied in this step and has lost its last user since must not be the target of another copy.
TEST(Engine, CopiesDoNotDependOnTheirOrder) {
  Limits limits = kRoomy;
  limits.n_blocks = 4;
  limits.max_logits = 3;
  World world(limits, 4);
  const std::vector<int> p = {1, 2, 3, 4}, q = {5, 6, 7, 8};
  for (const auto& prompt : {p, q}) {
    world.submit(request_of(prompt, 0));
    world.engine.run();
  }
  Request rows = request_of({9, 10, 11}, 0);  // takes all rows of a step, so that those behind it wait in the cache
  rows.logits_from = 0;
  world.submit(rows);
  for (const auto& prompt : {p, p, q, q, p}) world.submit(request_of(prompt, 1));
  world.engine.step();
  EXPECT_EQ(world.engine.stats().peak_sequences, 6);
  // Two copy p and take the last blocks; the third preempts the last, who leaves p.
  world.engine.run();
  EXPECT_GE(world.engine.stats().preemptions, 1);
  for (int i = 3; i < 8; ++i) {
    EXPECT_EQ(world.result(i).ids, alone(request_of(i == 5 || i == 6 ? q : p, 1), 0, 0).ids);
  }
}

TEST(Engine, PrefixesOutliveWhatFollowsThem) {
  Limits limits = kRoomy;
  limits.n_blocks = 8;
  World world(limits, 4);
  std::mt19937 random(16);
  std::vector<int> prompt = random_ids(random, 16);
  world.submit(request_of(prompt, 0));
  world.engine.run();
  world.submit(request_of(random_ids(random, 24), 0));  // evicts two blocks of the four
  world.engine.run();
  EXPECT_EQ(world.engine.stats().evicted, 2);
  world.submit(request_of(prompt, 0));
  world.engine.run();
  EXPECT_EQ(world.result(2).n_cached, 8);
}

// A long prompt is read beside a sequence that generates: one token of it in every step.
TEST(Engine, PromptsInChunksBesideDecoding) {
  Limits limits = kRoomy;
  limits.max_tokens = 5;
  World world(limits, 4);
  std::mt19937 random(10);
  world.submit(request_of({1, 2}, 20));
  world.engine.step();
  world.submit(request_of(random_ids(random, 40), 3));
  for (int step = 1; step <= 10; ++step) {
    world.engine.step();
    const std::vector<int>& positions = world.fake.step_positions.back();
    ASSERT_EQ(positions.size(), 5u);
    EXPECT_EQ(positions[0], 1 + step);        // the decode token first
    EXPECT_EQ(positions[1], 4 * (step - 1));  // then the rest of the budget for the prompt
  }
}

TEST(Engine, FirstComeFirstServed) {
  Limits limits = kRoomy;
  limits.max_tokens = 7;
  limits.max_sequences = 3;
  World world(limits, 4);
  std::mt19937 random(11);
  std::vector<int> begun;
  for (int i = 0; i < 12; ++i) {
    Request request = request_of(random_ids(random, 1 + static_cast<int>(random() % 20)), 4);
    request.on_token = [&begun, i](int, int) {
      if (std::count(begun.begin(), begun.end(), i) == 0) begun.push_back(i);
      return true;
    };
    world.submit(request);
  }
  world.engine.run();
  EXPECT_TRUE(std::is_sorted(begun.begin(), begun.end()));
  EXPECT_EQ(begun.size(), 12u);
  EXPECT_EQ(world.engine.stats().peak_sequences, 3);
}

// A fork leaves more sequences that generate than a step has tokens: the oldest go first, and each comes to its end.
TEST(Engine, TokenBudgetHoldsForDecoding) {
  Limits limits = kRoomy;
  limits.max_tokens = 3;
  World world(limits, 4);
  Request request = request_of({1, 2}, 5);
  request.samples = 8;
  world.submit(request);
  std::vector<int> finished;
  while (world.engine.step()) {
    EXPECT_LE(world.fake.step_positions.back().size(), 3u);
    for (int i = 0; i < 8; ++i) {
      if (world.results.count({0, i}) && std::count(finished.begin(), finished.end(), i) == 0) finished.push_back(i);
    }
  }
  EXPECT_EQ(finished, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(world.engine.stats().peak_sequences, 8);
}

// The next turn of a chat computes only what is new: paged by its blocks, contiguous by its slot.
TEST(Engine, NextTurnContinuesTheCache) {
  for (int block_size : {4, 64}) {
    Limits limits = kRoomy;
    limits.n_blocks = block_size == 64 ? 2 : 64;
    World world(limits, block_size);
    std::mt19937 random(12);
    std::vector<int> prompt = random_ids(random, 9);
    world.submit(request_of(prompt, 6));
    world.engine.run();
    std::vector<int> turn = joined(joined(prompt, world.result(0).ids), {7, 8, 9});
    world.submit(request_of(turn, 5));
    world.engine.run();
    EXPECT_EQ(world.result(1).n_cached, 9 + 5) << block_size;  // all but the last token generated
    EXPECT_EQ(world.result(1).ids, alone(request_of(turn, 5), 0, 0).ids);
  }
}

TEST(Engine, CancelGivesBackWhatIsInFlight) {
  World world(kRoomy, 4);
  std::mt19937 random(13);
  Request request = request_of(random_ids(random, 10), 30);
  Text expected = alone(request, 0, 0);
  for (int i = 0; i < 12; ++i) world.submit(request);  // 8 run, 4 wait
  for (int i = 0; i < 5; ++i) world.engine.step();
  world.engine.cancel(3);
  world.engine.step();
  EXPECT_EQ(world.result(3).finish, Finish::cancelled);
  EXPECT_EQ(world.results.size(), 1u);
  world.engine.cancel_all();
  EXPECT_FALSE(world.engine.step());
  EXPECT_EQ(world.results.size(), 12u);
  EXPECT_EQ(world.engine.stats().used, 0);
  for (const auto& [key, r] : world.results) {
    EXPECT_EQ(r.finish, Finish::cancelled);
    EXPECT_TRUE(std::equal(r.ids.begin(), r.ids.end(), expected.ids.begin()));
  }
}

TEST(Engine, Percentiles) {
  EXPECT_EQ(percentile({}, 0.5), 0);
  EXPECT_EQ(percentile({3}, 0.99), 3);
  EXPECT_EQ(percentile({4, 1, 3, 2}, 0.5), 2);
  std::vector<double> values;
  for (int i = 1; i <= 100; ++i) values.push_back(i);
  EXPECT_EQ(percentile(values, 0.99), 99);
  EXPECT_EQ(percentile(values, 1), 100);
}

// ---- random schedules

int pick(std::mt19937& random, int low, int high) {
  return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
}

struct Case {
  Request request;
  int most = 1 << 30;  // on_token ends it then
  bool cancelled = false;
};

class Schedule {
 public:
  explicit Schedule(unsigned seed) : random_(seed), limits_(limits()), world_(limits_, block_size_, window_, hash_) {}

  // Submits, steps and cancels at random; returns a trace of all batches.
  uint64_t run() {
    int n = pick(random_, 1, 14);
    while (static_cast<int>(cases_.size()) < n) {
      submit();
      for (int steps = pick(random_, 0, 4); steps > 0; --steps) world_.engine.step();
      if (random_() % 16 == 0) cancel();
    }
    int guard = 0;
    while (world_.engine.step()) {
      if (++guard > 20000) {
        ADD_FAILURE() << "no end";
        break;
      }
    }
    for (size_t i = 0; i < cases_.size(); ++i) check(static_cast<int>(i));
    EXPECT_EQ(world_.engine.stats().used, 0) << "blocks leaked";
    return world_.fake.trace;
  }
  Stats stats() const { return world_.engine.stats(); }

 private:
  Limits limits() {
    Limits l;
    l.context = pick(random_, 16, 48);
    bool contiguous = random_() % 5 == 0;
    int sizes[] = {1, 2, 3, 4, 5, 16};
    block_size_ = contiguous ? l.context : sizes[random_() % 6];
    l.n_blocks = contiguous ? pick(random_, 1, 5) : pick(random_, 1, 80 / block_size_);
    l.max_tokens = pick(random_, 1, 24);
    l.max_sequences = pick(random_, 1, 6);
    l.max_logits = pick(random_, 1, 8);
    window_ = random_() % 3 == 0 ? pick(random_, 1, 12) : 0;
    hash_ = random_() % 2 ? block_hash : one_bit_hash;
    whole_ = random_() % 4 == 0;
    if (whole_) l.max_logits = pick(random_, 1, 3);
    for (int i = 0; i < 3; ++i) bases_.push_back(random_ids(random_, 48));
    return l;
  }

  void submit() {
    int most = world_.engine.max_request_tokens();
    const std::vector<int>& base = bases_[random_() % bases_.size()];
    int common = pick(random_, 1, std::min(most, 40)), own = pick(random_, 0, std::min(4, most - common));
    if (whole_ && most >= block_size_)
      common = block_size_ * pick(random_, 1, std::min(3, most / block_size_)), own = 0;
    Case c;
    c.request.prompt = joined({base.begin(), base.begin() + common}, random_ids(random_, own));
    if (random_() % 4 == 0 && !cases_.empty()) continue_earlier(&c.request.prompt, most);
    int size = static_cast<int>(c.request.prompt.size());
    c.request.n = pick(random_, 0, std::min(most - size, 20));
    c.request.samples = c.request.n > 0 && random_() % 4 == 0 ? pick(random_, 2, 4) : 1;
    c.request.sampler.temperature = random_() % 2 ? 1.0f : 0.0f;
    c.request.sampler.repeat_penalty = random_() % 4 ? 1.0f : 1.3f;
    c.request.sampler.seed = random_();
    if (random_() % 3 == 0) c.request.stop = random_ids(random_, 1);
    if (random_() % 4 == 0) c.most = pick(random_, 1, 5);
    if (random_() % 4 == 0) c.request.logits_from = pick(random_, 0, size - 1);
    std::map<int, int> counts;
    c.request.on_token = [counts, most_ = c.most](int sample, int) mutable { return ++counts[sample] < most_; };
    int number = static_cast<int>(cases_.size());
    c.request.on_logits = [this, number](int sample, int position, const float* logits) {
      logits_[{number, sample}].emplace_back(position, std::vector<float>(logits, logits + kVocab));
    };
    cases_.push_back(c);
    EXPECT_EQ(world_.submit(c.request), number);
  }

  void continue_earlier(std::vector<int>* prompt, int most) {
    auto done = world_.results.find({pick(random_, 0, static_cast<int>(cases_.size()) - 1), 0});
    if (done == world_.results.end()) return;
    const Case& before = cases_[static_cast<size_t>(done->first.first)];
    *prompt = joined(before.request.prompt, done->second.ids);
    if (static_cast<int>(prompt->size()) < most) prompt->push_back(1);
  }

  void cancel() {
    int victim = pick(random_, 0, static_cast<int>(cases_.size()) - 1);
    world_.engine.cancel(victim);
    cases_[static_cast<size_t>(victim)].cancelled = true;
  }

  void check(int number) {
    const Case& c = cases_[static_cast<size_t>(number)];
    for (int i = 0; i < c.request.samples; ++i) {
      Text expected = alone(c.request, i, window_, c.most);
      const Result& r = world_.result(number, i);
      bool ended_early = c.cancelled && r.finish == Finish::cancelled;
      if (ended_early) {
        ASSERT_LE(r.ids.size(), expected.ids.size());
        expected.ids.resize(r.ids.size());
      } else {
        EXPECT_EQ(r.finish, expected.finish);
      }
      EXPECT_EQ(r.ids, expected.ids) << "request " << number << " sample " << i;
      check_logits(c.request, logits_[{number, i}], expected, ended_early, r.n_cached);
    }
  }

  // In order, without a gap, each equal to the reference. A sample that forked begins at the prompt's last position.
  void check_logits(const Request& request, const std::vector<std::pair<int, std::vector<float>>>& got,
                    const Text& expected, bool ended_early, int n_cached) {
    int last = static_cast<int>(request.prompt.size()) - 1;
    int next = request.logits_from < 0 || n_cached > last ? last : request.logits_from;
    for (const auto& [position, logits] : got) {
      ASSERT_EQ(position, next++);
      EXPECT_EQ(logits, expected.logits[static_cast<size_t>(position)]);
    }
    EXPECT_TRUE(ended_early || next == static_cast<int>(expected.logits.size()));
  }

  std::mt19937 random_;
  int block_size_ = 0, window_ = 0;
  bool whole_ = false;  // prompts of whole blocks, that wait for rows of logits: many copies at once
  BlockHash hash_ = block_hash;
  std::vector<std::vector<int>> bases_;
  Limits limits_;
  std::vector<Case> cases_;
  std::map<std::pair<int, int>, std::vector<std::pair<int, std::vector<float>>>> logits_;
  World world_;
};

TEST(Engine, RandomSchedules) {
  int64_t preemptions = 0, copies = 0, cached = 0, evicted = 0;
  int shared = 0;
  for (unsigned seed = 0; seed < 2000 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Schedule schedule(seed);
    uint64_t trace = schedule.run();
    EXPECT_TRUE(seed % 50 != 0 || Schedule(seed).run() == trace) << "not deterministic";
    Stats stats = schedule.stats();
    preemptions += stats.preemptions;
    copies += stats.copies;
    cached += stats.cached_tokens;
    evicted += stats.evicted;
    shared = std::max(shared, stats.peak_shared);
    EXPECT_GE(stats.waste, 0);
    EXPECT_LT(stats.waste, 1);
  }
  // The schedules reach all of it.
  EXPECT_GT(preemptions, 1000);
  EXPECT_GT(copies, 500);
  EXPECT_GT(cached, 10000);
  EXPECT_GT(evicted, 1000);
  EXPECT_GT(shared, 5);
}

}  // namespace
