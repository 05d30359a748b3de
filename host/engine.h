// engine.h: requests in, tokens out, one batch after the other.
//
// The engine knows nothing of attention: it is given the forward pass as a function, asks the scheduler (scheduler.h)
// what shares the next batch, and draws the tokens. A sequence's tokens do not depend on what shares its batch, nor on
// preemption, nor on what was found in the cache.
//
// Prompts share the full blocks of a common prefix; one that would share what another is just computing waits for it.
// The samples of a request fork once its prompt is computed. A prompt that continues an earlier text (the next turn of
// a chat) finds its blocks; with a contiguous cache, its slot.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "host/durations.h"
#include "host/sampler.h"
#include "host/scheduler.h"

class Threads;

// How a sample ended: it has n tokens; a stop id came; on_token returned false; cancel; something went wrong with it.
enum class Finish { length, stop, callback, cancelled, error };
const char* name(Finish finish);  // "length", "stop", "callback", "cancelled", "error"

struct Result {
  int request = 0, sample = 0;
  Finish finish = Finish::cancelled;
  std::string error;       // what went wrong
  std::vector<int> ids;    // generated; a stop id is not among them
  int n_prompt = 0;        // tokens of the prompt
  int n_cached = 0;        // of them, found in the cache when the prompt was first begun
  double first_token = 0;  // seconds from submit to the first generated token; 0: there was none
  double seconds = 0;      // from submit to the end
};

struct Request {
  std::vector<int> prompt;  // at least one id
  int n = 0;                // most tokens to generate; 0: the prompt's logits alone are wanted
  int samples = 1;          // continuations of this prompt; number i uses the seed sampler.seed + i
  SamplerOptions sampler;
  std::vector<int> stop;  // ids that end the text; empty: none does (--ignore-eos)
  // on_logits gets the logits [vocab_size] of each position from this one on, in order and once each (those
  // at position p choose token p + 1). -1: from the last of the prompt
  // on.
  int logits_from = -1;
  std::function<void(int sample, int position, const float* logits)> on_logits;
  // Each token as it is generated (stop ids are not); false ends the sample (stop strings, a closed pipe).
  std::function<bool(int sample, int id)> on_token;
  std::function<void(const Result& result)> on_finish;  // once for each sample
  // The callbacks run within step, one at a time; they may call cancel but not submit. What on_logits throws ends its
  // sample alone, with that error, and so does std::bad_alloc of on_token; what they throw else comes out of step.
};

struct Stats : CacheStats {
  int64_t steps = 0, decode_steps = 0;  // forward passes; of them, those without any prompt's tokens
  int64_t prompt_tokens = 0;            // computed, those computed again included
  int64_t generated_tokens = 0;
  int64_t decode_tokens = 0, decode_context = 0;   // of the decode steps: sequences, and sum of their context_len
  double prompt_seconds = 0, decode_seconds = 0;   // of steps with, and without a prompt's tokens
  int64_t prompt_threads = 0, decode_threads = 0;  // sums over those steps
  Durations first_token, between_tokens, decode_step;
};

// The smallest of values that at least p of them (0 < p <= 1) do not exceed; 0 where there are none.
double percentile(std::vector<double> values, double p);

class Engine {
 public:
  using Forward = std::function<const float*(const Batch&, int n_threads)>;  // Transformer::forward

  // max_tokens is the budget of a step. block_size: of the cache (contiguous: limits.context). window: tokens
  // that the layer with the longest sight sees; 0: all of them.
  // threads: with which tokens are drawn. A step has limits.max_threads or, where they are chosen, the number of those
  // that was fastest lately (thread_count.h).
  Engine(Forward forward, Threads& threads, const Limits& limits, int block_size, int vocab_size, int window,
         BlockHash hash = block_hash, bool choose_threads = false);
  ~Engine();
  // Bytes that it allocates for any number of requests, but for their tokens.
  static size_t bytes(const Limits& limits, int vocab_size);

  // Most tokens, prompt and generated together, that a request may have.
  int max_request_tokens() const;
  // Queues a request; its number, from 0. Throws Error where it could never fit, with the number of tokens
  // that would.
  int submit(Request request);
  // From the next step on the request has ended; on_finish is called for what is unfinished of it.
  void cancel(int request);
  void cancel_all();

  // One forward pass; false: nothing is left to do. Where it throws, the samples in it end with that error: the others
  // go on.
  bool step();
  void run() {
    while (step()) {
    }
  }
  int unfinished() const;  // samples that wait or run
  Stats stats() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};
