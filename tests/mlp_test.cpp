// Expert routing and the sum of the experts against the papers' definitions, written out with a full sort in float64.
#include "kernels/mlp.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

namespace {

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
  route(c, bias, T, scores.data(), chosen.data(), weights.data());
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
  route(c, nullptr, 1, scores.data(), chosen.data(), weights.data());
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
        route(c, bias.data(), 1, scores.data(), chosen.data(), weights.data());
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

// A matrix in memory pages of its own, which can be closed: who reads it then crashes.
class Pages {
 public:
  Pages(int n, int k, std::mt19937* random) : n_(n), k_(k), bytes_(packed_bytes(DType::f32, n, k)) {
    std::normal_distribution<float> normal(0, 1.5f / std::sqrt(static_cast<float>(k)));
    for (size_t i = 0; i < area(n, k); i++) values_.push_back(normal(*random));
    packed_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const TensorView view{DType::f32, n, k, values_.data(), nullptr, nullptr};
    for (int b = 0; b < row_blocks(n); b++) pack(view, false, b, static_cast<std::byte*>(packed_));
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { munmap(packed_, bytes_); }

  void close() const { ASSERT_EQ(mprotect(packed_, bytes_, PROT_NONE), 0); }
  Linear linear() const { return {{DType::f32, n_, k_, static_cast<const std::byte*>(packed_)}, nullptr}; }
  Vec times(const Vec& x) const {
    Vec y(static_cast<size_t>(n_), 0.0);
    for (size_t r = 0; r < y.size(); r++)
      for (size_t i = 0; i < x.size(); i++) y[r] += static_cast<double>(values_[r * x.size() + i]) * x[i];
    return y;
  }

 private:
  int n_, k_;
  size_t bytes_;
  std::vector<float> values_;  // [n, k]
  void* packed_;
};

struct Expert {
  Pages gate, up, down;
  Expert(int dim, int hidden, std::mt19937* random)
      : gate(hidden, dim, random), up(hidden, dim, random), down(dim, hidden, random) {}
  Mlp mlp() const { return {gate.linear(), up.linear(), down.linear()}; }
  void close() const {
    for (const Pages* pages : {&gate, &up, &down}) pages->close();
  }
  // y += weight * expert(x)
  void add(const Vec& x, double weight, Vec* y) const {
    const Vec g = gate.times(x);
    Vec h = up.times(x);
    for (size_t i = 0; i < h.size(); i++) h[i] *= g[i] / (1 + std::exp(-g[i]));
    const Vec out = down.times(h);
    for (size_t i = 0; i < out.size(); i++) (*y)[i] += weight * out[i];
  }
};

struct Experts {
  int E, k, shared, T;
};

// x of the block, and its float64 twin; the experts that no token hits are closed before it runs.
void check_experts(const Experts& shape) {
  const int dim = 24, hidden = 20, T = shape.T;
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
  const Pages router(shape.E, dim, &random);
  const Expert shared(dim, std::max(1, shape.shared) * hidden, &random);
  std::vector<std::unique_ptr<Expert>> experts;
  Layer layer;
  layer.router = router.linear();
  if (shape.shared) layer.shared = shared.mlp();
  for (int e = 0; e < shape.E; e++) {
    experts.push_back(std::make_unique<Expert>(dim, hidden, &random));
    layer.experts.push_back(experts.back()->mlp());
  }
  std::vector<float> x(area(T, dim), 0.25f), h(area(T, dim)), y(area(T, dim));
  for (float& v : h) v = std::normal_distribution<float>()(random);

  std::vector<Vec> expected;
  std::vector<bool> hit(experts.size());
  for (int t = 0; t < T; t++) {
    const Vec in(h.begin() + t * dim, h.begin() + (t + 1) * dim), logits = router.times(in);
    const Choice choice = reference(c, nullptr, {logits.begin(), logits.end()});
    expected.emplace_back(dim, 0.25);
    for (size_t j = 0; j < choice.experts.size(); j++) {
      const auto e = static_cast<size_t>(choice.experts[j]);
      experts[e]->add(in, choice.weights[j], &expected.back());
      hit[e] = true;
    }
    if (shape.shared) shared.add(in, 1, &expected.back());
  }
  for (size_t e = 0; e < experts.size(); e++)
    if (!hit[e]) experts[e]->close();

  MlpBlock block(c, T);
  MatmulWorkspace workspace(MlpBlock::workspace_bytes(c, T));
  Batch batch;
  batch.n_tokens = T;
  block.forward(0, layer, {c, batch, {}, x.data(), h.data(), y.data(), workspace});
  for (int t = 0; t < T; t++)
    for (size_t i = 0; i < dim; i++)  // sums of 24 and 20 products, twice: far fewer roundings than 128, of values to 8
      EXPECT_NEAR(static_cast<double>(x[area(t, dim) + i]), expected[static_cast<size_t>(t)][i], 8 * 128 * 0x1p-24);
}

// One token; several; an expert without tokens; all experts for every token; one expert; with and without shared ones.
TEST(MlpBlock, SumsTheChosenExpertsAndReadsNoOther) {
  for (const Experts& shape :
       {Experts{8, 2, 0, 1}, {8, 2, 2, 1}, {8, 2, 1, 3}, {40, 3, 1, 7}, {5, 5, 0, 4}, {1, 1, 1, 6}}) {
    SCOPED_TRACE(testing::Message() << shape.E << " experts, best " << shape.k << ", " << shape.T << " tokens");
    check_experts(shape);
  }
}

}  // namespace
