"""llama2.c checkpoints in float32: version 0 (a header of 7 integers) and version 1 (a magic number, 256 bytes)."""

from pathlib import Path

from exporter.errors import ExportError
from exporter.source import File, Source, array_tensor
from exporter.weights import size

LLAMA2C_V1 = 0x616B3432  # "ak42"


def open_llama2c(path: Path, tokenizer_file: Path | None) -> Source:
    """Version 0 (a header of 7 integers) and 1 (a magic number, 256 bytes of header); float32 weights."""
    source = Source("llama2c", path, path, tokenizer_file)
    file = File(path)
    versioned, source.config = read_header(path, file)
    order = tensors_in_order(source.config, versioned)
    offset = 256 if versioned else 28
    expected = offset + 4 * sum(size(shape) for _, shape in order)
    if expected != file.size:
        raise ExportError(
            f"{path}: {file.size} bytes, its header says {expected}: it is truncated or no llama2.c checkpoint: "
            "fetch it again"
        )
    for name, shape in order:
        source.tensors[name] = array_tensor(file, offset, "<f4", "f32", shape)
        offset += 4 * size(shape)
    return source


def read_header(path: Path, file: File) -> tuple[bool, dict]:
    """(whether it is version 1, the config under Hugging Face's names)"""
    if file.size < 256:
        raise ExportError(f"{path}: {file.size} bytes: not a llama2.c checkpoint: fetch it again")
    header = file.read(0, 256)
    head = header.view("<i4").tolist()
    versioned = head[0] == LLAMA2C_V1
    if versioned and head[1] != 1:
        raise ExportError(
            f"{path}: llama2.c version {head[1]}: export it with --version 0 or 1 of llama2.c's export.py"
        )
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = head[2:9] if versioned else head[:7]
    tied = bool(header[36]) if versioned else vocab > 0
    vocab = abs(vocab)
    if (
        min(dim, hidden, layers, heads, kv_heads, vocab, seq_len) <= 0
        or dim % heads
        or max(dim, vocab) > 1 << 24
        or 8 * dim * layers > file.size  # two norms each
    ):
        raise ExportError(
            f"{path}: header {head[:9]}: not the seven positive integers of a llama2.c checkpoint (dim, hidden_dim, "
            "n_layers, n_heads, n_kv_heads, vocab_size, seq_len): fetch it again"
        )
    return versioned, dict(
        model_type="llama2c",
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=seq_len,
        tie_word_embeddings=tied,
    )


def tensors_in_order(config: dict, versioned: bool) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as they follow each other in the file."""
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = dim // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    norms = [("attention_norm", (dim,)), ("mlp_norm", (dim,))]
    attention = [("q_proj", (dim, dim)), ("k_proj", (kv, dim)), ("v_proj", (kv, dim)), ("o_proj", (dim, dim))]
    mlp = [("gate_proj", (hidden, dim)), ("down_proj", (dim, hidden)), ("up_proj", (hidden, dim))]
    embed, final = ("embed_tokens.weight", (vocab, dim)), ("norm.weight", (dim,))
    tables = [("freq_cis", (2 * config["max_position_embeddings"] * (head_dim // 2),))]

    def stacked(parts):
        layers = range(config["num_hidden_layers"])
        return [(f"layers.{layer}.{name}.weight", shape) for name, shape in parts for layer in layers]

    if versioned:
        order = [*stacked(norms), final, embed, *stacked(attention + mlp)]
    else:
        order = [embed, *stacked(norms[:1] + attention + norms[1:] + mlp), final, *tables]
    return order if config["tie_word_embeddings"] else [*order, ("lm_head.weight", (vocab, dim))]
