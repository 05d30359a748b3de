// threads.h: threads that are started once and run one function after the other as a team (team.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/team.h"

// What the members of a team share.
struct Team::Shared {
  alignas(64) std::atomic<int> arrived{0};          // at the barrier
  alignas(64) std::atomic<uint32_t> generation{0};  // barriers passed
  std::atomic<bool> broken{false};                  // a thread has left by an exception: nobody waits for it
  alignas(64) std::atomic<int> next{0};             // of the loop under way; a barrier sets it to 0
};

class Threads {
 public:
  // Starts most - 1 threads; the caller of run is one more. Throws Error where the machine has none left.
  explicit Threads(int most);
  ~Threads();
  int most() const { return static_cast<int>(workers_.size()) + 1; }

  // f(team) on `size` threads (1 .. most), the caller among them as rank 0; returns once all have returned. An
  // exception of any of them ends the others at their next barrier and is thrown here.
  template <class F>
  void run(int size, const F& f) {
    run_job(
        size, [](const void* job, const Team& team) { (*static_cast<const F*>(job))(team); }, &f);
  }

 private:
  struct Worker {
    alignas(64) std::atomic<uint32_t> jobs{0};  // handed out so far
    std::thread thread;
  };
  using Job = void (*)(const void* f, const Team& team);  // calls f
  void run_job(int size, Job job, const void* f);
  void end();
  void work(int rank);
  void call(int rank);

  std::vector<std::unique_ptr<Worker>> workers_;  // [most - 1], of rank 1, 2, ...
  Team::Shared shared_;
  Job job_ = nullptr;
  const void* f_ = nullptr;
  int size_ = 1;
  bool ending_ = false;
  alignas(64) std::atomic<int> running_{0};  // workers that have not returned
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // the first
};
