// loader.cpp: makes a model of a model file: hyper-parameters, then tensors by name, then packing. Whatever is not
// expected is refused by name.
#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <map>
#include <set>

#include "host/error.h"
#include "host/json.h"
#include "host/safetensors.h"
#include "variants.h"

namespace {

constexpr const char* FORMAT = "attn.cu 2";
constexpr int MAX_LAYERS = 1 << 12, MAX_EXPERTS = 1 << 14, MAX_LENGTH = 1 << 27, MAX_PRODUCT = 1 << 26;

// What __metadata__ may hold.
class Metadata {
 public:
  Metadata(const std::string& path, const Header& header) : path_(path), values_(header.metadata()) {
    if ((*this)["format"] != FORMAT)
      fail(
          "%s: __metadata__ \"format\" is \"%s\", this build reads \"%s\"; make it anew: "
          ".venv/bin/python export.py SOURCE -o %s",
          path.c_str(), (*this)["format"].c_str(), FORMAT, path.c_str());
    for (const auto& [key, text] : values_)
      if (key != "format" && key != "config" && key != "types" && key != "tokenizer_sha256" && key != "source" &&
          key != "made_from")
        fail("%s: __metadata__ has an unknown key \"%s\"", path.c_str(), key.c_str());
  }

  const std::string& operator[](const char* key) const {
    const auto found = values_.find(key);
    if (found == values_.end())
      fail("%s: __metadata__ has no \"%s\"; make the file with export.py", path_.c_str(), key);
    return found->second;
  }

 private:
  std::string path_;
  const std::map<std::string, std::string>& values_;
};

// ---- Hyper-parameters.

// The fields of "config": each is taken once, checked for type and range; what is left over is refused.
class Fields {
 public:
  Fields(const std::string& path, const std::string& text)
      : path_(path), json_(parse_json(text, path + ": __metadata__ \"config\"")) {
    if (!json_.object()) fail("%s: __metadata__ \"config\" is not a JSON object", path.c_str());
  }

  void text(const char* key, std::string& out) {
    const Json* value = take(key, true);
    if (!value->string()) refuse(key, *value, "a string");
    out = *value->string();
  }

  void integer(const char* key, int& out, int low, int high, bool required = true) {
    const Json* value = take(key, required);
    if (value) out = to_integer(key, *value, low, high);
  }

  void number(const char* key, float& out, bool required = false) {
    const Json* value = take(key, required);
    if (value) out = to_number(key, *value);
  }

  void boolean(const char* key, bool& out) {
    const Json* value = take(key, false);
    if (!value) return;
    if (!value->boolean()) refuse(key, *value, "true or false");
    out = *value->boolean();
  }

  void integers(const char* key, std::vector<int>& out, int length, int low, int high) {
    for (const Json& v : array(key, length)) out.push_back(to_integer(key, v, low, high));
  }

  void numbers(const char* key, std::vector<float>& out) {
    for (const Json& v : array(key, -1)) out.push_back(to_number(key, v));
  }

  template <class Enum>
  void choice(const char* key, Enum& out, std::initializer_list<std::pair<const char*, Enum>> choices, bool required) {
    const Json* value = take(key, required);
    if (!value) return;
    std::string right;
    for (const auto& [text, choice] : choices) {
      if (value->string() && *value->string() == text) {
        out = choice;
        return;
      }
      right += (right.empty() ? "" : ", ") + std::string(text);
    }
    refuse(key, *value, right.c_str());
  }

  bool has(const char* key) const { return json_.find(key) != nullptr; }

  void require(bool right, const char* key, const char* what) const {
    if (!right) refuse(key, *json_.find(key), what);
  }

  // The width of a layer: count x size.
  void fits(const char* what, int count, int size) const {
    if (static_cast<int64_t>(count) * size > MAX_PRODUCT)
      fail("%s: config %s is %d x %d; more than %d are not supported", path_.c_str(), what, count, size, MAX_PRODUCT);
  }

