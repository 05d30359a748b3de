"""What Hugging Face's transformers computes, in float32, is what this project computes: see make_reference.py."""

import argparse
import functools
import subprocess
import tempfile
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import run_binary
from numpy_model import NumpyModel

import export
from exporter.architectures import ARCHITECTURES

# Of the largest logit. make_reference.py makes sure that rounding (float32 against float64) moves the reference by less
# than a tenth of it, and every feature of a model by more than fifty times as much.
TOLERANCE = 2e-4
TEXT = Path("/usr/share/common-licenses/GPL-3")


@functools.cache
def folder():
    """Deleted when the tests end: the real models in float32 are too large for pytest to keep."""
    directory = tempfile.TemporaryDirectory()
    return directory, Path(directory.name)


@functools.cache
def tiny(name):
    """(reference, path of the exported model)"""
    reference = checkpoints.load(name)
    source = checkpoints.build(reference, folder()[1] / name)
    weights = source.with_suffix(".safetensors")
    export.export(argparse.Namespace(source=source, output=weights, type="f32", layout=None, tokenizer=None))
    return reference, weights


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
    return NumpyModel(weights).c["attention"]


def test_every_architecture_has_a_model():
    made = {checkpoints.load(name)["config"]["model_type"] for name in checkpoints.names()}
    assert made == set(ARCHITECTURES) - {"llama2c"}
    assert {variant(tiny(name)[1]) for name in checkpoints.names()} == {"mha", "mqa", "gqa", "mla"}


@pytest.mark.parametrize("name", checkpoints.names())
def test_exported_file(name):
    """Without the runtime: the model file means what the checkpoint meant."""
    reference, weights = tiny(name)
    check_logits(NumpyModel(weights).logits(list(reference["prompt"].encode())), reference)


@pytest.mark.parametrize("kernel", ["naive", "flash"])
@pytest.mark.parametrize("name", checkpoints.names())
def test_logits(name, kernel, tmp_path):
    reference, weights = tiny(name)
    binary = run_binary(attention=variant(weights), kernel=kernel, kv="f32")
    for form in ("absorbed", "expanded") if variant(weights) == "mla" else (None,):
        flags = ["--mla", form] if form else []
        run(binary, weights, "-i", reference["prompt"], "--logits", tmp_path / "logits.npy", *flags)
        check_logits(np.load(tmp_path / "logits.npy"), reference)


@pytest.mark.parametrize("name", checkpoints.names())
def test_text(name):
    reference, weights = tiny(name)
    binary = run_binary(attention=variant(weights), kv="f32")
    assert tokens(binary, weights, reference["prompt"], len(reference["greedy"])) == (
        list(reference["prompt"].encode()),
        reference["greedy"],
    )
