"""Which tokens end a text besides those that the settings name: by their well-known texts, and by the chat template."""

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
MESSAGE_END = "<|end|>"  # in gpt-oss of each of an answer's messages, whose last ends with <|return|>
CONTROL_ENDS = {"</s>", "<eos>"}  # markup where they are no control tokens: Gemma's </s> closes a strike-through


def ends_by_text(specials: dict[int, tuple[int, str]]) -> set[int]:
    """specials: id -> flags, text."""
    ends = {id: text for id, (flags, text) in specials.items() if text in ENDS or (flags & 1 and text in CONTROL_ENDS)}
    if {"<|return|>", "<|call|>"} <= set(ends.values()):
        ends = {id: text for id, text in ends.items() if text != MESSAGE_END}
    return set(ends)


def ends_by_template(specials: dict[int, tuple[int, str]], after_answer: str) -> set[int]:
    """The longest token that the template's text after an answer begins with. host/tokenizer.cpp does the same where
    the command line has another template."""
    texts = {text: id for id, (_, text) in specials.items() if text and after_answer.startswith(text)}
    end = max(texts, key=len, default=None)
    answers = any(text == "<|return|>" for _, text in specials.values())
    return {texts[end]} if end is not None and not (end == MESSAGE_END and answers) else set()
