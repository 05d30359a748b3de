// roofline.h: the inference speed calculation: what a step reads and multiplies, and how long a machine takes for it.
//
//   step     max(weights / bandwidth, products / FLOP/s) + max(KV / bandwidth, attention / FLOP/s)
//            + stages x launch + logits x time of a logit
//   prompt   the sum of its chunks' steps
//
// Whichever of reading and multiplying takes longer hides the other: the roofline of Williams, Waterman and Patterson
// (CACM 52(4), 2009). Bytes and FLOP are counted from the model's own matrices and from its variant's cache shape,
// which also plan the memory. docs/3-speed.md does it by hand.
//
// GB is 10^9 bytes. FLOP are operations, 2 a multiply-add; FLOP/s is a rate.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "model.h"

struct Machine {
  std::string name, source;
  double memory = 0;  // bytes
  // bytes/s that it reads; on this CPU those that products of one row get through
  double bandwidth = 0;
  // FLOP/s, dense: of a decode step, which has a token of each sequence, and of a prompt's, whose tokens share what
  // they read. On a GPU of a datasheet they are the same.
  std::vector<double> products, prompt_products;  // [weight types] of matmul
  double attention = 0, prompt_attention = 0;
  double launch = 0;  // s of a stage that has next to nothing to compute: a kernel's launch; a call and its barrier
  double logit = 0;   // s for each logit that the next token is drawn from
};

// A GPU or a chip as its maker describes it: host/datasheets.cpp.
struct Datasheet {
  const char* name;
  double memory, bandwidth;  // GB, GB/s
  double f32, bf16, int8;    // TFLOP/s, never the sparse figure; float16 is as bf16
  const char* source;
};
std::span<const Datasheet> datasheets();
// From one kernel to the next, launched ahead: 3.8 us a kernel that runs for 2.9
// (developer.nvidia.com/blog/cuda-graphs); for want of other figures that of every GPU.
constexpr double GPU_LAUNCH = 0.9e-6;

// By name: "h100-sxm" is "H100 SXM". Throws Error that offers the nearest names.
const Datasheet& find_datasheet(const std::string& name);
// Quantised weights multiply int8 activations, bf16 and f16 weights 16-bit ones (kernels/matmul.h), attention too.
Machine machine_of(const Datasheet& sheet);

// The last `tokens` of each of `sequences` contexts of `context` tokens; decode: one of each. Means are welcome.
struct StepShape {
  double sequences = 1, tokens = 1, context = 1;
  double logits = 1;  // rows whose logits are wanted
};

// What a step reads and multiplies.
struct Work {
  double weight_bytes = 0, kv_bytes = 0;
  std::vector<double> products;  // [weight types] FLOP
  double attention = 0;          // FLOP
  int stages = 0;
  double logits = 0;  // that tokens are drawn from
  double bytes() const { return weight_bytes + kv_bytes; }
  double flop() const;
};
Work work_of(const Model& model, const StepShape& step, double kv_bytes_per_token);

struct StepTime {
  double weights = 0, kv = 0, products = 0, attention = 0, launches = 0, logits = 0;  // s
  double total() const;
  const char* bound() const;  // "weights", "KV", "compute", "launches" or "logits": what takes longest
};
StepTime time_of(const Work& work, const Machine& machine);
// Seconds for a prompt of n tokens, `chunk` of them a step.
double prompt_seconds(const Model& model, int n, int chunk, double kv_bytes_per_token, const Machine& machine);

// Tokens whose rows a layer reads for one at the end of this context, the mean of the layers: windows hide some.
double tokens_read(const Config& config, double context);
// Of experts, those that a step of this many tokens is expected to hit, each with num_experts_per_tok of them.
double experts_hit(const Config& config, double tokens);

// The matrices that decode reads, all experts among them; each group is one of its own.
std::vector<Matrix> matrices_of_decode(const Model& model);
// The same in this memory, one after the other and from its beginning again; of one that is larger, a part.
std::vector<Matrix> placed(std::vector<Matrix> matrices, std::span<const std::byte> memory);

// Bytes of a matrix in memory, all of its groups; multiply-adds of one row of activations with all of them.
double bytes_of(const Matrix& matrix);
double multiply_adds(const Matrix& matrix);
// Bytes of all weights in memory.
double weight_bytes(const Model& model);
double parameters(const Model& model);
// The sequences from which on a decode step's products take longer than reading their weights; 0: more than 2^20.
int ridge_batch(const Model& model, const Machine& machine);

// The same model with another attention, as shapes: as many heads, each as wide. GQA has a KV head for every four heads
// or more; MLA the widths of DeepSeek V2 relative to its heads (arXiv 2405.04434, table 1): a latent of 4 heads, a
// rotated key of half a head.
Model with_attention(const Model& model, const std::string& attention);
// All matrices in this type, but for those that have a reason for theirs: routers, and where the type is quantised
// MLA's heads and rows that are no whole groups.
void set_weight_type(Model& model, WeightType type);
// Bytes of a token's rows in all layers, in the KV type of this name.
double kv_bytes_per_token(const Config& config, const std::string& kv);

// The largest n of 1 .. most for which holds(n), which holds up to some n; 0: for none.
int largest(int most, const std::function<bool(int)>& holds);
