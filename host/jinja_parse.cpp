// jinja_parse.cpp: a template's text -> tokens -> tree. The language is Jinja 3.1's, with the settings of transformers:
// trim_blocks, lstrip_blocks, the extension "loopcontrols" and the tag {% generation %}.
#include <algorithm>
#include <array>
#include <charconv>
#include <initializer_list>

#include "host/jinja_syntax.h"

namespace jinja {

Text normalized(TextView source) {
  Text out;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == U'\r' && i + 1 < source.size() && source[i + 1] == U'\n') continue;
    out += source[i] == U'\r' ? U'\n' : source[i];
  }
  if (out.ends_with(U'\n')) out.pop_back();
  return out;
}

namespace {

// ---- Tokens

struct Token {
  enum class Type { data, variable_begin, variable_end, block_begin, block_end, name, string, number, op, end };
  using enum Type;
  Type type;
  size_t position;
  Text text;    // of data and strings: what they stand for
  Value value;  // of a number
  bool is(Type t, TextView what) const { return type == t && text == what; }
};

class Lexer {
 public:
  explicit Lexer(TextView source) : source_(source) {}
  std::vector<Token> tokens();

 private:
  using Type = Token::Type;
  bool at(TextView what, size_t offset = 0) const { return source_.substr(at_ + offset).starts_with(what); }
  Char peek(size_t offset = 0) const { return at_ + offset < source_.size() ? source_[at_ + offset] : U'\0'; }
  void add(Type type, size_t position, Text text = {}, Value value = {}) {
    tokens_.push_back({type, position, std::move(text), std::move(value)});
  }
  void skip_space() {
    while (at_ < source_.size() && is_space(source_[at_])) ++at_;
  }
  void add_data(size_t begin, size_t end, Char sign, bool line_starts);
  bool skip_end(TextView end, bool may_keep, bool trims);
  bool skip_tag(TextView name, bool begin);
  void comment(size_t begin);
  void raw(size_t begin);
  void tag(bool is_block);
  void string();
  void number();
  void name();
  void op();

