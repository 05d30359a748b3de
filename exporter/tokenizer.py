"""The model's tokenizer as NAME.tokenizer.bin, which tokenizer.cpp reads.

Whatever the source calls it, a tokenizer here is one thing: text is split at special tokens, normalised, split into pieces
by patterns applied in order, and in every piece the pair of neighbours whose merge has the lowest rank is merged until no
pair is left. Byte-level BPE starts from bytes, SentencePiece BPE from code points, with bytes for those it lacks.

The file. Integers are unsigned 32 bits, little-endian; a string is its length in bytes, the bytes, and zeros up to a
multiple of 4; everything is aligned to 4 bytes and the file ends where the last section ends.

    magic "attn.tok", version 1, flags, prefix, bos, unk (NONE = 2^32 - 1), vocab_size, n_merges, n_specials,
    n_patterns, n_before, n_after, n_end_of_generation
    offsets[vocab_size + 1]     of each token in the text of all tokens, the first 0
    kinds[vocab_size]           one byte each, padded to 4: 0 text, 1 the byte that stands for itself, 2 control, 3 unused
    string                      the tokens one after the other: the bytes that each stands for (a control token: its name)
    merges[n_merges][3]         left id, right id, merged id; the rank is the index
    specials[n_specials]        id, flags (1 control, 2 takes the white space to its left, 4 to its right), string: found in the text
    before[n_before], after[n_after]        ids put around a text, BOS and EOS
    end_of_generation[n_end_of_generation]  ids
    patterns[n_patterns]        strings, in PCRE2's syntax; a match is a piece and so is what lies between two
    chat                        trim (1 system, 2 user, 4 assistant), then strings: refusal, system_refusal, start, system_start,
                                system_to_user, user_to_assistant, assistant_to_user, generation (see ChatTemplate)

In SentencePiece vocabularies the tokens hold spaces, not U+2581: that character is read as a space, as theirs is.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exporter.chat import ChatTemplate, take_apart
from exporter.errors import ExportError
from exporter.hf_source import read_json

MAGIC, VERSION, NONE = b"attn.tok", 1, 0xFFFFFFFF
BYTE_LEVEL, IGNORE_MERGES, NFC = 1, 2, 4  # flags. IGNORE_MERGES: a piece that is a token is that token
PREFIX_NONE, PREFIX_EVERY, PREFIX_MISSING, PREFIX_FIRST = range(4)  # a space before: each text between special tokens,
# each that does not begin with one, the first likewise
TEXT, BYTE, CONTROL, UNUSED = range(4)  # kinds
STRIP_LEFT, STRIP_RIGHT = 2, 4  # flags of special tokens

END_OF_GENERATION = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>",
                     "<|eot|>", "</s>", "<｜end▁of▁sentence｜>", "<eos>"}


@dataclass
class Tokenizer:
    flags: int = 0
    prefix: int = PREFIX_NONE
    tokens: list[bytes] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    merges: list[tuple[int, int, int]] = field(default_factory=list)
    specials: dict[int, tuple[int, str]] = field(default_factory=dict)  # id -> flags, text
    patterns: list[str] = field(default_factory=list)
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    end_of_generation: list[int] = field(default_factory=list)
    chat: ChatTemplate = field(default_factory=ChatTemplate)


def write_tokenizer(source, path: Path) -> str:
    """Writes the tokenizer of a sources.Source; returns the file's SHA-256 in hexadecimal."""
    tokenizer = read_tokenizer(source)
    fit_vocabulary(tokenizer, text_config(source).get("vocab_size") or len(tokenizer.tokens))
    data = serialize(tokenizer)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def text_config(source) -> dict:
    return source.config | (source.config.get("text_config") or {})


