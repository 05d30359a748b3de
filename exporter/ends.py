"""Which tokens end a text by their well-known texts, besides those that the settings name. The runtime adds what the
chat template writes after an answer."""

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


def ends_by_text(specials: dict[int, tuple[int, str]]) -> set[int]:
    """specials: id -> flags, text."""
    ends = {id: text for id, (flags, text) in specials.items() if text in ENDS or (flags & 1 and text in CONTROL_ENDS)}
    if {"<|return|>", "<|call|>"} <= set(ends.values()):  # gpt-oss: <|end|> ends each of an answer's messages
        ends = {id: text for id, text in ends.items() if text != "<|end|>"}
    return set(ends)
