"""The model's tokenizer as NAME.tokenizer.bin, which tokenizer.cpp reads.

Whatever the source calls it, a tokenizer here is one thing: text is split at special tokens, normalised, split into
pieces by patterns applied in order, and in every piece the pair of neighbours whose merge has the lowest rank is
merged, the leftmost first, until no pair is left. Byte-level BPE starts from bytes, SentencePiece BPE from code
points, with bytes for those it lacks.

The file. Integers are unsigned 32 bits, little-endian; a string is its length in bytes, the bytes, and zeros up to a
multiple of 4; everything is aligned to 4 bytes, and the file ends where the last section ends.

    magic "attn.tok", version 2, flags, prefix, bos, unk (NONE = 2^32 - 1), vocab_size, n_merges, n_specials,
    n_patterns, n_before, n_after, n_end_of_generation
    offsets[vocab_size + 1]  of each token in the string below, the first 0
    kinds[vocab_size]        one byte each, padded to 4: 0 text, 1 byte that others fall back to, 2 control, 3 unused,
                             4 text that is found only as it is written, before anything splits it
    string                   the tokens one after the other: the bytes that each stands for; a control token's name
    merges[n_merges][3]      left id, right id, merged id; the rank is the index
    specials[n_specials]     id, flags (1 control, 2 takes the white space to its left, 4 to its right,
                             8 is looked for in normalized text), string: text
    before[n_before]         ids put before a text: BOS
    after[n_after]           and after it: EOS
    end_of_generation[n_end_of_generation]  ids
    patterns[n_patterns]     strings, in PCRE2's syntax; a match is a piece and so is what lies between two
    chat                     strings: why there is no template ("": there is one), the template in Jinja; the number
                             of its variables, then for each two strings: name (bos_token, ...), text

Flags, prefix and kinds have their names in vocabularies.py.
SentencePiece's tokens are written with spaces for U+2581: that character is read as a space in texts, as theirs is.
"""

import struct
from pathlib import Path

import numpy as np

from exporter.errors import ExportError, shown
from exporter.vocabularies import MAX_VOCAB, UNUSED, Tokenizer, is_id, read_tokenizer, text_config

MAGIC, VERSION, NONE = b"attn.tok", 2, 0xFFFFFFFF


def write_tokenizer(source, path: Path) -> tuple[str, list[str]]:
    """Writes the tokenizer of a sources.Source; returns what is to be said of the chat template, and the tokens that
    end a text."""
    tokenizer = read_tokenizer(source)
    ids = [*tokenizer.before, *tokenizer.after, *tokenizer.end_of_generation]
    for id in ids + [id for id in (tokenizer.bos, tokenizer.unk) if id is not None]:
        if not is_id(id):
            raise ExportError(
                f"{source.path}: token id {id!r} of BOS, EOS, unknown or the end of a text is no index: fetch the "
                "tokenizer again"
            )
    size = text_config(source).get("vocab_size") or len(tokenizer.tokens)
    beyond = sorted({id for id in tokenizer.end_of_generation if id >= size})
    if beyond:
        source.notes.append(f"end of a text {shown(beyond)}: not used, the model has {size} tokens")
    fit_vocabulary(tokenizer, size)
    try:
        path.write_bytes(serialize(tokenizer))
    except UnicodeEncodeError as error:
        raise ExportError(
            f"{source.path}: a token or the chat template holds {error.object[error.start]!r}, half of a character: "
            "fetch the tokenizer again"
        ) from error
    return tokenizer.chat.summary(), [
        tokenizer.tokens[id].decode("utf-8", "replace") for id in tokenizer.end_of_generation
    ]


def fit_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """As many tokens as the model has rows: the rows that pad an embedding stand for nothing."""
    if not 0 < size <= MAX_VOCAB:
        raise ExportError(f"the config's vocab_size {size} is not between 1 and {MAX_VOCAB}: fetch the model again")
    for id in range(len(tokenizer.tokens), size):
        tokenizer.tokens.append(b"[PAD%d]" % id)
        tokenizer.kinds.append(UNUSED)
    del tokenizer.tokens[size:], tokenizer.kinds[size:]
    tokenizer.merges = [merge for merge in tokenizer.merges if max(merge) < size]
    tokenizer.specials = {id: special for id, special in tokenizer.specials.items() if id < size}
    tokenizer.end_of_generation = sorted({id for id in tokenizer.end_of_generation if id < size})
    for id in tokenizer.before + tokenizer.after:
        if id >= size:
            raise ExportError(
                f"token {id} goes around every text, the model has {size}: this tokenizer belongs to another model"
            )


def serialize(t: Tokenizer) -> bytes:
    def string(value: bytes | str) -> bytes:
        value = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        return struct.pack("<I", len(value)) + value + bytes(-len(value) % 4)

    def integers(values) -> bytes:
        return np.asarray(values, np.uint32).astype("<u4").tobytes()

    def or_none(id: int | None) -> int:
        return NONE if id is None or id >= len(t.tokens) else id

    counts = [
        len(part) for part in (t.tokens, t.merges, t.specials, t.patterns, t.before, t.after, t.end_of_generation)
    ]
    lengths = np.fromiter((len(token) for token in t.tokens), np.uint32, len(t.tokens))
    kinds = bytes(t.kinds)
    chat = t.chat
    return b"".join(
        [
            MAGIC,
            integers([VERSION, t.flags, t.prefix, or_none(t.bos), or_none(t.unk), *counts]),
            integers(np.concatenate([[0], np.cumsum(lengths)])),
            kinds + bytes(-len(kinds) % 4),
            string(b"".join(t.tokens)),
            integers(t.merges),
            *(integers([id, flags]) + string(text) for id, (flags, text) in t.specials.items()),
            integers(t.before),
            integers(t.after),
            integers(t.end_of_generation),
            *(string(pattern) for pattern in t.patterns),
            string(chat.refusal),
            string(chat.source),
            integers([len(chat.variables)]),
            *(string(text) for variable in chat.variables.items() for text in variable),
        ]
    )
