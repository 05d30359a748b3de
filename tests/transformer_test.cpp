// The forward pass against a float64 one written from the papers' formulas, for every variant x kernel x cache, and bit
// for bit against itself under every way to cut the same work.
#include "transformer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "batches.h"
#include "host/error.h"
#include "kernels/build.h"
#include "q4_row.h"
#include "tensor_cores.h"
#include "tiny_model.h"

namespace {

using Vec = std::vector<double>;

// --- the reference ---------------------------------------------------------------------------------------------------

class Reference {
 public:
  // in_q4: rows are kept as q4 does, whose steps are too wide to be tolerated.
  explicit Reference(const TinyModel& m, bool in_q4 = false) : m_(m), in_q4_(in_q4) {}

  // Logits [T, vocab] of a sequence, every position recomputed from scratch.
  std::vector<Vec> logits(const std::vector<int>& tokens) {
    std::vector<Vec> x;
    for (int t : tokens) x.push_back(row(at("embed_tokens.weight"), t));
    for (int l = 0; l < m_.integer("n_layers"); l++) {
      const std::string name = "layers." + std::to_string(l) + ".";
      std::vector<Vec> h;
      for (const Vec& v : x) h.push_back(rms(v, name + "attention_norm.weight"));
      const std::vector<Vec> o = *m_.config.at("attention").string() == "mla" ? mla(h, name, l) : gqa(h, name, l);
      for (size_t t = 0; t < x.size(); t++) add(x[t], times(name + "o_proj", o[t]));
      for (Vec& v : x) add(v, mlp(rms(v, name + "mlp_norm.weight"), name, l));
    }
    std::vector<Vec> out;
    for (const Vec& v : x) out.push_back(times("embed_tokens", rms(v, "norm.weight")));
    return out;
  }

