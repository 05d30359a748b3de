// chat.h: a conversation as the text that the model's chat template makes of it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "host/json.h"

namespace jinja {
class Template;
}

struct Message {
  enum class Role { system, user, assistant };
  using enum Role;
  Role role;
  std::string content;
};

struct ChatText {
  struct Range {
    size_t begin, end;  // bytes
  };
  std::string text;
  std::vector<Range> own;  // the template's own parts, in order: all that did not come with the messages
};

class ChatTemplate {
 public:
  // bos_token, eos_token, ...: those that the tokenizer has.
  using Variables = std::vector<std::pair<std::string, std::string>>;

  ChatTemplate() = default;
  // name: what error lines call it. source: in Jinja, as jinja.h has it; empty: there is none, and `refusal` says why.
  // A template that cannot be parsed is refused when it is used.
  ChatTemplate(const std::string& name, std::string source, Variables variables, std::string refusal = "");

  const std::string& refusal() const { return refusal_; }  // empty where the template can be used
  const Variables& variables() const { return variables_; }

  // The conversation up to where the model is to speak, as transformers'
  // apply_chat_template(add_generation_prompt=True). arguments: further variables, a JSON object ({"enable_thinking":
  // false}). Throws Error, one line.
  ChatText render(const std::vector<Message>& messages, const Json& arguments) const;

 private:
  std::string refusal_ = "the model has no chat template";
  Variables variables_;
  std::shared_ptr<const jinja::Template> template_;
};
