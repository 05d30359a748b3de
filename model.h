// model.h: the model file as data: hyper-parameters, and every tensor by name with its expected type and
// shape. host/loader.h makes it of a file.
//
// The file is plain safetensors. `__metadata__` holds "format" ("attn.cu 3"), "config" (one JSON object, whose keys are
// the fields of Config below, to the letter), "types" (the weight type of each matrix that is not plain floats),
// "tokenizer_sha256" (of NAME.tokenizer.bin) and "source" (for people). All that differs between GPT-2, Llama, Gemma or
// DeepSeek is in there or in which tensors are present; the runtime has no per-architecture code. docs/model-file.md
// lists every key and tensor.
#pragma once

#include <string>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/ranks.h"

enum class NormKind { rms, layer };
enum class Scoring { softmax, sigmoid };
enum class GroupScore { max, top2_sum };  // how group-limited routing ranks a group of experts: DeepSeek V2, V3

constexpr int MAX_WIDTH = 1 << 20;  // of anything in a config

// Names follow llama2.c and Hugging Face.
struct Config {
  std::string attention;  // the variant's name: mha, mqa, gqa or mla (variants.h)
  int dim = 0, hidden_dim = 0, n_layers = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int vocab_size = 0, seq_len = 0;  // seq_len: the longest context the model was made for
  // MLA (DeepSeek V2, arXiv 2405.04434, section 2.1); head_dim and n_kv_heads are then not used
  int q_lora_rank = 0, kv_lora_rank = 0, qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;

  NormKind norm = NormKind::rms;
  float norm_eps = 1e-5f;
  float latent_norm_eps = 1e-5f;  // of the norms of MLA's latents
  Activation activation = Activation::silu;
  float swiglu_limit = 0;       // swiglu_oai clamps its inputs to this
  float attention_scale = 0;    // factor on q . k
  float attention_softcap = 0;  // s -> cap tanh(s / cap); 0: none
  float logit_softcap = 0;
  float embedding_scale = 1, logit_scale = 1, residual_scale = 1;
  std::vector<int> window;        // [n_layers] a token sees this many tokens, itself included; 0: all before it
  std::vector<int> rope;          // [n_layers] index of the layer's table rope.I.inv_freq; -1: no rotation
  std::vector<float> rope_scale;  // [tables] factor on cos and sin (YaRN's attention factor)
  int original_seq_len = 0;  // in a longer context rope.I.long_inv_freq holds (LongRoPE, arXiv 2402.13753); 0: never

  // mixture of experts; n_routed_experts 0: none
  int n_routed_experts = 0, num_experts_per_tok = 0, n_shared_experts = 0, moe_intermediate_size = 0;
  std::vector<int> moe_layers;  // [n_layers] 1 where the layer's MLP is experts
  Scoring scoring_func = Scoring::softmax;
  bool norm_topk_prob = false;
  float routed_scaling_factor = 1;
  int n_group = 1, topk_group = 1;
  GroupScore group_score = GroupScore::max;

  bool is_moe(int layer) const { return n_routed_experts > 0 && moe_layers[static_cast<size_t>(layer)] != 0; }
};

// The rows of a matrix, or its groups, are dealt to the ranks (kernels/ranks.h) in runs of so many; a run of KEPT is
// none: all ranks have all.
constexpr int KEPT = 0;

struct Norm {
  const float* weight = nullptr;  // [n]; null: this norm is absent
  const float* bias = nullptr;    // [n] or null
  int n = 0;                      // elements that are normed together
  explicit operator bool() const { return weight != nullptr; }
};

struct Linear {
  Matrix weight;                // [groups, n, k]; one group but for experts and MLA's heads; n 0: absent
  const float* bias = nullptr;  // [groups, n] or null
  explicit operator bool() const { return static_cast<bool>(weight); }
};

// One MLP: down(act(gate x) * up x), or down(act(up x)) where there is no gate.
struct Mlp {
  Linear gate, up, down;  // [hidden, dim], [hidden, dim], [dim, hidden]
};

struct Layer {
  Norm attention_norm, attention_post_norm;  // [dim] before, and (sandwich norms) after the block
  Norm mlp_norm, mlp_post_norm;
  // MHA, MQA, GQA
  Linear q_proj, k_proj, v_proj;  // [n_heads head_dim, dim], [n_kv_heads head_dim, dim] twice
  Norm q_norm, k_norm;            // [head_dim], over each head, or as wide as the projection, over its whole row
  const float* sinks = nullptr;   // [n_heads] a score without a value joins each softmax (gpt-oss)
  Linear o_proj;                  // [dim, n_heads head_dim]; MLA: [dim, n_heads v_head_dim]
  // MLA; q_proj [n_heads (nope + rope), dim] where there is no q_lora_rank
  Linear q_a_proj, q_b_proj;  // [q_lora_rank, dim], [n_heads (nope + rope), q_lora_rank]
  Norm q_a_norm, kv_a_norm;   // [q_lora_rank], [kv_lora_rank]
  Linear kv_a_proj;           // [kv_lora_rank + rope, dim]
  Linear w_uk;                // a group a head: [qk_nope_head_dim, kv_lora_rank] expands a latent to a key
  Linear w_uk_t;              // a group a head: [kv_lora_rank, qk_nope_head_dim] carries a query to the latent space
  Linear w_uv;                // a group a head: [v_head_dim, kv_lora_rank]
  Mlp mlp;
  // experts
  Linear router;                       // [n_routed_experts, dim], float32; its bias joins the logits
  const float* router_bias = nullptr;  // [n_routed_experts] added to the scores for the selection alone (noaux_tc)
  Mlp experts;                         // groups of n_routed_experts, hidden = moe_intermediate_size
  Mlp shared;                          // hidden = n_shared_experts * moe_intermediate_size
};

struct Model {
  std::string path;
  Config config;  // of the whole model
  Part part;      // of its matrices that this process has: their own rows, groups and biases alone
  std::string tokenizer_sha256;
  Matrix embed_tokens;  // [vocab_size, dim]
  Linear lm_head;       // [vocab_size, dim]; the very same matrix as embed_tokens where they are tied
  const float* position_embedding = nullptr;  // [seq_len, dim] learned positions (GPT-2)
  Norm final_norm;
  struct Rope {
    const float* inv_freq;       // [n] for 2n rotated elements
    const float* long_inv_freq;  // [n] for contexts longer than original_seq_len; null where that is 0
    int n;
  };
  std::vector<Rope> rope;  // rope.I.inv_freq, rope.I.long_inv_freq
  std::vector<Layer> layers;

  // For the report: bytes of the packed weights, parameters.
  size_t weight_bytes = 0, vector_bytes = 0;
  double n_parameters = 0;
  std::string types;  // "f32 0.04M, q8_0 134.5M"

  Buffer<std::byte> packed;  // all matrices
  Buffer<float> vectors;     // all norms, biases and tables
};
