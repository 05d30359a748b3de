"""The model's chat template, which NAME.tokenizer.bin carries as it is: host/chat.cpp renders it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from exporter.errors import ExportError
from exporter.render import environment, rendered
from exporter.source import is_listed, whole_file

MAX_BYTES = 1 << 20


@dataclass
class ChatTemplate:
    """source: in Jinja; "": there is none, and refusal says why. variables: bos_token and its like, as texts."""

    refusal: str = "the model has no chat template"
    source: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """For people: what --chat will find."""
        if self.refusal:
            return self.refusal
        try:
            environment().parse(self.source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            return f"the model's chat template is no Jinja: {' '.join(str(error).split())[:200]}: give --chat-template"
        return "the model's own template"

    def after_answer(self) -> str:
        """What the template writes after an answer, and after white space; "" where it writes none."""
        if self.refusal:
            return ""
        answer = "Qanswerq"
        turns = ("user", "Q"), ("assistant", answer), ("user", "Q")
        messages = [{"role": role, "content": text} for role, text in turns]
        given = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        text = rendered(self.source, given | self.variables) or ""
        return text.partition(answer)[2].lstrip()


def chat_template(source, variables: dict[str, str | None]) -> ChatTemplate:
    """source: as tokenizer_config.json has it: a text, or several by name as a dict or a list of {name, template}."""
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    known = {name: text for name, text in variables.items() if text is not None}
    if isinstance(source, dict):
        if source and "default" not in source:
            names = ", ".join(sorted(source))[:200]
            return ChatTemplate(f"the model's chat templates ({names}) have no default: give one with --chat-template")
        source = source.get("default")
    if source is None or source == "":
        return ChatTemplate(variables=known)
    if not isinstance(source, str) or len(source.encode("utf-8", "replace")) > MAX_BYTES:
        raise ValueError(f"a chat template that is no text of at most {MAX_BYTES} bytes")
    return ChatTemplate("", source, known)


def find_template(folder: Path, settings: dict):
    """As transformers: chat_template.jinja is the default and additional_chat_templates/NAME.jinja are others; else
    what tokenizer_config.json holds; else chat_template.json, which older processors wrote."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if is_listed(folder / "chat_template.jinja"):
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: read(path) for name, path in files.items()}
    if settings.get("chat_template") or not is_listed(folder / "chat_template.json"):
        return settings.get("chat_template")
    try:
        return json.loads(read(folder / "chat_template.json"))["chat_template"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(
            f"{folder / 'chat_template.json'}: no JSON object with chat_template ({error!r}): fetch it again"
        ) from error


def read(path: Path) -> str:
    return whole_file(path, MAX_BYTES).decode("utf-8")
