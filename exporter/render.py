"""A chat template rendered as transformers does, in a process of its own: it may loop for ever, or take all memory."""

import datetime
import json
import resource
import subprocess
import sys
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 2, 1 << 30  # more than any template takes, with the interpreter


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, transformers' own tag."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def rendered(template: str, variables: dict) -> str | None:
    """None: the template refuses its variables, or does not come to an end."""
    call = [sys.executable, Path(__file__)]
    asked = json.dumps([template, variables])
    try:
        answer = subprocess.run(call, input=asked, capture_output=True, text=True, timeout=4 * SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return None if answer.returncode else json.loads(answer.stdout)


def environment() -> ImmutableSandboxedEnvironment:
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    jinja.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
    }
    jinja.filters["tojson"] = lambda x, ensure_ascii=False, **rest: json.dumps(x, ensure_ascii=ensure_ascii, **rest)
    return jinja


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    source, values = json.loads(sys.stdin.read())
    print(json.dumps(environment().from_string(source).render(**values)))
