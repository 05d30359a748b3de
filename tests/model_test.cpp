// The loader: what a good file becomes, and that no bad one is taken, crashes or hangs.
#include "model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <random>

#include "host/error.h"
#include "host/json.h"
#include "tiny_model.h"
#include "typed_model.h"

namespace {

Model load(const std::string& path) {
  Threads threads(2);
  return load_model(path, threads);
}

Matrix group(Matrix m, int g) {
  m.data += packed_bytes(m.type, m.n, m.k) * static_cast<size_t>(g);
  m.groups = 1;
  return m;
}

std::string refusal(const std::string& path) {
  try {
    load(path);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

std::string refusal_of_bytes(const std::string& bytes) {
  const TemporaryFile file(bytes);
  return refusal(file.path());
}

Json* value_of(Json::Object& object, const std::string& key) {
  for (auto& [k, value] : object)
    if (k == key) return &value;
  return nullptr;
}
void put(Json::Object& object, const std::string& key, Json value) {
  if (Json* found = value_of(object, key))
    *found = std::move(value);
  else
    object.emplace_back(key, std::move(value));
}
void drop(Json::Object& object, const std::string& key) {
  std::erase_if(object, [&](const auto& entry) { return entry.first == key; });
}
// `change` works on the object below a key.
template <class Change>
void with_object(Json::Object& object, const std::string& key, Change change) {
  Json::Object inner = *value_of(object, key)->object();
  change(inner);
  put(object, key, inner);
}

// Splits a file into header and data and joins them again after `change` worked on the header.
template <class Change>
std::string with_header(const std::string& bytes, Change change) {
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  Json::Object header = *parse_json(bytes.substr(8, length), "header").object();
  change(header);
  return joined(header, bytes.substr(8 + length));
}

// The same for a JSON object that is text in __metadata__: "config" or "types".
template <class Change>
std::string with_text(const std::string& bytes, const char* key, Change change) {
  return with_header(bytes, [&](Json::Object& header) {
    with_object(header, "__metadata__", [&](Json::Object& metadata) {
      Json::Object object = *parse_json(*value_of(metadata, key)->string(), key).object();
      change(object);
      put(metadata, key, Json(object).text());
    });
  });
}
template <class Change>
std::string with_config(const std::string& bytes, Change change) {
  return with_text(bytes, "config", change);
}

const std::string& good(const char* variant = "gqa") {
  static std::map<std::string, std::string> all;
  std::string& bytes = all[variant];
  if (bytes.empty()) bytes = tiny_model(variant, true, 3).bytes();
  return bytes;
}

TEST(Model, LoadsWhatTheFileHolds) {
  const TinyModel tiny = tiny_model("gqa", true, 3);
  const TemporaryFile file(tiny.bytes());
  const Model m = load(file.path());
  EXPECT_EQ(m.config.n_kv_heads, 2);
  EXPECT_EQ(m.config.window, (std::vector<int>{7, 0}));
  EXPECT_EQ(m.lm_head.weight.data, m.embed_tokens.data) << "tied";
  EXPECT_EQ(m.layers[1].experts.up.weight.groups, 4);
  EXPECT_FALSE(m.layers[1].mlp.up);
  EXPECT_FALSE(m.layers[0].q_norm);
  // A matrix comes back as it was, experts too.
  const Array& up = tiny.tensors.at("layers.1.experts.up_proj.weight");
  std::vector<float> row(24);
  unpack_row(group(m.layers[1].experts.up.weight, 3), 15, row.data());
  EXPECT_EQ(row, std::vector<float>(up.row(3 * 16 + 15), up.row(3 * 16 + 15) + 24));
}

// Before anything is allocated all is known that the plan of the memory and the report need.
TEST(Model, TellsWhatItTakesBeforeItTakesIt) {
  for (const char* variant : {"gqa", "mla"}) {
    const TinyModel tiny = tiny_model(variant, true, 3);
    const TemporaryFile disk(tiny.bytes());
    ModelFile file(disk.path());
    EXPECT_EQ(file.model.packed.size() + file.model.vectors.size(), 0u);
    EXPECT_EQ(file.model.config.attention, variant);
    double parameters = 0;
    for (const auto& [name, a] : tiny.tensors) parameters += static_cast<double>(a.data.size());
    EXPECT_EQ(file.model.n_parameters, parameters);
    EXPECT_GT(file.model.weight_bytes, file.model.weight_bytes_per_token);  // half of the experts
    const size_t planned = file.model.weight_bytes;
    Threads threads(2);
    file.pack(threads);
    EXPECT_EQ(planned, file.model.packed.size() + file.model.vectors.size() * sizeof(float));
    EXPECT_EQ(planned, file.model.weight_bytes);
  }
}

TEST(Model, MlaHoldsBothOrientationsOfTheKeyMatrix) {
  const TinyModel tiny = tiny_model("mla", false, 3);
  const TemporaryFile file(tiny.bytes());
  const Model m = load(file.path());
  const Array& w_uk = tiny.tensors.at("layers.0.w_uk.weight");  // [6, 6, 16]
  std::vector<float> row(16), column(6);
  unpack_row(group(m.layers[0].w_uk.weight, 2), 4, row.data());
  EXPECT_EQ(row, std::vector<float>(w_uk.row(2 * 6 + 4), w_uk.row(2 * 6 + 4) + 16));
  unpack_row(group(m.layers[0].w_uk_t.weight, 2), 9, column.data());
  for (int i = 0; i < 6; i++) EXPECT_EQ(column[static_cast<size_t>(i)], w_uk.row(2 * 6 + i)[9]);
}

TEST(Model, RefusesWhatIsNoModel) {
  EXPECT_NE(refusal("no/such/file.safetensors").find("cannot open"), std::string::npos);
  EXPECT_NE(refusal(std::filesystem::temp_directory_path().string()).find("not a file"), std::string::npos);
  EXPECT_NE(refusal_of_bytes(""), "");
  EXPECT_NE(refusal_of_bytes("1234567"), "");
  EXPECT_NE(refusal_of_bytes(std::string(64, '\xff')).find("header length"), std::string::npos);
  EXPECT_NE(refusal_of_bytes(std::string("\2\0\0\0\0\0\0\0[]", 10)).find("not a JSON object"), std::string::npos);
}

struct BadConfig {
  const char* key;
  Json value;
};

TEST(Model, RefusesBadHyperParametersByName) {
  const BadConfig bad[] = {{"dim", 0},
                           {"dim", -24},
                           {"dim", 2.5},
                           {"dim", "24"},
                           {"dim", 1u << 31},
                           {"dim", 1e300},
                           {"n_layers", 1000000},
                           {"n_heads", 5},
                           {"n_kv_heads", 0},
                           {"n_kv_heads", 4},
                           {"head_dim", 7},
                           {"vocab_size", 49},
                           {"seq_len", 0},
                           {"norm", "batch"},
                           {"norm_eps", {}},
                           {"norm_eps", -1},
                           {"attention_scale", 1e39},
                           {"activation", "relu"},
                           {"window", Json::Array{7}},
                           {"window", Json::Array{7, -1}},
                           {"rope", Json::Array{0, 1}},
                           {"rope", Json::Array{0, -2}},
                           {"rope", 0},
                           {"attention", "mha"},
                           {"attention", "linear"},
                           {"n_routed_experts", 5},
                           {"num_experts_per_tok", 5},
                           {"num_experts_per_tok", 0},
                           {"moe_layers", Json::Array{0, 2}},
                           {"scoring_func", "tanh"},
                           {"n_group", 3},
                           {"topk_group", 2},
                           {"group_score", "top2_sum_"},
                           {"norm_topk_prob", 1},
                           {"head_dims", 8},
                           {"kv_lora_rank", 4}};
  for (const BadConfig& b : bad) {
    const std::string why = refusal_of_bytes(with_config(good(), [&](Json::Object& c) { put(c, b.key, b.value); }));
    EXPECT_NE(why, "") << b.key << " = " << b.value.text();
    EXPECT_EQ(why.find('\n'), std::string::npos) << why;
  }
  EXPECT_NE(refusal_of_bytes(with_config(good(), [](Json::Object& c) { put(c, "sparsity", 1); })).find("\"sparsity\""),
            std::string::npos);
  EXPECT_NE(refusal_of_bytes(with_config(good(), [](Json::Object& c) { drop(c, "norm_eps"); })).find("\"norm_eps\""),
            std::string::npos);
  const auto mla_rank = [](Json::Object& c) { put(c, "kv_lora_rank", 20); };
  EXPECT_NE(refusal_of_bytes(with_config(good("mla"), mla_rank)).find("kv_a"), std::string::npos);
}

TEST(Model, RefusesBadTensorsByName) {
  // The refusal where `field` of norm.weight ([24], the first 96 bytes or others) is another.
  const auto norm = [](const char* field, const Json& value) {
    return refusal_of_bytes(with_header(good(), [&](Json::Object& h) {
      with_object(h, "norm.weight", [&](Json::Object& t) { put(t, field, value); });
    }));
  };
  const auto expect = [](const std::string& why, const char* part) {
    EXPECT_NE(why.find(part), std::string::npos) << why << "; not: " << part;
  };
  using List = Json::Array;
  expect(norm("dtype", "F64"), "norm.weight");
  expect(norm("shape", List{25}), "norm.weight");
  expect(norm("shape", List{12, 2}), "expected F32 [24]");
  expect(norm("shape", List{-24}), "shape");
  expect(norm("data_offsets", List{0, int64_t{1} << 40}), "outside");
  expect(norm("data_offsets", List{96, 0}), "outside");
  EXPECT_NE(norm("data_offsets", List{0, 96}), "") << "overlaps";
  expect(norm("more", 1), "nothing else");
  const auto renamed = [](const char* from, const char* to) {
    return refusal_of_bytes(with_header(good(), [&](Json::Object& h) {
      for (auto& [key, value] : h)
        if (key == from) key = to;
    }));
  };
  expect(renamed("layers.0.q_proj.weight", "layers.0.extra.weight"), "layers.0.q_proj.weight is missing");
  expect(renamed("layers.0.v_proj.bias", "layers.0.k_proj.biases"), "k_proj.biases");
  std::string twice = good();  // the same key twice: JSON readers differ in which they take
  twice.replace(twice.find("\"dtype\""), 7, "\"shape\"");
  EXPECT_NE(refusal_of_bytes(twice), "");
  EXPECT_NE(refusal_of_bytes(good() + std::string(8, '\0')).find("after the last tensor"), std::string::npos);
  for (const size_t cut : {size_t{1}, size_t{100}, good().size() / 2, good().size() - 9})
    EXPECT_NE(refusal_of_bytes(good().substr(0, good().size() - cut)), "") << cut << " bytes cut off";
}

// ---- Every weight type.

void expect_values(const Matrix& m, const std::vector<double>& worth, const std::string& what) {
  ASSERT_EQ(static_cast<size_t>(m.groups) * static_cast<size_t>(m.n) * static_cast<size_t>(m.k), worth.size()) << what;
  std::vector<float> row(static_cast<size_t>(m.k));
  auto expected = worth.begin();
  for (int g = 0; g < m.groups; g++)
    for (int n = 0; n < m.n; n++) {
      unpack_row(group(m, g), n, row.data());
      // Each is the exact number, rounded once: products of a half float and a byte fit a float.
      for (const float x : row) ASSERT_EQ(x, static_cast<float>(*expected++)) << what << " " << g << " " << n;
    }
}

TEST(Model, EveryTypeIsWhatTheFileSays) {
  for (const std::string type : TYPES) {
    const TypedModel typed(type);
    const TemporaryFile file(typed.bytes());
    const Model m = load(file.path());
    const auto expect = [&](const Matrix& matrix, const char* name) {
      EXPECT_EQ(weight_format(matrix.type).name, type);
      expect_values(matrix, typed.values.at(name), type + " " + name);
    };
    expect(m.embed_tokens, "embed_tokens");
    expect(m.layers[0].q_proj.weight, "layers.0.q_proj");
    expect(m.layers[1].o_proj.weight, "layers.1.o_proj");
    expect(m.layers[0].mlp.down.weight, "layers.0.down_proj");
    expect(m.layers[1].experts.gate.weight, "layers.1.experts.gate_proj");
    expect(m.layers[1].experts.up.weight, "layers.1.experts.up_proj");
    expect(m.layers[1].experts.down.weight, "layers.1.experts.down_proj");
    EXPECT_EQ(m.types.find(type), type == "f32" ? 0u : m.types.find(type + " 0.")) << m.types;
  }
}

// Each a line that says what is wrong.
TEST(Model, RefusesWrongTypesByName) {
  const std::string q4 = TypedModel("q4").bytes(), q8 = TypedModel("q8").bytes();
  const auto expect = [](const std::string& bytes, const std::string& part) {
    const std::string why = refusal_of_bytes(bytes);
    EXPECT_NE(why.find(part), std::string::npos) << why << "; not: " << part;
    EXPECT_EQ(why.find('\n'), std::string::npos) << why;
  };
  const auto named = [](const std::string& bytes, const char* matrix, Json type) {
    return with_text(bytes, "types", [&](Json::Object& t) { put(t, matrix, type); });
  };
  const auto unnamed = [](const std::string& bytes, const char* matrix) {
    return with_text(bytes, "types", [&](Json::Object& t) { drop(t, matrix); });
  };
  expect(named(q4, "layers.0.q_proj", "q5"), "layers.0.q_proj is \"q5\", not one of f32, bf16, f16, q8, q4");
  expect(named(q4, "layers.0.q_proj", 4), "layers.0.q_proj is 4, not one of");
  expect(named(q4, "layers.0.q_proj", "q8"), "layers.0.q_proj.weight is U8 [64, 32], expected I8 [64, 64]");
  expect(named(q8, "layers.0.q_proj", "q4"), "layers.0.q_proj.weight is I8 [64, 64], expected U8 [64, 32]");
  expect(named(q8, "layers.0.q_proj", "f32"), "layers.0.q_proj.weight is I8 [64, 64], expected F32 [64, 64]");
  expect(named(q4, "layers.7.q_proj", "q4"), "\"types\" names layers.7.q_proj, which is not a matrix");
  expect(named(q4, "layers.0.mlp_norm", "q4"), "\"types\" names layers.0.mlp_norm, which is not a matrix");
  expect(unnamed(q4, "layers.0.q_proj"), "layers.0.q_proj.weight is U8 [64, 32], expected F32, BF16 or F16");
  const auto without = [](std::string type, const char* part) {
    TypedModel model(type);
    model.tensors.erase(part);
    return model.bytes();
  };
  expect(without("q4", "layers.0.up_proj.min"), "tensor layers.0.up_proj.min is missing");
  expect(without("q8", "layers.0.up_proj.scale"), "tensor layers.0.up_proj.scale is missing");
  TypedModel other("q8");
  other.tensors["layers.0.up_proj.scale"].dtype = "BF16";
  expect(other.bytes(), "tensor layers.0.up_proj.scale is BF16 [96, 2], expected F16 [96, 2]");
  TypedModel more("q8");
  more.tensors["layers.0.up_proj.min"] = more.tensors["layers.0.up_proj.scale"];
  expect(more.bytes(), "tensor layers.0.up_proj.min [96, 2] is not one that this model's config calls for");
  const auto metadata = [&](const char* key, const char* text) {
    return with_header(
        q8, [&](Json::Object& h) { with_object(h, "__metadata__", [&](Json::Object& m) { put(m, key, text); }); });
  };
  expect(metadata("types", "[]"), "\"types\" is not a JSON object");
  expect(metadata("types", "{"), "\"types\" is not JSON");
  expect(metadata("format", "attn.cu 1"), "make it anew: .venv/bin/python export.py");
  expect(metadata("kind", ""), "unknown key \"kind\"");
}

// Every byte of the header and of its length may be anything: the loader either takes the file or says why not, in a
// line.
TEST(Model, SurvivesMutatedHeaders) {
  std::vector<std::string> models = {good("gqa"), good("mla")};
  for (const char* type : TYPES) models.push_back(TypedModel(type).bytes());
  std::mt19937 random(1);
  constexpr int CASES = 300;
  int refused = 0;
  const TemporaryFile file("");
  for (int i = 0; i < CASES; i++) {
    std::string mutant = models[static_cast<size_t>(i) % models.size()];
    uint64_t length;
    std::memcpy(&length, mutant.data(), 8);
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int j = 0; j < changes; j++) {
      const size_t at = random() % 20 == 0 ? random() % 8 : 8 + random() % length;
      const char digits[] = "0123456789-eE.[]{},:\"\\ ";
      mutant[at] = random() % 2 ? digits[random() % (sizeof digits - 1)] : static_cast<char>(random());
    }
    if (random() % 10 == 0) mutant.resize(random() % mutant.size());
    file.write(mutant);
    const std::string why = refusal(file.path());
    refused += !why.empty();
    ASSERT_EQ(why.find('\n'), std::string::npos) << why;
  }
  EXPECT_GT(refused, CASES * 8 / 10) << "most mutants are no models";
}

}  // namespace