 private:
  const Array& at(const std::string& name) const { return m_.tensors.at(name); }
  static Vec row(const Array& a, int64_t r) { return Vec(a.row(r), a.row(r) + a.shape.back()); }
  static void add(Vec& x, const Vec& y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
  }
  // A row as the cache keeps it.
  Vec stored(const Vec& x) const { return in_q4_ ? q4_row({x.begin(), x.end()}) : x; }
  static Vec slice(const Vec& x, int first, int n) { return Vec(x.begin() + first, x.begin() + first + n); }
  static double dot(const Vec& a, const Vec& b) {
    double s = 0;
    for (size_t i = 0; i < a.size(); i++) s += a[i] * b[i];
    return s;
  }
  // Rows first .. first + n - 1 of a matrix times x.
  static Vec times(const Array& w, const Vec& x, int64_t first, int64_t n) {
    Vec y;
    for (int64_t r = first; r < first + n; r++) y.push_back(dot(row(w, r), x));
    return y;
  }
  Vec times(const std::string& name, const Vec& x) const {
    const Array& w = at(name + ".weight");
    Vec y = times(w, x, 0, w.shape[0]);
    if (m_.tensors.count(name + ".bias")) add(y, row(at(name + ".bias"), 0));
    return y;
  }
  Vec rms(Vec x, const std::string& weight, const char* eps = "norm_eps") const {
    const double factor = 1 / std::sqrt(dot(x, x) / static_cast<double>(x.size()) + m_.number(eps));
    for (size_t i = 0; i < x.size(); i++) x[i] *= factor * static_cast<double>(at(weight).data[i]);
    return x;
  }
  void rotate(Vec& x, int first, size_t position) const {
    const Array& table = at("rope.0.inv_freq");
    const size_t n = table.data.size();
    for (size_t i = 0; i < n; i++) {
      const double angle = static_cast<double>(position) * static_cast<double>(table.data[i]);
      double &a = x[static_cast<size_t>(first) + i], &b = x[static_cast<size_t>(first) + i + n];
      const double a0 = a, b0 = b;
      a = a0 * std::cos(angle) - b0 * std::sin(angle);
      b = b0 * std::cos(angle) + a0 * std::sin(angle);
    }
  }
  // softmax(q . k[first .. t]) v[first .. t]
  Vec attend(const Vec& q, const std::vector<Vec>& k, const std::vector<Vec>& v, size_t t, int layer) const {
    const int window = m_.integer("window", layer);
    const size_t first = window > 0 && t + 1 > static_cast<size_t>(window) ? t + 1 - static_cast<size_t>(window) : 0;
    Vec s, out(v[0].size(), 0.0);
    for (size_t j = first; j <= t; j++) s.push_back(dot(q, k[j]) * m_.number("attention_scale"));
    const double m = *std::max_element(s.begin(), s.end());
    double total = 0;
    for (double& e : s) total += e = std::exp(e - m);
    for (size_t j = 0; j < s.size(); j++)
      for (size_t i = 0; i < out.size(); i++) out[i] += s[j] / total * v[first + j][i];
    return out;
  }
  std::vector<Vec> gqa(const std::vector<Vec>& h, const std::string& name, int layer) const {
    const int H = m_.integer("n_heads"), G = m_.integer("n_kv_heads"), d = m_.integer("head_dim");
    std::vector<Vec> out(h.size());
    for (int head = 0; head < H; head++) {
      const int g = head / (H / G);
      std::vector<Vec> k, v;
      for (size_t t = 0; t < h.size(); t++) {
        k.push_back(slice(times(name + "k_proj", h[t]), g * d, d));
        v.push_back(stored(slice(times(name + "v_proj", h[t]), g * d, d)));
        rotate(k.back(), 0, t);
        k.back() = stored(k.back());
        Vec q = slice(times(name + "q_proj", h[t]), head * d, d);
        rotate(q, 0, t);
        const Vec o = attend(q, k, v, t, layer);
        out[t].insert(out[t].end(), o.begin(), o.end());
      }
    }
    return out;
  }
  // Keys and values rebuilt for every head from the latent, as DeepSeek V2 section 2.1 writes it.
  std::vector<Vec> mla(const std::vector<Vec>& h, const std::string& name, int layer) const {
    const int H = m_.integer("n_heads"), r = m_.integer("kv_lora_rank"), nope = m_.integer("qk_nope_head_dim"),
              p = m_.integer("qk_rope_head_dim"), v_dim = m_.integer("v_head_dim");
    std::vector<Vec> out(h.size());
    for (int head = 0; head < H; head++) {
      std::vector<Vec> k, v;
      for (size_t t = 0; t < h.size(); t++) {
        const Vec kv = times(name + "kv_a_proj", h[t]);
        Vec latent = rms(slice(kv, 0, r), name + "kv_a_norm.weight", "latent_norm_eps");
        Vec shared = slice(kv, r, p);
        rotate(shared, 0, t);
        latent.insert(latent.end(), shared.begin(), shared.end());
        const Vec row = stored(latent);
        latent = slice(row, 0, r), shared = slice(row, r, p);
        k.push_back(times(at(name + "w_uk.weight"), latent, head * nope, nope));
        k.back().insert(k.back().end(), shared.begin(), shared.end());
        v.push_back(times(at(name + "w_uv.weight"), latent, head * v_dim, v_dim));
        const Vec q_a = rms(times(name + "q_a_proj", h[t]), name + "q_a_norm.weight", "latent_norm_eps");
        Vec q = slice(times(name + "q_b_proj", q_a), head * (nope + p), nope + p);
        rotate(q, nope, t);
        const Vec o = attend(q, k, v, t, layer);
        out[t].insert(out[t].end(), o.begin(), o.end());
      }
    }
    return out;
  }
  static Vec gated(const Vec& gate, Vec up) {
    for (size_t i = 0; i < up.size(); i++) up[i] *= gate[i] / (1 + std::exp(-gate[i]));
    return up;
  }
  Vec mlp(const Vec& h, const std::string& name, int layer) const {
    if (!m_.config.contains("moe_layers") || m_.integer("moe_layers", layer) == 0)
      return times(name + "down_proj", gated(times(name + "gate_proj", h), times(name + "up_proj", h)));
    const int E = m_.integer("n_routed_experts"), k = m_.integer("num_experts_per_tok");
    Vec scores = times(name + "router", h);
    const double m = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& s : scores) total += s = std::exp(s - m);
    std::vector<int> order;
    for (int e = 0; e < E; e++) order.push_back(e);
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
    double chosen = 0;
    for (int j = 0; j < k; j++) chosen += scores[static_cast<size_t>(order[static_cast<size_t>(j)])];
    const std::string shared = name + "shared_experts.";
    Vec y = times(shared + "down_proj", gated(times(shared + "gate_proj", h), times(shared + "up_proj", h)));
    for (int j = 0; j < k; j++) {
      const int e = order[static_cast<size_t>(j)];
      const auto expert = [&](const char* which, const Vec& x) {
        const Array& w = at(name + "experts." + which + ".weight");
        return times(w, x, e * w.shape[1], w.shape[1]);
      };
      Vec out = expert("down_proj", gated(expert("gate_proj", h), expert("up_proj", h)));
      const double weight = scores[static_cast<size_t>(e)] / chosen * m_.number("routed_scaling_factor");
      for (double& o : out) o *= weight;
      add(y, out);
    }
    return y;
  }

