// team.h: what a stage sees of the threads that compute a step together (threads.h starts them).
//
// Every stage is called by all threads of the team with the same arguments, and receives the team: its share of the
// work follows from rank and size, and it ends with a barrier. No result depends on the size, so each step may have
// another one.
#pragma once

#include <cstdint>
#include <utility>

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
      for (int i = first; i < first + chunk && i < n; i++) f(i);
    barrier();
  }

 private:
  friend class Threads;
  struct Shared;
  struct Broken {};

  int take(int chunk) const;  // the first of the next `chunk`

  Shared* shared_ = nullptr;  // null: a team of one
  mutable int alone_ = 0;     // a team of one counts here
};
