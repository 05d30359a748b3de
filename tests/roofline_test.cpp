// The speed calculation against worked figures of public sources, closed formulas and counting by hand.
#include "host/roofline.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "host/error.h"
#include "tiny_model.h"

namespace {

WeightType type(const char* name) {
  return find_weight_type(name).value();
}

Config gqa(int n_layers, int n_heads, int n_kv_heads, int head_dim) {
  Config c;
  c.attention = "gqa";
  c.n_layers = n_layers, c.n_heads = n_heads, c.n_kv_heads = n_kv_heads, c.head_dim = head_dim;
  c.window.assign(static_cast<size_t>(n_layers), 0);
  return c;
}

Config mla(int n_layers, int n_heads) {  // DeepSeek V2 and V3
  Config c = gqa(n_layers, n_heads, 0, 0);
  c.attention = "mla";
  c.kv_lora_rank = 512, c.qk_rope_head_dim = 64, c.qk_nope_head_dim = c.v_head_dim = 128;
  return c;
}

// One matrix of 7 x 10^9 parameters, and no attention to speak of.
Model seven_billion(const char* weights) {
  Model m;
  m.config = gqa(1, 1, 1, 2);
  m.layers.resize(1);
  m.layers[0].mlp.up.weight = {type(weights), 2'000'000, 3500, 1, nullptr};
  return m;
}

StepTime decode_time(const Model& model, const Machine& machine, double sequences = 1) {
  return time_of(work_of(model, {.sequences = sequences, .tokens = 1, .context = 1, .logits = sequences}, 0), machine);
}

// baseten.co/blog/llm-transformer-inference-guide: Llama 2 7B on an A10: 14 GB / 600 GB/s = 23 ms a token, and a
// prompt's 2 x 7 x 10^9 / 125 TFLOP/s = 0.11 ms.
TEST(Roofline, SevenBillionParametersOnAnA10) {
  const Model model = seven_billion("f16");
  const Machine a10 = machine_of(find_datasheet("A10"));
  const StepTime t = decode_time(model, a10);
  EXPECT_NEAR(t.weights, 23.33e-3, 0.01e-3);
  EXPECT_NEAR(t.products, 0.112e-3, 0.001e-3);
  EXPECT_STREQ(t.bound(), "weights");
  // A thousand tokens of a prompt at once: compute-bound.
  EXPECT_NEAR(prompt_seconds(model, 1000, 1000, 0, a10), 1000 * 0.112e-3, 1e-3);
  EXPECT_EQ(ridge_batch(model, a10), 209);  // 125e12 / 600e9 = 208.3 FLOP/byte, of 2-byte weights as many sequences
}

TEST(Roofline, RidgeOfAnH200) {  // 989 TFLOP/s dense, 4.8 TB/s: 206 FLOP/byte; 1979 is the sparse figure
  const Machine h200 = machine_of(find_datasheet("h200"));
  EXPECT_NEAR(h200.products[static_cast<size_t>(type("bf16"))] / h200.bandwidth, 206, 0.5);
  EXPECT_EQ(ridge_batch(seven_billion("bf16"), h200), 207);
}

TEST(Roofline, KvBytesAToken) {
  EXPECT_EQ(kv_bytes_per_token(gqa(32, 32, 8, 128), "f16"), 131072);   // Llama 3 8B: 2 x 32 x 8 x 128 x 2
  EXPECT_EQ(kv_bytes_per_token(gqa(80, 64, 8, 128), "bf16"), 327680);  // Llama 3 70B
  EXPECT_EQ(kv_bytes_per_token(gqa(80, 64, 8, 128), "f32"), 2 * 327680);
  EXPECT_EQ(kv_bytes_per_token(mla(60, 128), "f16"), 69120);  // DeepSeek V2: 60 x (512 + 64) x 2
  EXPECT_EQ(kv_bytes_per_token(mla(61, 128), "f16"), 70272);  // DeepSeek V3
  EXPECT_EQ(kv_bytes_per_token(gqa(1, 1, 1, 64), "q8"), 2 * (64 + 2 * 2));
  EXPECT_EQ(kv_bytes_per_token(gqa(1, 1, 1, 64), "q4"), 2 * (32 + 2 * 4));
}

TEST(Roofline, ExpertsThatABatchHits) {
  Config c;
  EXPECT_EQ(experts_hit(c, 5), 0);
  c.n_routed_experts = 8, c.num_experts_per_tok = 2;
  EXPECT_DOUBLE_EQ(experts_hit(c, 1), 2);
  EXPECT_DOUBLE_EQ(experts_hit(c, 2), 3.5);  // 8 (1 - (6/8)^2)
  EXPECT_NEAR(experts_hit(c, 1000), 8, 1e-9);
}

// Experts are read as they are hit, and multiplied as they are chosen.
TEST(Roofline, ExpertsCostWhatIsHit) {
  Model m;
  m.config = gqa(1, 1, 1, 2);
  m.config.n_routed_experts = 8, m.config.num_experts_per_tok = 2, m.config.moe_layers = {1};
  m.layers.resize(1);
  m.layers[0].experts.up.weight = {type("f32"), 64, 16, 8, nullptr};  // 4096 bytes an expert
  const Work one = work_of(m, {}, 0);
  const Work two = work_of(m, {.sequences = 2, .tokens = 1, .context = 1, .logits = 2}, 0);
  EXPECT_DOUBLE_EQ(one.weight_bytes, 2 * 4096);
  EXPECT_DOUBLE_EQ(two.weight_bytes, 3.5 * 4096);
  EXPECT_DOUBLE_EQ(one.products[static_cast<size_t>(type("f32"))], 2 * 2 * 64 * 16);
  EXPECT_DOUBLE_EQ(two.products[static_cast<size_t>(type("f32"))], 2 * 2 * 2 * 64 * 16);
}

// A layer whose window hides tokens, and one without: every query and key counted one by one.
TEST(Roofline, AttentionCountsWhatAQuerySees) {
  Model m;
  m.config = gqa(2, 6, 2, 8);
  m.config.window = {5, 0};
  m.layers.resize(2);
  for (const int tokens : {1, 3, 9, 20})
    for (const int context : {20, 21, 40}) {
      double pairs = 0;
      for (int i = context - tokens; i < context; i++)
        for (int j = 0; j <= i; j++) pairs += (i - j < 5) + 1;
      const double bytes = kv_bytes_per_token(m.config, "f32");  // of two layers
      const Work w = work_of(m, {.sequences = 3, .tokens = double(tokens), .context = double(context)}, bytes);
      EXPECT_DOUBLE_EQ(w.attention, 3 * pairs * 6 * 2 * (8 + 8)) << tokens << " of " << context;
      EXPECT_DOUBLE_EQ(w.kv_bytes, 3 * bytes / 2 * (std::min(context, 5 + tokens - 1) + context));
    }
}

TEST(Roofline, MlaTakesTheFormOfFewerFlop) {
  Model m;
  m.config = mla(1, 16);
  m.layers.resize(1);
  const double carry = 128 * 512 + 512 * 128, n = 4096;
  // Decode is absorbed, a long prompt expanded.
  EXPECT_DOUBLE_EQ(work_of(m, {.context = n}, 0).attention, 2 * 16 * (carry + n * (512 + 64 + 512)));
  const double pairs = n * (n + 1) / 2;
  EXPECT_DOUBLE_EQ(work_of(m, {.tokens = n, .context = n}, 0).attention,
                   2 * 16 * (n * carry + pairs * (128 + 64 + 128)));
}

// The one count of the weights is the loader's.
TEST(Roofline, CountsTheWeightsOfAFileAsTheLoaderDoes) {
  for (const char* variant : {"mha", "mqa", "gqa", "mla"})
    for (const bool experts : {false, true}) {
      const TemporaryFile disk(tiny_model(variant, experts, 3).bytes());
      ModelFile file(disk.path());
      for (int packed = 0; packed < 2; packed++) {
        const Model& m = file.model;
        EXPECT_EQ(weight_bytes(m), static_cast<double>(m.weight_bytes)) << variant << experts << packed;
        EXPECT_EQ(parameters(m), m.n_parameters) << variant << experts << packed;
        // A batch that hits every expert reads all there is, but for the matrices that lie there twice.
        const double all = work_of(m, {.sequences = 1e6}, 0).weight_bytes;
        double not_read = 0;
        for (const Layer& l : m.layers)
          if (const Matrix& w = l.w_uk.weight; w.n) not_read += double(packed_bytes(w.type, w.n, w.k)) * w.groups;
        const bool tied = !m.lm_head.weight.n || m.lm_head.weight.data == m.embed_tokens.data;
        const Matrix& e = m.embed_tokens;
        if (!tied || (!packed && m.lm_head.weight.n)) not_read += double(packed_bytes(e.type, e.n, e.k));
        EXPECT_NEAR(all, weight_bytes(m) - not_read, 1e-6) << variant << experts << packed;
        if (experts) {
          EXPECT_LT(work_of(m, {}, 0).weight_bytes, all);
        }
        if (!packed) file.pack(test_threads());
      }
    }
}

TEST(Roofline, TheSameModelWithAnotherAttention) {
  Model m;
  m.config = gqa(32, 32, 8, 128);
  m.config.dim = 4096;
  m.layers.resize(32);
  for (Layer& l : m.layers) l.o_proj.weight = {type("q8_0"), 4096, 4096, 1, nullptr};
  const auto kv = [&](const char* attention) { return kv_bytes_per_token(with_attention(m, attention).config, "f16"); };
  EXPECT_EQ(kv("gqa"), 131072);
  EXPECT_EQ(kv("mha"), 4 * 131072);
  EXPECT_EQ(kv("mqa"), 131072 / 8);
  EXPECT_EQ(kv("mla"), 32 * (4 * 128 + 64) * 2);
  // Projections: q, o and K, V of each.
  EXPECT_EQ(parameters(with_attention(m, "mha")), 32 * 4.0 * 4096 * 4096);
  EXPECT_EQ(parameters(with_attention(m, "mqa")), 32 * (2.0 * 4096 * 4096 + 2 * 4096 * 128));
  const Model latent = with_attention(m, "mla");
  EXPECT_EQ(parameters(latent), 32 * (32.0 * 192 * 4096 + 576 * 4096 + 2 * 32 * 128 * 512 + 4096.0 * 4096));
  EXPECT_EQ(latent.layers[0].w_uv.weight.type, type("f16"));  // never quantised
  EXPECT_EQ(latent.layers[0].q_proj.weight.type, type("q8_0"));
  // Of an MLA model: heads as wide as its keys without their rotated part, a KV head for four.
  m.config = mla(32, 128);
  EXPECT_EQ(kv("gqa"), 32 * 2 * 32 * 128 * 2);
  EXPECT_EQ(kv("mla"), 32 * 576 * 2);
}

TEST(Roofline, PlansWithAnotherWeightType) {
  Model m;
  m.config = mla(1, 4);
  m.embed_tokens = {type("bf16"), 64, 64, 1, nullptr};
  m.layers.resize(1);
  Layer& l = m.layers[0];
  l.router.weight = {type("f32"), 32, 64, 1, nullptr};
  l.w_uv.weight = {type("bf16"), 128, 512, 4, nullptr};
  l.mlp.up.weight = {type("bf16"), 32, 48, 1, nullptr};  // rows of a group and a half
  set_weight_type(m, type("q8_0"));
  EXPECT_EQ(m.embed_tokens.type, type("q8_0"));
  EXPECT_EQ(l.router.weight.type, type("f32"));
  EXPECT_EQ(l.w_uv.weight.type, type("bf16"));
  EXPECT_EQ(l.mlp.up.weight.type, type("bf16"));
  set_weight_type(m, type("f32"));
  EXPECT_EQ(l.w_uv.weight.type, type("f32"));
}

TEST(Roofline, TheLongerOfReadingAndMultiplyingCounts) {
  Work w;
  w.weight_bytes = 8, w.kv_bytes = 2, w.attention = 30, w.stages = 4, w.logits = 100;
  w.products.assign(weight_formats().size(), 0);
  w.products[0] = 10;
  Machine m;
  m.bandwidth = 2, m.attention = 10, m.launch = 0.5, m.logit = 0.01;
  m.products.assign(weight_formats().size(), 5);
  const StepTime t = time_of(w, m);  // weights 4, products 2; KV 1, attention 3; launches 2; logits 1
  EXPECT_DOUBLE_EQ(t.total(), 4 + 3 + 2 + 1);
  EXPECT_STREQ(t.bound(), "weights");
  m.logit = 0.05;
  EXPECT_STREQ(time_of(w, m).bound(), "logits");
  m.attention = 5;
  EXPECT_STREQ(time_of(w, m).bound(), "compute");
  m.launch = 5;
  EXPECT_STREQ(time_of(w, m).bound(), "launches");
}

// A prompt's products have a speed of their own, which also decides from which batch on arithmetic is the limit.
TEST(Roofline, ProductsOfManyRowsHaveTheirOwnSpeed) {
  const Model model = seven_billion("f16");
  Machine m = machine_of(find_datasheet("A10"));
  const double prompt = prompt_seconds(model, 1000, 1000, 0, m), step = decode_time(model, m).products;
  for (double& speed : m.products) speed /= 4;
  EXPECT_DOUBLE_EQ(prompt_seconds(model, 1000, 1000, 0, m), prompt);
  EXPECT_EQ(ridge_batch(model, m), 209);
  EXPECT_DOUBLE_EQ(decode_time(model, m).products, 4 * step);
}

// All that decode reads lies in the memory given, aligned and without overlap while there is room.
TEST(Roofline, MatricesOfDecodeAreWhatAStepReads) {
  const TemporaryFile disk(tiny_model("mla", true, 3).bytes());
  ModelFile file(disk.path());
  file.pack(test_threads());
  const Model& m = file.model;
  const std::vector<Matrix> all = matrices_of_decode(m);
  double bytes = double(m.vector_bytes);
  for (const Matrix& one : all) bytes += bytes_of(one);
  EXPECT_DOUBLE_EQ(bytes, work_of(m, {.sequences = 1e6}, 0).weight_bytes);
  EXPECT_EQ(std::ranges::count_if(all, [](const Matrix& one) { return one.groups != 1; }), 0);
  const Buffer<std::byte> room(size_t{1} << 24), small(1024);
  const std::byte* end = room.data();
  for (const Matrix& one : placed(all, {room.data(), room.size()})) {
    EXPECT_EQ(one.data, end);
    end += packed_bytes(one.type, one.n, one.k);
  }
  for (const Matrix& one : placed(all, {small.data(), small.size()}))
    EXPECT_LE(one.data + packed_bytes(one.type, one.n, one.k), small.data() + small.size());
}

// A prompt of 3 tokens in one layer of 2 heads of 4 without matrices: 1 + 2 + 3 pairs of 2 x 2 x (4 + 4) FLOP.
TEST(Roofline, PromptsAttendAtTheirOwnSpeed) {
  Model m;
  m.config = gqa(1, 2, 1, 4);
  Machine machine;
  machine.bandwidth = 1e12, machine.attention = 1, machine.prompt_attention = 64;
  machine.prompt_products.assign(weight_formats().size(), 1);
  EXPECT_DOUBLE_EQ(prompt_seconds(m, 3, 512, 0, machine), 6.0 * 2 * 2 * (4 + 4) / 64);
}

TEST(Machines, AreFoundByNameAndNearOnesOffered) {
  EXPECT_STREQ(find_datasheet("h100-sxm").name, "H100 SXM");
  EXPECT_STREQ(find_datasheet("RTX 4090").name, "RTX 4090");
  EXPECT_STREQ(find_datasheet("rtx4090").name, "RTX 4090");
  for (const auto& [wrong, near] : std::vector<std::pair<const char*, const char*>>{
           {"H100", "H100 SXM"}, {"RTX 4091", "RTX 4090"}, {"A100", "A100 80GB"}, {"mi300", "MI300X"}}) {
    try {
      find_datasheet(wrong);
      FAIL() << wrong;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(near), std::string::npos) << e.what();
    }
  }
}

// Sparse figures are twice the dense ones and the commonest error: 16-bit FLOP/s of two kinds of a chip do not differ
// by that, and no chip here does more than 4 times as much in int8.
TEST(Machines, AreDescribedInFull) {
  for (const Datasheet& d : datasheets()) {
    EXPECT_GT(d.memory, 0) << d.name;
    EXPECT_GT(d.bandwidth, 0) << d.name;
    EXPECT_LE(d.f32, d.bf16) << d.name;
    EXPECT_LE(d.bf16, d.int8) << d.name;
    EXPECT_LE(d.int8, 4.05 * d.bf16) << d.name;
    EXPECT_GT(std::string(d.source).size(), 10u) << d.name;
  }
}

TEST(Largest, IsTheLastThatHolds) {
  for (const int last : {0, 1, 6, 7}) EXPECT_EQ(largest(7, [&](int n) { return n <= last; }), last);
}

}  // namespace
