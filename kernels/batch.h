// batch.h: one step's work, as plain arrays, and the sizes that a step may have.
//
// Names follow vLLM: block_table, block_size, slot_mapping, context_len, query_start.
#pragma once

#include <functional>
#include <memory>

class Team;
class Threads;

// Any mix of prompt chunks and decode tokens. The tokens of sequence s are query_start[s] .. query_start[s + 1] - 1, in
// order of position, and are the last tokens of its context.
struct Batch {
  int n_tokens = 0;                   // T
  int n_sequences = 0;                // S
  const int* tokens = nullptr;        // [T]
  const int* positions = nullptr;     // [T] position in its sequence, from 0
  const int* query_start = nullptr;   // [S + 1]
  const int* context_len = nullptr;   // [S] tokens of the sequence in the cache once this step has appended its own
  const int* block_table = nullptr;   // [S, max_blocks]; entries past the context (or behind every window) are not read
  int max_blocks = 0;                 // row length of block_table
  const int* slot_mapping = nullptr;  // [T] block * block_size + slot: where append writes the token's rows
  int n_logits = 0;
  const int* logit_rows = nullptr;  // [n_logits] tokens of the batch whose logits are wanted, ascending
  int n_copies = 0;                 // blocks to copy in every layer before anything is appended (copy on write)
  const int* copy_from = nullptr;   // [n_copies] block
  const int* copy_to = nullptr;     // [n_copies] block
};

// Which form MLA takes: by the count of FLOP of each, or always the same one.
enum class MlaForm { automatic, absorbed, expanded };

// Capacities, fixed when the transformer is made: everything is allocated then, nothing during a step.
struct Limits {
  int max_tokens = 0;     // of a batch
  int max_sequences = 0;  // of a batch
  int max_logits = 0;     // rows of logits of a batch
  int context = 0;        // longest context_len of any sequence; contiguous: also the block size
  int n_blocks = 0;       // of the cache: blocks of Block tokens (paged), or sequences (contiguous)
  int max_threads = 1;    // of the team that computes a step
  MlaForm mla_form = MlaForm::automatic;
};

// A step on the device. On the CPU, all threads of a team call the stages, with the host's own batch. With CUDA the
// calling thread alone does, with a copy in device memory, made by one upload; and a step of the same sizes as the one
// before may be done without calling them again (batch.cu).
class DeviceBatch {
 public:
  DeviceBatch() = default;
  explicit DeviceBatch(const Limits& limits) : mla_form_(limits.mla_form) {}

  using Stages = std::function<void(const Team& team, const Batch& batch)>;
  // What the stages launch may depend on the batch's sizes, but not on what its arrays hold; prompts and --mla expanded
  // are free to. It may be under way yet when this returns.
  void run(const Batch& host, Threads& threads, int n_threads, const Stages& stages);
  // The batch where kernels read it, valid until the next.
  const Batch& upload(const Batch& host);

 private:
  MlaForm mla_form_ = MlaForm::automatic;
  struct Copy;
  std::shared_ptr<Copy> copy_;  // null on the CPU
};
