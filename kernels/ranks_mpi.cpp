// ranks_mpi.cpp: DIST=mpi: messages between processes of one MPI job (Open MPI, MPICH).
//
// A gather is a message from each rank to each other one: what one rank has goes out once, without a detour over a
// third, and the message that does not come names the rank that is lost.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <numeric>
#include <set>
#include <string>

#include "host/error.h"
#include "kernels/ranks.h"

namespace {

constexpr int GATHER = 1, MESSAGE = 2;                   // tags
constexpr double PATIENCE = 10, HURRIED_PATIENCE = 0.3;  // s, for a rank that computes the same layer
constexpr double IDLE = 0.02;                            // s without work, after which a rank sleeps between looks
std::string lost;                                        // who; empty: nobody

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A message under way.
struct Pending {
  MPI_Request request = MPI_REQUEST_NULL;
  int other = 0;  // rank
};

// Whether it has arrived, or is gone from here. Throws Error where MPI itself says that it will not be.
bool done(Pending& message) {
  int flag = 0;
  if (MPI_Test(&message.request, &flag, MPI_STATUS_IGNORE) != MPI_SUCCESS)
    fail("%s", (lost = "rank " + std::to_string(message.other) + " is lost: its messages break off").c_str());
  return flag != 0;
}

// Returns once all have arrived; gives up who keeps it waiting.
void wait_for(std::vector<Pending>& messages, bool (*hurries)()) {
  const auto start = Clock::now();
  Clock::time_point hurried{};
  for (size_t i = 0, looks = 0; i < messages.size(); looks++) {
    if (done(messages[i])) {
      i++;
      continue;
    }
    if (looks % 16 != 15) continue;
    sched_yield();
    if (hurries && hurries() && hurried == Clock::time_point{}) hurried = Clock::now();
    if (seconds_since(start) < PATIENCE &&
        (hurried == Clock::time_point{} || seconds_since(hurried) < HURRIED_PATIENCE))
      continue;
    std::set<int> silent;  // who waits for a lost one in an earlier gather is silent as well
    for (; i < messages.size(); i++)
      if (!done(messages[i])) silent.insert(messages[i].other);
    for (const int other : silent) lost += (lost.empty() ? "rank " : " or rank ") + std::to_string(other);
    if (!silent.empty()) fail("%s", (lost += " does not answer: it died or lost its link").c_str());
  }
}

void require_all() {
  if (!lost.empty()) fail("%s", lost.c_str());
}

}  // namespace

Ranks::Ranks() {
  int level = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level);  // ends the process where it fails
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &part_.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &part_.size);
}

Ranks::~Ranks() {
  if (lost.empty()) MPI_Finalize();
}

void Ranks::end_all(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  _exit(exit_code);
}

void Ranks::gather(void* all, std::span<const size_t> bytes) {
  require_all();
  const auto start = Clock::now();
  std::vector<Pending> messages;
  auto* at = static_cast<std::byte*>(all);
  const std::byte* own = std::accumulate(bytes.begin(), bytes.begin() + part_.rank, at);
  const auto own_bytes = static_cast<int>(bytes[static_cast<size_t>(part_.rank)]);
  for (int other = 0; other < part_.size; at += bytes[static_cast<size_t>(other++)]) {
    if (other == part_.rank) continue;
    const auto size = static_cast<int>(bytes[static_cast<size_t>(other)]);
    if (size > 0) {
      messages.push_back({MPI_REQUEST_NULL, other});
      MPI_Irecv(at, size, MPI_BYTE, other, GATHER, MPI_COMM_WORLD, &messages.back().request);
      traffic_.bytes += size;
    }
    if (own_bytes > 0) {
      messages.push_back({MPI_REQUEST_NULL, other});
      MPI_Isend(own, own_bytes, MPI_BYTE, other, GATHER, MPI_COMM_WORLD, &messages.back().request);
    }
  }
  wait_for(messages, hurries);
  traffic_.gathers++;
  traffic_.seconds += seconds_since(start);
}

void Ranks::send(const std::vector<int>& message) {
  require_all();
  std::vector<Pending> messages;
  for (int other = 1; other < part_.size; other++) {
    messages.push_back({MPI_REQUEST_NULL, other});
    MPI_Isend(message.data(), static_cast<int>(message.size()), MPI_INT, other, MESSAGE, MPI_COMM_WORLD,
              &messages.back().request);
  }
  wait_for(messages, hurries);
}

std::vector<int> Ranks::receive() {
  require_all();
  const auto start = Clock::now();
  MPI_Status status;
  for (int there = 0; !there;) {
    if (MPI_Iprobe(0, MESSAGE, MPI_COMM_WORLD, &there, &status) != MPI_SUCCESS)
      fail("%s", (lost = "rank 0 is lost: its messages break off").c_str());
    if (there) break;
    sched_yield();
    if (seconds_since(start) > IDLE) usleep(200);
  }
  int size = 0;
  MPI_Get_count(&status, MPI_INT, &size);
  std::vector<int> message(static_cast<size_t>(size));
  MPI_Recv(message.data(), size, MPI_INT, 0, MESSAGE, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  return message;
}
