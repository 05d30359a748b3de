"""Writes a Hugging Face folder of random weights: a Llama, a Mixtral with EXPERTS, a DeepSeek V2 without any for mla.

usage: random_model.py FOLDER mha|gqa|mqa|mla HIDDEN [EXPERTS EXPERTS_PER_TOKEN]
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DIM, LAYERS, HEADS, VOCAB = 1024, 6, 16, 260  # with 4096 hidden: 97 MB of q8 a token, more than caches hold
WIDTH = DIM // HEADS
KV_HEADS = {"mha": HEADS, "gqa": 4, "mqa": 1, "mla": HEADS}
# A latent of four heads and a rotated key of half a head: the proportions of DeepSeek V2.
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 4 * WIDTH,
    "qk_nope_head_dim": WIDTH,
    "qk_rope_head_dim": WIDTH // 2,
    "v_head_dim": WIDTH,
    "rms_norm_eps": 1e-6,
}


def config(attention: str, hidden: int, experts: int, per_token: int) -> dict:
    result = {
        "model_type": "deepseek_v2" if attention == "mla" else "mixtral" if experts else "llama",
        "hidden_size": DIM,
        "intermediate_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS[attention],
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    result |= MLA if attention == "mla" else {}
    return result | ({"num_local_experts": experts, "num_experts_per_tok": per_token} if experts else {})


def attention_shapes(attention: str) -> dict:
    if attention == "mla":
        rank, rope = MLA["kv_lora_rank"], MLA["qk_rope_head_dim"]
        return {
            "q_proj": (HEADS * (WIDTH + rope), DIM),
            "kv_a_proj_with_mqa": (rank + rope, DIM),
            "kv_a_layernorm": (rank,),
            "kv_b_proj": (HEADS * 2 * WIDTH, rank),
            "o_proj": (DIM, DIM),
        }
    kv = WIDTH * KV_HEADS[attention]
    return {"q_proj": (DIM, DIM), "k_proj": (kv, DIM), "v_proj": (kv, DIM), "o_proj": (DIM, DIM)}


def shapes(attention: str, hidden: int, experts: int) -> dict:
    result = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        result |= {at + "input_layernorm.weight": (DIM,), at + "post_attention_layernorm.weight": (DIM,)}
        result |= {at + f"self_attn.{name}.weight": shape for name, shape in attention_shapes(attention).items()}
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
    folder, attention = Path(sys.argv[1]), sys.argv[2]
    hidden, experts, per_token = (*map(int, sys.argv[3:]), 0, 0)[:3]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {name: tensor(rng, shape) for name, shape in shapes(attention, hidden, experts).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(attention, hidden, experts, per_token)))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))


if __name__ == "__main__":
    main()