def read_tokenizer(source) -> Tokenizer:
    if source.tokenizer_file is not None:
        return read_file(source.tokenizer_file, source)
    if source.kind == "gguf":
        return from_gguf(source)
    if source.kind == "hf":
        for name in "tokenizer.json", "tokenizer.model":
            if (source.folder / name).is_file():
                return read_file(source.folder / name, source)
        if (source.folder / "vocab.json").is_file() and (source.folder / "merges.txt").is_file():
            return from_gpt2_files(source)
        raise ExportError(f"{source.folder}: no tokenizer.json, tokenizer.model or vocab.json with merges.txt: give it with --tokenizer")
    beside = source.path.parent / "tokenizer.bin"
    if beside.is_file():
        return read_file(beside, source)
    raise ExportError(f"{source.path}: a llama2.c checkpoint holds no tokenizer: give it with --tokenizer")


def read_file(path: Path, source) -> Tokenizer:
    if path.suffix == ".json":
        return from_tokenizer_json(path, source)
    if path.suffix == ".model":
        return from_sentencepiece(path, source)
    return from_llama2c(path, source)


def fit_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """As many tokens as the model has rows: the rows that pad an embedding stand for nothing."""
    if not 0 < size <= 1 << 24:
        raise ExportError(f"the config's vocab_size {size} is not between 1 and {1 << 24}: fetch the model again")
    for id in range(len(tokenizer.tokens), size):
        tokenizer.tokens.append(b"[PAD%d]" % id)
        tokenizer.kinds.append(UNUSED)
    del tokenizer.tokens[size:], tokenizer.kinds[size:]
    tokenizer.merges = [merge for merge in tokenizer.merges if max(merge) < size]
    tokenizer.specials = {id: special for id, special in tokenizer.specials.items() if id < size}
    tokenizer.end_of_generation = sorted({id for id in tokenizer.end_of_generation if id < size})
    for id in tokenizer.before + tokenizer.after:
        if id >= size:
            raise ExportError(f"token {id} goes around every text, the model has {size} tokens: this tokenizer belongs to another model")


def serialize(t: Tokenizer) -> bytes:
    def string(value: bytes | str) -> bytes:
        value = value.encode() if isinstance(value, str) else value
        return struct.pack("<I", len(value)) + value + bytes(-len(value) % 4)

    def integers(values) -> bytes:
        return np.asarray(values, np.uint32).astype("<u4").tobytes()

    def or_none(id: int | None) -> int:
        return NONE if id is None or id >= len(t.tokens) else id

    counts = [len(part) for part in (t.tokens, t.merges, t.specials, t.patterns, t.before, t.after, t.end_of_generation)]
    lengths = np.fromiter((len(token) for token in t.tokens), np.uint32, len(t.tokens))
    kinds = bytes(t.kinds)
    chat = t.chat
    trim = chat.trim_system | chat.trim_user << 1 | chat.trim_assistant << 2
    return b"".join([
        MAGIC,
        integers([VERSION, t.flags, t.prefix, or_none(t.bos), or_none(t.unk), *counts]),
        integers(np.concatenate([[0], np.cumsum(lengths)])),
        kinds + bytes(-len(kinds) % 4),
        string(b"".join(t.tokens)),
        integers(t.merges),
        *(integers([id, flags]) + string(text) for id, (flags, text) in t.specials.items()),
        integers(t.before), integers(t.after), integers(t.end_of_generation),
        *(string(pattern) for pattern in t.patterns),
        integers([trim]),
        *(string(text) for text in (chat.refusal, chat.system_refusal, chat.start, chat.system_start, chat.system_to_user,
                                    chat.user_to_assistant, chat.assistant_to_user, chat.generation)),
    ])


# Patterns ----------------------------------------------------------------------------------------------------------------

SPACES = r"\t-\r\x{85}\p{Z}"  # white space as Unicode has it; PCRE2's \s adds U+180E
WORDS = r"\p{L}\p{M}\p{Nd}\p{Pc}"