  TextView source_;
  size_t at_ = 0;
  bool line_starts_ = true;  // what was read last ended a line
  Text open_;                // brackets, the closing ones that must come
  std::vector<Token> tokens_;
};

std::vector<Token> Lexer::tokens() {
  while (at_ < source_.size()) {
    const size_t begin = at_;
    while (at_ < source_.size() && !(peek() == U'{' && (peek(1) == U'{' || peek(1) == U'%' || peek(1) == U'#'))) ++at_;
    const size_t end = at_;
    if (end == source_.size()) {
      add(Type::data, begin, Text(source_.substr(begin)));
      break;
    }
    const Char kind = peek(1);
    const Char sign = peek(2) == U'-' || peek(2) == U'+' ? peek(2) : U'\0';
    add_data(begin, end, kind == U'{' && !sign ? U'+' : sign, line_starts_);
    if (kind == U'%' && skip_tag(U"raw", true)) {
      raw(end);
      continue;
    }
    at_ = end + (sign ? 3 : 2);
    if (kind == U'#')
      comment(end);
    else
      tag(kind == U'%');
  }
  add(Type::end, source_.size());
  return std::move(tokens_);
}

// Text up to a tag with this sign: -: no white space remains at its end; +: all of it; else, where the tag begins its
// line, no indentation.
void Lexer::add_data(size_t begin, size_t end, Char sign, bool line_starts) {
  TextView data = source_.substr(begin, end - begin);
  if (sign == U'-') {
    data = stripped(data, false, true, is_space);
  } else if (sign != U'+') {
    const size_t line = data.rfind(U'\n') + 1;  // npos + 1 is 0
    if ((line > 0 || line_starts) && std::ranges::all_of(data.substr(line), is_space)) data = data.substr(0, line);
  }
  if (!data.empty()) add(Type::data, begin, Text(data));
}

// The end of a tag, with the white space that belongs to it; may_keep: +%} leaves all of it.
bool Lexer::skip_end(TextView end, bool may_keep, bool trims) {
  const size_t begin = at_;
  if (peek() == U'-' && at(end, 1)) {
    at_ += 1 + end.size();
    skip_space();
  } else if (may_keep && peek() == U'+' && at(end, 1)) {
    at_ += 1 + end.size();
  } else if (at(end)) {
    at_ += end.size();
    if (trims && peek() == U'\n') ++at_;
  } else {
    return false;
  }
  line_starts_ = at_ > begin && source_[at_ - 1] == U'\n';
  return true;
}

void Lexer::comment(size_t begin) {
  for (; !skip_end(U"#}", true, true); ++at_)
    if (at_ >= source_.size()) throw SyntaxProblem(begin, "this comment has no end");
}

// {% raw %} or {% endraw %}.
bool Lexer::skip_tag(TextView name, bool begin) {
  const size_t start = at_;
  at_ += 2;
  if (peek() == U'-' || peek() == U'+') ++at_;
  skip_space();
  if (at(name)) {
    at_ += name.size();
    skip_space();
    if (skip_end(U"%}", !begin, !begin)) return true;
  }
  at_ = start;
  return false;
}

void Lexer::raw(size_t begin) {
  const size_t from = at_;
  for (; at_ < source_.size(); ++at_) {
    const size_t end = at_;
    const bool starts = line_starts_;
    if (!at(U"{%") || !skip_tag(U"endraw", false)) continue;
    const Char sign = source_[end + 2];
    return add_data(from, end, sign == U'-' || sign == U'+' ? sign : U'\0', starts);
  }
  throw SyntaxProblem(begin, "this {% raw %} has no {% endraw %}");
}

void Lexer::tag(bool is_block) {
  add(is_block ? Type::block_begin : Type::variable_begin, at_);
  open_.clear();
  while (at_ < source_.size()) {
    const size_t begin = at_;
    if (open_.empty() && skip_end(is_block ? U"%}" : U"}}", is_block, is_block))
      return add(is_block ? Type::block_end : Type::variable_end, begin);
    const Char c = peek();
    if (is_space(c))
      ++at_;
    else if (c >= U'0' && c <= U'9')
      number();
    else if (c == U'"' || c == U'\'')
      string();
    else if (c == U'_' || (c | 0x20) - U'a' < 26 || c >= 0x80)
      name();
    else
      op();
  }
}

void Lexer::name() {
  const size_t begin = at_;
  const auto part = [](Char c) { return c == U'_' || (c | 0x20) - U'a' < 26 || c - U'0' < 10 || c >= 0x80; };
  while (at_ < source_.size() && part(peek()) && !is_space(peek())) ++at_;
  add(Type::name, begin, Text(source_.substr(begin, at_ - begin)));
}

void Lexer::number() {
  const size_t begin = at_;
  const bool after_dot = begin > 0 && source_[begin - 1] == U'.';
  std::string digits;
  const auto digit = [&](size_t offset) { return peek(offset) >= U'0' && peek(offset) <= U'9'; };
  const auto take = [&] { digits += static_cast<char>(source_[at_++]); };
  const auto take_digits = [&] {
    while (digit(0) || (peek() == U'_' && digit(1)))
      if (source_[at_] == U'_')
        ++at_;
      else
        take();
  };
  take_digits();
  bool real = false;
  if (!after_dot && peek() == U'.' && digit(1)) real = true, take(), take_digits();
  const size_t sign = peek(1) == U'+' || peek(1) == U'-';
  if (!after_dot && (peek() == U'e' || peek() == U'E') && digit(1 + sign)) {
    real = true;
    for (size_t i = 0; i <= sign; ++i) take();
    take_digits();
  }
  if (real) return add(Type::number, begin, {}, std::strtod(digits.c_str(), nullptr));
  int64_t value = 0;
  if (std::from_chars(digits.data(), digits.data() + digits.size(), value).ec != std::errc() ||
      (digits.size() > 1 && digits[0] == '0' && value != 0) || (digits == "0" && (peek() | 0x20) - U'a' < 26))
    throw SyntaxProblem(begin, "this number is not known here");
  add(Type::number, begin, {}, value);
}

void Lexer::op() {
  constexpr std::array<TextView, 32> OPERATORS = {U"//", U"**", U"==", U"!=", U">=", U"<=", U"+", U"-", U"/",
                                                  U"*",  U"%",  U"~",  U"[",  U"]",  U"(",  U")", U"{", U"}",
                                                  U">",  U"<",  U"=",  U".",  U":",  U"|",  U",", U";"};
  for (const TextView known : OPERATORS) {
    if (known.empty() || !at(known)) continue;
    const size_t pair = TextView(U"([{").find(known), closing = TextView(U")]}").find(known);
    if (pair != TextView::npos) open_ += U")]}"[pair];
    if (closing != TextView::npos) {
      if (!open_.ends_with(known[0])) throw SyntaxProblem(at_, "unexpected '" + to_utf8(known) + "'");
      open_.pop_back();
    }
    add(Type::op, at_, Text(known));
    at_ += known.size();
    return;
  }
  throw SyntaxProblem(at_, "unexpected character '" + to_utf8(source_.substr(at_, 1)) + "'");
}

// Python's escapes; a backslash before anything else is a backslash.
void Lexer::string() {
  const size_t begin = at_++;
  const Char quote = source_[begin];
  Text out;
  const auto coded = [&](size_t n, int base) {  // at most n digits
    Char code = 0;
    for (; n > 0; --n, ++at_) {
      const Char c = peek(), low = c | 0x20;
      const Char value = c - U'0' < 10 ? c - U'0' : low - U'a' < 6 ? low - U'a' + 10 : 99;
      if (value >= static_cast<Char>(base)) break;
      code = code * static_cast<Char>(base) + value;
    }
    if ((n > 0 && base == 16) || code > 0x10FFFF) throw SyntaxProblem(begin, "this text has a bad escape");
    out += code;
  };
  for (;;) {
    if (at_ >= source_.size()) throw SyntaxProblem(begin, "this text has no end");
    const Char c = source_[at_++];
    if (c == quote) break;
    if (c != U'\\' || at_ >= source_.size()) {
      out += c;
      continue;
    }
    const Char escaped = source_[at_++];
    const size_t named = TextView(U"ntrbfva\\'\"").find(escaped);
    if (named != TextView::npos)
      out += U"\n\t\r\b\f\v\a\\'\""[named];
    else if (escaped - U'0' < 8)
      --at_, coded(3, 8);
    else if (escaped == U'x' || escaped == U'u' || escaped == U'U')
      coded(escaped == U'x' ? 2 : escaped == U'u' ? 4 : 8, 16);
    else if (escaped == U'N')
      throw SyntaxProblem(begin, "\\N{...} in a text is not known here");
    else if (escaped != U'\n')
      out += {c, escaped};
  }
  add(Type::string, begin, std::move(out));
}

// ---- The tree

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Syntax parse() {
    syntax_.body = statements({});
    return std::move(syntax_);
  }

