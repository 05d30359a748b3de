#include "host/chat.h"

#include "host/error.h"
#include "host/jinja.h"

ChatTemplate::ChatTemplate(const std::string& name, std::string source, Variables variables, std::string refusal)
    : refusal_(std::move(refusal)), variables_(std::move(variables)) {
  if (!refusal_.empty()) return;
  try {
    template_ = std::make_shared<const jinja::Template>(name, source);
  } catch (const Error& error) {
    refusal_ = error.what();
  }
}

ChatText ChatTemplate::render(const std::vector<Message>& messages, const Json& arguments) const {
  using jinja::Value;
  if (!refusal_.empty()) fail("%s", refusal_.c_str());
  if (messages.empty()) fail("a conversation has at least one message");
  jinja::List conversation;
  for (const Message& message : messages) {
    constexpr const char* ROLES[] = {"system", "user", "assistant"};
    jinja::Dict dict;
    // The role is a word of ours: templates make control tokens of it ("<|user|>").
    dict.items.emplace_back(jinja::to_text("role"), jinja::to_text(ROLES[static_cast<size_t>(message.role)]));
    dict.items.emplace_back(jinja::to_text("content"), jinja::to_text(message.content, true));
    conversation.items.emplace_back(std::move(dict));
  }
  std::vector<std::pair<std::string, Value>> variables = {{"messages", std::move(conversation)},
                                                          {"tools", jinja::None{}},
                                                          {"documents", jinja::None{}},
                                                          {"add_generation_prompt", true}};
  const auto set = [&](const std::string& name, const Value& value) {
    for (auto& [known, old] : variables)
      if (known == name) return void(old = value);
    variables.emplace_back(name, value);
  };
  for (const auto& [name, text] : variables_) set(name, jinja::to_text(text));
  if (arguments.object())
    for (const auto& [name, value] : *arguments.object()) {
      if (name == "messages") fail("the template's argument \"messages\" is the conversation itself: leave it out");
      set(name, Value::of(value, true));
    }

  const jinja::Text text = template_->render(std::move(variables));
  ChatText out;
  for (size_t begin = 0, end = 0; begin < text.size(); begin = end) {
    const bool given = jinja::marked(text[begin]);
    while (end < text.size() && jinja::marked(text[end]) == given) ++end;
    const size_t start = out.text.size();
    out.text += jinja::to_utf8(jinja::TextView(text).substr(begin, end - begin));
    if (!given) out.own.push_back({start, out.text.size()});
  }
  return out;
}
