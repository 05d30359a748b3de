// ranks.h: processes, on one machine or on several, that compute each step together: ranks, in MPI's word.
//
// A matrix is cut by output rows, attention by heads, experts by expert, never along a sum: every number is computed by
// one rank, in the order in which a single process adds, and travels as it is. So no bit depends on their number.
// gather.h is where they meet. make DIST=none|mpi links ranks_none.cpp, one process, or ranks_mpi.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

// Which of n things that follow each other are whose.
struct Part {
  int rank = 0, size = 1;
  // Rank r has those from edge(n, r) to edge(n, r + 1) - 1. No rank has more than the last.
  int edge(int n, int r) const { return static_cast<int>(static_cast<int64_t>(n) * r / size); }
  int first(int n) const { return edge(n, rank); }
  int count(int n) const { return edge(n, rank + 1) - edge(n, rank); }
};

class Ranks {
 public:
  Ranks();   // joins the others
  ~Ranks();  // leaves them: each must come to it
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  [[noreturn]] void end_all(int exit_code);

  Part part() const { return part_; }

  // all: bytes[r] of each rank r, one after the other; this rank's are there already. Every rank calls it, with the
  // same bytes. Throws Error that names the rank whose bytes do not come; from then on every call does.
  void gather(void* all, std::span<const size_t> bytes);
  // From rank 0 to all others, who wait as long as it takes. Throws Error as gather does.
  void send(const std::vector<int>& message);
  std::vector<int> receive();

  // A launcher that loses a rank ends the others after a second: where `hurries` says that it wants to, a rank that
  // does not answer is given up at once.
  bool (*hurries)() = nullptr;

  struct Traffic {
    int64_t bytes = 0, gathers = 0;  // that came in
    double seconds = 0;
  };
  const Traffic& traffic() const { return traffic_; }
  void forget_traffic() { traffic_ = {}; }

 private:
  Part part_;
  Traffic traffic_;
};