def pcre(pattern: str, where: str) -> str:
    """A pattern of the tokenizers library (Oniguruma, Ruby's syntax) in PCRE2's, where the two differ."""
    out, in_class, i = [], False, 0
    while i < len(pattern):
        c = pattern[i : i + 2] if pattern[i] == "\\" else pattern[i]
        i += len(c)
        if c in (r"\s", r"\w"):
            c = SPACES if c == r"\s" else WORDS
            c = c if in_class else f"[{c}]"
        elif c in (r"\S", r"\W") and not in_class:
            c = f"[^{SPACES if c == chr(92) + 'S' else WORDS}]"
        elif c == "$" and not in_class:  # the end of a line
            c = r"(?=\n|\z)"
        elif c in (r"\h", r"\S", r"\W", r"\b") or (in_class and (c == "[" or pattern[i - 1 : i + 1] == "&&")):
            raise ExportError(f"{where}: pre-tokenizer pattern {pattern!r} uses {c}, not supported here: use another model")
        elif c == "[":
            in_class = True
            if pattern[i : i + 1] == "^":
                c, i = "[^", i + 1
        elif c == "]":
            in_class = False
        out.append(c)
    # A run of n spaces that does not end a line would be tried from each of its n places, in n steps each.
    return re.sub(r"^(\[[^]]*\])\+\(\?=\\n\|\\z\)$", r"(?<!\1)\g<0>", "".join(out))


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|\p{{N}}%s"
         r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
# Letters with case, as DeepSeek's pattern lists them.
DEEPSEEK_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 "
    "3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 "
    "1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC "
    "1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B "
    "A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB "
    "10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943")
DEEPSEEK_WORD = r"\s?[%s]+" % re.sub(r"[0-9A-F]+", r"\\x{\g<0>}", DEEPSEEK_CASED).replace(" ", "")
DEEPSEEK_LLM = [r"[\r\n]", DEEPSEEK_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", DEEPSEEK_HAN, DIGIT]
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_HAN, DIGIT]
DEEPSEEK_V3 = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
               r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
               r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]

# tokenizer.ggml.pre -> patterns, flags
GGUF_PRE = {
    **dict.fromkeys(["gpt-2", "default", "phi-2", "olmo", "mpt"], ([GPT2], 0)),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell"], ([DIGIT, GPT2], 0)),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3"], ([CL100K % "{1,3}"], IGNORE_MERGES)),
    "qwen2": ([CL100K % ""], NFC),
    "deepseek-r1-qwen": ([CL100K % ""], 0),
    "deepseek-llm": (DEEPSEEK_LLM, 0),
    "deepseek-coder": (DEEPSEEK_CODER, 0),
    "deepseek-v3": (DEEPSEEK_V3, 0),
    "tekken": ([O200K % ("", "", "")], IGNORE_MERGES),
    "gpt-4o": ([O200K % (CONTRACTION, CONTRACTION, "{1,3}")], 0),
}


# Vocabularies ------------------------------------------------------------------------------------------------------------

def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = byte_characters()


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def set_tokens(t: Tokenizer, texts: list[str], added: set[int]) -> None:
    """tokens and kinds. In a byte-level vocabulary, the texts of `added` tokens are their own, no spelling of bytes."""
    for id, text in enumerate(texts):
        kind = TEXT
        if id in t.specials and t.specials[id][0] & 1:
            token, kind = utf8(text), CONTROL
        elif t.flags & BYTE_LEVEL:
            spelled = id not in added and all(c in BYTE_CHARACTERS for c in text)
            token = bytes([BYTE_CHARACTERS[c] for c in text]) if spelled else utf8(text)
        elif re.fullmatch("<0x[0-9A-F]{2}>", text):
            token, kind = bytes([int(text[3:5], 16)]), BYTE
        else:
            token = utf8(text.replace("▁", " "))
        t.tokens.append(token)
        t.kinds.append(kind)


