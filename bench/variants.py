"""One model in three attention layouts, and experts beside a dense MLP: does decode follow the bytes?

usage: variants.py MODEL.gguf [--rounds N]        (part of make bench)

MODEL is exported as it is (GQA), as MHA and as MLA (export.py --as): the same text, other KV bytes. Predicted is the
speed at which the bytes of a token pass at the rate that GQA reached at the shortest context; experts and the dense
model have random weights and the same active bytes. Rounds alternate; figures are medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "bench-variants"


def output(*command) -> str:
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def binary(attention: str) -> Path:
    return ROOT / output("make", "-s", "binary", f"ATTENTION={attention}").strip()


def export(source: Path, name: str, *flags: str) -> Path:
    weights = OUT / f"{name}.safetensors"
    output(sys.executable, ROOT / "export.py", source, "-o", weights, *flags)
    return weights


def speeds(weights: Path, attention: str) -> dict:
    """{context: (tokens/s, bytes per token)}"""
    report = json.loads(output(binary(attention), weights, "--bench", "-q"))
    tests = [test for test in report["tests"] if test["test"].startswith("tg")]
    return {test["context"]: (test["tokens_per_second"], test["bytes_per_token"]) for test in tests}


def medians(models: dict, rounds: int) -> dict:
    """{name: {context: (tokens/s, bytes per token)}} of {name: (weights, attention)}"""
    runs = [{name: speeds(*model) for name, model in models.items()} for _ in range(rounds)]
    return {
        name: {
            context: (statistics.median(run[name][context][0] for run in runs), runs[0][name][context][1])
            for context in runs[0][name]
        }
        for name in models
    }


def random_llama(name: str, experts: int, per_token: int, hidden: int) -> Path:
    """A Hugging Face folder: a Mixtral with `experts`, or a Llama where experts is 0."""
    dim, layers, heads, vocab = 1024, 4, 16, 260
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "mixtral" if experts else "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": per_token}
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (dim,), at + "post_attention_layernorm.weight": (dim,)}
        shapes |= {at + "self_attn.q_proj.weight": (dim, dim), at + "self_attn.o_proj.weight": (dim, dim)}
        shapes |= {at + f"self_attn.{x}_proj.weight": (dim // 4, dim) for x in "kv"}
        mlp = {"gate": (hidden, dim), "down": (dim, hidden), "up": (hidden, dim)}
        if experts:
            shapes[at + "block_sparse_moe.gate.weight"] = (experts, dim)
            for e in range(experts):
                for w, shape in zip(("w1", "w2", "w3"), mlp.values(), strict=True):
                    shapes[at + f"block_sparse_moe.experts.{e}.{w}.weight"] = shape
        else:
            shapes |= {at + f"mlp.{x}_proj.weight": shape for x, shape in mlp.items()}
    rng = np.random.default_rng(0)
    tensors = {
        key: np.ones(shape, np.float32)
        if len(shape) == 1
        else (rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])).astype(np.float16)
        for key, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer(vocab)))
    return folder


def byte_tokenizer(vocab: int) -> dict:
    """GPT-2's letters for the 256 bytes, no merges, and special tokens up to the vocabulary's size."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    added = [
        {
            "id": i,
            "content": f"<|{i}|>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in range(256, vocab)
    ]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)

    layouts = {"gqa": (), "mha": ("--as", "mha"), "mla": ("--as", "mla")}
    results = medians({x: (export(options.model, x, *flags), x) for x, flags in layouts.items()}, options.rounds)
    shortest = min(results["gqa"])
    speed, size = results["gqa"][shortest]
    print(f"{options.model.stem}, decode; bytes pass at {speed * size / 1e9:.1f} GB/s (GQA at {shortest})")
    print(f"{'layout':8}{'context':>8}{'MB a token':>12}{'tokens/s':>10}{'predicted':>11}{'ratio':>7}")
    for name, contexts in results.items():
        for context, (measured, size_here) in contexts.items():
            predicted = speed * size / size_here
            ratio = measured / predicted
            print(f"{name:8}{context:8}{size_here / 1e6:12.1f}{measured:10.1f}{predicted:11.1f}{ratio:7.2f}")

    pair = {
        "experts": export(random_llama("experts", 8, 2, 2048), "experts-q8", "--type", "q8"),
        "dense": export(random_llama("dense", 0, 0, 4096), "dense-q8", "--type", "q8"),
    }
    moe = medians({name: (weights, "gqa") for name, weights in pair.items()}, options.rounds)
    context = min(moe["dense"])
    (experts, experts_bytes), (dense, dense_bytes) = moe["experts"][context], moe["dense"][context]
    print(f"2 of 8 experts {experts:.1f} tokens/s of {experts_bytes / 1e6:.1f} MB, ", end="")
    print(f"dense {dense:.1f} of {dense_bytes / 1e6:.1f} MB: ratio {experts / dense:.2f}")
    path = ROOT / "bench" / "results" / "variants.json"
    path.write_text(json.dumps({"layouts": results, "experts": moe, "rounds": options.rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
