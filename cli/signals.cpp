// signals.cpp: what comes from outside. Handlers call nothing but what POSIX allows in them: what they need lies ready
// in plain arrays.
#include "cli/signals.h"

#include <fcntl.h>
#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "host/error.h"

namespace {

constexpr int MAX_FILES = 4, MAX_PATH = 4096;

volatile sig_atomic_t interrupt_came = 0, interrupt_caught = 0, kill_came = 0;
char unfinished[MAX_FILES][MAX_PATH];  // paths; empty: free
char lost_pages[MAX_PATH + 256];       // the line to print
termios terminal;
int screen = -1;        // where the line below is written
char leave_screen[64];  // what brings the terminal's screen back
volatile sig_atomic_t terminal_changed = 0, redraw_came = 0;

void clean_up() {
  for (const char* path : unfinished)
    if (*path) unlink(path);
  if (!terminal_changed) return;
  tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
  [[maybe_unused]] const ssize_t written = write(screen, leave_screen, std::strlen(leave_screen));
}

// The handler is gone already (SA_RESETHAND): the signal ends the process as it would have without one.
void die(int number) {
  clean_up();
  raise(number);
}

void interrupt(int number) {
  if (!interrupt_caught || interrupt_came) {
    signal(number, SIG_DFL);
    return die(number);
  }
  interrupt_came = 1;
  kill_came = number == SIGTERM;
}

// Several threads may come to the lost pages at once: the first one speaks and ends them all.
void page_lost(int) {
  static std::atomic_flag told;
  while (told.test_and_set()) pause();
  clean_up();
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, lost_pages, std::strlen(lost_pages));
  _exit(1);
}

// What is ignored (SIGHUP under nohup) stays so.
void handle(int number, void (*handler)(int), int flags) {
  struct sigaction old = {}, action = {};
  if (sigaction(number, nullptr, &old) == 0 && old.sa_handler == SIG_IGN && number != SIGINT) return;
  action.sa_handler = handler;
  action.sa_flags = flags;
  sigaction(number, &action, nullptr);
}

}  // namespace

void prepare_process() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
    if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd) fail("cannot open /dev/null");
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  handle(SIGINT, interrupt, static_cast<int>(SA_RESTART));  // no write is cut short; who waits for input polls
  for (const int number : {SIGCONT, SIGWINCH})
    handle(
        number, [](int) { redraw_came = 1; }, static_cast<int>(SA_RESTART));
  for (const int number : {SIGTERM, SIGHUP, SIGQUIT}) handle(number, die, static_cast<int>(SA_RESETHAND));
}

void prepare_rank(int rank) {
  for (const int number : {SIGINT, SIGTERM})
    if (rank > 0)
      signal(number, SIG_IGN);
    else
      handle(number, interrupt, static_cast<int>(SA_RESTART));
}

bool killed() {
  return kill_came != 0;
}

void catch_interrupt() {
  interrupt_came = 0;
  interrupt_caught = 1;
}

bool interrupted() {
  return interrupt_came != 0;
}

bool must_redraw() {
  const bool came = redraw_came != 0;
  redraw_came = 0;
  return came;
}

void remove_on_death(const std::string& path) {
  if (path.size() >= MAX_PATH) fail("cannot write %s: its path is too long", path.c_str());
  for (char* place : unfinished)
    if (!*place) {
      std::memcpy(place + 1, path.c_str() + 1, path.size());
      *place = path[0];  // last: a signal in between sees a free place
      return;
    }
  fail("cannot write %s: too many files are open", path.c_str());
}

void keep_on_death(const std::string& path) {
  for (char* place : unfinished)
    if (path == place) *place = '\0';
}

void restore_on_death(const termios& mode, int screen_fd, const std::string& leave) {
  terminal = mode;
  screen = screen_fd;
  std::snprintf(leave_screen, sizeof leave_screen, "%s", leave.c_str());
  terminal_changed = 1;
}

void keep_terminal_on_death() {
  terminal_changed = 0;
}

void blame_for_lost_pages(const std::string& path) {
  if (path.empty()) {
    signal(SIGBUS, SIG_DFL);
    return;
  }
  std::snprintf(lost_pages, sizeof lost_pages,
                "run: %s: a part of it went away while it was read (cut short, or its disk fails): bring the whole "
                "file back and start again\n",
                path.c_str());
  handle(SIGBUS, page_lost, 0);
}
