// roofline.cpp: the inference speed calculation.
#include "host/roofline.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "host/error.h"
#include "variants.h"

namespace {

constexpr int STAGES_OF_LAYER =
    8;  // projections, turn and append, attention, output, add and norm; gate and up, down, add and norm
constexpr int STAGES_OF_STEP = 3;  // embedding, norm, classifier

// How a step uses a matrix.
enum class Use {
  rows,        // each row of activations multiplies it
  router,      // the same
  experts,     // ... some of its groups
  classifier,  // the rows whose logits are wanted do
  heads,       // MLA's: read; its FLOP are the attention's
  stored       // not read in decode
};

// f(matrix, use) for every matrix of the model.
template <class M, class F>
void each_matrix(M& model, F f) {
  const bool tied =
      model.lm_head.weight.n == 0 || (model.embed_tokens && model.lm_head.weight.data == model.embed_tokens.data);
  f(model.embed_tokens, tied ? Use::classifier : Use::stored);
  if (!tied) f(model.lm_head.weight, Use::classifier);
  for (auto& l : model.layers) {
    for (auto* linear : {&l.q_proj, &l.k_proj, &l.v_proj, &l.o_proj, &l.q_a_proj, &l.q_b_proj, &l.kv_a_proj,
                         &l.mlp.gate, &l.mlp.up, &l.mlp.down, &l.shared.gate, &l.shared.up, &l.shared.down})
      f(linear->weight, Use::rows);
    f(l.router.weight, Use::router);
    for (auto* linear : {&l.experts.gate, &l.experts.up, &l.experts.down}) f(linear->weight, Use::experts);
    for (auto* linear : {&l.w_uk_t, &l.w_uv}) f(linear->weight, Use::heads);
    f(l.w_uk.weight, Use::stored);
  }
}

// Of the last t tokens of a context of n with keys that they see, in a window of w tokens (0: all).
double visible_pairs(double t, double n, double w) {
  const auto up_to = [](double m) { return m * (m + 1) / 2; };
  if (w == 0 || w >= n) return up_to(n) - up_to(n - t);
  const double whole = std::clamp(n - w, 0.0, t);  // queries that see a whole window
  return whole * w + (whole < t ? up_to(w) - up_to(n - t) : 0);
}

// A variant's matrices as shapes: what the loader's Collector is to a file.
class Shapes {
 public:
  explicit Shapes(WeightType type) : type_(type), heads_(type) {
    if (weight_format(type).block > 1) heads_ = *find_weight_type("f16");
  }
  void linear(const std::string&, int n, int k, Linear& out, int = 1) { out.weight = {type_, n, k, 1, nullptr}; }
  void heads(const std::string&, int groups, int n, int k, bool transposed, Linear& out) {
    out.weight = {heads_, transposed ? k : n, transposed ? n : k, groups, nullptr};
  }
  void norm(const std::string&, int, Norm&) {}
  void norm_of_heads(const std::string&, int, int, Norm&) {}
  void optional_vector(const std::string&, const std::vector<int64_t>&, const float*&, int = 1) {}

 private:
  WeightType type_, heads_;
};

// "H100 SXM" -> "h100sxm"
std::string plain(const std::string& name) {
  std::string out;
  for (const char c : name)
    if (std::isalnum(static_cast<unsigned char>(c))) out += static_cast<char>(std::tolower(c));
  return out;
}

// Letters to insert, delete or replace (Levenshtein).
int distance(const std::string& a, const std::string& b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (const char c : a) {
    int diagonal = row[0]++;
    for (size_t j = 0; j < b.size(); j++)
      diagonal = std::exchange(row[j + 1], std::min({row[j + 1] + 1, row[j] + 1, diagonal + (c != b[j])}));
  }
  return row.back();
}

}  // namespace

// ---- Machines.

