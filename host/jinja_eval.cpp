// jinja_eval.cpp: walks a template's tree and writes its text.
#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "host/error.h"
#include "host/jinja.h"
#include "host/jinja_builtins.h"
#include "host/jinja_syntax.h"

namespace jinja {

namespace {

// The variables of a template, a macro's call or one turn of a loop. What is not found is looked for further out; what
// is set is set here, so that a loop's variables end with its turn.
struct Scope {
  std::shared_ptr<Scope> outer;
  std::vector<std::pair<std::string, Value>> variables;

  const Value* find(const std::string& name) const {
    for (const Scope* scope = this; scope; scope = scope->outer.get())
      for (const auto& [known, value] : scope->variables)
        if (known == name) return &value;
    return nullptr;
  }
  void set(const std::string& name, Value value) {
    for (auto& [known, old] : variables)
      if (known == name) return void(old = std::move(value));
    variables.emplace_back(name, std::move(value));
  }
};
using ScopePointer = std::shared_ptr<Scope>;

ScopePointer inside(const ScopePointer& outer) {
  return std::make_shared<Scope>(Scope{outer, {}});
}

class Renderer {
 public:
  explicit Renderer(const Syntax& syntax) : syntax_(syntax) {}
  // A namespace may hold itself.
  ~Renderer() {
    for (const auto& variables : namespaces_) variables->items.clear();
  }

  Text render(std::vector<std::pair<std::string, Value>> variables);
  size_t position() const { return position_; }

 private:
  using Nodes = std::vector<const Node*>;
  enum class Flow { next, break_loop, continue_loop };

  // The evaluator calls itself: its depth is bounded, as macros may call themselves for ever.
  struct Level {
    explicit Level(int& depth) : depth_(depth) {
      if (++depth_ > 1000) throw Problem("the template calls itself too often, or is nested too deeply");
    }
    ~Level() { --depth_; }
    int& depth_;
  };

  Flow run(const Nodes& body, const ScopePointer& scope, Text& out);
  Flow run(const Node& node, const ScopePointer& scope, Text& out);
  Flow run_loop(const Node& node, const ScopePointer& scope, Text& out);
  Flow run_branches(const Node& node, const ScopePointer& scope, Text& out);
  void run_set_block(const Node& node, const ScopePointer& scope);
  void run_with(const Node& node, const ScopePointer& scope, Text& out);
  void run_call_block(const Node& node, const ScopePointer& scope, Text& out);
  Value text_of(const Nodes& body, const ScopePointer& scope);
  void write(const Value& value, Text& out);
  void assign(const Node& target, const Value& value, const ScopePointer& scope);

  Value eval(const Node& node, const ScopePointer& scope);
  Value operation(const Node& node, const ScopePointer& scope);
  Value collection(const Node& node, const ScopePointer& scope);
  Value slice_of(const Node& node, const ScopePointer& scope);
  Value concat(const Node& node, const ScopePointer& scope);
  Value compare(const Node& node, const ScopePointer& scope);
  Value call(const Node& node, const ScopePointer& scope, const Value* caller);
  Value filtered(const Node& node, const ScopePointer& scope, const Value& block);
  Arguments arguments(const Node& node, const ScopePointer& scope);
  Value macro(const Node& node, const ScopePointer& scope, std::span<const Node* const> parameters);
  Value make_namespace(Arguments& a);

