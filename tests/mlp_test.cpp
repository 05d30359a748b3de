// The block of experts against its definition in float64: router, experts and shared experts.
#include "kernels/mlp.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <random>

#include "kernels/threads.h"
#include "routing.h"

namespace {

using Vec = std::vector<double>;

// `groups` float32 matrices [n, k] that follow each other, each in a memory page of its own, which can be closed: who
// reads it then crashes.
class Pages {
 public:
  static constexpr size_t PAGE = 4096;
  Pages(int groups, int n, int k, std::mt19937* random) : n_(n), k_(k), bytes_(packed_bytes(FLOATS, n, k)) {
    std::normal_distribution<float> normal(0, 1.5f / std::sqrt(static_cast<float>(k)));
    for (size_t i = 0; i < area(groups * n, k); i++) values_.push_back(normal(*random));
    size_ = bytes_ * static_cast<size_t>(groups);
    packed_ = static_cast<std::byte*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    matrix_.type = FLOATS, matrix_.n = n, matrix_.k = k, matrix_.groups = groups, matrix_.data = packed_;
    for (int g = 0; g < groups; g++) {
      TensorView view;
      view.type = FLOATS, view.n = n, view.k = k, view.data = values_.data() + area(g * n, k);
      for (int p = 0; p < panels(n); p++) pack(view, false, p, packed_ + static_cast<size_t>(g) * bytes_);
    }
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { munmap(packed_, size_); }

  void close(size_t group) const {
    ASSERT_EQ(bytes_ % PAGE, 0u);
    ASSERT_EQ(mprotect(packed_ + group * bytes_, bytes_, PROT_NONE), 0);
  }
  Linear linear() const { return {matrix_, nullptr}; }
  Vec times(const Vec& x, size_t group = 0) const {
    Vec y(static_cast<size_t>(n_), 0.0);
    const float* w = values_.data() + group * area(n_, k_);
    for (size_t r = 0; r < y.size(); r++)
      for (size_t i = 0; i < x.size(); i++) y[r] += static_cast<double>(w[r * x.size() + i]) * x[i];
    return y;
  }

 private:
  static inline const WeightType FLOATS = *find_weight_type("f32");
  int n_, k_;
  size_t bytes_, size_;        // of a group, of all
  std::vector<float> values_;  // [groups, n, k]
  std::byte* packed_;
  Matrix matrix_;
};

struct Mlps {
  Pages gate, up, down;
  Mlps(int groups, int dim, int hidden, std::mt19937* random)
      : gate(groups, hidden, dim, random), up(groups, hidden, dim, random), down(groups, dim, hidden, random) {}
  Mlp mlp() const { return {gate.linear(), up.linear(), down.linear()}; }
  void close(size_t group) const {
    for (const Pages* pages : {&gate, &up, &down}) pages->close(group);
  }
  // y += weight * mlp(x)
  void add(const Vec& x, size_t group, double weight, Vec* y) const {
    const Vec g = gate.times(x, group);
    Vec h = up.times(x, group);
    for (size_t i = 0; i < h.size(); i++) h[i] *= g[i] / (1 + std::exp(-g[i]));
    const Vec out = down.times(h, group);
    for (size_t i = 0; i < out.size(); i++) (*y)[i] += weight * out[i];
  }
};

struct Experts {
  int E, k, shared, T;
};

// x of the stage, and its float64 twin; the experts that no token hits are closed before it runs. 32 x 32 floats fill a
// page.
void check_experts(const Experts& shape) {
  const int dim = 32, hidden = 32, T = shape.T;
  std::mt19937 random(static_cast<unsigned>(shape.E + T));
  Config c;
  c.dim = dim;
  c.hidden_dim = c.moe_intermediate_size = hidden;
  c.n_routed_experts = shape.E;
  c.num_experts_per_tok = shape.k;
  c.n_shared_experts = shape.shared;
  c.moe_layers = {1};
  c.norm_topk_prob = true;
  c.routed_scaling_factor = 2.5f;
  const Pages router(1, shape.E, dim, &random);
  const Mlps shared(1, dim, std::max(1, shape.shared) * hidden, &random), experts(shape.E, dim, hidden, &random);
  Layer layer;
  layer.router = router.linear();
  if (shape.shared) layer.shared = shared.mlp();
  layer.experts = experts.mlp();
  std::vector<float> h(area(T, dim)), y(area(T, dim));
  for (float& v : h) v = std::normal_distribution<float>()(random);

  std::vector<Vec> expected;
  std::vector<bool> hit(static_cast<size_t>(shape.E));
  for (int t = 0; t < T; t++) {
    const Vec in(h.begin() + t * dim, h.begin() + (t + 1) * dim), logits = router.times(in);
    const Choice choice = reference(c, nullptr, {logits.begin(), logits.end()});
    expected.emplace_back(dim, 0.0);
    for (size_t j = 0; j < choice.experts.size(); j++) {
      const auto e = static_cast<size_t>(choice.experts[j]);
      experts.add(in, e, choice.weights[j], &expected.back());
      hit[e] = true;
    }
    if (shape.shared) shared.add(in, 0, 1, &expected.back());
  }
  for (size_t e = 0; e < hit.size(); e++)
    if (!hit[e]) experts.close(e);

  Limits limits;
  limits.max_tokens = T;
  Arena plan, memory(1 << 20);
  Workspace planned, workspace;
  MlpStage(plan, planned, c, limits);
  const MlpStage stage(memory, workspace, c, limits);
  EXPECT_EQ(memory.bytes(), plan.bytes());
  workspace.allocate(memory);
  Batch batch;
  batch.n_tokens = T;
  Threads threads(2);
  threads.run(2, [&](const Team& team) {
    stage.forward(0, layer, {team, c, batch, batch, {}, nullptr, h.data(), y.data(), workspace, {}});
  });
  for (int t = 0; t < T; t++)
    for (size_t i = 0; i < dim; i++)  // sums of 32 products, twice: far fewer roundings than 128, of values to 8
      EXPECT_NEAR(static_cast<double>(y[area(t, dim) + i]), expected[static_cast<size_t>(t)][i], 8 * 128 * 0x1p-24);
}

// One token; several; an expert without tokens; all experts for every token; one expert; with and without shared ones.
TEST(MlpStage, SumsTheChosenExpertsAndReadsNoOther) {
  for (const Experts& shape :
       {Experts{8, 2, 0, 1}, {8, 2, 2, 1}, {8, 2, 1, 3}, {40, 3, 1, 7}, {5, 5, 0, 4}, {1, 1, 1, 6}}) {
    SCOPED_TRACE(testing::Message() << shape.E << " experts, best " << shape.k << ", " << shape.T << " tokens");
    check_experts(shape);
  }
}

}  // namespace
