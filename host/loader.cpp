// loader.cpp: makes a model of a model file: its tensors by name, as the config calls for them, then packed. Whatever
// is not expected is refused by name.
#include "host/loader.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <set>

#include "host/config.h"
#include "host/error.h"
#include "host/json.h"
#include "host/safetensors.h"
#include "kernels/threads.h"
#include "variants.h"

namespace {

using NamedTypes = std::map<std::string, WeightType>;

// The types that the file names: "types" of __metadata__, an object of matrix name to type name.
NamedTypes read_types(const std::string& path, const std::string& text) {
  const Json json = parse_json(text, path + ": __metadata__ \"types\"");
  if (!json.object()) fail("%s: __metadata__ \"types\" is not a JSON object", path.c_str());
  NamedTypes types;
  for (const auto& [matrix, value] : *json.object()) {
    const auto type = value.string() ? find_weight_type(*value.string()) : std::nullopt;
    if (!type)
      fail("%s: __metadata__ \"types\": %s is %s, not one of %s", path.c_str(), matrix.c_str(), value.text().c_str(),
           weight_type_names().c_str());
    types.emplace(matrix, *type);
  }
  return types;
}

// The float type that is stored as this dtype: what a matrix is whose type is not named.
std::optional<WeightType> float_type(const std::string& dtype) {
  for (size_t i = 0; i < weight_formats().size(); i++)
    if (const WeightFormat& f = weight_formats()[i]; f.block == 1 && f.dtype == dtype)
      return static_cast<WeightType>(i);
  return {};
}

// A vector to copy: this process's elements of it.
struct CopyJob {
  const std::byte* source;
  size_t n;
  const float** out;
};

// A matrix [groups, n, k] to pack, this process's rows of it, and where its description goes.
struct PackJob {
  std::string tensor;
  TensorView source;  // of the first group
  size_t bytes;       // of a group, as stored
  int groups;
  bool transposed;
  double parameters;  // of the whole matrix
  Matrix* out;

  size_t group_bytes() const { return ::packed_bytes(source.type, source.n, source.k); }
  size_t packed_bytes() const { return static_cast<size_t>(groups) * group_bytes(); }
};

// Takes tensors by name with their expected shape. Matrices are packed, and vectors copied, once all are known.
class Collector {
 public:
  Collector(const std::string& path, Header& header, const Part& part) : path_(path), header_(header), part_(part) {}

  NamedTypes types;
  std::vector<PackJob> jobs;
  std::vector<CopyJob> vectors;
  double vector_parameters = 0;  // of the whole model

  bool has(const std::string& name) const { return header_.has(name); }

  void refuse_unused() const {
    for (const auto& [name, type] : types)
      if (!matrices_.count(name))
        fail("%s: __metadata__ \"types\" names %s, which is not a matrix that this model's config calls for",
             path_.c_str(), name.c_str());
    header_.refuse_unused();
  }

  // [groups, n, k], and a bias [groups, n] where there is one. Ranks are dealt runs of `run` rows; n: whole groups.
  void linear(const std::string& name, int n, int k, Linear& out, int run = 1, int groups = 1) {
    matrix(name, n, k, out.weight, run, groups);
    optional_vector(name + ".bias", {groups, n}, out.bias, run);
  }

  void matrix(const std::string& name, int n, int k, Matrix& out, int run = 1, int groups = 1) {
    add(pack_job(name, groups, n, k, run, out));
  }

  // A group for each head of MLA; transposed: [groups, k, n] of it.
  void heads(const std::string& name, int groups, int n, int k, bool transposed, Linear& out) {
    PackJob job = pack_job(name, groups, n, k, n, out.weight);
    if (weight_format(job.source.type).block != 1) header_.refuse(name + ".weight", "F32, BF16 or F16", {groups, n, k});
    if (transposed) std::swap(job.source.n, job.source.k), job.parameters = 0;  // those of the other copy
    job.transposed = transposed;
    add(job);
  }

  void norm(const std::string& name, int n, Norm& out) {
    out.n = n;
    optional_vector(name + ".weight", {n}, out.weight);
    if (out.weight) optional_vector(name + ".bias", {n}, out.bias);
  }

  // The norm of `heads` heads of n elements: of each, or of all together, as long as its weight is.
  void norm_of_heads(const std::string& name, int heads, int n, Norm& out) {
    const bool row = has(name + ".weight") && length(name + ".weight") == int64_t{heads} * n;
    norm(name, row ? heads * n : n, out);
  }

  void vector(const std::string& name, const std::vector<int64_t>& shape, const float*& out, int run = KEPT) {
    const Entry& e = header_.take(name, "F32", shape);
    const int all = static_cast<int>(e.bytes / sizeof(float));
    const std::byte* source = e.data + static_cast<size_t>(first_own(all, run)) * sizeof(float);
    vectors.push_back({source, static_cast<size_t>(own(all, run)), &out});
    vector_parameters += all;
    out = reinterpret_cast<const float*>(source);  // until pack() copies it
  }

  void optional_vector(const std::string& name, const std::vector<int64_t>& shape, const float*& out, int run = KEPT) {
    if (has(name)) vector(name, shape, out, run);
  }