 private:
  using Type = Token::Type;
  using Nodes = std::vector<const Node*>;
  using Names = std::initializer_list<TextView>;

  // Nesting is bounded: the parser and the walk over its tree call themselves.
  struct Level {
    explicit Level(Parser& p) : parser(p) {
      if (++parser.level_ > 200) parser.wrong("this is nested too deeply");
    }
    ~Level() { --parser.level_; }
    Parser& parser;
  };

  const Token& now() const { return tokens_[at_]; }
  const Token& after() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  bool is_op(TextView what) const { return now().is(Type::op, what); }
  bool is_name(TextView what) const { return now().is(Type::name, what); }
  bool is_one(Names names) const {
    return std::ranges::any_of(names, [&](TextView n) { return is_name(n); });
  }
  bool skip_op(TextView what) { return is_op(what) && ++at_; }
  bool skip_name(TextView what) { return is_name(what) && ++at_; }
  [[noreturn]] void wrong(const std::string& what) const { throw SyntaxProblem(now().position, what); }
  void expect(Type type, TextView what = {}) {
    if (now().type != type || (!what.empty() && now().text != what))
      wrong("expected " +
            (what.empty() ? "something else than " + shown() : "'" + to_utf8(what) + "', not " + shown()));
    ++at_;
  }
  std::string expect_name() {
    const std::string text = to_utf8(now().text);
    expect(Type::name);
    return text;
  }
  std::string shown() const {
    if (now().type == Type::end) return "the template's end";
    if (now().type == Type::block_end || now().type == Type::variable_end) return "the tag's end";
    return now().type == Type::number ? "a number" : "'" + to_utf8(now().text) + "'";
  }
  Node* add(Kind kind, size_t position, Nodes children = {}, std::string name = {}, Op op = Op::none) {
    return &syntax_.nodes.emplace_back(Node{kind, position, std::move(children), std::move(name), op, {}, {}, {}});
  }
  Node* constant(size_t position, Value value) {
    Node* node = add(Kind::constant, position);
    node->value = std::move(value);
    return node;
  }

