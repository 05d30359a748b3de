// thread_count.h: how many threads the next step should have: the number that was fastest lately.
//
// Another program on the cores makes a large team slow, since every barrier waits for the thread that lost its core;
// memory may be busy with fewer threads than there are cores. So now and then a few steps try another number, and the
// mean of their time decides. When to try follows from what the machine shows, so that an idle one pays almost nothing.
#pragma once

#include <array>
#include <cstdint>

// What the operating system tells between two steps.
struct MachineLoad {
  double now = 0;           // seconds, of any clock that only moves on
  int64_t preemptions = 0;  // of this process's threads so far (getrusage: involuntary context switches)
  double idle_cores = 0;    // of the machine, lately
};

class ThreadCount {
 public:
  explicit ThreadCount(int most) : most_(most) {}

  // For a step of n_tokens >= 1. Steps are compared with others of about as many tokens.
  int next(int n_tokens, const MachineLoad& load);
  // How long the step took that next() was asked for.
  void note(double seconds);

 private:
  struct Pace {
    int threads = 0;                     // settled for; 0: not begun
    double cost = 0;                     // seconds a token, a running mean of the latest steps
    int steps = 0;                       // since the last trial
    int patience = 64;                   // steps until a trial without a reason
    double tried_at = -1e9;              // when the last trial ended
    double pause = 0;                    // seconds until the next trial for the same reason
    bool crowded = false, room = false;  // the reasons of the last step
    int trials = 0;                      // so far: they alternate between the nearest number and the double or half
    int trial = 0;                       // threads on trial; 0: none
    int trial_steps = 0;
    double trial_seconds = 0, trial_tokens = 0;
  };
  int candidate(Pace& p, const MachineLoad& load) const;
  void judge(Pace& p);

  int most_;
  std::array<Pace, 32> paces_;  // of steps with 1, 2-3, 4-7, ... tokens
  Pace* current_ = nullptr;
  double tokens_ = 0, now_ = 0;
  bool crowded_ = false;  // others take our cores away
  double window_start_ = 0;
  int64_t window_preemptions_ = 0;
};

// Reads it from the kernel: Linux.
MachineLoad machine_load();