def merges_from_scores(texts: list[str], scores: list[float], skip: set[int]) -> list[tuple[int, int, int]]:
    """SentencePiece merges the pair whose token has the highest score. As pairs in order of rank, ties as Hugging Face breaks
    them (convert_slow_tokenizer.py, generate_merges): the longer left part first."""
    ids = {text: id for id, text in enumerate(texts) if id not in skip}
    merges = []
    for id, text in enumerate(texts):
        if id in skip:
            continue
        parts = [(ids[text[:cut]], ids[text[cut:]], cut) for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
        merges += [(-scores[id], -cut, cut - len(text), left, right, id) for left, right, cut in sorted(parts)]
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in merges]


def merges_from_pairs(pairs, ids: dict[str, int], where) -> list[tuple[int, int, int]]:
    merges = []
    for pair in pairs:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        try:
            merges.append((ids[left], ids[right], ids[left + right]))
        except KeyError as error:
            raise ExportError(f"{where}: merge {left!r} {right!r}: {error} is not in the vocabulary: fetch it again") from error
    return merges


def set_special_ids(t: Tokenizer, texts: list[str], template: str | None) -> None:
    """End of generation by name, the chat template: once the tokens are known."""
    t.end_of_generation += [id for id, text in enumerate(texts) if text in END_OF_GENERATION and t.specials.get(id, (0,))[0] & 1]
    if t.eos is not None:
        t.end_of_generation.append(t.eos)

    def name(id):
        return "" if id is None else texts[id]

    t.chat = take_apart(template, name(t.bos), name(t.eos))


# Sources -----------------------------------------------------------------------------------------------------------------

GGUF_NORMAL, GGUF_UNKNOWN, GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED, GGUF_BYTE = range(1, 7)


def from_gguf(source) -> Tokenizer:
    where, values = source.path, source.metadata

    def get(key: str, default=None):
        return values.get(f"tokenizer.ggml.{key}", default)

    model, texts = get("model"), get("tokens")
    if model not in ("gpt2", "llama") or not texts:
        raise ExportError(f"{where}: tokenizer.ggml.model is {model!r}, only gpt2 (byte-level BPE) and llama (SentencePiece BPE) "
                          "are known: use another model")
    types = get("token_type") or [GGUF_NORMAL] * len(texts)
    control = {id for id, type in enumerate(types) if type in (GGUF_CONTROL, GGUF_UNKNOWN)}
    added = {id for id, type in enumerate(types) if type == GGUF_USER_DEFINED}
    if model == "gpt2":
        pre = get("pre", "default")
        if pre not in GGUF_PRE:
            raise ExportError(f"{where}: tokenizer.ggml.pre is {pre!r}, known are {', '.join(GGUF_PRE)}: "
                              "export from the Hugging Face folder, whose tokenizer.json holds the pattern itself")
        patterns, flags = GGUF_PRE[pre]
        t = Tokenizer(flags=BYTE_LEVEL | flags, patterns=[pcre(pattern, where) for pattern in patterns])
        t.specials = {id: (int(id in control), texts[id]) for id in sorted(control | added)}
        set_tokens(t, texts, added)
        t.merges = merges_from_pairs(get("merges", []), {text: id for id, text in enumerate(texts)}, where)
        add_bos = pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    else:
        # GGUF writes user-defined tokens of spaces as such.
        texts = [text.replace(" ", "▁") if id in added else text for id, text in enumerate(texts)]
        t = sentencepiece(texts, get("scores") or [0.0] * len(texts), control, added)
        t.prefix, t.unk = PREFIX_EVERY if get("add_space_prefix", True) else PREFIX_NONE, get("unknown_token_id")
        add_bos = True
    t.kinds = [UNUSED if type == GGUF_UNUSED else kind for kind, type in zip(t.kinds, types, strict=True)]
    t.bos, t.eos = get("bos_token_id"), get("eos_token_id")
    if get("add_bos_token", add_bos) and t.bos is not None:
        t.before = [t.bos]
    if get("add_eos_token", False) and t.eos is not None:
        t.after = [t.eos]
    t.end_of_generation = [get(key) for key in ("eot_token_id", "eom_token_id") if get(key) is not None]
    set_special_ids(t, texts, values.get("tokenizer.chat_template"))
    return t


