"""--explain counts what a look at the tensors of the model file counts."""

import json
import re
import subprocess

import checkpoints
import pytest
from conftest import exported, run_binary
from numpy_model import load

PROMPT = "I like to eat"
MODELS = ["llama_mha", "llama_mqa", "llama_gqa", "deepseek_v2", "gemma3", "gpt_oss", "gpt2", "qwen3_moe"]


def run(binary, *arguments):
    done = subprocess.run([str(a) for a in (binary, *arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def matrix_elements(config, tensors):
    """Elements of the matrices that one token is multiplied with: of experts only those it takes."""
    count = 0
    for name, tensor in tensors.items():
        if name == "embed_tokens.weight" and "lm_head.weight" in tensors:
            continue  # a row of it is looked up
        if tensor.ndim < 2 or "position" in name or name.endswith(("norm.weight", "bias")):
            continue
        share = config["num_experts_per_tok"] / config["n_routed_experts"] if ".experts." in name else 1
        count += tensor.size * share
    return count


@pytest.mark.parametrize("name", MODELS)
def test_totals(name, tmp_path):
    source = checkpoints.build(checkpoints.load(name), tmp_path / "model")
    weights = exported(source, tmp_path / "model.safetensors", "f32")
    config, tensors = load(weights)[:2]
    binary = run_binary(config["attention"], kv="f32")
    text = run(binary, weights, "-i", PROMPT, "--explain", "-q")
    position, multiply_adds, weight_bytes, kv_bytes = (
        int(n.replace(",", ""))
        for n in re.search(
            r"position (\S+): (\S+) multiply-adds; (\S+) bytes of weights, (\S+) of the cache", text
        ).groups()
    )
    assert position == len(PROMPT) - 1

    mla = config["attention"] == "mla"
    k_dim = config["kv_lora_rank"] + config["qk_rope_head_dim"] if mla else config["head_dim"]
    v_dim = config["kv_lora_rank"] if mla else config["head_dim"]
    seen = [min(window or len(PROMPT), len(PROMPT)) for window in config["window"]]
    pairs = config["n_heads"] * (k_dim + v_dim) * sum(seen)
    assert multiply_adds == matrix_elements(config, tensors) + pairs

    kept = k_dim if mla else 2 * config.get("n_kv_heads", 1) * config["head_dim"]
    assert kv_bytes == 4 * kept * (sum(seen) + config["n_layers"])  # what attention reads, and the new row

    run(binary, weights, "-i", PROMPT, "-n", 1, "-q", "--stats", tmp_path / "stats.json")
    stats = json.loads((tmp_path / "stats.json").read_text())
    small = {name: 4 * tensors[name].size for name in tensors}
    tables = sum(small[name] for name in small if "inv_freq" in name or "position" in name or "sinks" in name)
    biases = sum(small[name] for name in small if ".experts." in name and name.endswith("bias"))
    reported = stats["weight_bytes_per_token"] - tables  # the report counts these, and the biases of all experts
    assert reported - biases <= weight_bytes <= reported
