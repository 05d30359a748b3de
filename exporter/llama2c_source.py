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
    source.config = dict(
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
    head_dim = dim // heads
    norms = [("attention_norm", (dim,)), ("mlp_norm", (dim,))]
    attention = [
        ("q_proj", (dim, dim)),
        ("k_proj", (kv_heads * head_dim, dim)),
        ("v_proj", (kv_heads * head_dim, dim)),
        ("o_proj", (dim, dim)),
    ]
    mlp = [("gate_proj", (hidden, dim)), ("down_proj", (dim, hidden)), ("up_proj", (hidden, dim))]
    embed, final = ("embed_tokens.weight", (vocab, dim)), ("norm.weight", (dim,))
    tables = [("freq_cis", (2 * seq_len * (head_dim // 2),))]

    def stacked(parts):
        return [(f"layers.{layer}.{name}.weight", shape) for name, shape in parts for layer in range(layers)]

    if versioned:
        order = [*stacked(norms), final, embed, *stacked(attention + mlp)]
    else:
        order = [embed, *stacked(norms[:1] + attention + norms[1:] + mlp), final, *tables]
    order += [] if tied else [("lm_head.weight", (vocab, dim))]
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
