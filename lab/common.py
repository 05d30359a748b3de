"""What the parts of the measurements share: building, running, text of a known length, medians, the machine."""

import functools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "lab"
WORK.mkdir(parents=True, exist_ok=True)
PEER = [sys.executable, ROOT / "lab" / "llama_cpp_peer.py"]
OPENVINO = [sys.executable, ROOT / "lab" / "openvino_peer.py"]
# A token each, in the vocabularies of SmolLM2 and Gemma.
WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "by", "at", "from", "it")


def start(*command) -> subprocess.Popen:
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def output(*command) -> str:
    with start(*command) as process:
        text = process.stdout.read()
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(str(c) for c in command)}")
    return text


@functools.cache
def config(weights: Path) -> dict:
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])


@functools.cache
def binary(weights: Path, **choices: str) -> Path:
    """Of this combination, for the variant that the file names; built where it is not there."""
    choices["ATTENTION"] = config(weights)["attention"]
    return ROOT / output("make", "-s", "binary", *(f"{name}={value}" for name, value in choices.items())).strip()


def text(n: int, seed: int) -> str:
    """n tokens."""
    rng = random.Random(seed)
    return "".join(" " + rng.choice(WORDS) for _ in range(n))


def stats(weights: Path, *flags, **choices: str) -> dict:
    """The report of a run, and the most memory that was resident, in bytes.

    The kernel lets a process begin with its parent's figure: this one stays small (no numpy here).
    """
    report = WORK / "stats.json"
    process = start(binary(weights, **choices), weights, *flags, "-q", "--stats", report)
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed: run {weights} {flags} {choices}")
    return {**without_path(json.loads(report.read_text())), "resident": usage.ru_maxrss * 1024}


def without_path(report: dict) -> dict:
    """Results are for others to read: where the file lay here is nothing to them."""
    return {**report, "model": Path(report["model"]).name}


def generate(weights: Path, prompt: str, n: int, **choices: str) -> dict:
    """n tokens, always the likeliest, the first of which comes out of the prompt: n - 1 steps of decode."""
    (WORK / "prompt").write_text(prompt)
    return stats(weights, "-f", WORK / "prompt", "-n", n, "--temperature", 0, "--ignore-eos", **choices)


def bench(weights: Path, *flags) -> dict:
    return without_path(json.loads(output(binary(weights), weights, "--bench", "-q", *flags)))


def peer(*command) -> dict:
    return json.loads(output(*PEER, *command))


def openvino(*command) -> dict:
    """Before its last line it may say this and that."""
    return json.loads(output(*OPENVINO, *command).splitlines()[-1])


def medians(runs: list[dict]) -> dict:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def progress(what: str, number: int, rounds: int) -> None:
    print(f"{what}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)


def machine() -> dict:
    cpu = Path("/proc/cpuinfo").read_text()
    return {
        "cpu": re.search(r"model name\s*:\s*(.*)", cpu)[1],
        "cores": cpu.count("model name"),
        "memory, GB": round(int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) / 1e6, 1),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "compiler": output("g++", "-dumpfullversion").strip(),
        "attn.cu": output("git", "describe", "--always", "--dirty").strip(),
    }
