// The loader: what a good file becomes, and that no bad one is taken, crashes or hangs.
#include "host/loader.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tiny_model.h"

namespace {

// The file with another header over the same data.
template <class Change>
std::string with_header(const std::string& bytes, Change change) {
  uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  Members header = members(parse_json(bytes.substr(8, length), "the header"));
  change(header);
  return TinyModel::safetensors(json(header), bytes.substr(8 + length));
}

template <class Change>
std::string with_config(const std::string& bytes, Change change) {
  return with_header(bytes, [&](Members& header) {
    Members metadata = members(header["__metadata__"]);
    Members config = members(parse_json(*metadata["config"].string(), "the config"));
    change(config);
    metadata["config"] = json(config).text();
    header["__metadata__"] = json(metadata);
  });
}

TEST(Model, LoadsWhatTheFileHolds) {
  const TinyModel tiny = tiny_model("gqa", true, 3);
  const TemporaryFile file(tiny.bytes());
  const Model m = load_model(file.path(), test_threads());
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
    const size_t planned = file.model.weight_bytes;
    file.pack(test_threads());
    EXPECT_EQ(planned, file.model.packed.size() + file.model.vectors.size() * sizeof(float));
    EXPECT_EQ(planned, file.model.weight_bytes);
  }
}

// A file that ends with its header tells all of its shapes, and has nothing to run.
TEST(Model, ShapesAloneArePlannedWithAndNotRun) {
  const std::string& whole = good();
  uint64_t length;
  std::memcpy(&length, whole.data(), 8);
  const TemporaryFile disk(whole), shapes(whole.substr(0, 8 + length));
  const ModelFile file(disk.path());
  ModelFile alone(shapes.path());
  EXPECT_EQ(alone.model.weight_bytes, file.model.weight_bytes);
  EXPECT_EQ(alone.model.types, file.model.types);
  EXPECT_EQ(alone.model.layers[0].q_proj.weight.n, file.model.layers[0].q_proj.weight.n);
  EXPECT_NE(refusal(shapes.path()).find("shapes without weights"), std::string::npos);
  EXPECT_NE(refusal_of_bytes(whole.substr(0, 8 + length + 64)).find("truncated"), std::string::npos);
}

TEST(Model, MlaHoldsBothOrientationsOfTheKeyMatrix) {
  const TinyModel tiny = tiny_model("mla", false, 3);
  const TemporaryFile file(tiny.bytes());
  const Model m = load_model(file.path(), test_threads());
  const Array& w_uk = tiny.tensors.at("layers.0.w_uk.weight");  // [6, 6, 16]
  std::vector<float> row(16), column(6);
  unpack_row(group(m.layers[0].w_uk.weight, 2), 4, row.data());
  EXPECT_EQ(row, std::vector<float>(w_uk.row(2 * 6 + 4), w_uk.row(2 * 6 + 4) + 16));
  unpack_row(group(m.layers[0].w_uk_t.weight, 2), 9, column.data());
  for (int i = 0; i < 6; i++) EXPECT_EQ(column[static_cast<size_t>(i)], w_uk.row(2 * 6 + i)[9]);
}

// Of each head, or of the whole row (OLMo 2).
TEST(Model, NormsOfHeadsRunOverAsMuchAsTheirWeight) {
  for (const int heads : {1, 6}) {
    TinyModel tiny = tiny_model("gqa", false, 3);
    tiny.add("layers.0.q_norm.weight", {heads * 8}, 0.2f, 1);
    const TemporaryFile file(tiny.bytes());
    EXPECT_EQ(load_model(file.path(), test_threads()).layers[0].q_norm.n, heads * 8);
  }
  TinyModel tiny = tiny_model("gqa", false, 3);
  tiny.add("layers.0.k_norm.weight", {48}, 0.2f, 1);  // as wide as q's row
  EXPECT_NE(refusal_of_bytes(tiny.bytes()).find("k_norm.weight is F32 [48], expected F32 [8]"), std::string::npos);
}

TEST(Model, LongContextsHaveATableOfTheirOwn) {
  TinyModel tiny = tiny_model("gqa", false, 3);
  tiny.add("rope.0.long_inv_freq", {4}, 0.1f, 1);
  EXPECT_NE(refusal_of_bytes(tiny.bytes()).find("long_inv_freq [4] is not one"), std::string::npos);
  tiny.set({{"original_seq_len", 16}});
  const TemporaryFile file(tiny.bytes());
  EXPECT_EQ(load_model(file.path(), test_threads()).rope[0].long_inv_freq[3],
            tiny.tensors.at("rope.0.long_inv_freq").data[3]);
  tiny.tensors.erase("rope.0.long_inv_freq");
  EXPECT_NE(refusal_of_bytes(tiny.bytes()).find("rope.0.long_inv_freq is missing"), std::string::npos);
}

TEST(Model, ClampedActivationHasALimitAndAGate) {
  TinyModel tiny = tiny_model("gqa", false, 3);
  tiny.set({{"swiglu_limit", 7.0}});
  EXPECT_NE(refusal_of_bytes(tiny.bytes()).find("swiglu_limit"), std::string::npos) << "silu has no limit";
  tiny.set({{"activation", "swiglu_oai"}});
  EXPECT_EQ(refusal_of_bytes(tiny.bytes()), "");
  tiny.tensors.erase("layers.0.gate_proj.weight");
  EXPECT_NE(refusal_of_bytes(tiny.bytes()).find("layers.0.gate_proj.weight is missing"), std::string::npos);
  tiny.config.erase("swiglu_limit");
  EXPECT_NE(refusal_of_bytes(tiny.bytes()).find("swiglu_limit"), std::string::npos);
}