  const TinyModel& m_;
  bool in_q4_;
};

// --- the code under test, driven by a schedule -----------------------------------------------------------------------

struct Next {
  int sequence, n;  // the next n tokens of the sequence
};
using Schedule = std::vector<std::vector<Next>>;  // steps

constexpr int CONTEXT = 40;

using Logits = std::vector<std::vector<float>>;  // of each sequence [T, vocab_size]

// Runs the schedule and returns the logits of every position of every sequence.
Logits run_schedule(const std::function<const float*(const Batch&)>& forward, Batches& batches,
                    const std::vector<std::vector<int>>& sequences, const Schedule& schedule) {
  std::vector<int> done(sequences.size());
  Logits out(sequences.size());
  for (const auto& step : schedule) {
    std::vector<Piece> pieces;
    for (const Next& next : step) {
      int& first = done[static_cast<size_t>(next.sequence)];
      pieces.push_back({next.sequence, first, next.n});
      first += next.n;
    }
    const float* logits = forward(batches.batch(pieces, sequences));
    for (const Piece& piece : pieces) {
      auto& to = out[static_cast<size_t>(piece.sequence)];
      to.insert(to.end(), logits, logits + piece.n * TINY_VOCAB);
      logits += piece.n * TINY_VOCAB;
    }
  }
  return out;
}

template <class T, int Block>
Logits run(const Model& model, const std::vector<std::vector<int>>& sequences, const Schedule& schedule,
           MlaForm form = MlaForm::automatic, int n_threads = 2) {
  const int S = static_cast<int>(sequences.size());
  Batches batches(S, CONTEXT, Block);
  const Limits limits{S * CONTEXT, S, S * CONTEXT, CONTEXT, batches.n_blocks(), n_threads, form};
  T transformer(model, limits);
  EXPECT_EQ(transformer.taken().kv, T::bytes(model, limits).kv) << "what was planned is what is taken";
  EXPECT_EQ(transformer.taken().activations, T::bytes(model, limits).activations);
  const auto forward = [&](const Batch& b) { return transformer.forward(b, test_threads(), n_threads); };
  return run_schedule(forward, batches, sequences, schedule);
}

// Largest difference to the reference, relative to the largest logit.
double error(const std::vector<float>& logits, const std::vector<Vec>& reference) {
  double worst = 0, largest = 0;
  size_t i = 0;
  for (const Vec& row : reference)
    for (double r : row) {
      largest = std::max(largest, std::fabs(r));
      worst = std::max(worst, std::fabs(static_cast<double>(logits[i++]) - r));
    }
  return worst / largest;
}

