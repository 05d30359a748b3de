"""Tokenizers from where models keep them: GGUF, tokenizer.json, SentencePiece, GPT-2's and llama2.c's files."""

import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from exporter.chat import ChatTemplate, chat_template, find_template
from exporter.ends import ends_by_template, ends_by_text
from exporter.errors import ExportError, shown
from exporter.hf_source import read_json
from exporter.patterns import DIGIT, GGUF_MERGES, GGUF_PRE, GPT2, pcre, takes_everything
from exporter.source import is_listed, whole_file

# Flags. IGNORE_MERGES: a piece that is a token is that token; BYTE_FALLBACK: a code point that is none is its bytes;
# FUSE_UNK: neighbours that are unknown are one unknown; NORMALIZES_SPACES: spaces become U+2581 before tokens that are
# `normalized` are looked for
BYTE_LEVEL, IGNORE_MERGES, NFC, BYTE_FALLBACK, FUSE_UNK, NORMALIZES_SPACES = 1, 2, 4, 8, 16, 32
PREFIX_NONE, PREFIX_EVERY, PREFIX_MISSING, PREFIX_FIRST = range(4)  # a space before: each text between special tokens,
# each that does not begin with one, the first likewise
TEXT, BYTE, CONTROL, UNUSED, ADDED = range(5)  # kinds
MAX_VOCAB, MOST_PADDING, LONGEST_TOKEN = 1 << 24, 1 << 16, 1 << 10
STRIP_LEFT, STRIP_RIGHT, NORMALIZED = 2, 4, 8  # flags of special tokens


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


def text_config(source) -> dict:
    return source.config | (source.config.get("text_config") or {})


def read_tokenizer(source) -> Tokenizer:
    if source.tokenizer_file is not None:
        return read_file(source.tokenizer_file, source)
    if source.kind == "gguf":
        return from_gguf(source)
    if source.kind == "hf":
        for name in "tokenizer.json", "tokenizer.model":
            if is_listed(source.folder / name):
                return read_file(source.folder / name, source)
        if all(is_listed(source.folder / name) for name in ("vocab.json", "merges.txt")):
            return from_gpt2_files(source)
        raise ExportError(
            f"{source.folder}: no tokenizer.json, tokenizer.model or vocab.json and merges.txt: give --tokenizer"
        )
    beside = source.path.parent / "tokenizer.bin"
    if is_listed(beside):
        return read_file(beside, source)
    raise ExportError(f"{source.path}: a llama2.c checkpoint holds no tokenizer: give it with --tokenizer")


def read_file(path: Path, source) -> Tokenizer:
    if path.suffix == ".json":
        return from_tokenizer_json(path, source)
    if path.suffix == ".model":
        return from_sentencepiece(path, source)
    return from_llama2c(path, source)


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


def mark_added(t: Tokenizer, beside: set[int]) -> None:
    """Tokens that are in no vocabulary: they are found as they are written, and never made of the parts of a text."""
    for id in beside:
        t.kinds[id] = ADDED if t.kinds[id] == TEXT else t.kinds[id]


def merges_from_scores(where, texts: list[str], scores: list[float], skip: set[int]) -> list[tuple[int, int, int]]:
    """SentencePiece merges the pair whose token has the highest score. Here they are pairs in order of rank, with ties
    broken as in Hugging Face's generate_merges (convert_slow_tokenizer.py): the longer left part first."""
    ids = {text: id for id, text in enumerate(texts) if id not in skip}
    merges = []
    for id, text in enumerate(texts):
        if id in skip:
            continue
        if len(text) > LONGEST_TOKEN:  # it is cut everywhere, and each time both parts are looked up
            raise ExportError(
                f"{where}: token {id}, {shown(text)}, has {len(text)} characters, and {LONGEST_TOKEN} are the most "
                "here: use another model"
            )
        parts = [
            (ids[text[:cut]], ids[text[cut:]], cut)
            for cut in range(1, len(text))
            if text[:cut] in ids and text[cut:] in ids
        ]
        merges += [(-scores[id], -cut, cut - len(text), left, right, id) for left, right, cut in parts]
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in merges]