  void refuse_unused() const {
    for (const auto& [key, value] : *json_.object())
      if (!used_.count(key))
        fail("%s: config \"%s\" = %s is not known to this build", path_.c_str(), key.c_str(), text(value).c_str());
  }

  [[noreturn]] void refuse(const char* key, const Json& value, const char* right) const {
    fail("%s: config \"%s\" is %s; it must be %s", path_.c_str(), key, text(value).c_str(), right);
  }

 private:
  static std::string text(const Json& value) {
    const std::string t = value.text();
    return t.size() > 60 ? t.substr(0, 60) + "..." : t;
  }

  const Json* take(const char* key, bool required) {
    used_.insert(key);
    const Json* found = json_.find(key);
    if (!found && required) fail("%s: config has no \"%s\"; make the file with export.py", path_.c_str(), key);
    return found;
  }

  const Json::Array& array(const char* key, int length) {
    const Json* value = take(key, true);
    if (!value->array()) refuse(key, *value, "an array");
    if (length >= 0 && value->array()->size() != static_cast<size_t>(length))
      refuse(key, *value, ("an array of n_layers = " + std::to_string(length) + " elements").c_str());
    return *value->array();
  }

  int to_integer(const char* key, const Json& value, int low, int high) const {
    const auto x = value.integer<int>();
    if (!x || *x < low || *x > high)
      refuse(key, value, ("an integer from " + std::to_string(low) + " to " + std::to_string(high)).c_str());
    return *x;
  }

  float to_number(const char* key, const Json& value) const {
    const auto x = static_cast<float>(value.number().value_or(NAN));
    if (!std::isfinite(x)) refuse(key, value, "a finite number");
    return x;
  }

  std::string path_;
  Json json_;
  std::set<std::string> used_;
};

void read_attention(Fields& f, Config& c) {
  f.text("attention", c.attention);
  f.integer("n_heads", c.n_heads, 1, MAX_WIDTH);
  const bool known = with_variant(c.attention, [&](auto v) { decltype(v)::type::read(f, c); });
  f.require(known, "attention", "mha, mqa, gqa or mla");
}

void read_experts(Fields& f, const std::string& path, Config& c) {
  if (!f.has("n_routed_experts")) return;
  f.integer("n_routed_experts", c.n_routed_experts, 1, MAX_EXPERTS);
  f.integer("num_experts_per_tok", c.num_experts_per_tok, 1, c.n_routed_experts);
  f.integer("n_shared_experts", c.n_shared_experts, 0, MAX_EXPERTS, false);
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, MAX_WIDTH);
  f.integers("moe_layers", c.moe_layers, c.n_layers, 0, 1);
  f.choice("scoring_func", c.scoring_func, {{"softmax", Scoring::softmax}, {"sigmoid", Scoring::sigmoid}}, true);
  f.boolean("norm_topk_prob", c.norm_topk_prob);
  f.number("routed_scaling_factor", c.routed_scaling_factor);
  f.integer("n_group", c.n_group, 1, c.n_routed_experts, false);
  f.integer("topk_group", c.topk_group, 1, c.n_group, false);
  f.choice("group_score", c.group_score, {{"max", GroupScore::max}, {"top2_sum", GroupScore::top2_sum}}, false);
  if (c.n_routed_experts % c.n_group != 0)
    fail("%s: config \"n_group\" is %d; it must divide n_routed_experts = %d", path.c_str(), c.n_group,
         c.n_routed_experts);
  const int eligible = c.n_routed_experts / c.n_group * c.topk_group;
  if (c.num_experts_per_tok > eligible)
    fail("%s: config \"num_experts_per_tok\" is %d; topk_group = %d of %d groups hold only %d experts", path.c_str(),
         c.num_experts_per_tok, c.topk_group, c.n_group, eligible);
  if (c.group_score == GroupScore::top2_sum && c.n_routed_experts / c.n_group < 2)
    fail(
        "%s: config \"group_score\" is top2_sum; a group must hold at least 2 experts, n_group = %d leaves "
        "%d",
        path.c_str(), c.n_group, c.n_routed_experts / c.n_group);
}

