"""A function fits a screen: none is longer than 50 lines, header to closing brace, and in the tests than 60."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCREEN, SCREEN_OF_TESTS = 50, 60

# What may hold a brace that is none: comments, strings (raw ones too), characters and the preprocessor's lines.
NO_CODE = re.compile(
    r"""
    //[^\n]* | /\*.*?\*/ | R"(?P<mark>\w*)\(.*?\)(?P=mark)" | "(?:\\.|[^"\\\n])*"
    | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'  # a character, and no thousands' mark
    | ^[ ]*\#(?:[^\n\\]|\\.)*
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
CONTAINER = re.compile(r'\b(?:namespace|class|struct|union|enum)\b|extern\s*""\s*$')


def blank(found):
    """As many lines of nothing; a string stays one, so that `extern "C"` is known."""
    return ('""' if found[0][0] == '"' else "") + "\n" * found[0].count("\n")


def functions_of_cpp(text):
    """Yields the first line, the number of lines and the head of every function that is no other one's part."""
    code = NO_CODE.sub(blank, text)
    containers = []  # of each open brace: whether it is a namespace's or a class's
    start = parentheses = 0  # where the definition begins that is being read, and what is open in it
    for at, c in enumerate(code):
        if c in "()":
            parentheses += 1 if c == "(" else -1
        elif c == "{":
            head = code[start:at]
            containers.append(all(containers) and "(" not in head and bool(CONTAINER.search(head)))
            if containers[-1]:
                start = at + 1
        elif c == "}":
            containers.pop()
            # After the initializers of a constructor, `a{1}, b{2} {`, its body comes yet; after `try {}` the catch.
            if all(containers) and not re.match(r"\s*(?:[,{)]|catch\b)", code[at + 1 :]):
                if "(" in code[start:at].split("{")[0]:
                    yield measured(code, start, at)
                start = at + 1
        elif c == ";" and all(containers) and not parentheses:
            start = at + 1
    assert not containers, "braces do not match"


def measured(code, start, end):
    head = re.sub(r"\A\s*(?:(?:public|private|protected):\s*)*", "", code[start:end])
    first = code[: end - len(head)].count("\n") + 1
    return first, code[:end].count("\n") + 2 - first, " ".join(head.split("{")[0].split())


def functions_of_python(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.end_lineno - node.lineno + 1, node.name


def too_long(path, text, most):
    functions = functions_of_python if path.endswith(".py") else functions_of_cpp
    return [f"{path}:{line}: {n} lines: {head}" for line, n, head in functions(text) if n > most]


def sources():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.h", "*.cpp", "*.cu", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]


def test_functions_fit_a_screen():
    found = []
    for path in sources():
        most = SCREEN_OF_TESTS if path.startswith("tests/") else SCREEN
        found += too_long(path, (ROOT / path).read_text(), most)
    assert not found, "\n" + "\n".join(found)


BODY = "  x();\n" * 3


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.cpp", "int f(int a,\n      int b) {\n" + BODY + "}\n"),
        ("a.cpp", 'namespace n {\nvoid g() {}\nstruct S {\n  S() : a{1}, b("{") {\n' + BODY + "  }\n};\n}\n"),
        ("a.cpp", "#define F(x) {\ntemplate <class T>\nauto f = [](T x) {\n" + BODY + "};\n"),
        ("a.cpp", 'extern "C" int f(int x) try {\n' + BODY + "  // }\n} catch (...) {\n}\n"),
        ("a.cpp", "class C {\n public:\n  int f() const {\n" + BODY + "  }\n private:\n  int x;\n};\n"),
        ("a.py", "class A:\n  def f(self,\n        b):\n" + "    x()\n" * 3),
    ],
)
def test_a_long_function_is_found(path, text):
    assert len(too_long(path, text, 4)) == 1
    assert not too_long(path, text, 9)


def test_what_is_no_function_may_be_long():
    assert not too_long("a.cpp", "struct S {\n  int x = 0;\n  int f() { return x; }\n" + "  int y;\n" * 9 + "};\n", 4)
    assert not too_long("a.cpp", "const int table[] = {\n" + "  f(1),\n" * 9 + "};\n" + "int a;\n" * 9, 12)
