"""Writes a Hugging Face folder of random weights: a Mixtral with EXPERTS, or a Llama where they are 0.

usage: random_model.py FOLDER EXPERTS EXPERTS_PER_TOKEN HIDDEN
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DIM, LAYERS, HEADS, KV_HEADS, VOCAB = 1024, 6, 16, 4, 260  # 6 layers: 97 MB of q8 a token


def config(experts: int, per_token: int, hidden: int) -> dict:
    result = {
        "model_type": "mixtral" if experts else "llama",
        "hidden_size": DIM,
        "intermediate_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    return result | ({"num_local_experts": experts, "num_experts_per_tok": per_token} if experts else {})


def shapes(experts: int, hidden: int) -> dict:
    result = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    kv = DIM * KV_HEADS // HEADS
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        result |= {at + "input_layernorm.weight": (DIM,), at + "post_attention_layernorm.weight": (DIM,)}
        result |= {at + f"self_attn.{x}_proj.weight": (n, DIM) for x, n in zip("qkvo", (DIM, kv, kv, DIM), strict=True)}
        mlp = {"gate": (hidden, DIM), "down": (DIM, hidden), "up": (hidden, DIM)}
        if not experts:
            result |= {at + f"mlp.{x}_proj.weight": shape for x, shape in mlp.items()}
            continue
        at += "block_sparse_moe."
        result[at + "gate.weight"] = (experts, DIM)
        names = dict(zip(("w1", "w2", "w3"), mlp.values(), strict=True))
        result |= {at + f"experts.{e}.{w}.weight": shape for e in range(experts) for w, shape in names.items()}
    return result


def tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return (rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])).astype(np.float16)


def byte_tokenizer() -> dict:
    """GPT-2's letters for the 256 bytes, no merges, and special tokens up to the vocabulary's size."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": f"<|{i}|>", "special": True, **flags} for i in range(256, VOCAB)]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": split,
        "model": {"type": "BPE", "vocab": {letters[b]: b for b in range(256)}, "merges": []},
    }


def main() -> None:
    folder, (experts, per_token, hidden) = Path(sys.argv[1]), (int(x) for x in sys.argv[2:])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {name: tensor(rng, shape) for name, shape in shapes(experts, hidden).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(experts, per_token, hidden)))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))


if __name__ == "__main__":
    main()