Config read_config(const std::string& path, const std::string& text) {
  Config c;
  Fields f(path, text);
  f.integer("dim", c.dim, 1, MAX_WIDTH);
  f.integer("hidden_dim", c.hidden_dim, 1, MAX_WIDTH);
  f.integer("n_layers", c.n_layers, 1, MAX_LAYERS);
  f.integer("vocab_size", c.vocab_size, 1, 1 << 24);
  f.integer("seq_len", c.seq_len, 1, MAX_LENGTH);
  read_attention(f, c);
  f.choice("norm", c.norm, {{"rms", NormKind::rms}, {"layer", NormKind::layer}}, true);
  f.number("norm_eps", c.norm_eps, true);
  f.choice("activation", c.activation,
           {{"silu", Activation::silu},
            {"gelu", Activation::gelu},
            {"gelu_tanh", Activation::gelu_tanh},
            {"swiglu_oai", Activation::swiglu_oai}},
           true);
  if (c.activation == Activation::swiglu_oai) f.number("swiglu_limit", c.swiglu_limit, true);
  f.number("attention_scale", c.attention_scale, true);
  f.number("attention_softcap", c.attention_softcap);
  f.number("logit_softcap", c.logit_softcap);
  f.number("embedding_scale", c.embedding_scale);
  f.number("logit_scale", c.logit_scale);
  f.number("residual_scale", c.residual_scale);
  f.integers("window", c.window, c.n_layers, 0, MAX_LENGTH);
  f.numbers("rope_scale", c.rope_scale);
  f.integer("original_seq_len", c.original_seq_len, 0, MAX_LENGTH, false);
  f.integers("rope", c.rope, c.n_layers, -1, static_cast<int>(c.rope_scale.size()) - 1);
  read_experts(f, path, c);
  f.refuse_unused();
  const auto not_below = [&](const char* key, float value, float least) {
    if (value < least) fail("%s: config \"%s\" is %g; it must be at least %g", path.c_str(), key, value, least);
  };
  f.fits("n_shared_experts x moe_intermediate_size", c.n_shared_experts, c.moe_intermediate_size);
  not_below("norm_eps", c.norm_eps, 0);
  not_below("swiglu_limit", c.swiglu_limit, 0);
  not_below("attention_softcap", c.attention_softcap, 0);
  not_below("logit_softcap", c.logit_softcap, 0);
  return c;
}

// ---- Tensors.

// The weight types that the file names: "types" of __metadata__, an object of matrix name to type name.
class NamedTypes {
 public:
  NamedTypes(const std::string& path, const std::string& text) : path_(path) {
    const Json json = parse_json(text, path + ": __metadata__ \"types\"");
    if (!json.object()) fail("%s: __metadata__ \"types\" is not a JSON object", path.c_str());
    std::string known;
    for (const WeightFormat& format : weight_formats()) known += (known.empty() ? "" : ", ") + std::string(format.name);
    for (const auto& [matrix, value] : *json.object()) {
      const auto type = value.string() ? find_weight_type(*value.string()) : std::nullopt;
      if (!type)
        fail("%s: __metadata__ \"types\": %s is %s, not one of %s", path.c_str(), matrix.c_str(), value.text().c_str(),
             known.c_str());
      left_.emplace(matrix, *type);
    }
  }

  // The type of a matrix, once; none where the file does not name it.
  std::optional<WeightType> take(const std::string& matrix) {
    const auto found = left_.extract(matrix);
    return found ? std::optional(found.mapped()) : std::nullopt;
  }

  void refuse_unused() const {
    if (!left_.empty())
      fail("%s: __metadata__ \"types\" names %s, which is not a matrix that this model's config calls for",
           path_.c_str(), left_.begin()->first.c_str());
  }