  Nodes statements(Names ends);
  const Node* statement();
  Nodes block(TextView end);
  const Node* if_statement(size_t position);
  const Node* for_statement(size_t position);
  const Node* set_statement(size_t position);
  const Node* with_statement(size_t position);
  const Node* macro_statement(size_t position);
  const Node* call_statement(size_t position);
  const Node* filter_statement(size_t position);
  void parameters(Node& node);
  const Node* target(bool tuple = true);
  const Node* single_target();

  const Node* tuple(bool with_conditional = true, Names ends = {}, bool in_parentheses = false);
  const Node* expression(bool with_conditional = true);
  const Node* disjunction();
  const Node* conjunction();
  const Node* negation();
  const Node* comparison();
  const Node* sum();
  const Node* concat();
  const Node* product();
  const Node* power();
  const Node* unary(bool with_filters = true);
  const Node* primary();
  const Node* postfix(const Node* node);
  const Node* filters(const Node* node);
  const Node* call(const Node* function);
  const Node* filter(const Node* input);
  const Node* test(const Node* input);
  const Node* subscript(const Node* object);
  void arguments(Node& node);

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int level_ = 0, loops_ = 0;
  Syntax syntax_;
};

// Up to a tag whose name is one of `ends`, which is left to the caller; without any: to the template's end.
Parser::Nodes Parser::statements(Names ends) {
  const Level level(*this);
  Nodes body;
  for (;;) {
    const Token& token = now();
    if (token.type == Type::end) {
      if (ends.size() > 0) wrong("expected {% " + to_utf8(*(ends.end() - 1)) + " %} before the template's end");
      return body;
    }
    ++at_;
    if (token.type == Type::data) {
      body.push_back(add(Kind::output, token.position, {constant(token.position, token.text)}));
    } else if (token.type == Type::variable_begin) {
      body.push_back(add(Kind::output, token.position, {tuple()}));
      expect(Type::variable_end);
    } else {
      if (is_one(ends)) return body;
      body.push_back(statement());
      expect(Type::block_end);
    }
  }
}

// Statements up to {% end %}, whose end is left to the caller; begins at the end of the tag before them.
Parser::Nodes Parser::block(TextView end) {
  expect(Type::block_end);
  Nodes body = statements({end});
  ++at_;
  return body;
}

const Node* Parser::statement() {
  const size_t position = now().position;
  const std::string name = expect_name();
  if (name == "if") return if_statement(position);
  if (name == "for") return for_statement(position);
  if (name == "set") return set_statement(position);
  if (name == "with") return with_statement(position);
  if (name == "macro") return macro_statement(position);
  if (name == "call") return call_statement(position);
  if (name == "filter") return filter_statement(position);
  if (name == "generation") {
    Node* node = add(Kind::generation, position);
    node->body = block(U"endgeneration");
    return node;
  }
  if (name == "break" || name == "continue") {
    if (loops_ == 0) throw SyntaxProblem(position, "'" + name + "' stands in no loop");
    return add(name == "break" ? Kind::break_loop : Kind::continue_loop, position);
  }
  throw SyntaxProblem(position, "the tag '" + name + "' is not known here");
}

const Node* Parser::if_statement(size_t position) {
  Node* node = add(Kind::branches, position);
  for (bool last = false;;) {
    Node* branch = add(Kind::branch, now().position, {last ? nullptr : tuple(false)});
    node->children.push_back(branch);
    expect(Type::block_end);
    branch->body = last ? statements({U"endif"}) : statements({U"elif", U"else", U"endif"});
    if (skip_name(U"endif")) return node;
    last = is_name(U"else");
    ++at_;
  }
}

const Node* Parser::for_statement(size_t position) {
  const Node* variables = target();
  expect(Type::name, U"in");
  const Node* iterable = tuple(false, {U"recursive"});
  const Node* condition = skip_name(U"if") ? expression() : nullptr;
  if (is_name(U"recursive")) wrong("recursive loops are not known here");
  Node* node = add(Kind::loop, position, {variables, iterable, condition});
  expect(Type::block_end);
  ++loops_;
  node->body = statements({U"else", U"endfor"});
  --loops_;
  if (skip_name(U"else"))
    node->otherwise = block(U"endfor");
  else
    ++at_;
  return node;
}