def from_tokenizer_json(path: Path, source) -> Tokenizer:
    data = read_json(path)
    try:
        model, vocab = data["model"], data["model"]["vocab"]
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind != "BPE":
            raise ExportError(f"{path}: model.type is {kind!r}, only BPE is known: use another model")
        for key in "continuing_subword_prefix", "end_of_word_suffix", "dropout":
            if model.get(key):
                raise ExportError(f"{path}: model.{key} is {model[key]!r}, not supported here: use another model")
        t, added = Tokenizer(), data.get("added_tokens") or []
        read_normalizer(t, data.get("normalizer"), path)
        read_pre_tokenizer(t, data.get("pre_tokenizer"), path)
        if model.get("ignore_merges"):
            t.flags |= IGNORE_MERGES
        ids = vocab | {token["content"]: token["id"] for token in added}
        texts = [f"[PAD{id}]" for id in range(max(ids.values()) + 1)]
        for text, id in ids.items():
            texts[id] = text
        for token in added:
            if token.get("single_word"):
                raise ExportError(f"{path}: added token {token['content']!r} is single_word, not supported here: set it to false")
            flags = token["special"] | STRIP_LEFT * token["lstrip"] | STRIP_RIGHT * token["rstrip"]
            t.specials[token["id"]] = int(flags), token["content"]
        set_tokens(t, texts, {token["id"] for token in added})
        used = set(ids.values())
        t.kinds = [kind if id in used else UNUSED for id, kind in enumerate(t.kinds)]
        t.merges = merges_from_pairs(model["merges"], vocab, path)
        t.unk = ids.get(model.get("unk_token"))
        read_post_processor(t, data.get("post_processor"), path)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ExportError(f"{path}: not a tokenizer.json of the tokenizers library ({error!r}): fetch it again") from error
    read_settings(t, texts, path.parent, source)
    return t


def kind_of(node) -> str | None:
    return node and node["type"]


def read_normalizer(t: Tokenizer, node: dict | None, where) -> None:
    """NFC, and the two that make SentencePiece's texts: ▁ before, ▁ for a space (which here stays a space)."""
    match kind_of(node):
        case None:
            pass
        case "Sequence":
            for part in node["normalizers"]:
                read_normalizer(t, part, where)
        case "NFC":
            t.flags |= NFC
        case "Prepend" if node["prepend"] == "▁":
            t.prefix = PREFIX_EVERY
        case "Replace" if node["pattern"] == {"String": " "} and node["content"] == "▁":
            pass
        case kind:
            raise ExportError(f"{where}: normalizer {kind} ({json.dumps(node, ensure_ascii=False)[:80]}) is not known: use another model")


def read_pre_tokenizer(t: Tokenizer, node: dict | None, where) -> None:
    match kind_of(node):
        case None:
            pass
        case "Sequence":
            for part in node["pretokenizers"]:
                read_pre_tokenizer(t, part, where)
        case "ByteLevel" if not node["add_prefix_space"]:
            t.flags |= BYTE_LEVEL
            t.patterns += [pcre(GPT2, where)] if node.get("use_regex", True) else []
        case "Digits":
            t.patterns.append(DIGIT if node["individual_digits"] else DIGIT + "+")
        case "Metaspace" if node["replacement"] == "▁":
            always = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
            t.prefix = {"always": PREFIX_MISSING, "first": PREFIX_FIRST, "never": PREFIX_NONE}[always]
            t.patterns += [" [^ ]*"] if node.get("split", True) else []
        case "Split" if node["pattern"] == {"String": " "} and node["behavior"] == "MergedWithPrevious":
            pass  # Gemma's: after its normalizer no space is left to split at
        case "Split" if (node["behavior"], node["invert"]) in (("Isolated", False), ("Removed", True)):
            pattern = node["pattern"]
            t.patterns.append(pcre(pattern["Regex"], where) if "Regex" in pattern else re.escape(pattern["String"]))
        case kind:
            raise ExportError(f"{where}: pre_tokenizer {kind} ({json.dumps(node, ensure_ascii=False)[:120]}) is not known: "
                              "use another model")