 private:
  std::string path_;
  std::map<std::string, WeightType> left_;
};

// The float type that is stored as this dtype: what a matrix is whose type is not named.
std::optional<WeightType> float_type(const std::string& dtype) {
  for (size_t i = 0; i < weight_formats().size(); i++)
    if (const WeightFormat& f = weight_formats()[i]; f.quant_group == 1 && f.parts[0].dtype == dtype)
      return static_cast<WeightType>(i);
  return {};
}

// A matrix to pack and where its description goes.
struct PackJob {
  TensorView source;
  size_t row_bytes[MAX_PARTS];  // of each part
  bool transposed;
  Matrix* out;
};

// Takes tensors by name with their expected shape. Matrices are packed, and vectors copied, once all are
// known.
class Collector {
 public:
  Collector(const std::string& path, Header& header, NamedTypes types)
      : path_(path), header_(header), types_(std::move(types)) {}

  bool has(const std::string& name) { return header_.find(name) != nullptr; }
  void refuse_unused() const {
    types_.refuse_unused();
    header_.refuse_unused();
  }

  void matrix(const std::string& name, int n, int k, Matrix& out) { group(name, 1, n, k, false, false, out); }

  // [groups, n, k] in one, and a bias [groups, n] where there is one.
  void grouped(const std::string& name, int groups, int n, int k, Linear& out) {
    group(name, groups, n, k, false, false, out.weight);
    optional_vector(name + ".bias", {groups, n}, out.bias);
  }
  // The same where each group is a head of MLA; transposed: [groups, k, n] of it.
  void heads(const std::string& name, int groups, int n, int k, Linear& out) {
    group(name, groups, n, k, true, false, out.weight);
  }
  void heads_transposed(const std::string& name, int groups, int n, int k, Linear& out) {
    group(name, groups, n, k, true, true, out.weight);
  }

  void linear(const std::string& name, int n, int k, Linear& out) {
    matrix(name, n, k, out.weight);
    optional_vector(name + ".bias", {n}, out.bias);
  }

  void norm(const std::string& name, int n, Norm& out) {
    out.n = n;
    optional_vector(name + ".weight", {n}, out.weight);
    if (out.weight) return optional_vector(name + ".bias", {n}, out.bias);
  }

  // The norm of `heads` heads of n elements: of each, or of all together, as long as its weight is.
  void norm_of_heads(const std::string& name, int heads, int n, Norm& out) {
    const bool row = has(name + ".weight") && length(name + ".weight") == int64_t{heads} * n;
    norm(name, row ? heads * n : n, out);
  }

  void vector(const std::string& name, const std::vector<int64_t>& shape, const float*& out) {
    const Entry& e = typed(name, "F32", shape);
    vectors.emplace_back(&e, &out);
    out = reinterpret_cast<const float*>(e.data);  // until pack() copies it
  }

  void optional_vector(const std::string& name, const std::vector<int64_t>& shape, const float*& out) {
    if (has(name)) vector(name, shape, out);
  }

  int64_t length(const std::string& name) {
    const Entry& e = entry(name);
    if (e.shape.size() != 1) refuse(name, e, "F32", {-1});
    return e.shape[0];
  }

  std::vector<PackJob> jobs;
  std::vector<std::pair<const Entry*, const float**>> vectors;