const Node* Parser::set_statement(size_t position) {
  const Node* variables = target();
  if (skip_op(U"=")) return add(Kind::set, position, {variables, tuple()});
  const Node* filtered = nullptr;
  while (skip_op(U"|")) filtered = filter(filtered);
  Node* node = add(Kind::set_block, position, {variables, filtered});
  node->body = block(U"endset");
  return node;
}

const Node* Parser::with_statement(size_t position) {
  Node* node = add(Kind::with, position);
  while (now().type != Type::block_end) {
    if (!node->children.empty()) expect(Type::op, U",");
    node->children.push_back(target());
    expect(Type::op, U"=");
    node->children.push_back(expression());
  }
  node->body = block(U"endwith");
  return node;
}

// A macro's body is a function: no loop around it can be left from within.
const Node* Parser::macro_statement(size_t position) {
  Node* node = add(Kind::macro, position, {}, expect_name());
  parameters(*node);
  const int loops = std::exchange(loops_, 0);
  node->body = block(U"endmacro");
  loops_ = loops;
  return node;
}

const Node* Parser::call_statement(size_t position) {
  Node* node = add(Kind::call_block, position, {nullptr});
  if (is_op(U"(")) parameters(*node);
  node->children[0] = expression();
  if (node->children[0]->kind != Kind::call) throw SyntaxProblem(position, "expected a call");
  const int loops = std::exchange(loops_, 0);
  node->body = block(U"endcall");
  loops_ = loops;
  return node;
}

const Node* Parser::filter_statement(size_t position) {
  const Node* filtered = filter(nullptr);
  while (skip_op(U"|")) filtered = filter(filtered);
  Node* node = add(Kind::filter_block, position, {filtered});
  node->body = block(U"endfilter");
  return node;
}

void Parser::parameters(Node& node) {
  expect(Type::op, U"(");
  bool has_default = false, first = true;
  for (; !is_op(U")"); first = false) {
    if (!first) expect(Type::op, U",");
    const size_t position = now().position;
    Node* parameter = add(Kind::keyword, position, {nullptr}, expect_name());
    if (skip_op(U"="))
      parameter->children[0] = expression(), has_default = true;
    else if (has_default)
      throw SyntaxProblem(position, "a parameter without a default follows one that has one");
    node.children.push_back(parameter);
  }
  ++at_;
}

const Node* Parser::single_target() {
  const size_t position = now().position;
  if (skip_op(U"(")) {
    const Node* inner = target();
    expect(Type::op, U")");
    return inner;
  }
  const Node* variable = add(Kind::name, position, {}, expect_name());
  for (const char* reserved : {"true", "false", "none", "True", "False", "None", "loop"})
    if (variable->name == reserved) throw SyntaxProblem(position, "cannot assign to '" + variable->name + "'");
  if (!skip_op(U".")) return variable;
  return add(Kind::member, position, {variable}, expect_name());
}

// A name, a namespace's variable, or several of them.
const Node* Parser::target(bool tuple) {
  const Level level(*this);
  const size_t position = now().position;
  Nodes parts = {single_target()};
  if (!tuple || !is_op(U",")) return parts[0];
  while (skip_op(U","))
    if (now().type == Type::name || is_op(U"(")) {
      if (is_name(U"in")) break;
      parts.push_back(single_target());
    }
  return add(Kind::tuple, position, std::move(parts));
}

const Node* Parser::tuple(bool with_conditional, Names ends, bool in_parentheses) {
  const size_t position = now().position;
  Nodes parts;
  bool is_tuple = false;
  for (;;) {
    const bool ended = now().type == Type::variable_end || now().type == Type::block_end || is_op(U")");
    if (ended || is_one(ends)) break;
    parts.push_back(expression(with_conditional));
    if (!skip_op(U",")) break;
    is_tuple = true;
  }
  if (!is_tuple && !parts.empty()) return parts[0];
  if (!is_tuple && !in_parentheses) wrong("expected an expression, not " + shown());
  return add(Kind::tuple, position, std::move(parts));
}

const Node* Parser::expression(bool with_conditional) {
  const Level level(*this);
  const Node* value = disjunction();
  while (with_conditional && is_name(U"if")) {
    const size_t position = now().position;
    ++at_;
    const Node* condition = disjunction();
    const Node* otherwise = skip_name(U"else") ? expression() : nullptr;
    value = add(Kind::conditional, position, {condition, value, otherwise});
  }
  return value;
}

