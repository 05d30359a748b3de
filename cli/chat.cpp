// chat.cpp: a conversation. The whole of it is the prompt of each turn; the engine finds what is in the cache already.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <optional>

#include "cli/session.h"

namespace {

// A line, as it is typed or as it comes. False: there is none any more.
bool next_line(Session& s, const char* prompt, std::string& line) {
  if (s.editor) return s.editor->read(prompt, line);
  for (;;) {
    const auto got = s.lines.next(line, true);
    if (got == LineReader::Got::end) return false;
    if (got == LineReader::Got::line) return true;
    note("line " + std::to_string(s.lines.number()) + " is left out: it has more than " +
         std::to_string(s.lines.max_bytes()) + " bytes (--max-line)");
    s.failed = true;
  }
}

// A turn is a line, and the one after it where it ends with a backslash.
bool next_turn(Session& s, std::string& turn) {
  turn.clear();
  for (std::string line; next_line(s, turn.empty() ? "> " : "... ", line);) {
    turn += line;
    if (!turn.ends_with('\\')) return true;
    turn.back() = '\n';
  }
  return !turn.empty() && !interrupted();
}

// The prompt of the conversation. Where it leaves too little room for an answer, the oldest turns go, each with its
// answer, until half of the context is free: so this happens once in many turns, and all between find their beginning
// in the cache.
std::vector<int> render(Session& s, std::vector<Message>& messages) {
  const int context = s.engine->max_request_tokens(), wanted = context / 4;
  const int needed = s.options.n > 0 ? std::min(s.options.n, wanted) : wanted;
  std::vector<int> prompt = s.tokenizer.encode_chat(messages, s.options.chat_arguments);
  if (s.room(prompt.size()) >= std::max(1, needed)) return prompt;
  const auto begin = messages.begin() + (messages[0].role == Message::system ? 1 : 0);
  while (messages.end() - begin > 2 && s.room(prompt.size()) < context / 2) {
    messages.erase(begin, begin + 2);
    prompt = s.tokenizer.encode_chat(messages, s.options.chat_arguments);
  }
  return prompt;
}

// Prints the answer as it comes.
std::string answer(Session& s, int n) {
  std::string text;
  Finish finish{};
  TextStream stream(s.tokenizer, s.options.stop, [&](std::string_view piece) {
    text += piece;
    print(piece);
  });
  Request r = make_request(s, s.prompt, n, 0);
  r.on_token = [&](int, int id) {
    note_first_token(s);
    return stream.push(id);
  };
  r.on_finish = [&, check = r.on_finish](const Result& result) {
    finish = result.finish;
    check(result);
  };
  s.engine->submit(std::move(r));
  work(s);
  stream.finish();
  print("\n");
  if (finish == Finish::length && n != s.options.n) note("the answer ends here: the context is full");
  return text;
}

}  // namespace

void chat(Session& s) {
  std::vector<Message> messages;
  if (s.options.system) messages.push_back({Message::system, *s.options.system});
  bool forgot = false;
  for (std::string turn; next_turn(s, turn);) {
    if (turn.empty()) continue;
    if (const std::string valid = valid_utf8(turn); valid != turn) {
      note("line " + std::to_string(s.lines.number()) + " has bytes that are not UTF-8: each became U+FFFD");
      turn = valid;
    }
    if (const std::string token = looks_special(s.tokenizer, turn); !token.empty())
      note("this turn has " + token + " as plain text");
    std::vector<Message> with_turn = messages;
    with_turn.push_back({Message::user, turn});
    s.prompt = render(s, with_turn);
    const int room = s.room(s.prompt.size());
    if (room < 1) {
      note("this turn is left out: with it the prompt has " + std::to_string(s.prompt.size()) +
           " tokens, and the context takes " + std::to_string(s.engine->max_request_tokens()));
      s.failed = true;
      continue;
    }
    if (with_turn.size() <= messages.size() && !std::exchange(forgot, true))
      note("the context of " + std::to_string(s.engine->max_request_tokens()) +
           " tokens is full: from now on the oldest turns are forgotten (-c N makes it larger)");
    messages = std::move(with_turn);
    messages.push_back({Message::assistant, answer(s, s.options.n > 0 ? std::min(s.options.n, room) : room)});
    if (!interrupted()) continue;
    if (!s.editor) break;
    catch_interrupt();  // at a terminal it ended the answer alone
  }
}