 private:
  // A matrix [groups, n, k]: a job for each group. transposed: each is packed as [k, n].
  void group(const std::string& name, int groups, int n, int k, bool floats_only, bool transposed, Matrix& out) {
    const WeightType type = type_of(name, groups, n, k, floats_only);
    const WeightFormat& format = weight_format(type);
    PackJob job{{type, n, k}, {}, transposed, &out};
    size_t group_bytes[MAX_PARTS] = {};
    for (size_t i = 0; i < format.parts.size(); i++) {
      const WeightPart& part = format.parts[i];
      const Entry& e = typed(name + "." + part.name, part.dtype, {groups, n, k / format.quant_group * part.elements});
      job.source.parts[i] = e.data;
      group_bytes[i] = e.bytes / static_cast<size_t>(groups);
      job.row_bytes[i] = group_bytes[i] / static_cast<size_t>(n);
    }
    if (transposed) std::swap(job.source.n, job.source.k);
    out = {type, job.source.n, job.source.k, groups, nullptr};
    for (int g = 0; g < groups; g++) {
      jobs.push_back(job);
      for (size_t i = 0; i < format.parts.size(); i++)
        job.source.parts[i] = static_cast<const std::byte*>(job.source.parts[i]) + group_bytes[i];
    }
  }

  WeightType type_of(const std::string& name, int groups, int n, int k, bool floats_only) {
    const std::string weight = name + ".weight";
    auto known = seen_.find(name);  // MLA takes its key matrix twice
    if (known != seen_.end()) return known->second;
    const std::optional<WeightType> named = types_.take(name);
    const Entry& e = entry(weight);
    const std::optional<WeightType> type = named ? named : float_type(e.dtype);
    if (!type) refuse(weight, e, "F32, BF16 or F16, or a type that __metadata__ \"types\" names,", {groups, n, k});
    const WeightFormat& format = weight_format(*type);
    if (format.quant_group != 1 && floats_only) refuse(weight, e, "F32, BF16 or F16", {groups, n, k});
    if (k % format.quant_group != 0)
      fail("%s: __metadata__ \"types\": %s is %s, whose rows are multiples of %d inputs; it has %d", path_.c_str(),
           name.c_str(), std::string(format.name).c_str(), format.quant_group, k);
    seen_.emplace(name, *type);
    return *type;
  }

  Entry& entry(const std::string& name) {
    Entry* e = header_.find(name);
    if (!e) fail("%s: tensor %s is missing", path_.c_str(), name.c_str());
    e->used = true;
    return *e;
  }

  // The tensor of this name, which must be of this dtype and shape.
  const Entry& typed(const std::string& name, const char* dtype, const std::vector<int64_t>& shape) {
    const Entry& e = entry(name);
    if (e.dtype != dtype || e.shape != spelled_like(e, shape)) refuse(name, e, dtype, shape);
    return e;
  }

  // A leading size of 1 may be left out: [1, n, k] is [n, k].
  static std::vector<int64_t> spelled_like(const Entry& e, std::vector<int64_t> shape) {
    if (shape.size() == 3 && shape[0] == 1 && e.shape.size() != 3) shape.erase(shape.begin());
    return shape;
  }

  [[noreturn]] void refuse(const std::string& name, const Entry& e, const char* dtype,
                           const std::vector<int64_t>& shape) const {
    fail("%s: tensor %s is %s %s, expected %s %s", path_.c_str(), name.c_str(), e.dtype.c_str(),
         shape_text(e.shape).c_str(), dtype, shape_text(spelled_like(e, shape)).c_str());
  }

  std::string path_;
  Header& header_;
  NamedTypes types_;
  std::map<std::string, WeightType> seen_;
};

void collect_mlp(Collector& t, const std::string& at, const Config& c, int hidden, Mlp& mlp) {
  const int dim = c.dim;
  if (t.has(at + "gate_proj.weight") || c.activation == Activation::swiglu_oai)
    t.linear(at + "gate_proj", hidden, dim, mlp.gate);
  t.linear(at + "up_proj", hidden, dim, mlp.up);
  t.linear(at + "down_proj", dim, hidden, mlp.down);
}