// Of a stored element, relative to its row's largest.
template <class Kv>
constexpr double STORED = 0x1p-24;
template <>
constexpr double STORED<KvF16> = 0x1p-11;
template <>
constexpr double STORED<KvBF16> = 0x1p-8;
template <>
constexpr double STORED<KvQ8> = 1 / 254.0;
template <>  // of a reference in q4: what float32 rounds to another step, an element in thousands
constexpr double STORED<KvQ4> = STORED<KvQ8>;

// What rounds most passes two layers of attention and MLP; 40 covers the growth that these random weights (gain 1.5 a
// product) show with a factor of about 3 to spare.
template <class Attention, class Kernel, class Kv>
double tolerance() {
  double rounding = STORED<Kv>;
  if (std::is_same_v<Kernel, Flash>) rounding = std::max(rounding, Flash::operand_rounding<Kv>());
  if (std::is_same_v<Kernel, Flash> && std::is_same_v<Attention, Mla> && on_tensor_cores()) rounding += STORED<KvBF16>;
  return 40 * rounding;
}

struct Case {
  Model model;
  std::vector<std::vector<int>> sequences;
  std::vector<std::vector<Vec>> reference;
  explicit Case(const TinyModel& tiny, bool in_q4 = false) : model(load(tiny)) {
    Reference r(tiny, in_q4);
    for (const int n : {21, 9}) {
      sequences.push_back(random_tokens(n, static_cast<unsigned>(n)));
      reference.push_back(r.logits(sequences.back()));
    }
  }
};

template <class Attention, bool IN_Q4 = false>
const Case& the_case() {
  static const Case c(tiny_model(Attention::name, true, 7), IN_Q4);
  return c;
}

using RunCase = Logits (*)(const Model&, const std::vector<std::vector<int>>&, const Schedule&, MlaForm, int);

void check(const Case& c, RunCase run_case, double tolerated) {
  for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded}) {
    const Logits whole = run_case(c.model, c.sequences, {{{0, 21}}, {{1, 9}}}, form, 2);
    EXPECT_LT(error(whole[0], c.reference[0]), tolerated);
    EXPECT_LT(error(whole[1], c.reference[1]), tolerated);
    // Prompt chunks and decode tokens, alone or mixed, in both orders.
    const Schedule mixed = {{{0, 5}}, {{1, 1}, {0, 7}}, {{0, 1}, {1, 4}}, {{1, 1}, {0, 1}}, {{0, 7}, {1, 3}}};
    EXPECT_EQ(whole, run_case(c.model, c.sequences, mixed, form, 3));
    if (c.model.config.attention != "mla") break;
  }
}

template <class Attention, class Kernel, class Kv, int Block>
void check_combination() {
  check(the_case<Attention, std::is_same_v<Kv, KvQ4>>(), run<Transformer<Attention, Kernel, Kv, Block>, Block>,
        tolerance<Attention, Kernel, Kv>());
}

struct Combination {
  const char* name;
  bool is_taken;
  void (*check)();
};
class EveryCombination : public testing::TestWithParam<Combination> {};
TEST_P(EveryCombination, AgreesWithTheReferenceAndItself) {
  GetParam().check();
}

#define COMBINATION(Attention, Kernel, Kv, Block)                             \
  Combination{#Attention "_" #Kernel "_" #Kv "_" #Block, takes<Kernel, Kv>(), \
              check_combination<Attention, Kernel, Kv, Block>},
std::vector<Combination> combinations() {
  std::vector<Combination> all = { FOR_EACH_TRANSFORMER(COMBINATION) };
  std::erase_if(all, [](const Combination& c) { return !c.is_taken; });
  return all;
}
INSTANTIATE_TEST_SUITE_P(Transformer, EveryCombination, testing::ValuesIn(combinations()),
                         [](const auto& c) { return std::string(c.param.name); });

