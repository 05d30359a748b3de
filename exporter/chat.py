"""A Jinja chat template as the six strings between the contents of a conversation (ChatTemplate in tokenizer.h).

The template is rendered with marked contents, and what stands between the marks is kept; then a conversation of three
turns, with and without a system message, must come out of the pieces as it does out of the template.
"""

from dataclasses import dataclass

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


@dataclass
class ChatTemplate:
    refusal: str = ""
    system_refusal: str = ""
    start: str = ""
    system_start: str = ""
    system_to_user: str = ""
    user_to_assistant: str = ""
    assistant_to_user: str = ""
    generation: str = ""
    trim_system: bool = False
    trim_user: bool = False
    trim_assistant: bool = False

    def render(self, messages: list[dict]) -> str:
        """What encode_chat makes of [system] user (assistant user)*."""
        trim = {"system": self.trim_system, "user": self.trim_user, "assistant": self.trim_assistant}
        contents = [message["content"].strip() if trim[message["role"]] else message["content"] for message in messages]
        out = self.start
        if messages[0]["role"] == "system":
            out = self.system_start + contents.pop(0) + self.system_to_user
        for i, content in enumerate(contents):
            out += content + (self.user_to_assistant, self.assistant_to_user)[i % 2] * (i + 1 < len(contents))
        return out + self.generation


class Refusal(Exception):
    pass


def take_apart(template: str | None, bos: str, eos: str) -> ChatTemplate:
    if not template:
        return ChatTemplate(refusal="the model has no chat template")
    try:
        render = renderer(template, bos, eos)
        return pieces(render)
    except (jinja2.TemplateError, TypeError, ValueError, Refusal) as error:
        line = " ".join(str(error).split())
        return ChatTemplate(refusal=f"the model's chat template cannot be taken apart: {line}")


def renderer(template: str, bos: str, eos: str):
    """As transformers renders. strftime_now is not defined: a template with a date in it takes its own default."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(template)
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)


def conversation(*contents: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def between(text: str, *marks: str) -> list[str]:
    parts, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise Refusal(f"a message appears {'twice' if found else 'nowhere or out of its order'} in what it makes")
        parts.append(before)
    return [*parts, rest]


SYSTEM, USER, ASSISTANT, AGAIN = "Qsystemq", "Quserq", "Qassistantq", "Qagainq"
TURNS = ("Quserq one", "Qassistantq\n\ntwo", "Q three", "Q\nfour", "Q {five}")


def pieces(render) -> ChatTemplate:
    chat = ChatTemplate()
    chat.start, chat.user_to_assistant, chat.assistant_to_user, chat.generation = between(
        render(conversation(USER, ASSISTANT, AGAIN)), USER, ASSISTANT, AGAIN
    )
    chat.trim_user = trims(render, conversation(USER), 0)
    chat.trim_assistant = trims(render, conversation(USER, ASSISTANT, AGAIN), 1)
    check(render, chat, conversation(*TURNS[:1]))
    check(render, chat, conversation(*TURNS))
    try:
        chat.system_start, chat.system_to_user, _ = between(render(conversation(USER, system=SYSTEM)), SYSTEM, USER)
        chat.trim_system = trims(render, conversation(USER, system=SYSTEM), 0)
        check(render, chat, conversation(*TURNS[:1], system=SYSTEM))
        check(render, chat, conversation(*TURNS, system=SYSTEM))
    except (jinja2.TemplateError, Refusal) as error:
        chat.system_refusal = f"the model's chat template takes no system message: {' '.join(str(error).split())}"
    return chat


def trims(render, messages: list[dict], index: int) -> bool:
    content = messages[index]["content"]
    messages[index] = {**messages[index], "content": f" \n{content}\n "}
    return f" \n{content}\n " not in render(messages)


def check(render, chat: ChatTemplate, messages: list[dict]) -> None:
    if render(messages) != chat.render(messages):
        raise Refusal("what it makes of a message depends on its place in the conversation or on its text")
