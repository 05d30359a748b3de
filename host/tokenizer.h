// tokenizer.h: text <-> ids, from NAME.tokenizer.bin (written by exporter/tokenizer.py, which documents the format).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "host/chat.h"

// Where a model's tokenizer is: NAME.tokenizer.bin beside NAME.safetensors, or beside the file that this is a link to;
// where there is neither, tokenizer.bin one folder up, which the models of a folder share. Of none of them: the first.
std::string tokenizer_path(const std::string& model);

class Tokenizer {
 public:
  // Throws Error for a missing, truncated or corrupt file. `sha256` (hexadecimal; "" : unchecked) must be the file's.
  static Tokenizer load(const std::string& path, const std::string& sha256);

  int vocab_size() const;
  // Ids of the text. Control tokens' texts become their ids only where parse_special; elsewhere they are plain text.
  // Invalid UTF-8 is taken byte by byte. add_special: BOS and EOS where the model's own tokenizer adds them by default.
  std::vector<int> encode(std::string_view text, bool parse_special, bool add_special) const;
  // Ids of a conversation up to where the model is to speak, as ChatTemplate::render writes it. Only the template's own
  // text can become control tokens (BOS is in it). arguments: further variables of the template.
  std::vector<int> encode_chat(const std::vector<Message>& messages, const Json& arguments = {}) const;

  // The bytes of a token; empty for control tokens. id must be in [0, vocab_size); the view lives as long as the
  // tokenizer.
  std::string_view bytes(int id) const;
  // As the vocabulary writes it, for --tokens: "Ġthe", "▁the", "<0x0A>", "<|im_end|>".
  std::string text(int id) const;
  bool is_end_of_generation(int id) const;
  int bos() const;  // -1: none
  const ChatTemplate& chat() const;
  // The same tokenizer with another template, and the token that it ends an answer with. Throws Error where it cannot
  // be parsed.
  Tokenizer with_template(const std::string& name, const std::string& source) const;

  struct Impl;

 private:
  std::shared_ptr<const Impl> impl_;
  std::shared_ptr<const ChatTemplate> chat_;  // in place of the file's own; null: that one
  uint32_t end_of_turn_ = UINT32_MAX;         // by chat_; UINT32_MAX: none
};

// Holds back bytes until they are whole UTF-8 sequences; bytes that can never become one leave as U+FFFD.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);  // what can be shown now
  std::string finish();                      // what is left, as U+FFFD

 private:
  std::string pending_;
};
