// Expert routing and the sum of the experts against the papers' definitions, written out with a full sort in float64.
#include "kernels/mlp.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/experts.h"
#include "kernels/threads.h"

namespace {

// route by a team of two, or one.
void route_all(const Config& c, const float* bias, int T, float* scores, int* chosen, float* weights) {
  Threads threads(2);
  std::vector<float> scratch(area(T, c.n_routed_experts + c.n_group));
  threads.run(1 + T % 2, [&](const Team& team) { route(team, c, bias, T, scores, chosen, weights, scratch.data()); });
}

struct Choice {
  std::vector<int> experts;
  std::vector<double> weights;
};

// Indices of values, largest first; ties to the lower index.
std::vector<int> ranking(const std::vector<double>& values) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)]; });
  return order;
}

Choice reference(const Config& c, const float* bias, const std::vector<float>& logits) {
  const auto E = static_cast<size_t>(c.n_routed_experts), size = E / static_cast<size_t>(c.n_group);
  std::vector<double> scores, choice;
  double total = 0;
  for (float l : logits) total += std::exp(static_cast<double>(l));
  for (float l : logits) {
    const double e = std::exp(static_cast<double>(l));
    scores.push_back(c.scoring_func == Scoring::softmax ? e / total : e / (1 + e));
  }
  choice = scores;
  for (size_t e = 0; bias && e < E; e++) choice[e] += static_cast<double>(bias[e]);
  std::vector<double> worth;
  for (size_t g = 0; g < E / size; g++) {
    std::vector<double> group(choice.begin() + static_cast<long>(g * size),
                              choice.begin() + static_cast<long>((g + 1) * size));
    std::sort(group.rbegin(), group.rend());
    worth.push_back(c.group_score == GroupScore::max ? group[0] : group[0] + group[1]);
  }
  std::vector<int> groups = ranking(worth);
  groups.resize(static_cast<size_t>(c.topk_group));
  Choice out;
  for (const int e : ranking(choice)) {
    const bool eligible = std::find(groups.begin(), groups.end(), e / static_cast<int>(size)) != groups.end();
    if (eligible && out.experts.size() < static_cast<size_t>(c.num_experts_per_tok)) out.experts.push_back(e);
  }
  double sum = 0;
  for (const int e : out.experts) sum += scores[static_cast<size_t>(e)];
  for (const int e : out.experts)
    out.weights.push_back(scores[static_cast<size_t>(e)] / (c.norm_topk_prob ? sum : 1) *
                          static_cast<double>(c.routed_scaling_factor));
  return out;
}

struct Shape {
  int E, k, n_group, topk_group;
};
// All experts; groups of one and of two; as many experts as the chosen groups hold.
constexpr Shape SHAPES[] = {{16, 4, 1, 1}, {16, 4, 4, 2},  {16, 8, 4, 2}, {16, 16, 1, 1},
                            {1, 1, 1, 1},  {16, 3, 16, 3}, {6, 2, 3, 1},  {6, 6, 3, 3}};

void check_selection(const Config& c, const float* bias, const std::vector<float>& logits) {
  const int E = c.n_routed_experts, k = c.num_experts_per_tok, T = static_cast<int>(logits.size()) / E;
  auto scores = logits;
  std::vector<int> chosen(area(T, k));
  std::vector<float> weights(area(T, k));
  route_all(c, bias, T, scores.data(), chosen.data(), weights.data());
  for (int t = 0; t < T; t++) {
    const Choice expected = reference(c, bias, {logits.begin() + t * E, logits.begin() + (t + 1) * E});
    EXPECT_EQ(std::vector<int>(chosen.begin() + t * k, chosen.begin() + (t + 1) * k), expected.experts);
    for (int j = 0; j < k; j++) {  // exp, a sum of 16 and two divisions: under 32 roundings
      const double weight = expected.weights[static_cast<size_t>(j)];
      EXPECT_NEAR(static_cast<double>(weights[area(t, k) + static_cast<size_t>(j)]), weight, 32 * 0x1p-24 * weight);
    }
  }
}

