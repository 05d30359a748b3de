// signals.h: what comes from outside while a run works: Ctrl-C, a kill, a closed descriptor, a model file cut short.
//
// Whatever ends the process, no half-written file stays and the terminal is as it was.
#pragma once

#include <string>

struct termios;

// Called first. Descriptors 0 to 2 that are closed become /dev/null, or the first file opened would be the standard
// output. A closed pipe and a file too large become errors of write. From here on a signal that ends the process
// removes what it must.
void prepare_process();

// Called after it by a rank of several. The first one takes a kill for a Ctrl-C: a launcher makes one of it, and sends
// it too where another rank died. The others heed neither: they end when the first one says so.
void prepare_rank(int rank);
// Whether such a kill came: the launcher will not wait long.
bool killed();

// From here on the first Ctrl-C makes interrupted() true, and what runs ends cleanly; the second one kills. Called
// again, it forgets the Ctrl-C that came.
void catch_interrupt();
bool interrupted();
// Whether the process was stopped (Ctrl-Z) and goes on, or the window has another size: true once.
bool must_redraw();

// What a signal that ends the process does before.
void remove_on_death(const std::string& path);  // at most 4 files; throws Error
void keep_on_death(const std::string& path);    // no more
// The mode of the terminal on standard input, and what is written to the screen.
void restore_on_death(const termios& mode, int screen_fd, const std::string& leave);
void keep_terminal_on_death();
// The file that is read as memory: where a part of it is not there any more, one line names it and the run ends.
// Empty: there is none any more.
void blame_for_lost_pages(const std::string& path);
