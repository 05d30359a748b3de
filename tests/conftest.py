"""What the Python tests share: the project's own programs, built by make.

`make test SANITIZE=1` sets SANITIZE in the environment, and so every program here is the sanitized one.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import checkpoints

import export as program

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = os.environ.get("SANITIZE", "0")

# What an outer `make test` leaves for its own sub-makes would make one of a test warn of a job server that it lacks.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)

# A shell's background job ignores them, and so would the programs under test.
for number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def make(*arguments: str) -> str:
    """What make prints."""
    command = ["make", "-s", *arguments, f"SANITIZE={SANITIZE}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def run_binary(attention="gqa", cache="contiguous", kernel="flash", kv="f16", block=16, dist="none") -> Path:
    """The path of `run` for this combination."""
    choices = {"ATTENTION": attention, "CACHE": cache, "KERNEL": kernel, "KV": kv, "BLOCK": block, "DIST": dist}
    choices["DEVICE"] = "cpu"
    return ROOT / make("binary", *(f"{k}={v}" for k, v in choices.items())).strip()


@functools.cache
def tool(name: str) -> Path:
    """The path of a test tool: tests/NAME.cpp."""
    path = f"build/test/native{'-sanitize' if SANITIZE == '1' else ''}/{name}"
    make(path, "ARCH=native")
    return ROOT / path


def exported(source, weights, type=None, layout=None, tokenizer=None):
    """What export.py's export() makes of the source, in this process; returns `weights`."""
    program.export(
        argparse.Namespace(source=source, output=weights, type=type, layout=layout, tokenizer=tokenizer, pre=None)
    )
    return weights


# Deleted when the tests end: the real models in float32 are too large for pytest to keep.
MODELS = tempfile.TemporaryDirectory()


def exported_path(name: str) -> Path:
    return Path(MODELS.name) / f"{name}.safetensors"


@functools.cache
def tiny(name: str, type=None):
    """(what transformers says of a random checkpoint, path of the exported model)"""
    reference = checkpoints.load(name)
    source = checkpoints.build(reference, Path(MODELS.name) / f"{name}-{type}")
    return reference, exported(source, exported_path(f"{name}-{type}"), type)


def export(source: Path, weights: Path, *flags: str) -> Path:
    """export.py SOURCE -o WEIGHTS FLAGS; returns WEIGHTS."""
    command = [sys.executable, str(ROOT / "export.py"), str(source), "-o", str(weights), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return weights