const Datasheet& find_datasheet(const std::string& name) {
  const std::string wanted = plain(name);
  std::vector<std::pair<int, const Datasheet*>> near;
  for (const Datasheet& sheet : datasheets()) {
    const std::string known = plain(sheet.name);
    if (known == wanted) return sheet;
    near.emplace_back(distance(known.substr(0, wanted.size()), wanted), &sheet);
  }
  std::stable_sort(near.begin(), near.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  fail(
      "--gpu %s: not known; near are %s, %s and %s; --gpu list has all, and --bandwidth, --flops and --memory do "
      "without",
      name.c_str(), near[0].second->name, near[1].second->name, near[2].second->name);
}

Machine machine_of(const Datasheet& sheet) {
  Machine m{.name = sheet.name,
            .source = sheet.source,
            .memory = sheet.memory * 1e9,
            .bandwidth = sheet.bandwidth * 1e9,
            .products = {},
            .prompt_products = {},
            .attention = sheet.bf16 * 1e12,
            .prompt_attention = sheet.bf16 * 1e12,
            .launch = GPU_LAUNCH};
  for (const WeightFormat& format : weight_formats())
    m.products.push_back(1e12 * (format.block > 1 ? sheet.int8 : format.name == "f32" ? sheet.f32 : sheet.bf16));
  m.prompt_products = m.products;
  return m;
}

// ---- Work and time.

double Work::flop() const {
  return std::accumulate(products.begin(), products.end(), attention);
}

double tokens_read(const Config& config, double context) {
  double read = 0;
  for (const int window : config.window) read += window > 0 ? std::min<double>(window, context) : context;
  return read / config.n_layers;
}

double experts_hit(const Config& c, double tokens) {
  if (c.n_routed_experts == 0) return 0;
  const double missed = 1 - static_cast<double>(c.num_experts_per_tok) / c.n_routed_experts;  // by one token
  return c.n_routed_experts * (1 - std::pow(missed, tokens));
}

Work work_of(const Model& model, const StepShape& s, double kv_bytes_per_token) {
  const Config& c = model.config;
  const double rows = s.sequences * s.tokens, hit = experts_hit(c, rows);
  Work work;
  work.products.resize(weight_formats().size());
  work.weight_bytes = static_cast<double>(model.vector_bytes);
  each_matrix(model, [&](const Matrix& m, Use use) {
    double read = 1, multiplied = rows;  // of its bytes; rows of activations
    if (use == Use::experts)
      read = hit / c.n_routed_experts, multiplied *= c.num_experts_per_tok / double(c.n_routed_experts);
    if (use == Use::classifier) read = s.logits > 0, multiplied = s.logits;
    if (use == Use::heads) multiplied = 0;
    if (use == Use::stored || m.n == 0) return;
    work.weight_bytes += read * bytes_of(m);
    work.products[static_cast<size_t>(m.type)] += 2 * multiply_adds(m) * multiplied;
  });
  for (const int window : c.window) {
    const double seen = window > 0 ? std::min(s.context, window + s.tokens - 1) : s.context;
    work.kv_bytes += s.sequences * seen * kv_bytes_per_token / c.n_layers;
    with_variant(c.attention, [&](auto v) {
      work.attention += s.sequences * decltype(v)::type::attention_flop(c, s.tokens, seen,
                                                                        visible_pairs(s.tokens, s.context, window));
    });
  }
  work.stages = c.n_layers * STAGES_OF_LAYER + STAGES_OF_STEP;
  work.logits = s.logits * c.vocab_size;
  return work;
}

StepTime time_of(const Work& work, const Machine& machine) {
  StepTime t{.weights = work.weight_bytes / machine.bandwidth,
             .kv = work.kv_bytes / machine.bandwidth,
             .products = 0,
             .attention = work.attention / machine.attention,
             .launches = work.stages * machine.launch,
             .logits = work.logits * machine.logit};
  for (size_t i = 0; i < work.products.size(); i++)
    if (work.products[i] > 0) t.products += work.products[i] / machine.products[i];
  return t;
}

double StepTime::total() const {
  return std::max(weights, products) + std::max(kv, attention) + launches + logits;
}

const char* StepTime::bound() const {
  const std::pair<double, const char*> parts[] = {{weights, "weights"},   {kv, "KV"},
                                                  {products, "compute"},  {attention, "compute"},
                                                  {launches, "launches"}, {logits, "logits"}};
  return std::ranges::max_element(parts, {}, [](const auto& part) { return part.first; })->second;
}

double prompt_seconds(const Model& model, int n, int chunk, double kv_bytes_per_token, const Machine& machine) {
  Machine of_prompts = machine;
  of_prompts.products = machine.prompt_products, of_prompts.attention = machine.prompt_attention;
  double seconds = 0;
  for (int done = 0; done < n;) {
    const int tokens = std::min(chunk, n - done);
    done += tokens;
    const StepShape step{
        .sequences = 1, .tokens = double(tokens), .context = double(done), .logits = double(done == n)};
    seconds += time_of(work_of(model, step, kv_bytes_per_token), of_prompts).total();
  }
  return seconds;
}

// ---- The model's sizes.

std::vector<Matrix> matrices_of_decode(const Model& model) {
  std::vector<Matrix> all;
  each_matrix(model, [&](const Matrix& m, Use use) {
    for (int g = 0; g < m.groups && m.n > 0 && use != Use::stored; g++) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(packed_bytes(m.type, m.n, m.k)) * g;
      all.push_back({m.type, m.n, m.k, 1, m.data + at});
    }
  });
  return all;
}