const Node* Parser::disjunction() {
  const Node* left = conjunction();
  for (size_t position = now().position; skip_name(U"or"); position = now().position)
    left = add(Kind::disjunction, position, {left, conjunction()});
  return left;
}

const Node* Parser::conjunction() {
  const Node* left = negation();
  for (size_t position = now().position; skip_name(U"and"); position = now().position)
    left = add(Kind::conjunction, position, {left, negation()});
  return left;
}

const Node* Parser::negation() {
  const Level level(*this);
  const size_t position = now().position;
  return skip_name(U"not") ? add(Kind::negation, position, {negation()}) : comparison();
}

const Node* Parser::comparison() {
  constexpr std::pair<TextView, Op> OPERATORS[] = {{U"==", Op::eq}, {U"!=", Op::ne}, {U"<", Op::lt},
                                                   {U"<=", Op::le}, {U">", Op::gt},  {U">=", Op::ge}};
  const size_t start = now().position;
  Nodes chain = {sum()};
  for (;;) {
    const size_t position = now().position;
    Op op = Op::none;
    for (const auto& [text, known] : OPERATORS)
      if (is_op(text)) op = known;
    if (is_name(U"in")) op = Op::in;
    if (is_name(U"not") && after().is(Type::name, U"in")) op = Op::not_in, ++at_;
    if (op == Op::none) break;
    ++at_;
    chain.push_back(add(Kind::compared, position, {sum()}, {}, op));
  }
  return chain.size() == 1 ? chain[0] : add(Kind::comparison, start, std::move(chain));
}

const Node* Parser::sum() {
  const Node* left = concat();
  while (is_op(U"+") || is_op(U"-")) {
    const size_t position = now().position;
    const Op op = is_op(U"+") ? Op::add : Op::sub;
    ++at_;
    left = add(Kind::arithmetic, position, {left, concat()}, {}, op);
  }
  return left;
}

const Node* Parser::concat() {
  const size_t position = now().position;
  Nodes parts = {product()};
  while (skip_op(U"~")) parts.push_back(product());
  return parts.size() == 1 ? parts[0] : add(Kind::concat, position, std::move(parts));
}

const Node* Parser::product() {
  constexpr std::pair<TextView, Op> OPERATORS[] = {
      {U"*", Op::mul}, {U"/", Op::div}, {U"//", Op::floordiv}, {U"%", Op::mod}};
  const Node* left = power();
  for (;;) {
    const size_t position = now().position;
    Op op = Op::none;
    for (const auto& [text, known] : OPERATORS)
      if (is_op(text)) op = known;
    if (op == Op::none) return left;
    ++at_;
    left = add(Kind::arithmetic, position, {left, power()}, {}, op);
  }
}

// From left to right, unlike Python's.
const Node* Parser::power() {
  const Node* left = unary();
  for (size_t position = now().position; skip_op(U"**"); position = now().position)
    left = add(Kind::arithmetic, position, {left, unary()}, {}, Op::pow);
  return left;
}

const Node* Parser::unary(bool with_filters) {
  const Level level(*this);
  const size_t position = now().position;
  const Node* node = nullptr;
  if (is_op(U"-") || is_op(U"+")) {
    const Op op = is_op(U"-") ? Op::sub : Op::add;
    ++at_;
    node = add(Kind::sign, position, {unary(false)}, {}, op);
  } else {
    node = primary();
  }
  node = postfix(node);
  return with_filters ? filters(node) : node;
}

const Node* Parser::primary() {
  const Token& token = now();
  const size_t position = token.position;
  if (token.type == Type::end) wrong("unexpected end of the template");
  ++at_;
  if (token.type == Type::name) {
    if (token.text == U"true" || token.text == U"True") return constant(position, true);
    if (token.text == U"false" || token.text == U"False") return constant(position, false);
    if (token.text == U"none" || token.text == U"None") return constant(position, None{});
    if (token.text == U"varargs" || token.text == U"kwargs")
      throw SyntaxProblem(position, "'" + to_utf8(token.text) + "' is not known here");
    return add(Kind::name, position, {}, to_utf8(token.text));
  }
  if (token.type == Type::string) {
    Text text = token.text;
    for (; now().type == Type::string; ++at_) text += now().text;
    return constant(position, std::move(text));
  }
  if (token.type == Type::number) return constant(position, token.value);
  if (token.is(Type::op, U"(")) {
    const Node* inner = tuple(true, {}, true);
    expect(Type::op, U")");
    return inner;
  }
  const bool list = token.is(Type::op, U"[");
  if (!list && !token.is(Type::op, U"{")) {
    --at_;
    wrong("unexpected " + shown());
  }
  Nodes items;
  for (const TextView end = list ? U"]" : U"}"; !skip_op(end);) {
    if (!items.empty()) {
      expect(Type::op, U",");
      if (skip_op(end)) break;
    }
    items.push_back(expression());
    if (list) continue;
    expect(Type::op, U":");
    items.push_back(expression());
  }
  return add(list ? Kind::list : Kind::dict, position, std::move(items));
}