  int64_t length(const std::string& name) {
    const Entry& e = header_.take(name);
    if (e.shape.size() != 1) header_.refuse(name, "F32", {-1});
    return e.shape[0];
  }

 private:
  // Of n rows that are dealt in runs, this process's.
  int first_own(int n, int run) const { return run == KEPT ? 0 : part_.first(n / run) * run; }
  int own(int n, int run) const { return run == KEPT ? n : part_.count(n / run) * run; }

  void add(const PackJob& job) {
    *job.out = {job.source.type, job.source.n, job.source.k, job.groups, nullptr};  // its data: pack()
    jobs.push_back(job);
  }

  PackJob pack_job(const std::string& name, int groups, int n, int k, int run, Matrix& out) {
    const WeightType type = type_of(name, groups, n, k);
    const WeightFormat& format = weight_format(type);
    const std::string tensor = name + ".weight";
    const Entry& e = header_.take(tensor, format.dtype, {groups, n, k / format.block * format.block_elements});
    const size_t row_bytes = e.bytes / area(groups, n);
    const int rows = own(groups * n, run), own_groups = groups == 1 ? 1 : rows / n, own_n = groups == 1 ? rows : n;
    const std::byte* source = e.data + static_cast<size_t>(first_own(groups * n, run)) * row_bytes;
    const TensorView view{type, own_n, k, source};
    const double parameters = static_cast<double>(groups) * n * k;
    return {tensor, view, static_cast<size_t>(own_n) * row_bytes, own_groups, false, parameters, &out};
  }

  WeightType type_of(const std::string& name, int groups, int n, int k) {
    matrices_.insert(name);
    const std::string weight = name + ".weight";
    const auto named = types.find(name);
    const std::optional<WeightType> type =
        named != types.end() ? named->second : float_type(header_.take(weight).dtype);
    if (!type) header_.refuse(weight, "F32, BF16 or F16, or a type that __metadata__ \"types\" names,", {groups, n, k});
    const WeightFormat& format = weight_format(*type);
    if (k % format.block != 0)
      fail("%s: __metadata__ \"types\": %s is %s, whose rows are multiples of %d inputs; it has %d", path_.c_str(),
           name.c_str(), std::string(format.name).c_str(), format.block, k);
    return *type;
  }

