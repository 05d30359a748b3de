// render.cpp: the template engine behind a pipe, for tests/test_templates.py.
//
// A request is a line of JSON, {"template": TEXT, "variables": {...}}; so is its answer: {"text": ..., "given": ...},
// where "given" has a 1 for each character that came with the variables and a 0 for each other, or {"error": ...}.
#include <iostream>
#include <string>

#include "host/error.h"
#include "host/jinja.h"
#include "host/json.h"

namespace {

Json answer(const std::string& line) {
  const Json request = parse_json(line, "the request");
  std::vector<std::pair<std::string, jinja::Value>> variables;
  for (const auto& [name, value] : *request.find("variables")->object())
    variables.emplace_back(name, jinja::Value::of(value, true));
  const jinja::Template compiled("template", *request.find("template")->string());
  const jinja::Text text = compiled.render(std::move(variables));
  std::string given;
  for (const jinja::Char c : text) given += jinja::marked(c) ? '1' : '0';
  return Json::Object{{"text", jinja::to_utf8(text)}, {"given", given}};
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << answer(line).text() << std::endl;
    } catch (const Error& error) {
      std::cout << Json(Json::Object{{"error", error.what()}}).text() << std::endl;
    }
  }
}
