#include "host/thread_count.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>

namespace {

constexpr double WINDOW = 0.03, PREEMPTIONS_A_SECOND = 60;  // more of them: the cores are crowded
constexpr double ROOM = 0.6;                                // idle cores that are worth a trial of more threads
constexpr double UNASKED_PAUSE = 1;                         // seconds between trials of more without idle cores
constexpr double WORSE = 1.18, BETTER = 0.95;               // of the settled cost: ends a trial early; wins it
constexpr int MOST_PATIENCE = 1024;
constexpr double PAUSE = 0.05, MOST_PAUSE = 1;

}  // namespace

int ThreadCount::next(int n_tokens, const MachineLoad& load) {
  if (load.now - window_start_ >= WINDOW) {
    const double preempted = static_cast<double>(load.preemptions - window_preemptions_);
    crowded_ = window_start_ > 0 && preempted / (load.now - window_start_) > PREEMPTIONS_A_SECOND;
    window_start_ = load.now;
    window_preemptions_ = load.preemptions;
  }
  Pace& p = paces_[static_cast<size_t>(std::bit_width(static_cast<unsigned>(n_tokens)) - 1)];
  current_ = &p;
  tokens_ = n_tokens;
  now_ = load.now;
  if (p.threads == 0) p.threads = most_;
  if (p.trial == 0 && p.cost > 0) p.trial = candidate(p, load);
  return p.trial > 0 ? p.trial : p.threads;
}

// Another number that is worth a trial now; 0: none is.
int ThreadCount::candidate(Pace& p, const MachineLoad& load) const {
  const bool room = load.idle_cores > ROOM;
  if ((crowded_ && !p.crowded) || (room && !p.room)) p.pause = PAUSE;  // the machine has just become another
  p.crowded = crowded_;
  p.room = room;
  const double since = load.now - p.tried_at;
  const bool fewer = p.threads > 1 && ((crowded_ && since > p.pause) || p.steps >= p.patience);
  const bool more = p.threads < most_ && since > (room ? p.pause : UNASKED_PAUSE);
  if (!fewer && !more) return 0;
  const bool near = p.trials++ % 2 == 0;
  if (more) return std::min(most_, near ? p.threads + 1 : 2 * p.threads);
  return std::max(1, near ? p.threads - 1 : p.threads / 2);
}

void ThreadCount::note(double seconds) {
  Pace& p = *current_;
  now_ += seconds;
  if (p.trial > 0) {
    p.trial_steps++;
    p.trial_seconds += seconds;
    p.trial_tokens += tokens_;
    return judge(p);
  }
  const double cost = seconds / tokens_;
  p.cost = p.cost == 0 ? cost : p.cost + (cost - p.cost) / 8;
  p.steps++;
}

// A trial ends early where it is clearly slower, else once chance has had its say: a step that lost its core for a
// moment is slow, and the mean of some milliseconds tells how often.
void ThreadCount::judge(Pace& p) {
  const double cost = p.trial_seconds / p.trial_tokens;
  const bool lost = cost > WORSE * p.cost && (p.trial_steps >= 2 || p.trial_seconds > 0.05);
  const bool done = (p.trial_steps >= 3 && p.trial_seconds > 0.02) || p.trial_seconds > 0.1;
  if (!lost && !done) return;
  if (cost < BETTER * p.cost) {
    p.threads = p.trial;
    p.cost = cost;
    p.patience = 64;
    p.pause = PAUSE;
  } else {
    p.patience = std::min(MOST_PATIENCE, 2 * p.patience);
    p.pause = std::min(MOST_PAUSE, 2 * p.pause);
  }
  p.steps = p.trial = p.trial_steps = 0;
  p.trial_seconds = p.trial_tokens = 0;
  p.tried_at = now_;
}

// The first line of /proc/stat: "cpu user nice system idle ...", in ticks, of all cores. Read at most ten times a
// second.
static double idle_cores(double now) {
  static double read_at = 0, idle_cores = 0;
  static long long idle_before = 0;
  if (now - read_at < 0.1) return idle_cores;
  std::FILE* file = std::fopen("/proc/stat", "r");
  if (!file) return 0;
  long long user = 0, nice = 0, system = 0, idle = 0;
  const bool right = std::fscanf(file, "cpu %lld %lld %lld %lld", &user, &nice, &system, &idle) == 4;
  std::fclose(file);
  if (!right) return 0;
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  if (read_at > 0) idle_cores = static_cast<double>(idle - idle_before) / ticks / (now - read_at);
  read_at = now;
  idle_before = idle;
  return idle_cores;
}

MachineLoad machine_load() {
  MachineLoad load;
  load.now = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  load.preemptions = usage.ru_nivcsw;
  load.idle_cores = idle_cores(load.now);
  return load;
}
