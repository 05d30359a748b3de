// The loader on files of every weight type, made byte by byte: their values, and what is refused by name.
#include "host/loader.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>

#include "host/json.h"
#include "tiny_model.h"
#include "typed_model.h"

namespace {

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
// ---- Every weight type.

void expect_values(const Matrix& m, const std::vector<double>& worth, const std::string& what) {
  ASSERT_EQ(static_cast<size_t>(m.groups) * static_cast<size_t>(m.n) * static_cast<size_t>(m.k), worth.size()) << what;
  std::vector<float> row(static_cast<size_t>(m.k));
  auto expected = worth.begin();
  for (int g = 0; g < m.groups; g++)
    for (int n = 0; n < m.n; n++) {
      unpack_row(group(m, g), n, row.data());
      // Each is the exact number, rounded once: products of a half float, a factor and a code fit a float.
      for (const float x : row) ASSERT_EQ(x, static_cast<float>(*expected++)) << what << " " << g << " " << n;
    }
}

TEST(WeightTypes, EveryTypeIsWhatTheFileSays) {
  for (const std::string& type : TYPES) {
    const TypedModel typed(type);
    const TemporaryFile file(typed.bytes());
    const Model m = load_model(file.path(), test_threads());
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
    EXPECT_EQ(m.types.find(type), type == "f32" ? 0u : m.types.find(type + " ")) << m.types;
  }
}

// Each a line that says what is wrong.
TEST(WeightTypes, RefusesWrongTypesByName) {
  const std::string q4 = TypedModel("q4_1").bytes(), q8 = TypedModel("q8_0").bytes();
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
  expect(named(q4, "layers.0.q_proj", "q5"), "layers.0.q_proj is \"q5\", not one of f32, bf16, f16, q8_0, q4_0, q4_1");
  expect(named(q4, "layers.0.q_proj", 4), "layers.0.q_proj is 4, not one of");
  expect(named(q4, "layers.0.q_proj", "q8_0"), "layers.0.q_proj.weight is U8 [64, 40], expected U8 [64, 68]");
  expect(named(q8, "layers.0.q_proj", "q4_1"), "layers.0.q_proj.weight is U8 [64, 68], expected U8 [64, 40]");
  expect(named(q8, "layers.0.q_proj", "f32"), "layers.0.q_proj.weight is U8 [64, 68], expected F32 [64, 64]");
  expect(named(q8, "layers.0.q_proj", "q4_k"), "layers.0.q_proj is q4_k, whose rows are multiples of 256 inputs");
  expect(named(q4, "layers.7.q_proj", "q4_1"), "\"types\" names layers.7.q_proj, which is not a matrix");
  expect(named(q4, "layers.0.mlp_norm", "q4_1"), "\"types\" names layers.0.mlp_norm, which is not a matrix");
  expect(unnamed(q4, "layers.0.q_proj"), "layers.0.q_proj.weight is U8 [64, 40], expected F32, BF16 or F16");
  TypedModel other("q8_0");
  other.tensors["layers.0.up_proj.weight"].dtype = "I8";
  expect(other.bytes(), "tensor layers.0.up_proj.weight is I8 [96, 68], expected U8 [96, 68]");
  const auto metadata = [&](const char* key, const char* text) {
    return with_header(
        q8, [&](Json::Object& h) { with_object(h, "__metadata__", [&](Json::Object& m) { put(m, key, text); }); });
  };
  expect(metadata("types", "[]"), "\"types\" is not a JSON object");
  expect(metadata("types", "{"), "\"types\" is not JSON");
  expect(metadata("format", "attn.cu 2"), "make it anew: .venv/bin/python export.py");
  expect(metadata("kind", ""), "unknown key \"kind\"");
}

// Any bits are numbers but for the scales: one that is infinite or no number is refused, in any block of any type.
TEST(WeightTypes, RefusesScalesThatAreNoNumbers) {
  std::mt19937 random(3);
  for (const GgmlType& type : GGML_TYPES) {
    const TypedModel typed(type.name);
    const std::vector<int> places = type.name == "mxfp4" ? std::vector<int>{0} : type.halves;
    for (const int place : places)
      for (const char* name : {"embed_tokens.weight", "layers.1.experts.up_proj.weight"})
        for (const uint16_t bad : std::vector<uint16_t>{0xfc00, 0x7c01}) {
          TypedModel damaged = typed;
          std::string& data = damaged.tensors[name].bytes;
          const size_t block = random() % (data.size() / static_cast<size_t>(type.bytes));
          char* at = &data[block * static_cast<size_t>(type.bytes) + static_cast<size_t>(place)];
          if (type.name == "mxfp4")
            *at = static_cast<char>(0xff);
          else
            std::memcpy(at, &bad, 2);
          EXPECT_NE(refusal_of_bytes(damaged.bytes()).find("tensor " + std::string(name) + " has a scale"),
                    std::string::npos)
              << type.name << ", block " << block;
        }
  }
}

// Every byte of the header and of its length may be anything: the loader either takes the file or says why not, in a
// line.
TEST(WeightTypes, SurvivesMutatedHeaders) {
  std::vector<std::string> models = {good("gqa"), good("mla")};
  for (const std::string& type : TYPES) models.push_back(TypedModel(type).bytes());
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
