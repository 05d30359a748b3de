// tiny_model.h: small random models for the tests, as model files and as float64 arrays for the references.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "host/error.h"
#include "host/json.h"
#include "host/loader.h"
#include "kernels/threads.h"

// A JSON object to change by name.
using Members = std::map<std::string, Json>;

inline Members members(const Json& object) {
  return Members(object.object()->begin(), object.object()->end());
}
inline Json json(const Members& object) {
  return Json::Object(object.begin(), object.end());
}

// A tensor of the reference: row-major, any shape.
struct Array {
  std::vector<int64_t> shape;
  std::vector<float> data;
  const float* row(int64_t r) const { return data.data() + r * shape.back(); }
};

struct TinyModel {
  Members config, types;
  std::map<std::string, Array> tensors;
  std::mt19937 random;

  explicit TinyModel(unsigned seed) : random(seed) {}

  void set(Members changes) {
    for (auto& [key, value] : changes) config[key] = std::move(value);
  }
  // Normal numbers around mean.
  void add(const std::string& name, std::vector<int64_t> shape, float deviation, float mean = 0) {
    Array a;
    a.shape = std::move(shape);
    size_t n = 1;
    for (int64_t d : a.shape) n *= static_cast<size_t>(d);
    std::normal_distribution<float> normal(mean, deviation);
    for (size_t i = 0; i < n; i++) a.data.push_back(normal(random));
    tensors[name] = std::move(a);
  }
  void add_matrix(const std::string& name, int n, int k) {
    add(name + ".weight", {n, k}, 1.5f / std::sqrt(static_cast<float>(k)));
  }

  // Of the config.
  int integer(const std::string& key) const { return *config.at(key).integer<int>(); }
  double number(const std::string& key) const { return *config.at(key).number(); }
  int integer(const std::string& key, int layer) const {
    return *config.at(key).array()->at(static_cast<size_t>(layer)).integer<int>();
  }

  // The bytes of a safetensors file; all tensors float32.
  std::string bytes() const {
    Json::Object header = {{"__metadata__", Json::Object{{"format", "attn.cu 3"},
                                                         {"config", json(config).text()},
                                                         {"types", json(types).text()},
                                                         {"tokenizer_sha256", ""}}}};
    std::string data;
    for (const auto& [name, a] : tensors) {
      const size_t begin = data.size();
      data.append(reinterpret_cast<const char*>(a.data.data()), a.data.size() * sizeof(float));
      header.emplace_back(name, Json::Object{{"dtype", "F32"},
                                             {"shape", Json::Array(a.shape.begin(), a.shape.end())},
                                             {"data_offsets", Json::Array{begin, data.size()}}});
    }
    return safetensors(header, data);
  }

  static std::string safetensors(const Json& header, const std::string& data) {
    std::string text = header.text();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t length = text.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + text + data;
  }
};