const Node* Parser::postfix(const Node* node) {
  for (;;) {
    if (is_op(U".") || is_op(U"["))
      node = subscript(node);
    else if (is_op(U"("))
      node = call(node);
    else
      return node;
  }
}

const Node* Parser::filters(const Node* node) {
  for (;;) {
    if (skip_op(U"|"))
      node = filter(node);
    else if (skip_name(U"is"))
      node = test(node);
    else if (is_op(U"("))
      node = call(node);
    else
      return node;
  }
}

const Node* Parser::call(const Node* function) {
  Node* node = add(Kind::call, now().position, {function});
  arguments(*node);
  return node;
}

const Node* Parser::filter(const Node* input) {
  const size_t position = now().position;
  Node* node = add(Kind::filter, position, {input}, expect_name());
  if (is_op(U"(")) arguments(*node);
  return node;
}

const Node* Parser::test(const Node* input) {
  const size_t position = now().position;
  const bool negated = skip_name(U"not");
  Node* node = add(Kind::test, position, {input}, expect_name());
  const Type type = now().type;
  if (is_op(U"(")) {
    arguments(*node);
  } else if ((type == Type::name || type == Type::string || type == Type::number || is_op(U"[") || is_op(U"{")) &&
             !is_one({U"else", U"or", U"and"})) {
    if (is_name(U"is")) wrong("a test cannot follow a test");
    // "if" and the like stand where an argument might: they are names, and Jinja takes them for one.
    node->children.push_back(postfix(primary()));
  }
  return negated ? add(Kind::negation, position, {node}) : node;
}

const Node* Parser::subscript(const Node* object) {
  const size_t position = now().position;
  if (skip_op(U".")) {
    const Token& token = now();
    ++at_;
    if (token.type == Type::name) return add(Kind::attribute, position, {object}, to_utf8(token.text));
    if (token.type != Type::number || !token.value.integer()) wrong("expected a name or a number after '.'");
    return add(Kind::item, position, {object, constant(position, token.value)});
  }
  expect(Type::op, U"[");
  const bool bare = is_op(U":");
  const Node* first = bare ? nullptr : expression();
  if (!is_op(U":")) {
    expect(Type::op, U"]");
    return add(Kind::item, position, {object, first});
  }
  Nodes parts = {object, first, nullptr, nullptr};
  for (size_t i = 2; i < 4 && skip_op(U":"); ++i)
    if (!is_op(U"]") && !is_op(U":")) parts[i] = expression();
  expect(Type::op, U"]");
  return add(Kind::slice, position, std::move(parts));
}

void Parser::arguments(Node& node) {
  expect(Type::op, U"(");
  for (bool first = true; !skip_op(U")"); first = false) {
    if (!first) {
      expect(Type::op, U",");
      if (skip_op(U")")) return;
    }
    const size_t position = now().position;
    const Kind last = node.children.empty() || !node.children.back() ? Kind::constant : node.children.back()->kind;
    if (skip_op(U"*")) {
      node.children.push_back(add(Kind::spread, position, {expression()}));
    } else if (skip_op(U"**")) {
      node.children.push_back(add(Kind::spread_dict, position, {expression()}));
    } else if (now().type == Type::name && after().is(Type::op, U"=")) {
      const std::string name = expect_name();
      ++at_;
      node.children.push_back(add(Kind::keyword, position, {expression()}, name));
    } else {
      if (!first && (last == Kind::keyword || last == Kind::spread || last == Kind::spread_dict))
        throw SyntaxProblem(position, "an argument without a name follows one that has one");
      node.children.push_back(expression());
    }
  }
}

}  // namespace

Syntax parse(TextView source) {
  return Parser(Lexer(source).tokens()).parse();
}

}  // namespace jinja