TEST(Model, ExpertsAndTheirRouterMayHaveBiases) {
  TinyModel tiny = tiny_model("gqa", true, 3);
  tiny.add("layers.1.experts.up_proj.bias", {4, 16}, 1);
  tiny.add("layers.1.router.logit_bias", {4}, 1);
  const TemporaryFile file(tiny.bytes());
  const Model m = load_model(file.path(), test_threads());
  EXPECT_EQ(m.layers[1].experts.up.bias[3 * 16 + 5], tiny.tensors.at("layers.1.experts.up_proj.bias").row(3)[5]);
  EXPECT_EQ(m.layers[1].router.bias[2], tiny.tensors.at("layers.1.router.logit_bias").data[2]);
  EXPECT_EQ(m.layers[1].experts.gate.bias, nullptr);
  EXPECT_EQ(m.layers[1].router_bias, nullptr);
}

TEST(Model, RefusesWhatIsNoModel) {
  EXPECT_NE(refusal("no/such/file.safetensors").find("cannot open"), std::string::npos);
  EXPECT_NE(refusal(std::filesystem::temp_directory_path().string()).find("a folder, not a model file"),
            std::string::npos);
  EXPECT_NE(refusal_of_bytes(""), "");
  EXPECT_NE(refusal_of_bytes("1234567"), "");
  EXPECT_NE(refusal_of_bytes(std::string(64, '\xff')).find("header length"), std::string::npos);
  EXPECT_NE(refusal_of_bytes(std::string("\2\0\0\0\0\0\0\0[]", 10)).find("not a JSON object"), std::string::npos);
  EXPECT_NE(refusal_of_bytes(std::string("\3\0\0\0\0\0\0\0[]", 10)).find("header length 3"), std::string::npos);
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
                           {"norm_eps", Json()},
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
    const std::string why = refusal_of_bytes(with_config(good(), [&](Members& c) { c[b.key] = b.value; }));
    EXPECT_NE(why, "") << b.key << " = " << b.value.text();
    EXPECT_EQ(why.find('\n'), std::string::npos) << why;
  }
  EXPECT_NE(refusal_of_bytes(with_config(good(), [](Members& c) { c["sparsity"] = 1; })).find("\"sparsity\""),
            std::string::npos);
  EXPECT_NE(refusal_of_bytes(with_config(good(), [](Members& c) { c.erase("norm_eps"); })).find("\"norm_eps\""),
            std::string::npos);
  const auto mla_rank = [](Members& c) { c["kv_lora_rank"] = 20; };
  EXPECT_NE(refusal_of_bytes(with_config(good("mla"), mla_rank)).find("kv_a"), std::string::npos);
}

TEST(Model, RefusesBadTensorsByName) {
  const auto with = [](const char* key, const Json& value) {  // in norm.weight, [24]
    return refusal_of_bytes(with_header(good(), [&](Members& header) {
      Members tensor = members(header["norm.weight"]);
      tensor[key] = value;
      header["norm.weight"] = json(tensor);
    }));
  };
  using List = Json::Array;
  EXPECT_NE(with("dtype", "F64").find("norm.weight"), std::string::npos);
  EXPECT_NE(with("shape", List{25}).find("norm.weight"), std::string::npos);
  EXPECT_NE(with("shape", List{12, 2}).find("expected F32 [24]"), std::string::npos);
  EXPECT_NE(with("shape", List{-24}).find("shape"), std::string::npos);
  EXPECT_NE(with("data_offsets", List{0, int64_t{1} << 40}).find("outside"), std::string::npos);
  EXPECT_NE(with("data_offsets", List{96, 0}).find("outside"), std::string::npos);
  EXPECT_NE(with("data_offsets", List{0, 96}), "") << "overlaps";
  EXPECT_NE(with("more", 1).find("nothing else"), std::string::npos);
  const std::string missing = refusal_of_bytes(with_header(good(), [](Members& h) {
    h["layers.0.extra.weight"] = h["layers.0.q_proj.weight"];
    h.erase("layers.0.q_proj.weight");
  }));
  EXPECT_NE(missing.find("layers.0.q_proj.weight is missing"), std::string::npos) << missing;
  const std::string unused = refusal_of_bytes(with_header(good(), [](Members& h) {
    h["layers.0.k_proj.biases"] = h["layers.0.v_proj.bias"];
    h.erase("layers.0.v_proj.bias");
  }));
  EXPECT_NE(unused.find("k_proj.biases"), std::string::npos) << unused;
  std::string twice = good();  // the same key twice: JSON readers differ in which they take
  const size_t at = twice.find("\"dtype\":\"F32\"");
  twice.replace(at, 13, "\"shape\":[1],\"");
  EXPECT_NE(refusal_of_bytes(twice), "");
  EXPECT_NE(refusal_of_bytes(good() + std::string(8, '\0')).find("after the last tensor"), std::string::npos);
  std::string hole = with_header(good(), [](Members& header) {  // before the first tensor
    for (auto& [name, tensor] : header) {
      if (name == "__metadata__") continue;
      Members entry = members(tensor);
      List moved;
      for (const Json& offset : *entry["data_offsets"].array()) moved.push_back(*offset.integer<int64_t>() + 8);
      entry["data_offsets"] = moved;
      tensor = json(entry);
    }
  });
  uint64_t length;
  std::memcpy(&length, hole.data(), 8);
  EXPECT_NE(refusal_of_bytes(hole.insert(8 + length, 8, '\0')).find("leave a hole"), std::string::npos);
  for (const size_t cut : {size_t{1}, size_t{100}, good().size() / 2, good().size() - 9})
    EXPECT_NE(refusal_of_bytes(good().substr(0, good().size() - cut)), "") << cut << " bytes cut off";
}

}  // namespace
