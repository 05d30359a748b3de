// jinja_syntax.h: a template as a tree, between jinja_parse.cpp, which makes it, and jinja_eval.cpp, which walks it.
#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "host/jinja_value.h"

namespace jinja {

enum class Kind {
  // Expressions: what `children` are; name.
  constant,     // value
  name,         // name
  list,         // elements
  tuple,        // elements
  dict,         // key, value, key, value, ...
  attribute,    // object; name
  item,         // object, key
  slice,        // object, start, stop, step; each but the object may be null
  call,         // callee, arguments
  filter,       // input (null in a filter block), arguments; name
  test,         // input, arguments; name
  keyword,      // among arguments: value; name
  spread,       // among arguments: *list
  spread_dict,  // among arguments: **dict
  negation,     // operand: not
  sign,         // operand; op add or sub
  arithmetic,   // left, right; op
  concat,       // operands of ~
  comparison,   // operand, then one `compared` for each operator of the chain
  compared,     // operand; op
  conjunction,  // left, right: and
  disjunction,  // left, right: or
  conditional,  // condition, value, otherwise (may be null)
  member,       // a namespace's variable as the target of a set: namespace; name
  // Statements.
  output,         // expression
  branches,       // one `branch` for each if, elif and else
  branch,         // condition (null: else); body
  loop,           // target, iterable, condition (may be null); body, otherwise
  set,            // target, value
  set_block,      // target, filter (may be null, its input is null); body
  with,           // target, value, target, value, ...; body
  macro,          // one `keyword` for each parameter, whose child is its default or null; name, body
  call_block,     // call, then parameters; body
  filter_block,   // filter; body
  generation,     // body
  break_loop,     //
  continue_loop,  //
};

enum class Op { none, add, sub, mul, div, floordiv, mod, pow, eq, ne, lt, le, gt, ge, in, not_in };

struct Node {
  Kind kind;
  size_t position;  // in the source, in characters
  std::vector<const Node*> children;
  std::string name;
  Op op = Op::none;
  Value value;
  std::vector<const Node*> body, otherwise;
};

struct Syntax {
  std::deque<Node> nodes;  // owns them all: trees of strangers are too deep for destructors that call each other
  std::vector<const Node*> body;
};

// A syntax error, and where.
struct SyntaxProblem : Problem {
  SyntaxProblem(size_t at, const std::string& what) : Problem(what), position(at) {}
  size_t position;
};

// Throws SyntaxProblem.
Syntax parse(TextView source);
// Line breaks as Python reads them, and without the last one: positions are those of this text.
Text normalized(TextView source);

}  // namespace jinja
