// tokenizer.h: text <-> ids, from NAME.tokenizer.bin (written by exporter/tokenizer.py, which documents the format).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

// The chat template as pieces worked out and checked by export.py: a conversation is
//   prefix, then for each message before(role) + content + after(role), then `generation` where the model is to speak.
struct ChatTemplate {
  bool present = false;
  std::string refusal;  // why there is none: "this model's chat template ..."
  std::string prefix;
  struct Role {
    bool present = false;
    bool trim = false;  // white space around the content is removed
    std::string before, after;
  };
  Role system, user, assistant;
  std::string default_system;  // used when the conversation has no system message ("" : none)
  // Where the template has no system role, the system text goes before the first user's content, joined by this.
  bool system_in_user = false;
  std::string system_separator;
  std::string generation;
};

class Tokenizer {
 public:
  // Throws Error for a missing, truncated or corrupt file. `sha256` (may be empty) must equal the file's.
  static Tokenizer load(const std::string& path, const std::string& sha256);

  int vocab_size() const;
  // Ids of the text. Special tokens' texts become their ids only where parse_special; elsewhere they are plain text.
  // Invalid UTF-8 is taken as bytes where the kind has them. add_bos: as the model's own tokenizer does by default.
  std::vector<int> encode(std::string_view text, bool parse_special, bool add_special) const;
  // The bytes of a token; empty for control tokens. id must be in [0, vocab_size).
  std::string_view bytes(int id) const;
  std::string_view text(int id) const;  // as the vocabulary writes it, for --tokens
  bool is_end_of_generation(int id) const;
  int bos() const;  // -1: none
  const ChatTemplate& chat() const;

  struct Impl;

 private:
  std::shared_ptr<const Impl> impl_;
};

// Holds back bytes until they are whole UTF-8 sequences; bytes that can never become one leave as U+FFFD.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);  // what can be shown now
  std::string finish();                      // what is left, as U+FFFD

 private:
  std::string pending_;
};