TEST(Route, EveryKindOfSelection) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Shape& shape : SHAPES) {
    for (int kind = 0; kind < 16; kind++) {
      SCOPED_TRACE(testing::Message() << shape.E << " experts, best " << shape.k << ", groups " << shape.n_group
                                      << ", kind " << kind);
      Config c;
      c.n_routed_experts = shape.E;
      c.num_experts_per_tok = shape.k;
      c.n_group = shape.n_group;
      c.topk_group = shape.topk_group;
      c.routed_scaling_factor = 2.5f;
      c.scoring_func = kind & 1 ? Scoring::sigmoid : Scoring::softmax;
      c.norm_topk_prob = kind & 2;
      c.group_score = kind & 4 && shape.E / shape.n_group > 1 ? GroupScore::top2_sum : GroupScore::max;
      std::vector<float> logits, bias;
      for (int i = 0; i < 25 * shape.E; i++) logits.push_back(2 * normal(random));
      for (int i = 0; i < shape.E; i++) bias.push_back(normal(random) / 4 - 1);  // all biased scores may be negative
      check_selection(c, kind & 8 ? bias.data() : nullptr, logits);
    }
  }
}

TEST(Route, TiesGoToTheLowerIndex) {
  Config c;
  c.n_routed_experts = 6;
  c.num_experts_per_tok = 3;
  std::vector<float> scores(6, 1.0f), weights(3);
  std::vector<int> chosen(3);
  route_all(c, nullptr, 1, scores.data(), chosen.data(), weights.data());
  EXPECT_EQ(chosen, (std::vector<int>{0, 1, 2}));
}

// A NaN anywhere, also of an expert or a group that would lose: the weights are NaN, the experts exist.
TEST(Route, NotANumberReachesTheWeights) {
  for (const Scoring scoring : {Scoring::softmax, Scoring::sigmoid}) {
    for (const bool in_bias : {false, true}) {
      for (size_t e = 0; e < 8; e++) {
        Config c;
        c.n_routed_experts = 8;
        c.num_experts_per_tok = 2;
        c.n_group = 4;
        c.topk_group = 1;
        c.scoring_func = scoring;
        c.group_score = GroupScore::top2_sum;
        std::vector<float> scores = {1, 2, 3, 4, 5, 6, 7, 8}, bias(8, 0), weights(2);
        (in_bias ? bias : scores)[e] = std::numeric_limits<float>::quiet_NaN();
        std::vector<int> chosen(2);
        route_all(c, bias.data(), 1, scores.data(), chosen.data(), weights.data());
        for (size_t j = 0; j < 2; j++) {
          EXPECT_TRUE(std::isnan(weights[j]));
          EXPECT_TRUE(chosen[j] >= 0 && chosen[j] < 8);
        }
      }
    }
  }
}

// ---- the block: router, experts and shared experts

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
  std::vector<float> x(area(T, dim), 0.25f), h(area(T, dim)), y(area(T, dim));
  for (float& v : h) v = std::normal_distribution<float>()(random);

  std::vector<Vec> expected;
  std::vector<bool> hit(static_cast<size_t>(shape.E));
  for (int t = 0; t < T; t++) {
    const Vec in(h.begin() + t * dim, h.begin() + (t + 1) * dim), logits = router.times(in);
    const Choice choice = reference(c, nullptr, {logits.begin(), logits.end()});
    expected.emplace_back(dim, 0.25);
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
    stage.forward(0, layer, {team, c, batch, batch, {}, x.data(), h.data(), y.data(), workspace});
  });
  for (int t = 0; t < T; t++)
    for (size_t i = 0; i < dim; i++)  // sums of 32 products, twice: far fewer roundings than 128, of values to 8
      EXPECT_NEAR(static_cast<double>(x[area(t, dim) + i]), expected[static_cast<size_t>(t)][i], 8 * 128 * 0x1p-24);
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
