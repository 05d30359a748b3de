"""Pre-tokenizer patterns: the models' own where their GGUF file only names them, and all of them in PCRE2's syntax."""

import re
from typing import NamedTuple

from exporter.errors import ExportError
from exporter.unicode import CATEGORIES, in_class

SPACES = r"\t-\r\x{85}\p{Z}"  # white space as Unicode has it; PCRE2's \s adds U+180E
WORDS = (  # Oniguruma's \w
    "".join(map(in_class, ("L", "M", "Nd", "Nl", "Pc")))
    + r"\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189}"
)


def pcre(pattern: str, where: str) -> str:
    """A pattern of the tokenizers library (Oniguruma, Ruby's syntax) in PCRE2's, where the two differ."""
    out, inside, i = [], False, 0
    while i < len(pattern):
        c = pattern[i : i + 2] if pattern[i] == "\\" else pattern[i]
        i += len(c)
        if c in (r"\p", r"\P"):
            name, brace, _ = pattern[i:].removeprefix("{").partition("}")
            newer = name in CATEGORIES and in_class(name)
            if not newer or not brace or (c == r"\P" and inside):
                raise ExportError(
                    f"{where}: pre-tokenizer pattern {pattern!r}: {c}{{{name}}} is not supported: use another model"
                )
            i += len(name) + 2
            c = newer if inside else f"[{'^' * (c[1] == 'P')}{newer}]"
        elif c == r"\d":
            c = in_class("Nd") if inside else f"[{in_class('Nd')}]"
        elif c in (r"\s", r"\w"):
            c = SPACES if c == r"\s" else WORDS
            c = c if inside else f"[{c}]"
        elif c in (r"\S", r"\W") and not inside:
            c = f"[^{SPACES if c == chr(92) + 'S' else WORDS}]"
        elif c == "$" and not inside:  # the end of a line
            c = r"(?=\n|\z)"
        elif c == "^" and not inside:  # the start of one
            c = "(?m:^)"
        elif (
            c in (r"\h", r"\S", r"\W", r"\b", r"\D", r"\C")
            or (inside and (c == "[" or pattern[i - 1 : i + 1] == "&&"))
            or (not inside and re.match(r"\{,|\{[\d,]+\}\+|\(\?[a-z]*m", pattern[i - 1 :]))  # mean something else there
        ):
            raise ExportError(f"{where}: pre-tokenizer pattern {pattern!r}: {c} is not supported: use another model")
        elif c == "[":
            inside = True
            if pattern[i : i + 1] == "^":
                c, i = "[^", i + 1
        elif c == "]":
            inside = False
        out.append(c)
    # A run of n spaces that does not end a line would be tried from each of its n places, in n steps each.
    return re.sub(r"^(\[[^]]*\])\+\(\?=\\n\|\\z\)$", r"(?<!\1)\g<0>", "".join(out))


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"[\p{N}𑷠-𑷩]"  # of Rust, which knows the digits of Unicode 17
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES
QWEN2 = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINES
TEKKEN = "|".join([*CASED, r"\p{N}", SYMBOLS])
GPT_4O = "|".join([*(word + CONTRACTION + "?" for word in CASED), r"\p{N}{1,3}", SYMBOLS])
DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
# Letters with case, as DeepSeek's pattern lists them.
DEEPSEEK_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
    "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
    "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
DEEPSEEK_WORD = r"\s?[" + re.sub("[0-9A-F]+", r"\\x{\g<0>}", DEEPSEEK_CASED).replace(" ", "") + "]+"
DEEPSEEK_LLM = [r"[\r\n]", DEEPSEEK_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", DEEPSEEK_HAN, DIGIT]
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_HAN, DIGIT]
DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def takes_everything(pattern: str) -> bool:
    """Whether letters, digits, white space and all else are matched, as by the patterns that came from tiktoken."""
    parts = (r"\p{L", r"\p{N}", r"[^\s\p{L}\p{N}]+")
    return pattern.endswith(r"|\s+(?!\S)|\s+") and all(part in pattern for part in parts)


class PreTokenizer(NamedTuple):
    patterns: list[str]
    ignore_merges: bool = False
    nfc: bool = False


# tokenizer.ggml.pre -> what the model's tokenizer.json says
GGUF_PRE = {
    **dict.fromkeys(["gpt-2", "phi-2", "olmo", "mpt"], PreTokenizer([GPT2])),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell"], PreTokenizer([DIGIT, GPT2])),
    **dict.fromkeys(
        ["llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "glm4"], PreTokenizer([LLAMA3], ignore_merges=True)
    ),
    **dict.fromkeys(["dbrx", "chatglm-bpe"], PreTokenizer([LLAMA3])),
    "qwen2": PreTokenizer([QWEN2], nfc=True),
    "qwen35": PreTokenizer([QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")]),
    "deepseek-r1-qwen": PreTokenizer([QWEN2]),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3),
    "tekken": PreTokenizer([TEKKEN], ignore_merges=True),
    **dict.fromkeys(["gpt-4o", "llama4"], PreTokenizer([GPT_4O])),
}

# Files written before May 2024 lack tokenizer.ggml.pre. A vocabulary is known by its merges, which no fine-tune
# changes: the start of the SHA-256 of their lines -> the name.
GGUF_MERGES = {
    "04e3597d7996f292": "gpt-2",
    "0cd100e0ab7dbd83": "llama-bpe",
    "bbeef245f0b03a96": "qwen2",
    "cb5bed793622288a": "deepseek-llm",
    "3c86e94c54c92cfe": "deepseek-coder",
    "8715d8d6d92d1b0c": "starcoder",
    "da302fc35c8c3284": "refact",
}