  const Syntax& syntax_;
  Work work_;
  size_t position_ = 0;  // of what is evaluated, for errors
  int depth_ = 0;
  std::vector<std::shared_ptr<Namespace>> namespaces_;
};

Text Renderer::render(std::vector<std::pair<std::string, Value>> variables) {
  const auto root = std::make_shared<Scope>();
  root->variables = globals(work_);
  root->set("namespace", std::make_shared<const Function>(
                             Function{"namespace", [this](Arguments& a) { return make_namespace(a); }}));
  const auto context = inside(root);
  context->variables = std::move(variables);
  Text out;
  run(syntax_.body, inside(context), out);
  return out;
}

Renderer::Flow Renderer::run(const Nodes& body, const ScopePointer& scope, Text& out) {
  for (const Node* node : body)
    if (const Flow flow = run(*node, scope, out); flow != Flow::next) return flow;
  return Flow::next;
}

Renderer::Flow Renderer::run(const Node& node, const ScopePointer& scope, Text& out) {
  const Level level(depth_);
  work_.charge(16);
  position_ = node.position;
  switch (node.kind) {
    case Kind::output:
      write(eval(*node.children[0], scope), out);
      break;
    case Kind::branches:
      return run_branches(node, scope, out);
    case Kind::loop:
      return run_loop(node, scope, out);
    case Kind::set:
      assign(*node.children[0], eval(*node.children[1], scope), scope);
      break;
    case Kind::set_block:
      run_set_block(node, scope);
      break;
    case Kind::with:
      run_with(node, scope, out);
      break;
    case Kind::macro:
      scope->set(node.name, macro(node, scope, node.children));
      break;
    case Kind::call_block:
      run_call_block(node, scope, out);
      break;
    case Kind::filter_block:
      write(filtered(*node.children[0], scope, text_of(node.body, scope)), out);
      break;
    case Kind::generation:  // marks the answers, for training
      write(text_of(node.body, scope), out);
      break;
    case Kind::break_loop:
      return Flow::break_loop;
    case Kind::continue_loop:
      return Flow::continue_loop;
    default:
      break;
  }
  return Flow::next;
}

Renderer::Flow Renderer::run_branches(const Node& node, const ScopePointer& scope, Text& out) {
  for (const Node* branch : node.children)
    if (!branch->children[0] || eval(*branch->children[0], scope).truth()) return run(branch->body, scope, out);
  return Flow::next;
}

Renderer::Flow Renderer::run_loop(const Node& node, const ScopePointer& scope, Text& out) {
  const Node &target = *node.children[0], *condition = node.children[2];
  const Value iterable = eval(*node.children[1], scope);
  position_ = node.position;
  if (iterable.text() || iterable.dict()) work_.charge(32 * length(iterable));
  std::vector<Value> items = elements(iterable);
  work_.charge(16 * items.size());
  if (condition) {
    const ScopePointer tried = inside(scope);
    std::erase_if(items, [&](const Value& item) {
      assign(target, item, tried);
      return !eval(*condition, tried).truth();
    });
  }
  const auto loop = std::make_shared<Loop>();
  loop->items = std::move(items);
  for (; loop->index < loop->items.size(); ++loop->index) {
    const ScopePointer turn = inside(scope);
    turn->set("loop", Shared<Loop>(loop));
    assign(target, loop->items[loop->index], turn);
    if (run(node.body, turn, out) == Flow::break_loop) break;
  }
  return loop->items.empty() ? run(node.otherwise, scope, out) : Flow::next;
}

void Renderer::run_set_block(const Node& node, const ScopePointer& scope) {
  const Value text = text_of(node.body, scope);
  assign(*node.children[0], node.children[1] ? filtered(*node.children[1], scope, text) : text, scope);
}

void Renderer::run_with(const Node& node, const ScopePointer& scope, Text& out) {
  const ScopePointer inner = inside(scope);
  for (size_t i = 0; i < node.children.size(); i += 2)
    assign(*node.children[i], eval(*node.children[i + 1], scope), inner);
  run(node.body, inner, out);
}

// {% call f() %}body{% endcall %}: f finds the body as a function, caller().
void Renderer::run_call_block(const Node& node, const ScopePointer& scope, Text& out) {
  const Value caller = macro(node, scope, std::span(node.children).subspan(1));
  write(call(*node.children[0], scope, &caller), out);
}

Value Renderer::text_of(const Nodes& body, const ScopePointer& scope) {
  Text out;
  run(body, inside(scope), out);
  return out;
}

void Renderer::write(const Value& value, Text& out) {
  Text text = str(value);
  work_.charge(text.size());
  out += text;
}

void Renderer::assign(const Node& target, const Value& value, const ScopePointer& scope) {
  position_ = target.position;
  if (target.kind == Kind::name) return scope->set(target.name, value);
  if (target.kind == Kind::member) {
    const Value object = eval(*target.children[0], scope);
    if (!object.variables()) throw Problem("'" + target.children[0]->name + "' is no namespace");
    if (target.name.starts_with('_')) throw Problem("a namespace takes no name that begins with '_'");
    auto& items = object.variables()->items;
    const auto at = std::ranges::find(items, target.name, [](const auto& pair) { return pair.first; });
    if (at == items.end())
      items.emplace_back(target.name, value);
    else
      at->second = value;
    return;
  }
  const std::vector<Value> parts = elements(value);
  if (parts.size() != target.children.size())
    throw Problem(std::to_string(parts.size()) + " values for " + std::to_string(target.children.size()) + " names");
  for (size_t i = 0; i < parts.size(); ++i) assign(*target.children[i], parts[i], scope);
}

Value Renderer::make_namespace(Arguments& a) {
  const auto variables = std::make_shared<Namespace>();
  const auto set = [&](const std::string& name, const Value& value) {
    if (name.starts_with('_')) throw Problem("a namespace takes no name that begins with '_'");
    variables->items.emplace_back(name, value);
  };
  for (const Value& value : a.positional) {
    if (!value.dict()) throw Problem("namespace takes a dict, not a " + value.kind());
    for (const auto& [key, item] : value.dict()->items) set(to_utf8(str(key)), item);
  }
  for (const auto& [name, value] : a.named) set(name, value);
  work_.charge(64);
  namespaces_.push_back(variables);
  return variables;
}

// A function that keeps the scope in which it was defined. It does not own it: the scope may hold the function.
Value Renderer::macro(const Node& node, const ScopePointer& scope, std::span<const Node* const> parameters) {
  const auto run_macro = [this, &node, parameters, weak = std::weak_ptr(scope)](Arguments& a) -> Value {
    const ScopePointer definition = weak.lock();
    if (!definition) throw Problem("the macro '" + node.name + "' is called outside of where it was defined");
    const ScopePointer inner = inside(definition);
    if (a.positional.size() > parameters.size())
      throw Problem("'" + node.name + "' takes at most " + std::to_string(parameters.size()) + " arguments");
    for (const auto& [name, value] : a.named) {
      const auto at = std::ranges::find(parameters, name, &Node::name);
      const bool twice = at - parameters.begin() < std::ssize(a.positional);
      if (name != "caller" && (at == parameters.end() || twice))
        throw Problem("'" + node.name + "' takes no argument '" + name + "', or takes it once");
      inner->set(name, value);
    }
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Node& parameter = *parameters[i];
      if (i < a.positional.size())
        inner->set(parameter.name, a.positional[i]);
      else if (std::ranges::find(inner->variables, parameter.name, [](const auto& v) { return v.first; }) ==
               inner->variables.end())
        inner->set(parameter.name, parameter.children[0] ? eval(*parameter.children[0], inner)
                                                         : Undefined{"'" + parameter.name + "' was not given"});
    }
    Text out;
    run(node.body, inner, out);
    return out;
  };
  return std::make_shared<const Function>(Function{node.name, run_macro});
}

// ---- Expressions

Value Renderer::eval(const Node& node, const ScopePointer& scope) {
  const Level level(depth_);
  work_.charge(16);
  position_ = node.position;
  const auto child = [&](size_t i) { return eval(*node.children[i], scope); };
  switch (node.kind) {
    case Kind::constant:
      return node.value;
    case Kind::name: {
      const Value* value = scope->find(node.name);
      return value ? *value : Undefined{"'" + node.name + "' is undefined"};
    }
    case Kind::conjunction: {
      const Value left = child(0);
      return left.truth() ? child(1) : left;
    }
    case Kind::disjunction: {
      const Value left = child(0);
      return left.truth() ? left : child(1);
    }
    case Kind::negation:
      return !child(0).truth();
    case Kind::conditional:
      if (child(0).truth()) return child(1);
      return node.children[2] ? child(2) : Undefined{"an 'if' without 'else' gave nothing"};
    case Kind::call:
      return call(node, scope, nullptr);
    case Kind::filter:
      return filtered(node, scope, {});
    case Kind::comparison:
      return compare(node, scope);
    case Kind::concat:
      return concat(node, scope);
    default:
      return operation(node, scope);
  }
}

int64_t checked(bool overflow, const int64_t& value) {  // a reference: the value is there once overflow is known

  if (overflow) throw Problem("a number is too large");
  return value;
}

Value repeated(Work& work, const Value& value, int64_t n) {
  const size_t times = static_cast<size_t>(std::max<int64_t>(n, 0)), size = length(value);
  if (size > 0 && times > work.left / size) work.charge(work.left + 1);
  work.charge(times * size * (value.list() ? 8 : 1));
  Text text;
  List list({}, value.list() ? value.list()->kind : List::list);
  for (size_t i = 0; i < times && size > 0; ++i) {
    if (value.text())
      text += *value.text();
    else
      list.items.insert(list.items.end(), value.list()->items.begin(), value.list()->items.end());
  }
  return value.text() ? Value(std::move(text)) : Value(std::move(list));
}

bool can_repeat(const Value& value) {
  return value.text() || (value.list() && value.list()->kind <= List::tuple);
}

int64_t whole_arithmetic(Op op, int64_t a, int64_t b) {
  int64_t out = 0;
  if (op == Op::add) return checked(__builtin_add_overflow(a, b, &out), out);
  if (op == Op::sub) return checked(__builtin_sub_overflow(a, b, &out), out);
  if (op == Op::mul) return checked(__builtin_mul_overflow(a, b, &out), out);
  if (op == Op::pow) {
    out = 1;
    if (b > 64 && (a > 1 || a < -1)) checked(true, 0);
    for (int64_t i = 0; i < (b > 64 ? b % 2 + 2 : b); ++i) checked(__builtin_mul_overflow(out, a, &out), out);
    return out;
  }
  if (b == 0) throw Problem("division by zero");
  if (b == -1) return op == Op::mod ? 0 : checked(a == INT64_MIN, a == INT64_MIN ? a : -a);
  // Rounded down, the remainder has the divisor's sign.
  const int64_t rest = a % b;
  const bool down = rest != 0 && (rest < 0) != (b < 0);
  return op == Op::mod ? rest + (down ? b : 0) : a / b - down;
}

double real_arithmetic(Op op, double a, double b) {
  if (op == Op::add) return a + b;
  if (op == Op::sub) return a - b;
  if (op == Op::mul) return a * b;
  if (op == Op::pow) return std::pow(a, b);
  if (b == 0) throw Problem("division by zero");
  if (op == Op::div) return a / b;
  const double rest = std::fmod(a, b), modulo = rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
  return op == Op::mod ? modulo : std::floor((a - modulo) / b + 0.5);
}

Text escaped(const Text& text) {
  Text out;
  for (const Char c : text) {
    const size_t special = TextView(U"&<>'\"").find(c);
    if (special == TextView::npos)
      out += c;
    else
      for (const char x : std::string_view(std::array{"&amp;", "&lt;", "&gt;", "&#39;", "&#34;"}[special]))
        out += static_cast<Char>(x) | (c & MARK);
  }
  return out;
}

// Where one of two is HTML, so is their sum.
Value sum_of_texts(Work& work, const Value& a, const Value& b) {
  work.charge(a.text()->size() + b.text()->size());
  if (!a.is_html() && !b.is_html()) return *a.text() + *b.text();
  const auto html = [](const Value& value) { return value.is_html() ? *value.text() : escaped(*value.text()); };
  return Value::html(html(a) + html(b));
}

Value arithmetic(Work& work, Op op, const Value& a, const Value& b) {
  for (const Value* value : {&a, &b})
    if (value->undefined()) throw Problem(value->undefined()->why);
  const bool whole = a.integer() && b.integer() && op != Op::div && !(op == Op::pow && *b.integer() < 0);
  if (whole) return whole_arithmetic(op, *a.integer(), *b.integer());
  if (a.number() && b.number()) return real_arithmetic(op, *a.number(), *b.number());
  if (op == Op::add && a.text() && b.text()) return sum_of_texts(work, a, b);
  if (op == Op::add && a.list() && b.list() && a.list()->kind == b.list()->kind && a.list()->kind <= List::tuple) {
    List sum = *a.list();
    work.charge(8 * (sum.items.size() + b.list()->items.size()));
    sum.items.insert(sum.items.end(), b.list()->items.begin(), b.list()->items.end());
    return sum;
  }
  if (op == Op::mul && can_repeat(a) && b.integer()) return repeated(work, a, *b.integer());
  if (op == Op::mul && can_repeat(b) && a.integer()) return repeated(work, b, *a.integer());
  if (op == Op::mod && a.text()) return percent_format(work, *a.text(), b);
  constexpr const char* SIGNS[] = {"", "+", "-", "*", "/", "//", "%", "**"};
  throw Problem("a " + a.kind() + " " + SIGNS[static_cast<size_t>(op)] + " a " + b.kind() + " is nothing");
}

Value Renderer::operation(const Node& node, const ScopePointer& scope) {
  const auto child = [&](size_t i) { return eval(*node.children[i], scope); };
  const Kind kind = node.kind;
  if (kind == Kind::list || kind == Kind::tuple || kind == Kind::dict) return collection(node, scope);
  if (kind == Kind::slice) return slice_of(node, scope);
  const Value first = child(0);
  if (kind == Kind::test) {
    Arguments a = arguments(node, scope);
    position_ = node.position;
    return test(work_, node.name, first, a);
  }
  const Value second = node.children.size() > 1 ? child(1) : Value(int64_t{0});
  position_ = node.position;
  if (kind == Kind::attribute) return attribute(work_, first, node.name);
  if (kind == Kind::item) return item(work_, first, second);
  if (kind == Kind::sign && first.real()) return node.op == Op::sub ? -*first.real() : *first.real();
  return kind == Kind::sign ? arithmetic(work_, node.op, second, first) : arithmetic(work_, node.op, first, second);
}

Value Renderer::collection(const Node& node, const ScopePointer& scope) {
  List list({}, node.kind == Kind::tuple ? List::tuple : List::list);
  for (const Node* child : node.children) list.items.push_back(eval(*child, scope));
  if (node.kind != Kind::dict) return list;
  Dict dict;
  for (size_t i = 0; i < list.items.size(); i += 2) {
    work_.charge(4 * dict.items.size());
    dict.set(list.items[i], list.items[i + 1]);
  }
  return dict;
}

Value Renderer::slice_of(const Node& node, const ScopePointer& scope) {
  Value parts[4];
  for (size_t i = 0; i < 4; ++i) parts[i] = node.children[i] ? eval(*node.children[i], scope) : Value(None{});
  position_ = node.position;
  return slice(work_, parts[0], parts[1], parts[2], parts[3]);
}

Value Renderer::concat(const Node& node, const ScopePointer& scope) {
  Text out;
  for (const Node* child : node.children) write(eval(*child, scope), out);
  return out;
}

Value Renderer::compare(const Node& node, const ScopePointer& scope) {
  Value left = eval(*node.children[0], scope);
  for (size_t i = 1; i < node.children.size(); ++i) {
    const Node& next = *node.children[i];
    Value right = eval(*next.children[0], scope);
    position_ = next.position;
    for (const Value* value : {&left, &right})
      if (value->text()) work_.charge(value->text()->size() / 16);
    bool holds = false;
    if (next.op == Op::eq || next.op == Op::ne)
      holds = equal(left, right) == (next.op == Op::eq);
    else if (next.op == Op::in || next.op == Op::not_in)
      holds = contains(work_, right, left) == (next.op == Op::in);
    else if (next.op == Op::lt || next.op == Op::gt)
      holds = next.op == Op::lt ? less(left, right) : less(right, left);
    else
      holds = (next.op == Op::le ? less(left, right) : less(right, left)) || equal(left, right);
    if (!holds) return false;
    left = std::move(right);
  }
  return true;
}

Value Renderer::call(const Node& node, const ScopePointer& scope, const Value* caller) {
  const Value callee = eval(*node.children[0], scope);
  Arguments a = arguments(node, scope);
  if (caller) a.named.emplace_back("caller", *caller);
  position_ = node.position;
  if (callee.undefined()) throw Problem(callee.undefined()->why);
  if (!callee.function()) throw Problem("a " + callee.kind() + " cannot be called");
  return callee.function()->call(a);
}

// A filter applied to its input, or to `block` where it stands at the head of a block.
Value Renderer::filtered(const Node& node, const ScopePointer& scope, const Value& block) {
  const Level level(depth_);
  const Node* from = node.children[0];
  const Value input = !from ? block : from->kind == Kind::filter ? filtered(*from, scope, block) : eval(*from, scope);
  Arguments a = arguments(node, scope);
  position_ = node.position;
  return filter(work_, node.name, input, a);
}

Arguments Renderer::arguments(const Node& node, const ScopePointer& scope) {
  Arguments a;
  for (const Node* child : std::span(node.children).subspan(1)) {
    const bool named = child->kind == Kind::keyword;
    const bool spread = child->kind == Kind::spread || child->kind == Kind::spread_dict;
    const Value value = eval(named || spread ? *child->children[0] : *child, scope);
    if (named) {
      a.named.emplace_back(child->name, value);
    } else if (child->kind == Kind::spread) {
      for (Value& element : elements(value)) a.positional.push_back(std::move(element));
    } else if (child->kind == Kind::spread_dict) {
      if (!value.dict()) throw Problem("** needs a dict, not a " + value.kind());
      for (const auto& [key, item] : value.dict()->items) a.named.emplace_back(to_utf8(str(key)), item);
    } else {
      a.positional.push_back(value);
    }
  }
  work_.charge(8 * a.positional.size());
  return a;
}

}  // namespace

Template::Template(std::string name, std::string_view source)
    : name_(std::move(name)), source_(normalized(to_text(source))) {
  try {
    syntax_ = std::make_shared<const Syntax>(parse(source_));
  } catch (const SyntaxProblem& problem) {
    fail_at(problem.position, problem.what());
  }
}

Text Template::render(std::vector<std::pair<std::string, Value>> variables) const {
  Renderer renderer(*syntax_);
  try {
    return renderer.render(std::move(variables));
  } catch (const Problem& problem) {
    fail_at(renderer.position(), problem.what());
  }
}

void Template::fail_at(size_t position, const std::string& what) const {
  const TextView before = TextView(source_).substr(0, position);
  const auto line = std::ranges::count(before, U'\n') + 1;
  std::string shown = what.substr(0, 500);
  std::ranges::replace_if(
      shown, [](char c) { return static_cast<unsigned char>(c) < ' '; }, ' ');
  fail("%s, line %td, column %zu: %s", name_.c_str(), line, position - (before.rfind(U'\n') + 1) + 1, shown.c_str());
}

}  // namespace jinja
