// The small layers against float64, at widths that do and do not fill a register.
#include "kernels/layers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "device_memory.h"
#include "tiny_model.h"

namespace {

template <class Stage>
void on_team(Stage stage) {
  test_threads().run(2, [&](const Team& team) { stage(team); });
}

std::vector<float> normal(size_t n, unsigned seed, float deviation = 1, float mean = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(mean, deviation);
  std::vector<float> x(n);
  for (float& v : x) v = distribution(random);
  return x;
}

constexpr double EPS = 0x1p-24;  // float32: half a unit in the last place

class Widths : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Layers, Widths, testing::Values(1, 2, 7, 8, 15, 16, 17, 64, 80, 576, 1000));

TEST_P(Widths, Norms) {
  const int n = GetParam(), rows = 3, stride = n + 5;
  const auto x = normal(static_cast<size_t>(rows * stride), 1, 2, 3), w = normal(static_cast<size_t>(n), 2),
             b = normal(static_cast<size_t>(n), 3);
  const float eps = 1e-5f;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (const bool bias : {false, true}) {
      Buffer<float> normed(static_cast<size_t>(rows * n));
      const auto device_x = device_copy(x), device_w = device_copy(w), device_b = device_copy(b);
      on_team([&](const Team& team) {
        norm(team, kind, eps, {device_w.data(), bias ? device_b.data() : nullptr}, device_x.data(), stride, rows, n,
             normed.data(), n);
      });
      const std::vector<float> out = host_copy(normed);
      for (int r = 0; r < rows; r++) {
        const float* in = x.data() + r * stride;
        double mean = 0, squares = 0;
        for (int i = 0; i < n; i++) mean += static_cast<double>(in[i]) / n;
        if (kind == NormKind::rms) mean = 0;
        for (int i = 0; i < n; i++) squares += (in[i] - mean) * (in[i] - mean);
        const double factor = 1 / std::sqrt(squares / n + static_cast<double>(eps));
        for (int i = 0; i < n; i++) {
          const auto at = static_cast<size_t>(i);
          const double expected =
              (in[i] - mean) * factor * static_cast<double>(w[at]) + (bias ? static_cast<double>(b[at]) : 0.0);
          // Sums of n terms lose at most n roundings, but the lanes cut that by their number; inputs are up to
          // about 12. A layer norm of one element is 0 / sqrt(eps): the mean's rounding is divided by 3e-3.
          EXPECT_NEAR(static_cast<double>(out[static_cast<size_t>(r * n + i)]), expected,
                      (static_cast<double>(n) / 4 + 12) * EPS * 12 * std::max(1.0, factor) *
                          std::max(1.0, std::fabs(static_cast<double>(w[at]))));
        }
      }
    }
  }
}

TEST_P(Widths, Activations) {
  const int n = GetParam(), rows = 2;
  auto gate = normal(static_cast<size_t>(rows * n), 4, 4), up = normal(static_cast<size_t>(rows * n), 5);
  const float extremes[] = {0.0f, -0.0f, 100, -100, 1e30f, -1e30f, 1e-30f, 88.5f, -88.5f};
  for (size_t i = 0; i < std::min(gate.size(), std::size(extremes)); i++) gate[i] = extremes[i];
  const auto exact = [](Activation a, double x) {
    if (a == Activation::silu) return x / (1 + std::exp(-x));
    if (a == Activation::gelu) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  for (const Activation a : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    const auto device_gate = device_copy(gate), device_up = device_copy(up);
    Buffer<float> device_gated(gate.size()), device_plain(gate.size());
    on_team([&](const Team& team) {
      activate(team, a, 0, device_gate.data(), device_up.data(), rows, n, device_gated.data());
      activate(team, a, 0, nullptr, device_gate.data(), rows, n, device_plain.data());
    });
    const std::vector<float> gated = host_copy(device_gated), plain = host_copy(device_plain);
    for (size_t i = 0; i < gate.size(); i++) {
      const double expected = exact(a, static_cast<double>(gate[i]));
      // Where 1 + tanh or 1 + erf cancels, the error is absolute: a few roundings of 1, times |x|.
      const double bound = 16 * EPS * std::max(std::fabs(static_cast<double>(gate[i])), 1e-30);
      EXPECT_NEAR(static_cast<double>(plain[i]), expected, bound) << gate[i];
      EXPECT_NEAR(static_cast<double>(gated[i]), expected * static_cast<double>(up[i]),
                  2 * bound * std::max(1.0, std::fabs(static_cast<double>(up[i]))));
    }
  }
}

// gpt-oss's: (clamp(up) + 1) g sigmoid(1.702 g), g = min(gate, limit); a NaN of either input reaches the output.
TEST_P(Widths, ClampedActivation) {
  const int n = GetParam(), rows = 2;
  const float limit = 1.5f;
  auto gate = normal(static_cast<size_t>(rows * n), 4, 4), up = normal(static_cast<size_t>(rows * n), 5, 2);
  gate[0] = 1e30f;
  gate.back() = -1e30f;
  std::vector<float> out(gate.size());
  const auto run = [&] {
    const auto device_gate = device_copy(gate), device_up = device_copy(up);
    Buffer<float> device_out(gate.size());
    on_team([&](const Team& team) {
      activate(team, Activation::swiglu_oai, limit, device_gate.data(), device_up.data(), rows, n, device_out.data());
    });
    out = host_copy(device_out);
  };
  run();
  for (size_t i = 0; i < gate.size(); i++) {
    const double g = std::min<double>(gate[i], limit), u = std::clamp<double>(up[i], -limit, limit);
    const double expected = (u + 1) * g / (1 + std::exp(-1.702 * g));
    // A few roundings of each factor; those of 1.702 g count as often as g is large, while the sigmoid is not yet 0.
    EXPECT_NEAR(static_cast<double>(out[i]), expected, 64 * EPS * (2.5 * std::min(std::fabs(g), 60.0) + 1e-30)) << g;
  }
  gate[0] = std::nanf("");
  up.back() = std::nanf("");
  run();
  EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out.back()));
}

