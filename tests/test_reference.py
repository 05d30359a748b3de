"""What Hugging Face's transformers computes, in float32, is what this project computes: see make_reference.py."""

import functools
import json
import subprocess
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import ROOT, SANITIZE, exported, exported_path, run_binary, tiny
from numpy_model import NumpyModel

from exporter.architectures import ARCHITECTURES

# Of the largest logit. Rounding moves the reference itself by up to 6e-6 (float32 against float64), and this project's
# logits lie up to 7e-6 from it; a wrong GELU (tanh's for erf's) moves them by 3e-4 and every other feature by far more.
TOLERANCE = 5e-5
TEXT = Path("/usr/share/common-licenses/GPL-3")
STORIES = ROOT.parent / "shared/models/stories260K.bin"


@functools.cache
def real(name, type):
    """(reference, path of the exported model); skips where the model is not there. type None: the file's own."""
    if SANITIZE == "1":
        pytest.skip("the tiny models take the same paths under the sanitizers")
    reference = json.loads((checkpoints.REFERENCE / f"real_{name}.json").read_text())
    source = ROOT / "models" / reference["file"]
    if not source.exists():
        pytest.skip(f"models/{source.name} is not here: `make models/{source.name}` downloads it")
    return reference, exported(source, exported_path(f"{name}-{type}"), type)


def run(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, f"{binary} {arguments}\n{done.stderr}"
    return done.stdout


def tokens(binary, weights, prompt, n):
    """(ids of the prompt, ids of n greedy tokens)"""
    printed = run(binary, weights, "-i", prompt, "-n", n, "--tokens", "--temperature", 0)
    return tuple([int(line.split("\t")[0]) for line in part.splitlines()] for part in printed.strip().split("\n\n"))


def check_logits(logits, reference):
    wrong = np.abs(logits[reference["positions"]] - reference["logits"]).max() / np.abs(reference["logits"]).max()
    assert wrong <= TOLERANCE, f"off by {wrong:.1e} of the largest logit"


def variant(weights):
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])["attention"]


def test_every_architecture_has_a_model():
    made = {checkpoints.load(name)["config"]["model_type"] for name in checkpoints.names()}
    assert made == set(ARCHITECTURES) - {"llama2c"}
    assert {variant(tiny(name, "f32")[1]) for name in checkpoints.names()} == {"mha", "mqa", "gqa", "mla"}


@pytest.mark.parametrize("name", checkpoints.names())
def test_exported_file(name):
    """Without the runtime: the model file means what the checkpoint meant."""
    reference, weights = tiny(name, "f32")
    check_logits(NumpyModel(weights).logits(list(reference["prompt"].encode())), reference)


@pytest.mark.parametrize("kernel", ["naive", "flash"])
@pytest.mark.parametrize("name", checkpoints.names())
def test_logits(name, kernel, tmp_path):
    reference, weights = tiny(name, "f32")
    binary = run_binary(attention=variant(weights), kernel=kernel, kv="f32")
    forms = {"naive": ["absorbed"], "flash": ["absorbed", "expanded"]}[kernel]  # what the kernel has of MLA
    for flags in [["--mla", form] for form in forms] if variant(weights) == "mla" else [[]]:
        run(binary, weights, "-i", reference["prompt"], "--logits", tmp_path / "logits.npy", *flags)
        check_logits(np.load(tmp_path / "logits.npy"), reference)


@pytest.mark.parametrize("name", checkpoints.names())
def test_text(name):
    reference, weights = tiny(name, "f32")
    binary = run_binary(attention=variant(weights), kv="f32")
    assert tokens(binary, weights, reference["prompt"], len(reference["greedy"])) == (
        list(reference["prompt"].encode()),
        reference["greedy"],
    )


@pytest.mark.parametrize("context, long", [(256, False), (257, True)])
def test_the_chosen_context_picks_the_factors_of_longrope(context, long, tmp_path):
    """As vLLM does, and not the length that a text has so far: no key has to rotate anew as it grows."""
    reference, weights = tiny("phi4_mini", "f32")
    model = NumpyModel(weights)
    assert model.c["original_seq_len"] == 256
    model.c["original_seq_len"] = 1 if long else 256
    reference["logits"] = model.logits(list(reference["prompt"].encode()))[reference["positions"]]
    binary = run_binary(attention=variant(weights), kv="f32")
    run(binary, weights, "-i", reference["prompt"], "-c", context, "--logits", tmp_path / "logits.npy")
    check_logits(np.load(tmp_path / "logits.npy"), reference)


@pytest.mark.skipif(not STORIES.is_file(), reason=f"{STORIES.name} is not beside this repository")
def test_llama2c_tells_its_story(tmp_path):
    weights = exported(STORIES, tmp_path / "m.safetensors", tokenizer=STORIES.with_name("tok512.bin"))
    text = run(run_binary(attention="gqa"), weights, "-i", "Once upon a time", "-n", 40, "--temperature", 0)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert text.startswith(story), text


REAL = sorted(path.stem.removeprefix("real_") for path in checkpoints.REFERENCE.glob("real_*.json"))


@pytest.mark.parametrize("name", REAL)
def test_real_texts(name, tmp_path):
    """64 greedy tokens on each of 12 prompts, all in one batch; and once more alone, id by id."""
    reference, weights = real(name, "f32")
    binary = run_binary(attention=variant(weights), kv="f32")
    requests = [{"prompt": text["prompt"], "n": len(text["greedy"]), "temperature": 0} for text in reference["texts"]]
    (tmp_path / "requests").write_text("".join(json.dumps(request) + "\n" for request in requests))
    answers = run(binary, weights, "--prompts", tmp_path / "requests", "--parallel", len(requests)).splitlines()
    for answer, text in zip(map(json.loads, answers), reference["texts"], strict=True):
        assert answer["prompt_tokens"] == len(text["ids"])
        assert answer["text"].rstrip("\ufffd") == text["text"].rstrip("\ufffd")  # the last character may be cut
    text = reference["texts"][0]
    assert tokens(binary, weights, text["prompt"], len(text["greedy"])) == (text["ids"], text["greedy"])


# float32 differs by rounding alone; 8-bit keys and activations, and what --type takes away, may cost 1 %.
@pytest.mark.parametrize("type, kv, tolerance", [("f32", "f32", 1e-4), (None, "f16", 0.01), ("q8_0", "q8", 0.01)])
@pytest.mark.parametrize("name", REAL)
def test_real_perplexity(name, type, kv, tolerance):
    if not TEXT.exists():
        pytest.skip(f"{TEXT} is not on this system")
    reference, weights = real(name, type)
    binary = run_binary(attention=variant(weights), kv=kv)
    size = ["-c", reference["chunk"], "--chunks", reference["chunks"]]
    figure = float(run(binary, weights, "--perplexity", TEXT, *size).split("perplexity ")[1].split()[0])
    assert abs(figure / reference["perplexity"] - 1) <= tolerance, f"{figure} is not {reference['perplexity']}"