template <class Attention>
void check_threads() {
  using T = Transformer<Attention, Flash, KvF16, 16>;
  const Case& c = the_case<Attention>();
  const Schedule schedule = {{{0, 20}, {1, 8}}, {{0, 1}, {1, 1}}};
  const auto one = run<T, 16>(c.model, c.sequences, schedule, MlaForm::automatic, 1);
  for (const int threads : {2, 3})
    EXPECT_EQ(one, (run<T, 16>(c.model, c.sequences, schedule, MlaForm::automatic, threads))) << threads << " threads";
}

TEST(Transformer, ThreadsDoNotChangeABit) {
  check_threads<Gqa>();
  check_threads<Mla>();
}

// A block's address does not matter: every block size, and the contiguous cache, give the same bits.
TEST(Transformer, CachesAgreeBitForBit) {
  const Case& c = the_case<Gqa>();
  const Schedule schedule = {{{0, 13}, {1, 8}}, {{0, 8}, {1, 1}}};
  const auto contiguous = run<Transformer<Gqa, Flash, KvQ8, 0>, 0>(c.model, c.sequences, schedule);
  EXPECT_EQ(contiguous, (run<Transformer<Gqa, Flash, KvQ8, 1>, 1>(c.model, c.sequences, schedule)));
  EXPECT_EQ(contiguous, (run<Transformer<Gqa, Flash, KvQ8, 3>, 3>(c.model, c.sequences, schedule)));
  EXPECT_EQ(contiguous, (run<Transformer<Gqa, Flash, KvQ8, 16>, 16>(c.model, c.sequences, schedule)));
}

// The text that is most likely, token by token: a prompt, then decode.
template <class Attention, class Kernel, int Block>
void check_greedy() {
  constexpr size_t PROMPT = 8, N = 12;
  static const TinyModel tiny = tiny_model(Attention::name, true, 7);
  static const Model model = load(tiny);
  static const std::vector<int> text = [] {
    std::vector<int> ids = random_tokens(PROMPT, 5);
    const auto largest = [](const auto& x) {
      return static_cast<int>(std::max_element(x.begin(), x.end()) - x.begin());
    };
    while (ids.size() < PROMPT + N) ids.push_back(largest(Reference(tiny).logits(ids).back()));
    return ids;
  }();
  Schedule schedule = {{{0, PROMPT}}};
  for (size_t i = 0; i < N - 1; i++) schedule.push_back({{0, 1}});
  const Logits logits = run<Transformer<Attention, Kernel, KvF16, Block>, Block>(model, {text}, schedule);
  for (size_t t = PROMPT - 1; t + 1 < text.size(); t++) {
    const auto row = logits[0].begin() + static_cast<ptrdiff_t>(t * TINY_VOCAB);
    EXPECT_EQ(std::max_element(row, row + TINY_VOCAB) - row, text[t + 1]) << Attention::name << " token " << t + 1;
  }
}

TEST(Transformer, GreedyTextIsTheReferences) {
  check_greedy<Mha, Naive, 0>(), check_greedy<Mha, Flash, 16>();
  check_greedy<Mqa, Naive, 0>(), check_greedy<Mqa, Flash, 16>();
  check_greedy<Gqa, Naive, 0>(), check_greedy<Gqa, Flash, 16>();
  check_greedy<Mla, Naive, 0>(), check_greedy<Mla, Flash, 16>();
}