// A file that lives as long as this.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content) {
    static int count = 0;
    path_ = (std::filesystem::temp_directory_path() /
             ("attn-test-" + std::to_string(getpid()) + "-" + std::to_string(count++) + ".safetensors"))
                .string();
    write(content);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { std::filesystem::remove(path_); }
  void write(const std::string& content) const {
    std::ofstream(path_, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

constexpr int TINY_VOCAB = 50;

// Sizes of the tiny models; names as in Config.
namespace tiny {
constexpr int dim = 24, hidden = 40, layers = 2, heads = 6, d = 8, E = 4, moe_hidden = 16;
constexpr int nope = 6, p = 4, r = 16, q_rank = 12, v = 5;
inline int kv_heads(const std::string& variant) {
  return variant == "mha" ? heads : variant == "mqa" ? 1 : 2;
}
}  // namespace tiny

inline Members tiny_config(const std::string& variant, bool experts) {
  Members c = {{"attention", variant},
               {"dim", tiny::dim},
               {"hidden_dim", tiny::hidden},
               {"n_layers", tiny::layers},
               {"n_heads", tiny::heads},
               {"vocab_size", TINY_VOCAB},
               {"seq_len", 512},
               {"norm", "rms"},
               {"norm_eps", 1e-5},
               {"activation", "silu"},
               {"attention_scale", 0.35},
               {"window", Json::Array{7, 0}},
               {"rope", Json::Array{0, 0}},
               {"rope_scale", Json::Array{1.0}}};
  if (variant == "mla")
    c.merge(Members{{"q_lora_rank", tiny::q_rank},
                    {"kv_lora_rank", tiny::r},
                    {"qk_nope_head_dim", tiny::nope},
                    {"qk_rope_head_dim", tiny::p},
                    {"v_head_dim", tiny::v},
                    {"latent_norm_eps", 0.2}});
  else
    c.merge(Members{{"n_kv_heads", tiny::kv_heads(variant)}, {"head_dim", tiny::d}});
  if (experts)
    c.merge(Members{{"n_routed_experts", tiny::E},
                    {"num_experts_per_tok", 2},
                    {"n_shared_experts", 1},
                    {"moe_intermediate_size", tiny::moe_hidden},
                    {"moe_layers", Json::Array{0, 1}},
                    {"scoring_func", "softmax"},
                    {"norm_topk_prob", true},
                    {"routed_scaling_factor", 1.5}});
  return c;
}

// The tensors of a layer, at "layers.N.".
inline void add_tiny_attention(TinyModel& m, const std::string& at, const std::string& variant) {
  using namespace tiny;
  if (variant == "mla") {
    m.add_matrix(at + "q_a_proj", q_rank, dim);
    m.add(at + "q_a_norm.weight", {q_rank}, 0.2f, 1);
    m.add_matrix(at + "q_b_proj", heads * (nope + p), q_rank);
    m.add_matrix(at + "kv_a_proj", r + p, dim);
    m.add(at + "kv_a_norm.weight", {r}, 0.2f, 1);
    m.add(at + "w_uk.weight", {heads, nope, r}, 0.3f);
    m.add(at + "w_uv.weight", {heads, v, r}, 0.3f);
    m.add_matrix(at + "o_proj", dim, heads * v);
  } else {
    m.add_matrix(at + "q_proj", heads * d, dim);
    m.add_matrix(at + "k_proj", kv_heads(variant) * d, dim);
    m.add_matrix(at + "v_proj", kv_heads(variant) * d, dim);
    m.add(at + "v_proj.bias", {kv_heads(variant) * d}, 0.3f);
    m.add_matrix(at + "o_proj", dim, heads * d);
  }
}

inline void add_tiny_mlp(TinyModel& m, const std::string& at, bool experts) {
  using namespace tiny;
  if (experts) {
    m.add_matrix(at + "router", E, dim);
    m.add(at + "experts.gate_proj.weight", {E, moe_hidden, dim}, 0.3f);
    m.add(at + "experts.up_proj.weight", {E, moe_hidden, dim}, 0.3f);
    m.add(at + "experts.down_proj.weight", {E, dim, moe_hidden}, 0.3f);
  }
  const std::string mlp = at + (experts ? "shared_experts." : "");
  const int width = experts ? moe_hidden : hidden;
  m.add_matrix(mlp + "gate_proj", width, dim);
  m.add_matrix(mlp + "up_proj", width, dim);
  m.add_matrix(mlp + "down_proj", dim, width);
}

// variant: mha, mqa, gqa or mla; with experts in the last layer, a window in the first.
inline TinyModel tiny_model(const std::string& variant, bool experts, unsigned seed) {
  TinyModel m(seed);
  m.config = tiny_config(variant, experts);
  m.add_matrix("embed_tokens", TINY_VOCAB, tiny::dim);
  m.add("norm.weight", {tiny::dim}, 0.2f, 1);
  const int rotated = variant == "mla" ? tiny::p : tiny::d;
  Array& table = m.tensors["rope.0.inv_freq"];
  table.shape = {rotated / 2};
  for (int i = 0; i < rotated / 2; i++)
    table.data.push_back(std::pow(100.0f, -2.0f * static_cast<float>(i) / static_cast<float>(rotated)));
  for (int l = 0; l < tiny::layers; l++) {
    const std::string at = "layers." + std::to_string(l) + ".";
    for (const char* norm : {"attention_norm", "mlp_norm"}) m.add(at + norm + ".weight", {tiny::dim}, 0.2f, 1);
    add_tiny_attention(m, at, variant);
    add_tiny_mlp(m, at, experts && l == 1);
  }
  return m;
}

// The tests' threads; no result depends on how many of them a step has.
inline Threads& test_threads() {
  static Threads threads(3);
  return threads;
}

inline Model load(const TinyModel& tiny) {
  const TemporaryFile file(tiny.bytes());
  return load_model(file.path(), test_threads());
}

// n ids of its vocabulary.
inline std::vector<int> random_tokens(int n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int> ids(static_cast<size_t>(n));
  for (int& id : ids) id = static_cast<int>(random() % TINY_VOCAB);
  return ids;
}

// The line with which the loader refuses a file; empty: it takes it.
inline std::string refusal(const std::string& path) {
  try {
    load_model(path, test_threads());
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
inline std::string refusal_of_bytes(const std::string& bytes) {
  const TemporaryFile file(bytes);
  return refusal(file.path());
}

// A file that the loader takes.
inline const std::string& good(const char* variant = "gqa") {
  static std::map<std::string, std::string> all;
  std::string& bytes = all[variant];
  if (bytes.empty()) bytes = tiny_model(variant, true, 3).bytes();
  return bytes;
}

// One of a matrix's groups.
inline Matrix group(Matrix m, int g) {
  m.data += static_cast<size_t>(g) * packed_bytes(m.type, m.n, m.k);
  m.groups = 1;
  return m;
}
