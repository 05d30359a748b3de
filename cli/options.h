// options.h: the command line.
#pragma once

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/error.h"
#include "host/json.h"
#include "host/sampler.h"

constexpr int DEFAULT_CONTEXT = 4096;

struct Options {
  std::string model;
  // what to do; without any of these: continue the prompt
  bool chat = false, bench = false, explain = false, estimate = false, tokens = false;
  std::string prompts, perplexity, logits, heatmap;

  std::string prompt, prompt_file;
  bool has_prompt = false;
  std::optional<std::string> system;  // an empty one takes the place of a template's own
  std::string chat_template;          // a file; empty: the model's own
  Json chat_arguments;                // further variables of the template: an object, or null
  std::vector<std::string> stop;
  bool ignore_eos = false, special = false, escape = false;
  SamplerOptions sampler;
  int n = 0;  // most tokens to generate; 0: until the context is full
  bool has_n = false;
  int samples = 1, parallel = 1;
  size_t max_line = size_t{16} << 20;  // bytes
  int chunks = 0;                      // of --perplexity; 0: all
  int layer = 0, head = -1;            // of --heatmap and --explain; -1: all heads

  int context = 0;             // 0: chosen by plan()
  bool model_context = false;  // the model's longest
  size_t kv_memory = 0;        // bytes; 0: chosen by plan()
  int batch = 512;             // tokens a step
  std::string mla;             // "absorbed" or "expanded" forces that form
  int threads = 0;             // at most; default: one a physical core that affinity and the cgroup's quota allow
  bool choose_threads = true;  // for every step anew, up to that many; not with -t
  // of --estimate: the machine, by name or as figures (GB/s, TFLOP/s, GB), and the types; empty: what is here
  std::string gpu, weight_type, kv_type;
  double bandwidth = 0, flops = 0, memory = 0;
  int ranks = 1;  // of --estimate: at most so many
  std::string link;
  double link_bandwidth = 0, link_latency = 0;  // GB/s, us
  std::string stats;
  bool quiet = false;
};

// A command line that makes no sense: exit code 2.
struct Usage : std::runtime_error {
  explicit Usage(const std::string& line) : std::runtime_error(one_line(line)) {}
};

// What is wrong with them: "top-p 0: must be ..."; empty: nothing.
std::string problem(const SamplerOptions& s);

uint64_t random_seed();

// Throws Usage with one line. After --help, which is printed, and with --gpu list the model is empty.
Options parse(int argc, char** argv);