std::vector<Matrix> placed(std::vector<Matrix> matrices, std::span<const std::byte> memory) {
  size_t used = 0;
  for (Matrix& m : matrices) {
    m.n = largest(m.n, [&](int n) { return packed_bytes(m.type, n, m.k) <= memory.size(); });
    const size_t bytes = packed_bytes(m.type, m.n, m.k);
    if (used + bytes > memory.size()) used = 0;
    m.data = memory.data() + used;
    used += bytes;
  }
  return matrices;
}

double bytes_of(const Matrix& m) {
  return m.n == 0 ? 0 : static_cast<double>(packed_bytes(m.type, m.n, m.k)) * m.groups;
}

double multiply_adds(const Matrix& m) {
  return static_cast<double>(m.n) * m.k * m.groups;
}

double weight_bytes(const Model& model) {
  double bytes = static_cast<double>(model.vector_bytes);
  each_matrix(model, [&](const Matrix& m, Use) { bytes += bytes_of(m); });
  return bytes;
}

double parameters(const Model& model) {
  double n = static_cast<double>(model.vector_bytes / sizeof(float));
  each_matrix(model, [&](const Matrix& m, Use) { n += multiply_adds(m); });
  for (const Layer& l : model.layers) n -= multiply_adds(l.w_uk_t.weight);  // w_uk's, turned
  return n;
}

int largest(int most, const std::function<bool(int)>& holds) {
  int low = 0, high = most;  // low holds, high + 1 does not
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (holds(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

int ridge_batch(const Model& model, const Machine& machine) {
  constexpr int MOST = 1 << 20;
  Machine of_many = machine;
  of_many.products = machine.prompt_products;
  const int below = largest(MOST, [&](int n) {
    const StepTime t =
        time_of(work_of(model, {.sequences = double(n), .tokens = 1, .context = 1, .logits = double(n)}, 0), of_many);
    return t.products < t.weights;
  });
  return below == MOST ? 0 : below + 1;
}

double kv_bytes_per_token(const Config& config, const std::string& kv) {
  double bytes = 0;
  with_variant(config.attention, [&](auto v) {
    const CacheShape shape = decltype(v)::type::cache_shape(config, 1, 1);
    const auto try_each = [&]<class... Kv>(std::type_identity<std::tuple<Kv...>>) {
      ((kv == Kv::name ? bytes = static_cast<double>(KVCache<Kv, 0>::bytes_per_token(shape)) : 0), ...);
    };
    try_each(std::type_identity<KvTypes>());
  });
  return bytes;
}

// ---- The same model, otherwise.

Model with_attention(const Model& model, const std::string& attention) {
  Model m;
  m.config = model.config;
  m.embed_tokens = model.embed_tokens;
  m.lm_head = model.lm_head;
  m.rope = model.rope;
  m.layers = model.layers;
  m.vector_bytes = model.vector_bytes;
  Config& c = m.config;
  if (attention == c.attention) return m;
  const int d = c.attention == "mla" ? c.qk_nope_head_dim : c.head_dim, H = c.n_heads;
  c.attention = attention;
  c.head_dim = c.qk_nope_head_dim = c.v_head_dim = d;
  c.q_lora_rank = 0, c.kv_lora_rank = 4 * d, c.qk_rope_head_dim = d / 2;
  c.n_kv_heads = attention == "mha" ? H : 1;
  if (attention == "gqa")
    for (int g = 1; g <= H / 4; g++)
      if (H % g == 0) c.n_kv_heads = g;
  for (Layer& l : m.layers) {
    Layer other;
    other.mlp = l.mlp, other.router = l.router, other.experts = l.experts, other.shared = l.shared;
    Shapes shapes(l.o_proj.weight.type);
    with_variant(attention, [&](auto v) { decltype(v)::type::collect(shapes, "", c, other); });
    l = other;
  }
  return m;
}

void set_weight_type(Model& model, WeightType type) {
  const int group = weight_format(type).block;
  each_matrix(model, [&](Matrix& m, Use use) {
    const bool head = use == Use::heads || (use == Use::stored && m.groups > 1);
    if (use != Use::router && m.k % group == 0 && !(head && group > 1)) m.type = type;
  });
}