// One batch holds a prompt in the expanded form and, after it, a decode token in the absorbed one.
TEST(Transformer, MlaFormsShareABatch) {
  const Case& c = the_case<Mla>();
  const Schedule schedule = {{{1, 8}}, {{0, 20}, {1, 1}}, {{0, 1}}};
  const auto expect_close = [&]<class Kernel, class Kv>() {
    if (!takes<Kernel, Kv>()) return;
    const Logits logits = run<Transformer<Mla, Kernel, Kv, 16>, 16>(c.model, c.sequences, schedule);
    for (const size_t s : {0, 1}) EXPECT_LT(error(logits[s], c.reference[s]), (tolerance<Mla, Kernel, Kv>()));
  };
  expect_close.template operator()<Naive, KvF32>();
  expect_close.template operator()<Flash, KvF32>();
  expect_close.template operator()<Flash, KvF16>();
}

// The tiny MLA model with latents of r + p elements, each about `size` large; W_UK and W_UV undo the size.
TinyModel mla_model(int r, int p, float size) {
  TinyModel m = tiny_model("mla", false, 13);
  const int dim = m.integer("dim"), heads = m.integer("n_heads"), nope = m.integer("qk_nope_head_dim"),
            v = m.integer("v_head_dim");
  m.set({{"kv_lora_rank", r}, {"qk_rope_head_dim", p}});
  const auto deviation = [](int k) { return 1 / std::sqrt(static_cast<float>(k)); };
  m.add("rope.0.inv_freq", {p / 2}, 0.2f, 0.5f);
  for (const std::string at : {"layers.0.", "layers.1."}) {
    m.add(at + "q_b_proj.weight", {heads * (nope + p), 12}, deviation(12));
    m.add(at + "kv_a_proj.weight", {r + p, dim}, deviation(dim));
    m.add(at + "kv_a_norm.weight", {r}, 0.2f * size, size);
    m.add(at + "w_uk.weight", {heads, nope, r}, deviation(r) / size);
    m.add(at + "w_uv.weight", {heads, v, r}, deviation(r) / size);
  }
  return m;
}

// Sums of 512 products round sqrt(512 / 40) times as much as those of the tiny model's 40.
constexpr double WIDE = 3.6;

template <class Kernel, class Kv>
void check_mla(const Case& c) {
  if (!takes<Kernel, Kv>()) return;
  check(c, run<Transformer<Mla, Kernel, Kv, 16>, 16>,
        (std::is_same_v<Kv, KvF32> ? WIDE : 1) * tolerance<Mla, Kernel, Kv>());
}

TEST(Transformer, MlaOfAnyWidth) {
  for (const auto& [r, p] : {std::pair(256, 64), {512, 64}, {128, 32}, {37, 6}}) {
    SCOPED_TRACE(testing::Message() << r << " + " << p);
    const Case c(mla_model(r, p, 1));
    check_mla<Flash, KvF32>(c);
    check_mla<Flash, KvF16>(c);
    check_mla<Naive, KvF16>(c);
  }
}

// As DeepSeek has them: sums of 512 elements of 1e4 overflow half precision, float32 sums do not even lose bits.
TEST(Transformer, MlaWithLatentsOfTenThousand) {
  const Case c(mla_model(512, 64, 1e4f));
  check_mla<Flash, KvF32>(c);
  check_mla<Naive, KvF32>(c);
  check_mla<Flash, KvF16>(c);
  check_mla<Flash, KvQ8>(c);
}

TEST(Transformer, ATeamLargerThanPlannedIsRefused) {
  Transformer<Gqa, Flash, KvF16, 16> transformer(the_case<Gqa>().model, {8, 1, 1, 8, 1, 1, MlaForm::automatic});
  EXPECT_THROW(transformer.forward(Batch(), test_threads(), 2), Error);
}

TEST(Transformer, RefusesAnotherVariant) {
  const Case& c = the_case<Gqa>();
  const Limits limits{8, 1, 1, 8, 1, 1, MlaForm::automatic};
  try {
    Transformer<Mla, Flash, KvF32, 0> t(c.model, limits);
    FAIL() << "a GQA model was taken by an MLA build";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("make ATTENTION=gqa"), std::string::npos) << e.what();
  }
}

}  // namespace
