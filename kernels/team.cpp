// team.cpp: threads that wait first spin, then sleep. A tenth of a millisecond of spinning is as fast alone as any
// longer, and where another program has the core that is waited for, sleeping gives it away.
#include "kernels/threads.h"

#include <system_error>

#include "host/error.h"

namespace {

constexpr int SPINS = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns once `word` is not `old`.
template <class T>
void wait_while(const std::atomic<T>& word, T old) {
  for (int i = 0; i < SPINS; i++, pause())
    if (word.load(std::memory_order_acquire) != old) return;
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

void Team::barrier() const {
  alone_ = 0;
  if (!shared_) return;
  Shared& s = *shared_;
  const uint32_t generation = s.generation.load(std::memory_order_acquire);
  if (s.broken.load(std::memory_order_acquire)) throw Broken{};
  if (s.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    s.arrived.store(0, std::memory_order_relaxed);
    s.next.store(0, std::memory_order_relaxed);
    s.generation.fetch_add(1);
    s.generation.notify_all();
  } else {
    wait_while(s.generation, generation);
  }
  if (s.broken.load(std::memory_order_acquire)) throw Broken{};
}

int Team::take(int chunk) const {
  if (shared_) return shared_->next.fetch_add(chunk, std::memory_order_relaxed);
  return std::exchange(alone_, alone_ + chunk);
}

Threads::Threads(int most) {
  for (int rank = 1; rank < most; rank++) workers_.push_back(std::make_unique<Worker>());
  try {
    for (int rank = 1; rank < most; rank++)
      workers_[static_cast<size_t>(rank - 1)]->thread = std::thread([this, rank] { work(rank); });
  } catch (const std::system_error& e) {
    end();
    fail("cannot start %d threads: %s: with -t there are fewer", most, e.what());
  }
}

Threads::~Threads() {
  end();
}

void Threads::end() {
  ending_ = true;
  for (const auto& worker : workers_) {
    worker->jobs.fetch_add(1, std::memory_order_release);
    worker->jobs.notify_one();
  }
  for (const auto& worker : workers_)
    if (worker->thread.joinable()) worker->thread.join();
}

void Threads::run_job(int size, Job job, const void* f) {
  if (size == 1) return job(f, Team{});
  job_ = job;
  f_ = f;
  size_ = size;
  running_.store(size - 1, std::memory_order_relaxed);
  for (int rank = 1; rank < size; rank++) {
    Worker& worker = *workers_[static_cast<size_t>(rank - 1)];
    worker.jobs.fetch_add(1, std::memory_order_release);
    worker.jobs.notify_one();
  }
  call(0);
  for (int left; (left = running_.load(std::memory_order_acquire)) > 0;) wait_while(running_, left);
  if (!failed_.exchange(false)) return;
  shared_.arrived = 0;
  shared_.next = 0;
  shared_.broken = false;
  std::rethrow_exception(std::exchange(error_, nullptr));
}

// The job as `rank`; an exception frees those who wait at a barrier.
void Threads::call(int rank) {
  Team team;
  team.rank = rank;
  team.size = size_;
  team.shared_ = &shared_;
  try {
    job_(f_, team);
  } catch (const Team::Broken&) {
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
    shared_.broken = true;
    shared_.generation.fetch_add(1);
    shared_.generation.notify_all();
  }
}

void Threads::work(int rank) {
  Worker& me = *workers_[static_cast<size_t>(rank - 1)];
  for (uint32_t done = 0;; done++) {
    wait_while(me.jobs, done);
    if (ending_) return;
    call(rank);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}
