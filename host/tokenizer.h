// tokenizer.h: text <-> ids, from NAME.tokenizer.bin (written by exporter/tokenizer.py, which documents the format).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

// The chat template as pieces, worked out and checked by exporter/tokenizer.py. A conversation is
//   start, or system_start + system + system_to_user
//   user  (user_to_assistant + assistant  assistant_to_user + user)*  generation
// which says the same for a system role of its own, for one inside the first user's turn, and for a default system
// text.
struct ChatTemplate {
  bool present = false;
  std::string refusal;         // why there is none: "the model has no chat template"; --chat prints it
  std::string system_refusal;  // why it takes no system message; empty where it does
  std::string start, system_start, system_to_user, user_to_assistant, assistant_to_user, generation;
  bool trim_system = false, trim_user = false, trim_assistant = false;  // white space around the content is removed
};

struct Message {
  enum class Role { system, user, assistant };
  using enum Role;
  Role role;
  std::string content;
};

class Tokenizer {
 public:
  // Throws Error for a missing, truncated or corrupt file. `sha256` (hexadecimal; "" : unchecked) must be the file's.
  static Tokenizer load(const std::string& path, const std::string& sha256);

  int vocab_size() const;
  // Ids of the text. Control tokens' texts become their ids only where parse_special; elsewhere they are plain text.
  // Invalid UTF-8 is taken byte by byte. add_special: BOS and EOS where the model's own tokenizer adds them by default.
  std::vector<int> encode(std::string_view text, bool parse_special, bool add_special) const;
  // The first control token whose text is in this one, -1: none. encode makes plain text of it unless parse_special.
  int find_control(std::string_view text) const;
  // Ids of a conversation up to where the model is to speak: [system] user (assistant user)*. Only the template's own
  // text can become control tokens (BOS is in it). Throws Error where the template or the order of the roles does not
  // allow it.
  std::vector<int> encode_chat(const std::vector<Message>& messages) const;

  // The bytes of a token; empty for control tokens. id must be in [0, vocab_size); the view lives as long as the
  // tokenizer.
  std::string_view bytes(int id) const;
  // As the vocabulary writes it, for --tokens: "Ġthe", "▁the", "<0x0A>", "<|im_end|>".
  std::string text(int id) const;
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