def merges_from_pairs(pairs, ids: dict[str, int], where) -> list[tuple[int, int, int]]:
    merges = []
    for pair in pairs:
        parts = pair.split(" ", 1) if isinstance(pair, str) else pair
        if len(parts) != 2:
            raise ExportError(f"{where}: merge {shown(pair)} is not of two tokens: fetch it again")
        left, right = parts
        try:
            merges.append((ids[left], ids[right], ids[left + right]))
        except KeyError as error:
            raise ExportError(
                f"{where}: merge {left!r} {right!r}: {error} is not in the vocabulary: fetch it again"
            ) from error
    return merges


def set_special_ids(t: Tokenizer, texts: list[str], template) -> None:
    """What ends a text, the chat template: once the tokens are known."""

    def name(id):
        return None if id is None else texts[id]

    t.chat = chat_template(template, {"bos_token": name(t.bos), "eos_token": name(t.eos), "unk_token": name(t.unk)})
    # Whatever type its source gives it, a token that ends a text is a control token: no user may write one.
    for id in ends_by_text(t.specials) | ends_by_template(t.specials, t.chat.after_answer()):
        t.specials[id] = t.specials[id][0] | 1, texts[id]
        t.tokens[id], t.kinds[id] = utf8(texts[id]), CONTROL
        t.end_of_generation.append(id)
    if t.eos is not None:
        t.end_of_generation.append(t.eos)


