// editor.cpp: lines that are typed at a terminal.
#include "cli/editor.h"

#include <histedit.h>
#include <poll.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cwchar>
#include <utility>

#include "cli/output.h"
#include "cli/signals.h"
#include "host/error.h"

namespace {

constexpr int HISTORY_LINES = 1000;
constexpr wchar_t REPLACEMENT = 0xFFFD;
// A terminal that is asked to says where a paste begins and ends.
constexpr char MARK_PASTES[] = "\033[?2004h", MARK_NONE[] = "\033[?2004l", PASTE_BEGINS[] = "\\e[200~";
constexpr std::wstring_view PASTE_ENDS = L"\033[201~";

}  // namespace

struct Editor::Impl {
  EditLine* edit = nullptr;
  History* history = nullptr;
  FILE* screen = nullptr;
  termios before = {}, between = {};  // the terminal's modes: as it was, and between the lines
  bool marks_pastes = false;
  const char* prompt = "";
  std::string typed;      // bytes that came
  size_t begin = 0;       // ... of them, read
  bool replaced = false;  // some were no UTF-8

  int next(wchar_t* c);
  bool wait_for_bytes();
  void paste();
  void start_libedit();
  void take_terminal_again();

  static Impl& of(EditLine* edit) {
    void* self = nullptr;
    el_get(edit, EL_CLIENTDATA, &self);
    return *static_cast<Impl*>(self);
  }
};

// The next character: 1. The end, or Ctrl-C: 0.
int Editor::Impl::next(wchar_t* c) {
  constexpr auto WRONG = static_cast<size_t>(-1), INCOMPLETE = static_cast<size_t>(-2);
  for (;;) {
    mbstate_t state = {};
    const size_t n = begin < typed.size() ? std::mbrtowc(c, &typed[begin], typed.size() - begin, &state) : INCOMPLETE;
    if (n == INCOMPLETE) {
      if (!wait_for_bytes()) return 0;
      continue;
    }
    if (n == WRONG) *c = REPLACEMENT, replaced = true;
    begin += n == WRONG || n == 0 ? 1 : n;
    return 1;
  }
}

bool Editor::Impl::wait_for_bytes() {
  typed.erase(0, std::exchange(begin, 0));
  for (;;) {
    if (interrupted()) return false;
    if (must_redraw()) take_terminal_again();
    pollfd ready = {STDIN_FILENO, POLLIN, 0};
    if (poll(&ready, 1, 50) <= 0) continue;  // a Ctrl-C just before it would not end a poll without an end
    char piece[65536];
    const ssize_t n = ::read(STDIN_FILENO, piece, sizeof piece);
    if (n < 0 && errno == EINTR) continue;
    if (n > 0) typed.append(piece, static_cast<size_t>(n));
    return n > 0;
  }
}

// A shell that went on meanwhile has set its own mode; the window may have another size.
void Editor::Impl::take_terminal_again() {
  el_resize(edit);
  el_set(edit, EL_PREP_TERM, 0);
  el_set(edit, EL_PREP_TERM, 1);
  if (marks_pastes) std::fputs(MARK_PASTES, screen);
  el_set(edit, EL_REFRESH);
}

// All up to the end of the paste becomes part of the line, newlines included.
void Editor::Impl::paste() {
  std::wstring text;
  for (wchar_t c; next(&c) == 1;) {
    text += c == L'\r' ? L'\n' : c;
    if (!text.ends_with(PASTE_ENDS)) continue;
    text.resize(text.size() - PASTE_ENDS.size());
    break;
  }
  if (text.ends_with(L'\n')) text.pop_back();
  el_winsertstr(edit, text.c_str());
}

void Editor::Impl::start_libedit() {
  edit = el_init("run", stdin, screen, screen);
  history = history_init();
  if (!edit || !history) fail("cannot edit lines on this terminal: give the input in a file or a pipe");
  HistEvent event;
  ::history(history, &event, H_SETSIZE, HISTORY_LINES);
  el_set(edit, EL_CLIENTDATA, this);
  el_set(edit, EL_HIST, ::history, history);
  el_set(edit, EL_EDITOR, "emacs");
  el_set(edit, EL_SIGNAL, 0);
  el_set(
      edit, EL_PROMPT, +[](EditLine* e) { return const_cast<char*>(of(e).prompt); });
  el_set(
      edit, EL_GETCFN, +[](EditLine* e, wchar_t* c) { return of(e).next(c); });
  el_wset(  // el_set would leak its copies of the names
      edit, EL_ADDFN, L"paste", L"a paste", +[](EditLine* e, int) -> unsigned char {
        of(e).paste();
        return CC_REFRESH;
      });
  el_set(edit, EL_BIND, PASTE_BEGINS, "paste", nullptr);
  el_set(edit, EL_BIND, "^I", "ed-insert", nullptr);
}

Editor::Editor() : impl_(new Impl) {
  setlocale(LC_CTYPE, "C.UTF-8");  // what libedit takes bytes for
  if (tcgetattr(STDIN_FILENO, &impl_->before) != 0) fail("cannot read the terminal: %s", std::strerror(errno));
  termios& between = impl_->between = impl_->before;
  between.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
  between.c_cc[VMIN] = 1;
  between.c_cc[VTIME] = 0;
  impl_->screen = std::fopen("/dev/tty", "we");  // wherever standard output and error go
  if (!impl_->screen) impl_->screen = stderr;
  const char* term = std::getenv("TERM");
  impl_->marks_pastes = term && *term && std::string(term) != "dumb";
  restore_on_death(impl_->before, fileno(impl_->screen), impl_->marks_pastes ? MARK_NONE : "");
  impl_->start_libedit();
  tcsetattr(STDIN_FILENO, TCSANOW, &between);  // libedit knows line editing of its own, and of the terminal
}

Editor::~Editor() {
  if (impl_->edit) el_end(impl_->edit);
  if (impl_->history) history_end(impl_->history);
  if (impl_->screen != stderr) std::fclose(impl_->screen);
  tcsetattr(STDIN_FILENO, TCSANOW, &impl_->before);
  keep_terminal_on_death();
}

bool Editor::read(const char* prompt, std::string& line) {
  impl_->prompt = prompt;
  impl_->replaced = false;
  el_resize(impl_->edit);  // the window may have another size by now
  if (impl_->marks_pastes) std::fputs(MARK_PASTES, impl_->screen);
  int n = 0;
  const char* typed = el_gets(impl_->edit, &n);
  tcsetattr(STDIN_FILENO, TCSANOW, &impl_->between);
  if (impl_->marks_pastes) std::fputs(MARK_NONE, impl_->screen);
  if (!typed || n <= 0) std::fputs("\n", impl_->screen);
  std::fflush(impl_->screen);
  if (!typed || n <= 0) return false;
  line = typed;
  if (line.ends_with('\n')) line.pop_back();
  HistEvent event;
  if (!line.empty()) history(impl_->history, &event, H_ENTER, line.c_str());
  if (impl_->replaced) note("what was typed has bytes that are not UTF-8: each became U+FFFD");
  return true;
}
