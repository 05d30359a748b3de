"""--explain counts what a look at the tensors of the model file counts."""

import re
import subprocess

import checkpoints
import numpy as np
import pytest
from conftest import exported, run_binary
from numpy_model import load

PROMPT = "I like to eat"
MODELS = ["llama_mha", "llama_mqa", "llama_gqa", "deepseek_v2", "gemma3", "gpt_oss", "gpt2", "qwen3_moe"]


def run(binary, *arguments):
    done = subprocess.run([str(a) for a in (binary, *arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def counts(config, tensors):
    """Of one token: multiply-adds with matrices, their floats where rows are packed in panels of 32, and all other
    floats. Of experts' matrices only those that it hits."""
    multiply_adds = packed = vectors = 0
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or "position" in name or name.endswith(("norm.weight", "bias")):
            vectors += tensor.size
        elif name != "embed_tokens.weight" or "lm_head.weight" not in tensors:  # of the embedding a row is looked up
            share = config["num_experts_per_tok"] / config["n_routed_experts"] if ".experts." in name else 1
            rows = tensor.shape[-1 if name.endswith("w_uk.weight") else -2]  # W_UK is read transposed
            multiply_adds += share * tensor.size
            packed += share * tensor.size // rows * -(-rows // 32) * 32
    return multiply_adds, packed, vectors


@pytest.mark.parametrize("name", MODELS)
def test_totals(name, tmp_path):
    source = checkpoints.build(checkpoints.load(name), tmp_path / "model")
    weights = exported(source, tmp_path / "model.safetensors", "f32")
    config, tensors = load(weights)[:2]
    binary = run_binary(config["attention"], kv="f32")
    text = run(binary, weights, "-i", PROMPT, "--explain", "-q")
    position, multiply_adds, weight_bytes, kv_bytes, kv_written = (
        int(n.replace(",", ""))
        for n in re.search(
            r"position (\S+): (\S+) multiply-adds; (\S+) bytes of weights, (\S+) of the cache read, (\S+) written", text
        ).groups()
    )
    assert position == len(PROMPT) - 1

    mla = config["attention"] == "mla"
    k_dim = config["kv_lora_rank"] + config["qk_rope_head_dim"] if mla else config["head_dim"]
    v_dim = config["kv_lora_rank"] if mla else config["head_dim"]
    seen = [min(window or len(PROMPT), len(PROMPT)) for window in config["window"]]
    pairs = config["n_heads"] * (k_dim + v_dim) * sum(seen)
    products, packed, vectors = counts(config, tensors)
    assert multiply_adds == products + pairs
    assert 4 * (products + vectors) <= weight_bytes <= 4 * (packed + vectors)  # panels are narrower elsewhere

    kept = k_dim if mla else 2 * config.get("n_kv_heads", 1) * config["head_dim"]
    assert (kv_bytes, kv_written) == (4 * kept * sum(seen), 4 * kept * config["n_layers"])


@pytest.mark.parametrize("name", MODELS)
def test_the_lines_of_all_layers_are_the_total(name, tmp_path):
    weights = exported(checkpoints.build(checkpoints.load(name), tmp_path / "model"), tmp_path / "model.safetensors")
    config = load(weights)[0]
    sums = np.zeros(4, int)  # multiply-adds; bytes of weights, of the cache that are read, that are written
    for layer in range(config["n_layers"]):
        text = run(run_binary(config["attention"]), weights, "-i", PROMPT, "--explain", "-q", "--layer", layer)
        *lines, total = text.splitlines()[1:]
        ends = lines.index(f"{config['n_layers']} layers:")
        for line in lines[: ends if layer else None]:  # those after the layers once
            adds, bytes_of = (int(n.replace(",", "").strip() or 0) for n in (line[75:89], line[89:103]))
            sums += [adds, *(bytes_of * line.endswith(x) for x in (tuple("0123456789"), "KV read", "KV written"))]
    assert list(sums) == [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", total)[1:]]
