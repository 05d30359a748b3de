// jinja.h: renders chat templates. They are written in Jinja 3.1 as transformers sets it up
// (transformers/utils/chat_template_utils.py): trim_blocks, lstrip_blocks, loop controls, a sandbox in which no value
// can be changed, tojson that leaves every character as it is, raise_exception, strftime_now, {% generation %}.
//
// Not known, and refused by name: blocks, imports, includes, recursive loops, varargs and kwargs of macros, and the
// filters that write HTML.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "host/jinja_value.h"

namespace jinja {

struct Syntax;

class Template {
 public:
  // name: what error lines call it. Throws Error, one line: "NAME, line 3, column 14: what is wrong".
  Template(std::string name, std::string_view source);

  // Throws Error likewise, also where the template raises an exception and where it takes too many steps. A character
  // of the text is marked where it comes from a marked one of `variables`.
  Text render(std::vector<std::pair<std::string, Value>> variables) const;

 private:
  [[noreturn]] void fail_at(size_t position, const std::string& what) const;

  std::string name_;
  Text source_;
  std::shared_ptr<const Syntax> syntax_;
};

}  // namespace jinja
