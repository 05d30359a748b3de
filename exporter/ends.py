"""Which tokens end a text, besides those that the settings name: by their well-known texts and by the chat template."""

import jinja2

from exporter.chat import conversation, renderer

ENDS = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|EOT|>",
    "<|return|>",
    "<|call|>",
    "<｜end▁of▁sentence｜>",
}
CONTROL_ENDS = {"</s>", "<eos>"}  # markup where they are no control tokens: Gemma's </s> closes a strike-through


def ends_by_text(specials: dict[int, tuple[int, str]], texts: list[str]) -> set[int]:
    """specials: id -> flags, text."""
    ends = {id for id, (flags, text) in specials.items() if text in ENDS or (flags & 1 and text in CONTROL_ENDS)}
    return ends - harmony_end(specials)


def harmony_end(specials: dict[int, tuple[int, str]]) -> set[int]:
    """gpt-oss ends each of an answer's messages with <|end|>, and the answer with <|return|> or <|call|>."""
    ids = {text: id for id, (_, text) in specials.items()}
    return {ids["<|end|>"]} if {"<|return|>", "<|call|>", "<|end|>"} <= ids.keys() else set()


def ends_by_template(specials: dict[int, tuple[int, str]], template: str | None, bos: str, eos: str) -> set[int]:
    """The added token that follows an answer."""
    if not template:
        return set()
    try:
        text = renderer(template, bos, eos)(conversation("Qone", "Qtwo", "Qthree"))
    except (jinja2.TemplateError, TypeError, ValueError):
        return set()
    after = text.partition("Qtwo")[2].lstrip()
    found = {id: text for id, (_, text) in specials.items() if text and after.startswith(text)}
    return {max(found, key=lambda id: len(found[id]))} - harmony_end(specials) if found else set()