TEST(Layers, AnglesOfTokens) {
  const int positions[] = {0, 5, 100000}, T = 3;
  const std::vector<float> inv_freq = {1, 0.3f, 0.01f, 1e-4f};
  const Buffer<float> device_inv_freq = device_copy(inv_freq);
  Buffer<float> device_cos(T * inv_freq.size()), device_sin(T * inv_freq.size());
  Batch batch;
  batch.n_tokens = T, batch.positions = positions;
  DeviceBatch on_device;
  const Batch& uploaded = on_device.upload(batch);
  on_team([&](const Team& team) {
    rope_angles(team, uploaded, device_inv_freq.data(), 4, 1.25f, device_cos.data(), device_sin.data());
  });
  const std::vector<float> cos = host_copy(device_cos), sin = host_copy(device_sin);
  for (size_t i = 0; i < cos.size(); i++) {
    // The angle is a float32 product by definition; its cosine is exact to a rounding.
    const auto angle = static_cast<double>(static_cast<float>(positions[i / 4]) * inv_freq[i % 4]);
    EXPECT_NEAR(static_cast<double>(cos[i]), 1.25 * std::cos(angle), 8 * EPS);
    EXPECT_NEAR(static_cast<double>(sin[i]), 1.25 * std::sin(angle), 8 * EPS);
  }
}

// Bit for bit a norm of y, a multiply-add by hand, and a norm of the sum; either norm may be absent.
TEST_P(Widths, AStageIsAddedAndTheSumNormed) {
  const int n = GetParam(), rows = 3;
  const auto elements = static_cast<size_t>(rows * n);
  const auto x = normal(elements, 1, 2, 3), y = normal(elements, 2), w = normal(static_cast<size_t>(n), 3),
             post_w = normal(static_cast<size_t>(n), 4);
  const auto device_w = device_copy(w), device_post = device_copy(post_w);
  const float eps = 1e-5f, scale = 0.3f;
  for (const bool has_post : {false, true})
    for (const bool has_next : {false, true}) {
      const Norm post{has_post ? device_post.data() : nullptr, nullptr, n},
          next{has_next ? device_w.data() : nullptr, nullptr, n};
      const auto normed = [&](const Norm& weights, const std::vector<float>& in) {
        if (!weights) return in;
        const auto device_in = device_copy(in);
        Buffer<float> out(elements);
        on_team([&](const Team& team) {
          norm(team, NormKind::layer, eps, weights, device_in.data(), n, rows, n, out.data(), n);
        });
        return host_copy(out);
      };
      std::vector<float> sum = x;
      const std::vector<float> added = normed(post, y);
      for (size_t i = 0; i < elements; i++) sum[i] += scale * added[i];
      auto device_x = device_copy(x), device_y = device_copy(y);
      Buffer<float> out(elements);
      on_team([&](const Team& team) {
        add_and_norm(team, NormKind::layer, eps, post, next, scale, device_x.data(), device_y.data(), rows, n,
                     out.data());
      });
      EXPECT_EQ(host_copy(device_x), sum);
      EXPECT_EQ(host_copy(out), normed(next, sum));
    }
}

TEST(Layers, EmbeddingAddsThePosition) {
  constexpr int vocab = 5, dim = 19;
  const auto w = normal(vocab * dim, 7), positions = normal(4 * dim, 8);
  const WeightType floats = *find_weight_type("f32");
  const TensorView view{floats, vocab, dim, w.data()};
  std::vector<std::byte> packed(packed_bytes(floats, vocab, dim));
  for (int p = 0; p < panels(vocab); p++) pack(view, false, p, packed.data());
  const Buffer<std::byte> weight = device_copy(packed);
  const Buffer<float> device_positions = device_copy(positions);
  const Matrix matrix{floats, vocab, dim, 1, weight.data()};
  const int tokens[] = {4, 0, 4}, at[] = {0, 3, 1};
  Buffer<float> embedded(3 * dim);
  Batch batch;
  batch.n_tokens = 3;
  batch.tokens = tokens;
  batch.positions = at;
  DeviceBatch on_device;
  const Batch& uploaded = on_device.upload(batch);
  on_team([&](const Team& team) { embed(team, matrix, device_positions.data(), uploaded, 2, embedded.data()); });
  const std::vector<float> x = host_copy(embedded);
  for (size_t t = 0; t < 3; t++)
    for (size_t i = 0; i < dim; i++)
      EXPECT_EQ(x[t * dim + i],
                2 * w[static_cast<size_t>(tokens[t]) * dim + i] + positions[static_cast<size_t>(at[t]) * dim + i]);
}

TEST(Layers, ScaleAndCap) {
  Buffer<float> capped = device_copy<float>({0, 1, -50, 1e6f});
  on_team([&](const Team& team) { scale_and_cap(team, capped.data(), capped.size(), 0.5f, 30); });
  const std::vector<float> x = host_copy(capped);
  EXPECT_FLOAT_EQ(x[1], 30 * std::tanh(0.5f / 30));
  EXPECT_FLOAT_EQ(x[2], 30 * std::tanh(-25.0f / 30));
  EXPECT_FLOAT_EQ(x[3], 30);
}

}  // namespace