  std::string path_;
  Header& header_;
  Part part_;
  std::set<std::string> matrices_;  // taken so far
};

void collect_mlp(Collector& t, const std::string& at, const Config& c, int hidden, Mlp& mlp) {
  const int dim = c.dim;
  if (t.has(at + "gate_proj.weight") || c.activation == Activation::swiglu_oai)
    t.linear(at + "gate_proj", hidden, dim, mlp.gate);
  t.linear(at + "up_proj", hidden, dim, mlp.up);
  t.linear(at + "down_proj", dim, hidden, mlp.down);
}

void collect_experts(Collector& t, const std::string& at, const Config& c, Layer& l) {
  const int E = c.n_routed_experts, hidden = c.moe_intermediate_size;
  t.matrix(at + "router", E, c.dim, l.router.weight, KEPT);
  t.optional_vector(at + "router.logit_bias", {E}, l.router.bias);
  t.optional_vector(at + "router.bias", {E}, l.router_bias);
  t.linear(at + "experts.gate_proj", hidden, c.dim, l.experts.gate, hidden, E);
  t.linear(at + "experts.up_proj", hidden, c.dim, l.experts.up, hidden, E);
  t.linear(at + "experts.down_proj", c.dim, hidden, l.experts.down, c.dim, E);
  if (c.n_shared_experts) collect_mlp(t, at + "shared_experts.", c, c.n_shared_experts * hidden, l.shared);
}

// The RoPE tables; a head has `rotated` elements that may rotate.
void collect_rope(Collector& t, int rotated, Model& m) {
  m.rope.resize(m.config.rope_scale.size());
  for (size_t i = 0; i < m.rope.size(); i++) {
    const std::string at = "rope." + std::to_string(i) + ".", name = at + "inv_freq";
    const int64_t n = t.length(name);
    if (2 * n > rotated || n < 1)
      fail("%s: tensor %s has %lld frequencies; a head has 1 to %d", m.path.c_str(), name.c_str(),
           static_cast<long long>(n), rotated / 2);
    m.rope[i].n = static_cast<int>(n);
    t.vector(name, {n}, m.rope[i].inv_freq);
    if (m.config.original_seq_len > 0) t.vector(at + "long_inv_freq", {n}, m.rope[i].long_inv_freq);
  }
}

template <class Variant>
void collect(Collector& t, Model& m) {
  const Config& c = m.config;
  t.matrix("embed_tokens", c.vocab_size, c.dim, m.embed_tokens);
  if (t.has("lm_head.weight")) t.matrix("lm_head", c.vocab_size, c.dim, m.lm_head.weight);
  t.optional_vector("lm_head.bias", {c.vocab_size}, m.lm_head.bias, 1);
  t.optional_vector("position_embedding.weight", {c.seq_len, c.dim}, m.position_embedding);
  t.norm("norm", c.dim, m.final_norm);
  collect_rope(t, Variant::rotated(c), m);
  m.layers.resize(static_cast<size_t>(c.n_layers));
  for (int i = 0; i < c.n_layers; i++) {
    Layer& l = m.layers[static_cast<size_t>(i)];
    const std::string at = "layers." + std::to_string(i) + ".";
    t.norm(at + "attention_norm", c.dim, l.attention_norm);
    t.norm(at + "attention_post_norm", c.dim, l.attention_post_norm);
    t.norm(at + "mlp_norm", c.dim, l.mlp_norm);
    t.norm(at + "mlp_post_norm", c.dim, l.mlp_post_norm);
    Variant::collect(t, at, c, l);
    if (c.is_moe(i))
      collect_experts(t, at, c, l);
    else
      collect_mlp(t, at, c, c.hidden_dim, l.mlp);
  }
}

// What the report says of the weights: the parameters of the whole model, and this process's bytes.
void count(const Collector& tensors, Model& m) {
  std::map<std::string, double> by_type;
  for (const PackJob& j : tensors.jobs) {
    m.weight_bytes += j.packed_bytes();
    if (j.parameters > 0) by_type[std::string(weight_format(j.source.type).name)] += j.parameters;
  }
  for (const CopyJob& j : tensors.vectors) m.vector_bytes += j.n * sizeof(float);
  if (!tensors.vectors.empty()) by_type["f32"] += tensors.vector_parameters;
  m.weight_bytes += m.vector_bytes;
  for (const auto& [type, parameters] : by_type) {
    char text[64];
    std::snprintf(text, sizeof text, "%s%s %.2fM", m.types.empty() ? "" : ", ", type.c_str(), parameters / 1e6);
    m.types += text;
    m.n_parameters += parameters;
  }
}

// ---- Packing.

constexpr size_t RELEASE_EVERY = size_t{8} << 20;  // bytes of the file that are resident at most while packing

void pack_group(const MappedFile& file, const PackJob& j, size_t group, const std::string& path, std::byte* out,
                Threads& threads) {
  TensorView s = j.source;
  const auto* data = static_cast<const std::byte*>(s.data) + group * j.bytes;
  s.data = data;
  const int all = panels(s.n);
  const size_t panel_bytes = (j.bytes + static_cast<size_t>(all) - 1) / static_cast<size_t>(all);
  // A transposed source is read by columns: all of it at once.
  const int step = j.transposed ? all : static_cast<int>(std::max<size_t>(1, RELEASE_EVERY / panel_bytes));
  for (int first = 0; first < all; first += step) {
    const int last = std::min(all, first + step);
    std::atomic<bool> finite = true;
    threads.run(threads.most(), [&](const Team& team) {
      team.for_each(last - first, [&](int p) {
        if (!pack(s, j.transposed, first + p, out)) finite = false;
      });
    });
    if (!finite)
      fail("%s: tensor %s has a scale that is infinite or no number: it is damaged: export or fetch it again",
           path.c_str(), j.tensor.c_str());
    file.release(data, data + std::min(j.bytes, static_cast<size_t>(last) * panel_bytes));
  }
}

void pack_matrices(const MappedFile& file, const std::vector<PackJob>& jobs, Model& m, Threads& threads) {
  size_t total = 0;
  for (const PackJob& j : jobs) total += j.packed_bytes();
  m.packed = Buffer<std::byte>(total);
  std::byte* at = m.packed.data();
  for (const PackJob& j : jobs) {
    j.out->data = at;
    for (size_t group = 0; j.source.n > 0 && group < static_cast<size_t>(j.groups); group++, at += j.group_bytes())
      stage(at, j.group_bytes(), [&](std::byte* out) { pack_group(file, j, group, m.path, out, threads); });
  }
}

void copy_vectors(const std::vector<CopyJob>& vectors, Model& m) {
  size_t total = 0;
  for (const CopyJob& v : vectors) total += v.n;
  m.vectors = Buffer<float>(total);
  float* at = m.vectors.data();
  for (const CopyJob& v : vectors) {
    upload(at, v.source, v.n * sizeof(float));
    *v.out = at;
    at += v.n;
  }
  synchronize();  // the file is closed next
}

}  // namespace

struct ModelFile::Contents {
  Contents(const std::string& path, const Part& part) : file(path), header(path, file), tensors(path, header, part) {}
  MappedFile file;
  Header header;
  Collector tensors;
};

ModelFile::ModelFile(const std::string& path, Part part) : contents_(new Contents(path, part)) {
  const std::map<std::string, std::string>& metadata = contents_->header.metadata();
  Collector& tensors = contents_->tensors;
  model.path = path;
  model.part = part;
  model.config = read_config(path, metadata);
  model.tokenizer_sha256 = metadata.at("tokenizer_sha256");
  tensors.types = read_types(path, metadata.at("types"));
  with_variant(model.config.attention, [&](auto v) { collect<typename decltype(v)::type>(tensors, model); });
  tensors.refuse_unused();
  count(tensors, model);
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