def recognized(merges: list[str], where) -> str:
    """tokenizer.ggml.pre of a file that does not say it."""
    digest = hashlib.sha256("\n".join(merges).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    if digest not in GGUF_MERGES:
        raise ExportError(
            f"{where}: no tokenizer.ggml.pre, and the vocabulary is none of {', '.join(GGUF_MERGES.values())}: say "
            f"with --pre how it splits a text: {', '.join(GGUF_PRE)}"
        )
    return GGUF_MERGES[digest]


# tokenizer.KEY of a GGUF file: what is read, or what says nothing of how a text is split; and what may only be off.
GGUF_KEYS = re.compile(
    r"ggml\.(model|pre|tokens|token_type|token_type_count|scores|merges|add_space_prefix|add_[be]os_token|\w+_token_id)"
    r"|chat_templates?(\..*)?|huggingface\.json"
)
GGUF_SWITCHES = {"ggml.add_sep_token", "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap"}
GGUF_NORMAL, GGUF_UNKNOWN, GGUF_CONTROL, GGUF_USER_DEFINED, GGUF_UNUSED, GGUF_BYTE = range(1, 7)


def gguf_value(source, key: str, kind, default=None):
    """tokenizer.KEY of a GGUF file's metadata, of a type; kind [type]: a list of such."""
    value, name = source.metadata.get(f"tokenizer.{key}"), getattr(kind, "__name__", "list")
    if value is None:
        return default
    if type(value).__name__ != name or (name == "list" and any(type(one) is not kind[0] for one in value)):
        wanted = name if name != "list" else f"a list of {kind[0].__name__}"
        raise ExportError(f"{source.path}: tokenizer.{key} is {shown(value)}: must be {wanted}: convert the file again")
    return value


def gguf_id(source, key: str, tokens: list) -> int | None:
    id = gguf_value(source, f"ggml.{key}", int)
    if id is not None and not 0 <= id < len(tokens):
        raise ExportError(
            f"{source.path}: tokenizer.ggml.{key} is {id}, but there are {len(tokens)} tokens: convert the file again"
        )
    return id


def check_gguf_keys(source) -> None:
    for key, value in source.metadata.items():
        prefix, _, name = key.partition(".")
        known = GGUF_KEYS.fullmatch(name) or (name in GGUF_SWITCHES and not value)
        if prefix == "tokenizer" and not known:
            raise ExportError(
                f"{source.path}: {key} is {shown(value)}: not supported, and it may change how a text is split: export "
                "from the Hugging Face folder"
            )


def from_gguf(source) -> Tokenizer:
    check_gguf_keys(source)
    model, texts = gguf_value(source, "ggml.model", str), gguf_value(source, "ggml.tokens", [str])
    if model not in ("gpt2", "llama"):
        raise ExportError(
            f"{source.path}: tokenizer.ggml.model is {shown(model)}, only gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE) are known: use another model"
        )
    if not texts:
        raise ExportError(f"{source.path}: tokenizer.ggml.tokens has none: convert the file again")
    types = gguf_value(source, "ggml.token_type", [int]) or [GGUF_NORMAL] * len(texts)
    scores = gguf_value(source, "ggml.scores", [float]) or [0.0] * len(texts)
    for key, values in ("token_type", types), ("scores", scores):
        if len(values) != len(texts):
            raise ExportError(
                f"{source.path}: tokenizer.ggml.{key} has {len(values)} entries, tokenizer.ggml.tokens {len(texts)}: "
                "convert the file again"
            )
    read = from_gguf_bpe if model == "gpt2" else from_gguf_sentencepiece
    t, add_bos = read(source, texts, types, scores)
    t.kinds = [UNUSED if type == GGUF_UNUSED else kind for kind, type in zip(t.kinds, types, strict=True)]
    t.bos, t.eos = (gguf_id(source, f"{name}_token_id", texts) for name in ("bos", "eos"))
    if gguf_value(source, "ggml.add_bos_token", bool, add_bos) and t.bos is not None:
        t.before = [t.bos]
    if gguf_value(source, "ggml.add_eos_token", bool, False) and t.eos is not None:
        t.after = [t.eos]
    ends = (gguf_id(source, f"{name}_token_id", texts) for name in ("eot", "eom"))
    t.end_of_generation = [id for id in ends if id is not None]
    set_special_ids(t, texts, gguf_value(source, "chat_template", str))
    return t


def gguf_kinds(types: list[int]) -> tuple[set[int], set[int]]:
    """The ids of control tokens, and of those that were added."""
    control = {id for id, type in enumerate(types) if type in (GGUF_CONTROL, GGUF_UNKNOWN)}
    return control, {id for id, type in enumerate(types) if type == GGUF_USER_DEFINED}


def from_gguf_bpe(source, texts: list[str], types: list[int], _) -> tuple[Tokenizer, bool]:
    """The vocabulary, and whether BOS goes before a text where the file does not say."""
    where, merges = source.path, gguf_value(source, "ggml.merges", [str], [])
    pre = source.pre or gguf_value(source, "ggml.pre", str)
    if pre in (None, "default"):
        pre = recognized(merges, where)
    if pre not in GGUF_PRE:
        raise ExportError(
            f"{where}: tokenizer.ggml.pre is {pre!r}, known are {', '.join(GGUF_PRE)}: "
            "say with --pre which of these it splits like, or export from the Hugging Face folder"
        )
    known, (control, added) = GGUF_PRE[pre], gguf_kinds(types)
    t = Tokenizer(BYTE_LEVEL | IGNORE_MERGES * known.ignore_merges | NFC * known.nfc)
    t.patterns = [pcre(pattern, where) for pattern in known.patterns]
    t.specials = {id: (int(id in control), texts[id]) for id in sorted(control | added)}
    set_tokens(t, texts, added)
    t.merges = merges_from_pairs(merges, {text: id for id, text in enumerate(texts)}, where)
    return t, pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


def from_gguf_sentencepiece(source, texts: list[str], types: list[int], scores: list[float]) -> tuple[Tokenizer, bool]:
    control, added = gguf_kinds(types)
    # GGUF writes user-defined tokens of spaces as such.
    texts = [text.replace(" ", "▁") if id in added else text for id, text in enumerate(texts)]
    t = sentencepiece(source.path, texts, scores, control, added)
    t.prefix = PREFIX_EVERY if gguf_value(source, "ggml.add_space_prefix", bool, True) else PREFIX_NONE
    t.unk = gguf_id(source, "unknown_token_id", texts)
    return t, True


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
        read_decoder(data.get("decoder"), path)
        for key, flag in ("ignore_merges", IGNORE_MERGES), ("byte_fallback", BYTE_FALLBACK), ("fuse_unk", FUSE_UNK):
            t.flags |= flag * switch(model, key, False)
        ids = vocab | {token["content"]: token["id"] for token in added}
        if not all(isinstance(text, str) for text in ids):
            raise ValueError("a token that is no text")
        texts, used = [], set(ids.values())
        if len(used) < len(ids):
            raise ValueError("two tokens of one id")
        place_tokens(texts, {id: (0, text) for text, id in ids.items()}, path)
        t.specials = {token["id"]: (added_flags(token, path), token["content"]) for token in added}
        beside = {  # what tokenizer.json says of an id or a text holds
            id: (flags, text)
            for id, (flags, text) in read_side_files(path.parent)[1].items()
            if ids.get(text, None if id in used else id) == id
        }
        place_tokens(texts, beside, path.parent)
        t.specials |= beside
        used |= beside.keys()
        set_tokens(t, texts, set(t.specials))
        t.kinds = [kind if id in used else UNUSED for id, kind in enumerate(t.kinds)]
        mark_added(t, t.specials.keys() - set(vocab.values()))
        t.merges = merges_from_pairs(model["merges"], vocab, path)
        t.unk = ids.get(model.get("unk_token"))
        if t.unk is None and model.get("unk_token") is not None and not t.flags & BYTE_LEVEL:
            raise ValueError(f"unk_token {shown(model['unk_token'])} is no token")
        read_post_processor(t, data.get("post_processor"), path)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise ExportError(
            f"{path}: not a tokenizer.json of the tokenizers library ({error!r}): fetch it again"
        ) from error
    read_settings(t, texts, path.parent, source)
    return t


def is_id(value) -> bool:
    return type(value) is int and 0 <= value < MAX_VOCAB


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
            t.flags |= NORMALIZES_SPACES
        case kind:
            raise ExportError(f"{where}: normalizer {kind} ({json.dumps(node)[:80]}) is not known: use another model")


def read_pre_tokenizer(t: Tokenizer, node: dict | None, where) -> None:
    match kind_of(node):
        case kind if t.flags & BYTE_LEVEL and kind not in (None, "Sequence"):
            raise ExportError(f"{where}: pre_tokenizer {kind} comes after ByteLevel, not supported: use another model")
        case None:
            pass
        case "Sequence":
            for part in node["pretokenizers"]:
                read_pre_tokenizer(t, part, where)
        case "ByteLevel" if not (switch(node, "add_prefix_space", True) and t.patterns):
            t.flags |= BYTE_LEVEL
            t.prefix = PREFIX_MISSING if switch(node, "add_prefix_space", True) else PREFIX_NONE
            t.patterns += [pcre(GPT2, where)] if switch(node, "use_regex", True) else []
        case "Digits":
            t.patterns.append(pcre(DIGIT if switch(node, "individual_digits", False) else DIGIT + "+", where))
        case "Metaspace" if node["replacement"] == "▁":
            always = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
            t.prefix = {"always": PREFIX_MISSING, "first": PREFIX_FIRST, "never": PREFIX_NONE}[always]
            t.patterns += [" [^ ]*"] if switch(node, "split", True) else []
        case "Split" if node["pattern"] == {"String": " "} and node["behavior"] == "MergedWithPrevious":
            pass  # Gemma's: after its normalizer no space is left to split at
        case "Split" if (node["behavior"], node["invert"]) == ("Isolated", False) or (
            (node["behavior"], node["invert"]) == ("Removed", True)
            and takes_everything(node["pattern"].get("Regex", ""))
        ):
            pattern = node["pattern"]
            t.patterns.append(pcre(pattern["Regex"], where) if "Regex" in pattern else re.escape(pattern["String"]))
        case kind:
            raise ExportError(
                f"{where}: pre_tokenizer {kind} ({json.dumps(node, ensure_ascii=False)[:120]}) is not known: "
                "use another model"
            )


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


DECODERS = {None, "Sequence", "ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip"}


def read_decoder(node: dict | None, where) -> None:
    """A token's bytes follow from its text; a decoder that makes something else of them is refused."""
    kind = kind_of(node)
    spaces = kind == "Replace" and (node["pattern"], node["content"]) == ({"String": "▁"}, " ")
    if kind not in DECODERS and not spaces:
        raise ExportError(f"{where}: decoder {kind} ({json.dumps(node)[:80]}) is not known: use another model")
    for part in node["decoders"] if kind == "Sequence" else []:
        read_decoder(part, where)


NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def switch(node: dict, key: str, default: bool) -> bool:
    value = node.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} is {shown(value)}, neither true nor false")
    return default if value is None else value


