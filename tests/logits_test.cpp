// The classifier: rows that are asked for, scaled and capped, on the host when the step is done.
#include "kernels/logits.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "device_memory.h"
#include "kernels/threads.h"

namespace {

TEST(Logits, AreThoseOfTheRowsAskedFor) {
  constexpr int T = 4, dim = 24, vocab = 37;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> h(T * dim), w(vocab * dim);
  for (std::vector<float>* numbers : {&h, &w})
    for (float& number : *numbers) number = normal(random);
  const WeightType floats = *find_weight_type("f32");
  std::vector<std::byte> packed(packed_bytes(floats, vocab, dim));
  for (int p = 0; p < panels(vocab); p++) pack({floats, vocab, dim, w.data()}, false, p, packed.data());
  const Buffer<std::byte> weight = device_copy(packed);
  Model model;
  model.config.dim = dim, model.config.vocab_size = vocab;
  model.config.logit_scale = 0.5f, model.config.logit_softcap = 2;
  model.lm_head.weight = {floats, vocab, dim, 1, weight.data()};

  Limits limits;
  limits.max_tokens = T, limits.max_logits = 2;
  Arena memory(1 << 20);
  Workspace workspace;
  const LogitsStage stage(memory, workspace, model.config, limits);
  workspace.allocate(memory);
  const int rows[] = {1, 3};
  Batch batch;
  batch.n_tokens = T, batch.n_logits = 2, batch.logit_rows = rows;
  DeviceBatch on_device;
  const Batch& uploaded = on_device.upload(batch);
  Buffer<float> device_h = device_copy(h);
  Threads(2).run(2, [&](const Team& team) {
    stage.forward(model, {team, model.config, uploaded, batch, {}, nullptr, device_h.data(), nullptr, workspace, {}});
  });
  for (size_t r = 0; r < 2; r++) {
    const float* row = h.data() + static_cast<size_t>(rows[r]) * dim;
    for (size_t j = 0; j < vocab; j++) {
      double sum = 0, size = 0;
      for (size_t i = 0; i < dim; i++) {
        const double term = double(row[i]) * double(w[j * dim + i]);
        sum += term, size += std::fabs(term);
      }
      // A rounding for each term, and those of the cap, whose slope is at most 1.
      EXPECT_NEAR(double(stage.host()[r * vocab + j]), 2 * std::tanh(sum / 4), (dim + 16) * 0x1p-24 * size + 0x1p-21);
    }
  }
}

}  // namespace