def read_post_processor(t: Tokenizer, node: dict | None, where) -> None:
    match kind_of(node):
        case None | "ByteLevel":
            pass
        case "Sequence":
            for part in node["processors"]:
                read_post_processor(t, part, where)
        case "TemplateProcessing":
            side = t.before
            for part in node["single"]:
                if "Sequence" in part:
                    side = t.after
                else:
                    side += node["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        case kind:
            raise ExportError(f"{where}: post_processor {kind} is not known: use another model")


def read_settings(t: Tokenizer, texts: list[str], folder: Path, source) -> None:
    """What Hugging Face keeps beside the vocabulary: the names of BOS and EOS, whether they are added, the chat template."""
    settings = {}
    for name in "special_tokens_map.json", "tokenizer_config.json":
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    ids = {text: id for id, text in enumerate(texts)}

    def special(key: str) -> int | None:
        value = settings.get(key)
        return ids.get(value["content"] if isinstance(value, dict) else value)

    t.bos, t.eos = special("bos_token"), special("eos_token")
    if t.bos is not None and settings.get("add_bos_token") is not None:
        t.before = [t.bos] * bool(settings["add_bos_token"]) + [id for id in t.before if id != t.bos]
    if t.eos is not None and settings.get("add_eos_token") is not None:
        t.after = [id for id in t.after if id != t.eos] + [t.eos] * bool(settings["add_eos_token"])
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    for ends in generation.get("eos_token_id"), text_config(source).get("eos_token_id"):
        t.end_of_generation += ends if isinstance(ends, list) else [] if ends is None else [ends]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    set_special_ids(t, texts, template)


def from_gpt2_files(source) -> Tokenizer:
    """vocab.json and merges.txt, GPT-2's own files."""
    vocab = read_json(source.folder / "vocab.json")
    lines = (source.folder / "merges.txt").read_text("utf-8").split("\n")
    pairs = [line for line in lines if line and not line.startswith("#version")]
    texts = sorted(vocab, key=vocab.get)
    t = Tokenizer(flags=BYTE_LEVEL, patterns=[pcre(GPT2, source.folder)], merges=merges_from_pairs(pairs, vocab, source.folder))
    end = vocab.get("<|endoftext|>")
    if source.config.get("model_type") != "gpt2" or end is None or sorted(vocab.values()) != list(range(len(vocab))):
        raise ExportError(f"{source.folder}: vocab.json without tokenizer.json is only understood for GPT-2: save the tokenizer "
                          "with save_pretrained, which writes tokenizer.json")
    t.specials = {end: (1, texts[end])}
    set_tokens(t, texts, set())
    read_settings(t, texts, source.folder, source)
    t.bos = t.eos = end
    return t


# sentencepiece_model.proto: ModelProto.SentencePiece.Type, TrainerSpec.ModelType
PIECE_NORMAL, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER_DEFINED, PIECE_UNUSED, PIECE_BYTE = range(1, 7)
BPE = 2


def protobuf(data: bytes) -> dict[int, list]:
    """The fields of a message, by number: integers, floats as 4 bytes, strings and messages as bytes."""
    fields, at = {}, 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        else:
            length = {1: 8, 5: 4}[tag & 7] if tag & 7 != 2 else varint()
            value = data[at : at + length]
            at += length
            if at > len(data):
                raise IndexError("a field reaches past the end")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def from_sentencepiece(path: Path, source) -> Tokenizer:
    try:
        model = protobuf(path.read_bytes())
        pieces = [protobuf(piece) for piece in model[1]]
        texts = [piece[1][0].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece[2][0])[0] if 2 in piece else 0.0 for piece in pieces]
        types = [piece.get(3, [PIECE_NORMAL])[0] for piece in pieces]
        trainer, normalizer = protobuf(model[2][0]), protobuf(model[3][0])
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise ExportError(f"{path}: not a SentencePiece model ({error!r}): fetch it again") from error
    algorithm = trainer.get(3, [1])[0]
    if algorithm != BPE:
        raise ExportError(f"{path}: trainer_spec.model_type is {algorithm}, only {BPE} (BPE) is known: use another model")
    if normalizer.get(2, [b""])[0] or normalizer.get(4, [1])[0]:
        name = normalizer.get(1, [b"?"])[0].decode()
        raise ExportError(f"{path}: normalizer {name!r} changes the text (a character map, or extra white space removed), only "
                          "identity is known: export from a folder that has tokenizer.json")
    control = {id for id, type in enumerate(types) if type in (PIECE_CONTROL, PIECE_UNKNOWN)}
    t = sentencepiece(texts, scores, control, {id for id, type in enumerate(types) if type == PIECE_USER_DEFINED})
    t.prefix = PREFIX_EVERY if normalizer.get(3, [1])[0] else PREFIX_NONE
    t.unk = next((id for id, type in enumerate(types) if type == PIECE_UNKNOWN), None)
    read_settings(t, texts, path.parent, source)
    bos, eos = trainer.get(41, [1])[0], trainer.get(42, [2])[0]
    t.bos = bos if t.bos is None and bos in control else t.bos
    t.eos = eos if t.eos is None and eos in control else t.eos
    t.end_of_generation += [] if t.eos is None else [t.eos]
    t.before = t.before or [t.bos] * (t.bos is not None)
    return t