def special_text(value) -> str | None:
    """Of a token in the settings: its text, or a dictionary that holds it."""
    text = value["content"] if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise ValueError(f"a special token is {shown(text)}, no text")
    return text


def listed(tokens) -> list:
    """Of special tokens in the settings: a list, or a dictionary that gives each a name."""
    tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
    if not isinstance(tokens, list | None):
        raise ValueError(f"special tokens are {shown(tokens)}, no list")
    return tokens or []


def read_side_files(folder: Path) -> tuple[dict, dict[int, tuple[int, str]]]:
    """The settings and the tokens (id -> flags, text) that transformers finds beside a vocabulary. It reads
    special_tokens_map.json and added_tokens.json only where tokenizer_config.json has no added_tokens_decoder."""
    try:
        config, names, tokens = (
            read_json(folder / name) if is_listed(folder / name) else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        )
        if "added_tokens_decoder" in config:
            decoder, where = config["added_tokens_decoder"].items(), folder / "tokenizer_config.json"
            return names | config, {
                int(id): (added_flags(token, where), str(token["content"])) for id, token in decoder
            }
        settings = config | names
        lists = (listed(settings.get(key)) for key in ("additional_special_tokens", "extra_special_tokens"))
        special = {special_text(settings.get(key)) for key in NAMED_TOKENS} | {
            special_text(v) for one in lists for v in one
        }
        if not all(map(is_id, tokens.values())):
            raise ValueError("an id that is no index")
        return settings, {id: (1 if text in special else NORMALIZED, text) for text, id in tokens.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ExportError(
            f"{folder}: tokenizer_config.json, special_tokens_map.json or added_tokens.json holds something else than "
            f"the tokenizer's settings ({error!r}): fetch them again"
        ) from error


def added_flags(token: dict, where) -> int:
    """Of a token as the tokenizers library writes it."""
    if switch(token, "single_word", False):
        raise ExportError(
            f"{where}: added token {shown(token['content'])} is single_word, not supported here: set it to false"
        )
    special = switch(token, "special", False)
    flags = special | STRIP_LEFT * switch(token, "lstrip", False) | STRIP_RIGHT * switch(token, "rstrip", False)
    return int(flags) | NORMALIZED * switch(token, "normalized", not special)


def place_tokens(texts: list[str], tokens: dict[int, tuple[int, str]], where) -> None:
    """Puts added tokens where their ids say; a gap before one is padding."""
    odd = [id for id in tokens if not is_id(id)]
    if odd:
        raise ExportError(
            f"{where}: token id {shown(odd[0])} is not between 0 and {MAX_VOCAB}: fetch the tokenizer again"
        )
    gap = max(tokens, default=-1) + 1 - len(texts) - len(tokens)
    if gap > MOST_PADDING:
        raise ExportError(
            f"{where}: token id {max(tokens)} is {gap} beyond the other tokens: fetch the tokenizer again"
        )
    texts += [f"[PAD{id}]" for id in range(len(texts), max(tokens, default=-1) + 1)]
    for id, (_, text) in tokens.items():
        texts[id] = text


def read_settings(t: Tokenizer, texts: list[str], folder: Path, source) -> None:
    try:
        apply_settings(t, texts, folder, source)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ExportError(
            f"{folder}: tokenizer_config.json, special_tokens_map.json, generation_config.json or chat_template.jinja "
            f"holds something else than the tokenizer's settings ({error!r}): fetch them again"
        ) from error


def apply_settings(t: Tokenizer, texts: list[str], folder: Path, source) -> None:
    """What Hugging Face keeps beside the vocabulary: BOS and EOS, whether they are added, the chat template."""
    settings, _ = read_side_files(folder)
    ids = {text: id for id, text in enumerate(texts)}

    def special(key: str) -> int | None:
        text = special_text(settings.get(key))
        if text is not None and text not in ids:
            source.notes.append(f"{key} {shown(text)}: not used, the vocabulary has no such token")
        return ids.get(text)

    t.bos, t.eos = special("bos_token"), special("eos_token")
    if t.bos is not None and settings.get("add_bos_token") is not None:
        t.before = [t.bos] * switch(settings, "add_bos_token", False) + [id for id in t.before if id != t.bos]
    if t.eos is not None and settings.get("add_eos_token") is not None:
        t.after = [id for id in t.after if id != t.eos] + [t.eos] * switch(settings, "add_eos_token", False)
    if settings.get("tokenizer_class") in ("GPT2Tokenizer", "GPT2TokenizerFast") and "add_prefix_space" in settings:
        t.prefix = PREFIX_MISSING if switch(settings, "add_prefix_space", False) else PREFIX_NONE
    generation = read_json(folder / "generation_config.json") if is_listed(folder / "generation_config.json") else {}
    for ends in generation.get("eos_token_id"), text_config(source).get("eos_token_id"):
        t.end_of_generation += ends if isinstance(ends, list) else [] if ends is None else [ends]
    set_special_ids(t, texts, find_template(folder, settings))


# model_type -> how its tokenizer splits, where only vocab.json and merges.txt are there
GPT2_FILES = {
    **dict.fromkeys(["gpt2", "gpt_bigcode"], GGUF_PRE["gpt-2"]),
    **dict.fromkeys(["qwen2", "qwen3", "qwen3_moe"], GGUF_PRE["qwen2"]),
}


def from_gpt2_files(source) -> Tokenizer:
    """vocab.json and merges.txt, GPT-2's own files."""
    vocab = read_json(source.folder / "vocab.json")
    try:
        lines = whole_file(source.folder / "merges.txt").decode("utf-8").split("\n")
    except ValueError as error:
        raise ExportError(f"{source.folder / 'merges.txt'}: not UTF-8 ({error}): fetch it again") from error
    pairs = [line for line in lines if line and not line.startswith("#version")]
    settings, beside = read_side_files(source.folder)
    known = GPT2_FILES.get(source.config.get("model_type"))
    if known is None or not all(map(is_id, vocab.values())) or sorted(vocab.values()) != list(range(len(vocab))):
        raise ExportError(
            f"{source.folder}: vocab.json without tokenizer.json is only understood for {', '.join(GPT2_FILES)}: save "
            "the tokenizer with save_pretrained, which writes tokenizer.json"
        )
    if settings.get("add_prefix_space") and known != GPT2_FILES["gpt2"]:
        raise ExportError(
            f"{source.folder}: add_prefix_space is true: only GPT-2's tokenizer takes it: set it to false"
        )
    texts = sorted(vocab, key=vocab.get)
    t = Tokenizer(
        flags=BYTE_LEVEL | NFC * known.nfc,
        prefix=PREFIX_MISSING if settings.get("add_prefix_space") else PREFIX_NONE,
        patterns=[pcre(pattern, source.folder) for pattern in known.patterns],
        merges=merges_from_pairs(pairs, vocab, source.folder),
    )
    place_tokens(texts, beside, source.folder)
    names = {special_text(settings.get(key)) for key in NAMED_TOKENS} | {"<|endoftext|>"}
    t.specials = {id: (1, text) for id, text in enumerate(texts) if text in names}
    t.specials |= {id: (flags | int(text in names), text) for id, (flags, text) in beside.items()}
    set_tokens(t, texts, set(beside))
    read_settings(t, texts, source.folder, source)
    end = vocab.get("<|endoftext|>")
    t.bos = end if t.bos is None and known == GPT2_FILES["gpt2"] else t.bos
    if t.eos is None and end is not None:
        t.eos = end
        t.end_of_generation.append(end)
    return t


# sentencepiece_model.proto: ModelProto.SentencePiece.Type, TrainerSpec.ModelType
PIECE_NORMAL, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER_DEFINED, PIECE_UNUSED, PIECE_BYTE = range(1, 7)
BPE = 2


def protobuf(data: bytes) -> dict[int, list]:
    """The fields of a message, by number: integers, floats as 4 bytes, strings and messages as bytes."""
    fields, at = {}, 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an integer of more than ten bytes")

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
        model = protobuf(whole_file(path))
        pieces = [protobuf(piece) for piece in model[1]]
        texts = [piece[1][0].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece[2][0])[0] if 2 in piece else 0.0 for piece in pieces]
        types = [piece.get(3, [PIECE_NORMAL])[0] for piece in pieces]
        trainer, normalizer = protobuf(model[2][0]), protobuf(model[3][0])
        name = normalizer.get(1, [b"?"])[0].decode()
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ExportError(f"{path}: not a SentencePiece model ({error!r}): fetch it again") from error
    algorithm = trainer.get(3, [1])[0]
    if algorithm != BPE:
        raise ExportError(
            f"{path}: trainer_spec.model_type is {algorithm}, only {BPE} (BPE) is known: use another model"
        )
    if normalizer.get(2, [b""])[0] or normalizer.get(4, [1])[0]:
        raise ExportError(
            f"{path}: normalizer {name!r} changes the text (a character map, or extra white space removed), only "
            "identity is known: export from a folder that has tokenizer.json"
        )
    control = {id for id, type in enumerate(types) if type in (PIECE_CONTROL, PIECE_UNKNOWN)}
    added = {id for id, type in enumerate(types) if type == PIECE_USER_DEFINED}
    settings, beside = read_side_files(path.parent)
    names = {special_text(settings.get(key)) for key in NAMED_TOKENS}
    place_tokens(texts, beside, path.parent)
    scores += [0.0] * (len(texts) - len(scores))
    control |= {id for id, text in enumerate(texts) if text in names}
    control |= {id for id, (flags, _) in beside.items() if flags & 1}
    t = sentencepiece(path, texts, scores, control, added - set(beside), set(beside))
    t.specials |= {id: (flags & ~NORMALIZED | int(id in control), text) for id, (flags, text) in beside.items()}
    t.prefix = PREFIX_EVERY if normalizer.get(3, [1])[0] else PREFIX_NONE
    if settings:  # transformers' LlamaTokenizer has its own ways; without its settings, they are SentencePiece's
        prefixed = settings.get("add_prefix_space")
        t.prefix = t.prefix and (PREFIX_MISSING if settings.get("legacy") else PREFIX_FIRST)
        t.prefix = PREFIX_NONE if prefixed is False else t.prefix
    t.unk = next((id for id, type in enumerate(types) if type == PIECE_UNKNOWN), None)
    read_settings(t, texts, path.parent, source)
    bos, eos = trainer.get(41, [1])[0], trainer.get(42, [2])[0]
    t.bos = bos if t.bos is None and bos in control else t.bos
    t.eos = eos if t.eos is None and eos in control else t.eos
    t.end_of_generation += [] if t.eos is None else [t.eos]
    if settings.get("add_bos_token") is not False:
        t.before = t.before or [t.bos] * (t.bos is not None)
    return t


