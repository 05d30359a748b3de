// typed_model.h: small model files of every weight type, made byte by byte from docs/model-file.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "ggml_types.h"
#include "host/json.h"

inline std::string joined(const Json::Object& header, const std::string& data) {
  std::string text = Json(header).text();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t n = text.size();
  return std::string(reinterpret_cast<const char*>(&n), 8) + text + data;
}

struct Stored {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

// A model of two layers, the second of experts, all of whose matrices are of one type, and what they are worth.
struct TypedModel {
  static constexpr int EXPERTS = 3, VOCAB = 40;
  std::string type;
  const GgmlType* blocks = ggml_type(type);
  const bool is_wide = blocks && blocks->inputs == 256;
  const int DIM = is_wide ? 256 : 64, HIDDEN = is_wide ? 512 : 96;
  std::map<std::string, Stored> tensors;
  std::map<std::string, std::vector<double>> values;  // of matrices
  std::mt19937 random{7};

  explicit TypedModel(const std::string& type_) : type(type_) {
    matrix("embed_tokens", {VOCAB, DIM});
    floats("norm.weight", {DIM});
    for (const std::string at : {"layers.0.", "layers.1."}) {
      floats(at + "attention_norm.weight", {DIM});
      floats(at + "mlp_norm.weight", {DIM});
      for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"}) matrix(at + name, {DIM, DIM});
    }
    matrix("layers.0.gate_proj", {HIDDEN, DIM});
    matrix("layers.0.up_proj", {HIDDEN, DIM});
    matrix("layers.0.down_proj", {DIM, HIDDEN});
    floats("layers.1.router.weight", {EXPERTS, DIM});
    matrix("layers.1.experts.gate_proj", {EXPERTS, HIDDEN, DIM});
    matrix("layers.1.experts.up_proj", {EXPERTS, HIDDEN, DIM});
    matrix("layers.1.experts.down_proj", {EXPERTS, DIM, HIDDEN});
  }

  template <class T>
  static void append(std::string& to, T x) {
    to.append(reinterpret_cast<const char*>(&x), sizeof x);
  }
  float normal() { return std::normal_distribution<float>(0, 0.1f)(random); }
  static size_t count(const std::vector<int64_t>& shape) {
    size_t n = 1;
    for (int64_t d : shape) n *= static_cast<size_t>(d);
    return n;
  }

  void floats(const std::string& name, const std::vector<int64_t>& shape) {
    Stored& s = tensors[name] = {"F32", shape, ""};
    for (size_t i = 0; i < count(shape); i++) append(s.bytes, normal());
  }

  // A half float of 1 sign, 5 exponent and 10 fraction bits, none of them special; and what it is worth.
  std::pair<uint16_t, double> half() {
    const auto bits = static_cast<uint16_t>((random() & 0x83ff) | (8 + random() % 8) << 10);
    const double fraction = 1 + (bits & 0x3ff) / 1024.0;
    return {bits, (bits & 0x8000 ? -1 : 1) * std::ldexp(fraction, (bits >> 10 & 31) - 15)};
  }

  // Random bits, and what they are worth.
  void matrix(const std::string& name, std::vector<int64_t> shape) {
    std::string data;
    std::vector<double>& worth = values[name];
    const size_t n = count(shape);
    if (blocks) {
      while (worth.size() < n) {
        const std::vector<uint8_t> block = random_ggml_block(*blocks, random, [&](size_t) { return half().first; });
        data.append(block.begin(), block.end());
        for (int i = 0; i < blocks->inputs; i++) worth.push_back(ggml_weight(type, block.data(), i).value);
      }
      shape.back() = shape.back() / blocks->inputs * blocks->bytes;
    }
    for (size_t i = worth.size(); i < n; i++) {
      if (type == "f32") {
        const float x = normal();
        append(data, x), worth.push_back(double(x));
      } else if (type == "f16") {
        const auto x = half();
        append(data, x.first), worth.push_back(x.second);
      } else {
        const auto bits = static_cast<uint16_t>((random() & 0x807f) | (120 + random() % 8) << 7);
        append(data, bits);
        worth.push_back((bits & 0x8000 ? -1 : 1) * std::ldexp(1 + (bits & 0x7f) / 128.0, (bits >> 7 & 255) - 127));
      }
    }
    const std::map<std::string, std::string> floats = {{"f32", "F32"}, {"bf16", "BF16"}, {"f16", "F16"}};
    tensors[name + ".weight"] = {blocks ? "U8" : floats.at(type), shape, data};
  }

  std::string bytes() const {
    std::string config = R"({"attention": "mha", "dim": DIM, "hidden_dim": HIDDEN, "n_layers": 2, "n_heads": 2,
        "n_kv_heads": 2, "head_dim": HALF, "vocab_size": 40, "seq_len": 16, "norm": "rms", "norm_eps": 1e-5,
        "activation": "silu", "attention_scale": 1, "window": [0, 0], "rope": [-1, -1], "rope_scale": [],
        "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN, "moe_layers": [0, 1],
        "scoring_func": "softmax"})";
    const std::pair<std::string, int> sizes[] = {{"DIM", DIM}, {"HIDDEN", HIDDEN}, {"HALF", DIM / 2}};
    for (const auto& [word, value] : sizes)
      for (size_t at; (at = config.find(word)) != std::string::npos;)
        config.replace(at, word.size(), std::to_string(value));
    Json::Object types, header;
    if (blocks)
      for (const auto& [name, worth] : values) types.emplace_back(name, type);
    header.emplace_back(
        "__metadata__",
        Json::Object{
            {"format", "attn.cu 3"}, {"config", config}, {"types", Json(types).text()}, {"tokenizer_sha256", ""}});
    std::string data;
    for (const auto& [name, t] : tensors) {
      Json::Array shape(t.shape.begin(), t.shape.end());
      const size_t begin = data.size();
      data += t.bytes;
      const Json::Array offsets{begin, data.size()};
      header.emplace_back(name, Json::Object{{"dtype", t.dtype}, {"shape", shape}, {"data_offsets", offsets}});
    }
    return joined(header, data);
  }
};