void collect_experts(Collector& t, const std::string& at, const Config& c, Layer& l) {
  t.matrix(at + "router", c.n_routed_experts, c.dim, l.router.weight);
  t.optional_vector(at + "router.logit_bias", {c.n_routed_experts}, l.router.bias);
  t.optional_vector(at + "router.bias", {c.n_routed_experts}, l.router_bias);
  const int E = c.n_routed_experts, hidden = c.moe_intermediate_size;
  t.grouped(at + "experts.gate_proj", E, hidden, c.dim, l.experts.gate);
  t.grouped(at + "experts.up_proj", E, hidden, c.dim, l.experts.up);
  t.grouped(at + "experts.down_proj", E, c.dim, hidden, l.experts.down);
  if (c.n_shared_experts)
    collect_mlp(t, at + "shared_experts.", c, c.n_shared_experts * c.moe_intermediate_size, l.shared);
}

void collect(Collector& t, Model& m) {
  const Config& c = m.config;
  t.matrix("embed_tokens", c.vocab_size, c.dim, m.embed_tokens);
  if (t.has("lm_head.weight")) t.matrix("lm_head", c.vocab_size, c.dim, m.lm_head.weight);
  t.optional_vector("lm_head.bias", {c.vocab_size}, m.lm_head.bias);
  t.optional_vector("position_embedding.weight", {c.seq_len, c.dim}, m.position_embedding);
  t.norm("norm", c.dim, m.final_norm);
  int rotated = 0;
  with_variant(c.attention, [&](auto v) { rotated = decltype(v)::type::rotated(c); });
  m.rope.resize(c.rope_scale.size());
  for (size_t i = 0; i < m.rope.size(); i++) {
    const std::string at = "rope." + std::to_string(i) + ".", name = at + "inv_freq";
    const int64_t n = t.length(name);
    if (2 * n > rotated || n < 1)
      fail("%s: tensor %s has %lld frequencies; a head has 1 to %d", m.path.c_str(), name.c_str(),
           static_cast<long long>(n), rotated / 2);
    m.rope[i].n = static_cast<int>(n);
    t.vector(name, {n}, m.rope[i].inv_freq);
    if (c.original_seq_len > 0) t.vector(at + "long_inv_freq", {n}, m.rope[i].long_inv_freq);
  }
  m.layers.resize(static_cast<size_t>(c.n_layers));
  for (int i = 0; i < c.n_layers; i++) {
    Layer& l = m.layers[static_cast<size_t>(i)];
    const std::string at = "layers." + std::to_string(i) + ".";
    t.norm(at + "attention_norm", c.dim, l.attention_norm);
    t.norm(at + "attention_post_norm", c.dim, l.attention_post_norm);
    t.norm(at + "mlp_norm", c.dim, l.mlp_norm);
    t.norm(at + "mlp_post_norm", c.dim, l.mlp_post_norm);
    with_variant(c.attention, [&](auto v) { decltype(v)::type::collect(t, at, c, l); });
    if (c.is_moe(i))
      collect_experts(t, at, c, l);
    else
      collect_mlp(t, at, c, c.hidden_dim, l.mlp);
  }
}

// ---- Packing.

constexpr size_t RELEASE_EVERY = size_t{8} << 20;  // bytes of the file that are resident at most while packing

size_t packed_bytes(const PackJob& j) {
  return packed_bytes(j.source.type, j.source.n, j.source.k);
}

void pack_matrix(const MappedFile& file, const PackJob& j, std::byte* out, Threads& threads) {
  const TensorView& s = j.source;
  const int all = panels(s.n);
  const size_t panel_rows = static_cast<size_t>(s.n + all - 1) / static_cast<size_t>(all);
  size_t row_bytes = 0;
  for (const size_t bytes : j.row_bytes) row_bytes += bytes;
  // A transposed source is read by columns: all of it at once.
  const int step = j.transposed ? all : static_cast<int>(std::max<size_t>(1, RELEASE_EVERY / (row_bytes * panel_rows)));
  const int source_rows = j.transposed ? s.k : s.n;
  for (int first = 0; first < all; first += step) {
    const int last = std::min(all, first + step);
    threads.run(threads.most(), [&](const Team& team) {
      team.for_each(last - first, [&](int p) { pack(s, j.transposed, first + p, out); });
    });
    const size_t done = j.transposed ? static_cast<size_t>(source_rows)
                                     : std::min(static_cast<size_t>(s.n), static_cast<size_t>(last) * panel_rows);
    for (size_t i = 0; i < MAX_PARTS; i++) {
      const auto* data = static_cast<const std::byte*>(s.parts[i]);
      file.release(data, data + j.row_bytes[i] * done);
    }
  }
}