def sentencepiece(
    where,
    texts: list[str],
    scores: list[float],
    control: set[int],
    added: set[int],
    beside: frozenset | set = frozenset(),
) -> Tokenizer:
    """The vocabulary of a SentencePiece model. Its user-defined tokens (`added`) come before any other merge; no merge
    makes those that were added `beside` it."""
    scores = [0.0 if id in added else score for id, score in enumerate(scores)]
    bytes_ = {id for id, text in enumerate(texts) if re.fullmatch("<0x[0-9A-F]{2}>", text)}
    t = Tokenizer(
        BYTE_FALLBACK | FUSE_UNK | NORMALIZES_SPACES,
        specials={id: (int(id in control), texts[id]) for id in sorted(control | added)},
    )
    set_tokens(t, texts, added)
    mark_added(t, set(beside))
    t.merges = merges_from_scores(where, texts, scores, bytes_ | control | beside)
    return t


def from_llama2c(path: Path, source) -> Tokenizer:
    """llama2.c's tokenizer.bin: the longest length, then a score, a length and the bytes of each token; ids 0 to 2 are
    unknown, BOS and EOS."""
    data, texts, scores, at = whole_file(path), [], [], 4
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
        raise ExportError(
            f"{path}: not a tokenizer of llama2.c ({error}): give its tokenizer.bin, a tokenizer.model or a "
            "tokenizer.json"
        ) from error
    if len(texts) != source.config.get("vocab_size", len(texts)):
        raise ExportError(
            f"{path}: {len(texts)} tokens, but the model's vocab_size is {source.config['vocab_size']}: "
            "give the tokenizer of this model"
        )
    texts[:3] = "<unk>", "<s>", "</s>"
    t = sentencepiece(path, texts, scores, {0, 1, 2}, set())
    t.prefix, t.unk, t.bos, t.eos, t.before = PREFIX_EVERY, 0, 1, 2, [1]
    set_special_ids(t, texts, None)
    return t
