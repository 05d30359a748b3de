// team.h: the threads that compute a step together.
//
// Threads are started once and run one function as a team. Every stage is called by all threads of the team with the
// same arguments, and receives the team: its share of the work follows from rank and size, and it ends with a barrier.
// No result depends on the size, so each step may have another one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

class Team {
 public:
  int rank = 0;  // 0 .. size - 1
  int size = 1;

  // Returns once all threads of the team have called it.
  void barrier() const;

  // This thread's share of 0 .. n - 1: from first to second - 1. Shares are equal but for one, and in order of rank.
  template <class Int>
  std::pair<Int, Int> share(Int n) const {
    const auto edge = [&](int r) { return static_cast<Int>(static_cast<int64_t>(n) * r / size); };
    return {edge(rank), edge(rank + 1)};
  }
  // f(i) for each i of 0 .. n - 1, by shares; then a barrier.
  template <class F>
  void for_each(int n, F f) const {
    const auto [first, last] = share(n);
    for (int i = first; i < last; i++) f(i);
    barrier();
  }
  // The same for work of unequal length: who is free takes the next `chunk` of them, in order. A barrier comes before.
  template <class F>
  void for_each_dynamic(int n, F f, int chunk = 1) const {
    for (int first; (first = take(chunk)) < n;)
      for (int i = first; i < std::min(first + chunk, n); i++) f(i);
    barrier();
  }

 private:
  friend class Threads;
  struct Shared {
    alignas(64) std::atomic<int> arrived{0};          // at the barrier
    alignas(64) std::atomic<uint32_t> generation{0};  // barriers passed
    std::atomic<bool> broken{false};                  // a thread has left by an exception: nobody waits for it
    alignas(64) std::atomic<int> next{0};             // of the loop under way; a barrier sets it to 0
  };
  struct Broken {};

  int take(int chunk) const {
    if (shared_) return shared_->next.fetch_add(chunk, std::memory_order_relaxed);
    return std::exchange(alone_, alone_ + chunk);
  }

  Shared* shared_ = nullptr;  // null: a team of one
  mutable int alone_ = 0;     // a team of one counts here
};

class Threads {
 public:
  // Starts most - 1 threads; the caller of run is one more. Throws Error where the machine has none left.
  explicit Threads(int most);
  ~Threads();
  int most() const { return static_cast<int>(workers_.size()) + 1; }

  // f(team) on `size` threads (1 .. most), the caller among them as rank 0; returns once all have returned. An
  // exception of any of them ends the others at their next barrier and is thrown here.
  void run(int size, const std::function<void(const Team&)>& f);

 private:
  struct Worker {
    alignas(64) std::atomic<uint32_t> jobs{0};  // handed out so far
    std::thread thread;
  };
  void end();
  void work(int rank);
  void call(int rank);

  std::vector<std::unique_ptr<Worker>> workers_;  // [most - 1], of rank 1, 2, ...
  Team::Shared shared_;
  const std::function<void(const Team&)>* job_ = nullptr;
  int size_ = 1;
  bool ending_ = false;
  alignas(64) std::atomic<int> running_{0};  // workers that have not returned
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // the first
};
