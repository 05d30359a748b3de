// editor.h: lines that are typed at a terminal, with editing and history (libedit).
#pragma once

#include <memory>
#include <string>

// What is typed before it is asked for waits, without an end and unseen: the terminal's own line editing would drop
// what comes after 4095 bytes. The destructor brings the terminal back as it was.
class Editor {
 public:
  Editor();
  Editor(const Editor&) = delete;
  Editor& operator=(const Editor&) = delete;
  ~Editor();
  // The next line, without its end; a paste of several lines is one. False: Ctrl-D on an empty line, or Ctrl-C.
  bool read(const char* prompt, std::string& line);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};
