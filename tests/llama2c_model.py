"""Random llama2.c checkpoints."""

import struct

import numpy as np


def llama2c_file(path, version, shared, config=(64, 96, 2, 4, 2, 40, 16)):
    """A checkpoint in version 0 or 1 of its format, as llama2.c's export.py orders it; {our name: array}."""
    dim, hidden, layers, heads, kv_heads, vocab, length = config
    random, kv = np.random.default_rng(3), dim // heads * kv_heads
    shapes = dict(
        attention_norm=(dim,),
        q_proj=(dim, dim),
        k_proj=(kv, dim),
        v_proj=(kv, dim),
        o_proj=(dim, dim),
        mlp_norm=(dim,),
        gate_proj=(hidden, dim),
        down_proj=(dim, hidden),
        up_proj=(hidden, dim),
    )
    weights = {
        f"layers.{layer}.{name}.weight": random.normal(size=shape)
        for name, shape in shapes.items()
        for layer in range(layers)
    }
    weights |= {
        "embed_tokens.weight": random.normal(size=(vocab, dim)),
        "norm.weight": random.normal(size=dim),
        "lm_head.weight": random.normal(size=(vocab, dim)),
    }
    stacked = [key for name in shapes for key in (f"layers.{layer}.{name}.weight" for layer in range(layers))]
    norms = [key for key in stacked if "norm" in key]
    last = [] if shared else ["lm_head.weight"]
    if version == 0:
        head = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab if shared else -vocab, length)
        order = ["embed_tokens.weight", *stacked, "norm.weight", "tables", *last]
    else:
        head = (struct.pack("<Ii7iB", 0x616B3432, 1, *config, shared)).ljust(256, b"\0")
        order = [*norms, "norm.weight", "embed_tokens.weight", *(key for key in stacked if key not in norms), *last]
    tables = np.zeros(length * (dim // heads))
    path.write_bytes(head + b"".join(weights.get(key, tables).astype("<f4").tobytes() for key in order))
    return weights
