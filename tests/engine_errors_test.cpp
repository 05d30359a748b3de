// What goes wrong with one sample or one step costs no other sample anything.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <new>
#include <random>

#include "host/engine.h"
#include "host/error.h"
#include "kernels/threads.h"

namespace {

int allocations_left = -1;  // the one that makes this 0 fails; negative: none does

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  if (allocations_left > 0 && --allocations_left == 0) throw std::bad_alloc();
  return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace {

constexpr int VOCAB = 8;

// Logits that depend on the token alone: after token t comes t + 1. `bad` is a token after which they are NaN.
struct Counting {
  int bad = -1;
  int throw_at_step = -1;
  int steps = 0;
  std::vector<float> logits = {};

  const float* forward(const Batch& batch) {
    if (steps++ == throw_at_step) throw std::runtime_error("the step broke");
    logits.assign(static_cast<size_t>(batch.n_logits) * VOCAB, 0);
    for (int i = 0; i < batch.n_logits; i++) {
      const int token = batch.tokens[batch.logit_rows[i]];
      logits[static_cast<size_t>(i * VOCAB + (token + 1) % VOCAB)] = token == bad ? NAN : 1;
    }
    return logits.data();
  }
};

struct Ends {
  std::map<int, std::vector<Result>> of = {};  // request -> its samples' results

  Request request(std::vector<int> prompt, int n, int samples = 1) {
    Request r;
    r.prompt = std::move(prompt);
    r.n = n;
    r.samples = samples;
    r.on_finish = [this](const Result& result) { of[result.request].push_back(result); };
    return r;
  }
};

struct Host {
  Counting model;
  Threads threads{2};
  Engine engine;

  explicit Host(Counting counting, int block_size = 4, int n_blocks = 32)
      : model(std::move(counting)),
        engine([this](const Batch& batch, int) { return model.forward(batch); }, threads,
               Limits{.max_tokens = 16, .max_sequences = 4, .max_logits = 16, .context = 32, .n_blocks = n_blocks},
               block_size, VOCAB, 0) {}
};

TEST(EngineErrors, LogitsThatAreNoNumbersEndTheirSampleAlone) {
  Host run({.bad = 3});
  Ends ends;
  run.engine.submit(ends.request({0}, 3));     // 1 2 3
  run.engine.submit(ends.request({1}, 9));     // 2 3, and then NaN
  run.engine.submit(ends.request({3}, 2, 3));  // NaN at once, for each sample
  run.engine.submit(ends.request({4, 5}, 2));  // 6 7
  run.engine.run();
  EXPECT_EQ(ends.of[0][0].finish, Finish::length);
  EXPECT_EQ(ends.of[1][0].finish, Finish::error);
  EXPECT_EQ(ends.of[1][0].ids, (std::vector<int>{2, 3}));
  EXPECT_NE(ends.of[1][0].error.find("not finite"), std::string::npos);
  ASSERT_EQ(ends.of[2].size(), 3u);
  for (const Result& r : ends.of[2]) EXPECT_EQ(r.finish, Finish::error);
  EXPECT_EQ(ends.of[3][0].ids, (std::vector<int>{6, 7}));
  EXPECT_TRUE(ends.of[3][0].error.empty());
  EXPECT_EQ(run.engine.unfinished(), 0);
  EXPECT_EQ(run.engine.stats().used, 0);
}

TEST(EngineErrors, WhatOnLogitsThrowsEndsItsSampleAlone) {
  for (const int at : {0, 2, 3, 4}) {  // in the prompt, at its end, later
    Host run({});
    Ends ends;
    Request r = ends.request({0, 1, 2, 3}, 3, 2);
    r.logits_from = 0;
    std::vector<int> seen;
    r.on_logits = [&](int sample, int position, const float*) {
      if (sample == 0) seen.push_back(position);
      if (sample == 0 && position == at) fail("no more of these");
    };
    run.engine.submit(std::move(r));
    run.engine.submit(ends.request({0}, 3));
    run.engine.run();
    ASSERT_EQ(ends.of[0].size(), 2u);
    for (const Result& result : ends.of[0]) {
      EXPECT_EQ(result.finish, result.sample == 0 ? Finish::error : Finish::length) << at;
      EXPECT_EQ(result.error, result.sample == 0 ? "no more of these" : "");
    }
    EXPECT_EQ(seen.back(), at) << "nothing after the error";
    EXPECT_EQ(ends.of[1][0].ids, (std::vector<int>{1, 2, 3}));
    EXPECT_EQ(run.engine.stats().used, 0);
  }
}

TEST(EngineErrors, AStepThatThrowsEndsThoseInItAlone) {
  for (const int at : {0, 1, 2}) {
    Host run({.throw_at_step = at});
    Ends ends;
    run.engine.submit(ends.request({0, 1, 2, 3, 4, 5}, 2, 2));
    for (int i = 0; i < at; i++) run.engine.step();
    run.engine.submit(ends.request({0}, 3));
    EXPECT_TRUE(run.engine.step());
    run.engine.submit(ends.request({4}, 2));
    run.engine.run();
    EXPECT_EQ(ends.of[2][0].ids, (std::vector<int>{5, 6})) << at;
    int failed = 0, finished = 0;
    for (const auto& [request, results] : ends.of)
      for (const Result& r : results) {
        r.finish == Finish::error ? failed++ : finished++;
        EXPECT_EQ(r.error, r.finish == Finish::error ? "the step broke" : "");
      }
    EXPECT_GT(failed, 0);
    EXPECT_EQ(failed + finished, 4);
    EXPECT_EQ(run.engine.stats().used, 0) << "no block is lost";
  }
}

// Memory that is not there, at each place in turn: a request that could not be submitted is not there, at most a step's
// samples end with the error, and all others come out as ever, whatever the pool's size.
TEST(EngineErrors, NoMemoryCostsAStepAtMost) {
  for (const int n_blocks : {32, 9})
    for (int place = 1, missing = 1; missing; place++) {
      Host run({}, 4, n_blocks);
      Ends ends;
      std::vector<Request> requests;
      for (int i = 0; i < 7; i++) requests.push_back(ends.request({i, i + 1, 0, 1, 2, i}, 5, i == 2 ? 3 : 1));
      for (Request& r : requests)
        r.on_finish = [inner = r.on_finish](const Result& result) {  // what the test itself needs is there
          const int left = std::exchange(allocations_left, -1);
          inner(result);
          allocations_left = left;
        };
      int submitted = 0;
      allocations_left = place;
      for (Request& r : requests) try {
          run.engine.submit(std::move(r));
          submitted++;
        } catch (const std::bad_alloc&) {
        }
      run.engine.run();
      missing = allocations_left == 0;
      allocations_left = -1;
      EXPECT_EQ(static_cast<int>(ends.of.size()), submitted) << place;
      int failed = 0;
      for (const auto& [number, results] : ends.of)
        for (const Result& r : results) {
          if (r.finish == Finish::error) {
            EXPECT_EQ(r.error, "out of memory");
            failed++;
          } else {
            ASSERT_EQ(r.ids.size(), 5u) << place;
            for (size_t i = 1; i < 5; i++) EXPECT_EQ(r.ids[i], (r.ids[0] + static_cast<int>(i)) % VOCAB) << place;
          }
        }
      EXPECT_LE(failed, 4) << place << ": more than a step";
      EXPECT_GE(submitted, 6) << place;
      EXPECT_EQ(run.engine.stats().used, 0) << place << ": a block is lost";
    }
}

// What the caller's own callbacks throw is the caller's: a closed pipe ends the run.
TEST(EngineErrors, TheOtherCallbacksThrowOutOfStep) {
  for (const bool in_finish : {false, true}) {
    Host run({});
    Request r;
    r.prompt = {0};
    r.n = 1;
    r.on_token = [&](int, int) -> bool { return in_finish ? true : throw 7; };
    r.on_finish = [&](const Result&) { throw 7; };
    run.engine.submit(std::move(r));
    EXPECT_THROW(run.engine.run(), int);
  }
}

// Percentiles of millions of durations, within 1 % of those of the sorted list.
TEST(Durations, PercentilesStayCloseInBoundedMemory) {
  EXPECT_EQ(Durations().percentile(0.5), 0);
  std::mt19937 generator(1);
  std::lognormal_distribution<double> spread(-6, 2);
  Durations durations;
  std::vector<double> all;
  for (int i = 0; i < 100000; i++) {
    all.push_back(spread(generator));
    durations.add(all.back());
  }
  for (const double p : {0.01, 0.5, 0.9, 0.99, 1.0}) {
    const double exact = percentile(all, p);
    EXPECT_NEAR(durations.percentile(p), exact, 0.01 * exact) << p;
  }
  EXPECT_EQ(durations.count(), 100000);
  for (const double odd : {0.0, 1e-300, 1e300, HUGE_VAL}) durations.add(odd);
  EXPECT_GT(durations.percentile(1), 1e4);
}

}  // namespace
