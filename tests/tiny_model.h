// tiny_model.h: small random models for the tests, as model files and as float64 arrays for the references.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

// A tensor of the reference: row-major, any shape.
struct Array {
  std::vector<int64_t> shape;
  std::vector<float> data;
  const float* row(int64_t r) const { return data.data() + r * shape.back(); }
};

struct TinyModel {
  nlohmann::json config, types = nlohmann::json::object();
  std::map<std::string, Array> tensors;
  std::mt19937 random;

  explicit TinyModel(unsigned seed) : random(seed) {}

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

  // The bytes of a safetensors file; all tensors float32.
  std::string bytes() const {
    nlohmann::json header;
    header["__metadata__"] = {
        {"format", "attn.cu 2"}, {"config", config.dump()}, {"types", types.dump()}, {"tokenizer_sha256", ""}};
    std::string data;
    for (const auto& [name, a] : tensors) {
      const size_t begin = data.size();
      data.append(reinterpret_cast<const char*>(a.data.data()), a.data.size() * sizeof(float));
      header[name] = {{"dtype", "F32"}, {"shape", a.shape}, {"data_offsets", {begin, data.size()}}};
    }
    std::string text = header.dump();
    while (text.size() % 8 != 0) text += ' ';
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

// variant: mha, mqa, gqa or mla; with experts in the last layer, a window in the first.
inline TinyModel tiny_model(const std::string& variant, bool experts, unsigned seed) {
  constexpr int dim = 24, hidden = 40, layers = 2, heads = 6, d = 8, vocab = 50, E = 4, moe_hidden = 16;
  constexpr int nope = 6, p = 4, r = 16, v = 5;
  const int kv_heads = variant == "mha" ? heads : variant == "mqa" ? 1 : 2;
  TinyModel m(seed);
  m.config = {{"attention", variant}, {"dim", dim},           {"hidden_dim", hidden},    {"n_layers", layers},
              {"n_heads", heads},     {"vocab_size", vocab},  {"seq_len", 512},          {"norm", "rms"},
              {"norm_eps", 1e-5},     {"activation", "silu"}, {"attention_scale", 0.35}, {"window", {7, 0}},
              {"rope", {0, 0}},       {"rope_scale", {1.0}}};
  const auto matrix = [&](const std::string& name, int n, int k) {
    m.add(name + ".weight", {n, k}, 1.5f / std::sqrt(static_cast<float>(k)));
  };
  matrix("embed_tokens", vocab, dim);
  m.add("norm.weight", {dim}, 0.2f, 1);
  const int rotated = variant == "mla" ? p : d;
  Array& table = m.tensors["rope.0.inv_freq"];
  table.shape = {rotated / 2};
  for (int i = 0; i < rotated / 2; i++)
    table.data.push_back(std::pow(100.0f, -2.0f * static_cast<float>(i) / static_cast<float>(rotated)));
  if (variant == "mla")
    m.config.update({{"q_lora_rank", 12},
                     {"kv_lora_rank", r},
                     {"qk_nope_head_dim", nope},
                     {"qk_rope_head_dim", p},
                     {"v_head_dim", v}});
  else
    m.config.update({{"n_kv_heads", kv_heads}, {"head_dim", d}});
  if (experts)
    m.config.update({{"n_routed_experts", E},
                     {"num_experts_per_tok", 2},
                     {"n_shared_experts", 1},
                     {"moe_intermediate_size", moe_hidden},
                     {"moe_layers", {0, 1}},
                     {"scoring_func", "softmax"},
                     {"norm_topk_prob", true},
                     {"routed_scaling_factor", 1.5}});
  for (int l = 0; l < layers; l++) {
    const std::string at = "layers." + std::to_string(l) + ".";
    for (const char* norm : {"attention_norm", "mlp_norm"}) m.add(at + norm + ".weight", {dim}, 0.2f, 1);
    if (variant == "mla") {
      matrix(at + "q_a_proj", 12, dim);
      m.add(at + "q_a_norm.weight", {12}, 0.2f, 1);
      matrix(at + "q_b_proj", heads * (nope + p), 12);
      matrix(at + "kv_a_proj", r + p, dim);
      m.add(at + "kv_a_norm.weight", {r}, 0.2f, 1);
      m.add(at + "w_uk.weight", {heads, nope, r}, 0.3f);
      m.add(at + "w_uv.weight", {heads, v, r}, 0.3f);
      matrix(at + "o_proj", dim, heads * v);
    } else {
      matrix(at + "q_proj", heads * d, dim);
      matrix(at + "k_proj", kv_heads * d, dim);
      matrix(at + "v_proj", kv_heads * d, dim);
      m.add(at + "v_proj.bias", {kv_heads * d}, 0.3f);
      matrix(at + "o_proj", dim, heads * d);
    }
    if (experts && l == 1) {
      matrix(at + "router", E, dim);
      m.add(at + "experts.gate_proj.weight", {E, moe_hidden, dim}, 0.3f);
      m.add(at + "experts.up_proj.weight", {E, moe_hidden, dim}, 0.3f);
      m.add(at + "experts.down_proj.weight", {E, dim, moe_hidden}, 0.3f);
      matrix(at + "shared_experts.gate_proj", moe_hidden, dim);
      matrix(at + "shared_experts.up_proj", moe_hidden, dim);
      matrix(at + "shared_experts.down_proj", dim, moe_hidden);
    } else {
      matrix(at + "gate_proj", hidden, dim);
      matrix(at + "up_proj", hidden, dim);
      matrix(at + "down_proj", dim, hidden);
    }
  }
  return m;
}
