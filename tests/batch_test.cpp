// A step on the device: its stages see each batch as it is, however often they were called for it.
#include "kernels/batch.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "device_memory.h"
#include "kernels/layers.h"
#include "kernels/threads.h"

namespace {

constexpr int VOCAB = 40, DIM = 32;

// The step looks up the embeddings of its tokens, of which all elements are the token itself.
class Steps {
 public:
  explicit Steps(const Limits& limits) : device_(limits) {
    std::vector<float> w(VOCAB * DIM);
    for (size_t i = 0; i < w.size(); i++) w[i] = static_cast<float>(i / DIM);
    const WeightType floats = *find_weight_type("f32");
    std::vector<std::byte> packed(packed_bytes(floats, VOCAB, DIM));
    for (int p = 0; p < panels(VOCAB); p++) pack({floats, VOCAB, DIM, w.data()}, false, p, packed.data());
    memory_ = device_copy(packed);
    embeddings_ = {floats, VOCAB, DIM, 1, memory_.data()};
  }

  // The tokens that a step of these found, the first elements of its rows; sequences have n_tokens / n_sequences each.
  std::vector<int> run(const std::vector<int>& tokens, int n_sequences, int max_blocks = 1) {
    std::vector<int> table(static_cast<size_t>(n_sequences * max_blocks));
    Batch batch;
    batch.n_tokens = static_cast<int>(tokens.size()), batch.n_sequences = n_sequences, batch.max_blocks = max_blocks;
    batch.tokens = batch.positions = tokens.data(), batch.block_table = table.data();
    device_.run(batch, threads_, 2, [&](const Team& team, const Batch& on_device) {
      if (team.rank == 0) calls++;
      embed(team, embeddings_, nullptr, on_device, 1, x_.data());
    });
    const std::vector<float> x = host_copy(x_);
    std::vector<int> found;
    for (size_t i = 0; i < tokens.size(); i++) found.push_back(static_cast<int>(x[i * DIM]));
    return found;
  }

  // How many of n steps of one sequence, of these sizes, called the stages.
  int calls_of(int n, int max_blocks = 1) {
    const int before = calls;
    for (int i = 0; i < n; i++) EXPECT_EQ(run({i}, 1, max_blocks), std::vector{i});
    return calls - before;
  }

  bool on_cpu() {
    const Batch batch;
    return &device_.upload(batch) == &batch;
  }

  std::atomic<int> calls = 0;

 private:
  Threads threads_{2};
  DeviceBatch device_;
  Buffer<std::byte> memory_;
  Matrix embeddings_;
  Buffer<float> x_{8 * DIM};
};

TEST(DeviceBatch, StepsSeeTheirOwnTokens) {
  Steps steps({});
  using Tokens = std::vector<int>;
  EXPECT_EQ(steps.run({1, 2, 3, 4, 5}, 1), (Tokens{1, 2, 3, 4, 5}));  // prompts, twice of the same sizes
  EXPECT_EQ(steps.run({5, 6, 7, 8, 9}, 1), (Tokens{5, 6, 7, 8, 9}));
  for (int i = 0; i < 5; i++) EXPECT_EQ(steps.run({i, i + 1}, 2), (Tokens{i, i + 1}));
  EXPECT_EQ(steps.run({7, 8, 9}, 3), (Tokens{7, 8, 9}));  // a third sequence
  EXPECT_EQ(steps.run({3, 4, 5}, 3), (Tokens{3, 4, 5}));
  EXPECT_EQ(steps.run({6, 7, 8}, 3, 100), (Tokens{6, 7, 8}));  // a table that takes other memory
  for (int i = 0; i < 5; i++) EXPECT_EQ(steps.run({i, 0, 1}, 3), (Tokens{i, 0, 1}));
}

// The first step of its sizes is a plain one, the second is captured; then its graph is launched.
TEST(DeviceBatch, DecodeIsCapturedOnceForItsSizes) {
  Steps steps({});
  if (steps.on_cpu()) GTEST_SKIP() << "the CPU calls the stages in every step";
  EXPECT_EQ(steps.calls_of(9), 2);
  EXPECT_EQ(steps.calls_of(9, 2), 2) << "the block table's rows are longer";
  EXPECT_EQ(steps.calls_of(9), 2) << "only the latest graph is kept";
}

// What they launch may depend on what their arrays hold.
TEST(DeviceBatch, PromptsAreNotCaptured) {
  Steps steps({});
  for (int i = 0; i < 4; i++) steps.run({1, 2, 3}, 1);
  EXPECT_EQ(steps.calls, 4);
}

TEST(DeviceBatch, ExpandedMlaIsNotCaptured) {
  Limits limits;
  limits.mla_form = MlaForm::expanded;
  EXPECT_EQ(Steps(limits).calls_of(9), 9);
}

TEST(DeviceBatch, AStepThatThrowsLeavesTheDeviceAsItWas) {
  DeviceBatch device;
  Threads threads(1);
  const int token = 0;
  Batch batch;
  batch.n_tokens = batch.n_sequences = 1, batch.tokens = &token;
  for (int i = 0; i < 3; i++)
    EXPECT_THROW(device.run(batch, threads, 1, [](const Team&, const Batch&) { throw std::runtime_error("no"); }),
                 std::runtime_error);
  EXPECT_EQ(Steps({}).calls_of(1), 1);
}

}  // namespace