void pack_matrices(const MappedFile& file, const std::vector<PackJob>& jobs, Model& m, Threads& threads) {
  size_t total = 0;
  for (const PackJob& j : jobs) total += packed_bytes(j);
  m.packed = Buffer<std::byte>(total);
  std::byte* at = m.packed.data();
  for (const PackJob& j : jobs) {
    pack_matrix(file, j, at, threads);
    if (!j.out->data) j.out->data = at;  // the first of its groups
    at += packed_bytes(j);
  }
}

void copy_vectors(const std::vector<std::pair<const Entry*, const float**>>& vectors, Model& m) {
  size_t total = 0;
  for (const auto& v : vectors) total += v.first->bytes / sizeof(float);
  m.vectors = Buffer<float>(total);
  float* at = m.vectors.data();
  for (const auto& [entry, out] : vectors) {
    std::memcpy(at, entry->data, entry->bytes);
    *out = at;
    at += entry->bytes / sizeof(float);
  }
}

// What the report says of the weights. A transposed matrix is a second copy of parameters that are counted
// already.
void count(const Collector& tensors, Model& m) {
  std::map<std::string, double> by_type;
  for (const PackJob& j : tensors.jobs) {
    m.weight_bytes += packed_bytes(j);
    if (!j.transposed)
      by_type[std::string(weight_format(j.source.type).name)] += static_cast<double>(j.source.n) * j.source.k;
  }
  for (const auto& [entry, out] : tensors.vectors) {
    m.vector_bytes += entry->bytes;
    by_type["f32"] += static_cast<double>(entry->bytes / sizeof(float));
  }
  m.weight_bytes += m.vector_bytes;
  for (const auto& [type, parameters] : by_type) {
    char text[64];
    std::snprintf(text, sizeof text, "%s%s %.2fM", m.types.empty() ? "" : ", ", type.c_str(), parameters / 1e6);
    m.types += text;
    m.n_parameters += parameters;
  }
}

NamedTypes read_types(const std::string& path, const Header& header) {
  return {path, Metadata(path, header)["types"]};
}

}  // namespace

struct ModelFile::Contents {
  explicit Contents(const std::string& path)
      : file(path), header(path, file), tensors(path, header, read_types(path, header)) {}
  MappedFile file;
  Header header;
  Collector tensors;
};

ModelFile::ModelFile(const std::string& path) : contents_(new Contents(path)) {
  model.path = path;
  const Metadata metadata(path, contents_->header);
  model.config = read_config(path, metadata["config"]);
  model.tokenizer_sha256 = metadata["tokenizer_sha256"];
  collect(contents_->tensors, model);
  contents_->tensors.refuse_unused();
  count(contents_->tensors, model);
}

ModelFile::~ModelFile() = default;

void ModelFile::require_weights() const {
  if (contents_->header.shapes_alone())
    fail(
        "%s: shapes without weights: ./run --estimate can plan with them; to run the model, export it with its weights",
        model.path.c_str());
}

void ModelFile::pack(Threads& threads) {
  require_weights();
  pack_matrices(contents_->file, contents_->tensors.jobs, model, threads);
  copy_vectors(contents_->tensors.vectors, model);
  contents_->file.refuse_changed(model.path);
  if (!model.lm_head) model.lm_head.weight = model.embed_tokens;
  contents_.reset();
}

Model load_model(const std::string& path, Threads& threads) {
  ModelFile file(path);
  file.pack(threads);
  return std::move(file.model);
}