def sentencepiece(texts: list[str], scores: list[float], control: set[int], added: set[int]) -> Tokenizer:
    """The vocabulary of a SentencePiece model. Its user-defined tokens (`added`) come before any other merge."""
    scores = [0.0 if id in added else score for id, score in enumerate(scores)]
    bytes_ = {id for id, text in enumerate(texts) if re.fullmatch("<0x[0-9A-F]{2}>", text)}
    t = Tokenizer(specials={id: (int(id in control), texts[id]) for id in sorted(control | added)})
    set_tokens(t, texts, added)
    t.merges = merges_from_scores(texts, scores, bytes_ | control)
    return t


def from_llama2c(path: Path, source) -> Tokenizer:
    """llama2.c's tokenizer.bin: the longest length, then a score, a length and the bytes of each token; ids 0 to 2 are unknown,
    BOS and EOS."""
    data, texts, scores, at = path.read_bytes(), [], [], 4
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                raise ValueError(f"a length of {length}")
            texts.append(data[at - length : at].decode().replace(" ", "▁"))
            scores.append(score)
        if len(texts) < 3:
            raise ValueError(f"{len(texts)} tokens")
    except (ValueError, struct.error) as error:
        raise ExportError(f"{path}: not a tokenizer of llama2.c ({error}): give its tokenizer.bin, a tokenizer.model or a "
                          "tokenizer.json") from error
    if len(texts) != source.config.get("vocab_size", len(texts)):
        raise ExportError(f"{path}: {len(texts)} tokens, but the model's vocab_size is {source.config['vocab_size']}: "
                          "give the tokenizer of this model")
    texts[:3] = "<unk>", "<s>", "</s>"
    t = sentencepiece(texts, scores, {0, 1, 2}, set())
    t.prefix, t.unk, t.bos, t.eos, t.before = PREFIX_EVERY, 0, 1, 2, [1]
    set_special_ids(t, texts, None)
    return t
