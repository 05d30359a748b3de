// scheduler.h: which sequences share the next batch, and in which blocks of the cache their tokens live.
//
// A batch is one token of every sequence that generates, then as much of the oldest prompts as the token budget leaves
// (continuous batching, as in Orca; chunked prefill, as in Sarathi). First come, first served: nobody is admitted
// before an older one, nor gets a share of a batch before it, so that those who generate are older than those who read
// a prompt. When the cache is full the youngest is preempted: its blocks are freed, it waits at its place and is
// computed again.
//
// Memory is taken where a scheduler is made and a sequence added: where next or fork throw, for lack of memory for the
// batch, all stays as it is but for the sequences in scheduled(), which must be removed.
#pragma once

#include <vector>

#include "host/blocks.h"
#include "kernels/batch.h"

struct Sequence {
  int request = 0, sample = 0;  // its age: the smaller pair is older
  std::vector<int> tokens;      // the prompt's and the generated
  bool begun = false;           // it has generated a token
  int next_logits = 0;          // the first position whose logits are still wanted
  int n_cached = 0;             // of the prompt: tokens found in the cache when it was first admitted

  // The scheduler's own.
  int computed = 0;        // of tokens: those whose keys and values are in the cache
  std::vector<int> table;  // blocks; -1: given back, no layer sees it any more
  int published = 0;       // full blocks of the table that others can find, or find the twins of
  Prefix prefix;           // ... and the tokens in them

  int size() const { return static_cast<int>(tokens.size()); }
  int left() const { return size() - computed; }
  bool generates() const { return begun && left() == 1; }
  bool older(const Sequence& other) const {
    return request != other.request ? request < other.request : sample < other.sample;
  }
};

// Of the cache, since the scheduler was made.
struct CacheStats {
  int64_t cached_tokens = 0;                // found in the cache instead of computed
  int64_t preemptions = 0;                  // of sequences
  int64_t copies = 0;                       // of blocks, on write
  int64_t evicted = 0;                      // blocks whose cached contents had to go
  int peak_sequences = 0;                   // at once in the cache
  int blocks = 0, used = 0, peak_used = 0;  // of the pool; referenced now, at most
  int peak_shared = 0;                      // referenced more than once
  double waste = 0;                         // part of the slots of the blocks in use that holds no token; mean of steps
};

class Scheduler {
 public:
  // window: as in engine.h
  Scheduler(const Limits& limits, int block_size, int window, BlockHash hash);

  int max_tokens() const;  // that one sequence can have

  // s waits for its turn. It must outlive its removal.
  void add(Sequence* s);
  // s has ended, or never shall: its blocks become cache.
  void remove(Sequence* s);

  // The next batch, of some of the sequences added, of which there must be one. Valid until the next call.
  const Batch& next();
  const std::vector<Sequence*>& scheduled() const { return scheduled_; }  // [n_sequences] of the batch
  // The batch's tokens are in the cache now.
  void advance();
  // Those that wait with the request of s, and have not begun either, as far as there is room: from now on they run,
  // with the tokens of s computed, in the very same blocks.
  std::vector<Sequence*> fork(const Sequence& s);

  CacheStats stats() const;

 private:
  // Filling the batch.
  bool schedule(Sequence* s);
  int reserve(Sequence* s, int n);
  int take(Sequence* s, int shared_block);
  void add_to_batch(Sequence* s, int n);
  void finish_batch();
  // Who is in the cache.
  Sequence* admit();
  bool should_wait(const Sequence& s) const;
  void match(Sequence* s);
  void preempt_last();
  void release_behind_window(Sequence* s);
  void give_back(Sequence* s);
  void count_blocks();

  int blocks_for(int tokens) const;

  Limits limits_;
  int block_size_, window_;
  BlockPool pool_;
  std::vector<Sequence*> waiting_, running_;  // by age, the youngest last
  // References to blocks of which the step makes copies; were they released at once, another copy might land there.
  std::vector<int> copied_;
  CacheStats stats_;
  double waste_sum_ = 0;
  int64_t steps_ = 0;

  // What batch_ points to.
  Batch batch_;
  std::vector<Sequence*> scheduled_;
  std::vector<int> tokens_, positions_, query_start_, context_len_, block_table_, slot_mapping_, logit_rows_;
  std::vector<int> copy_from_, copy_to_;
};
