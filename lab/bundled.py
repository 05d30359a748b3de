"""The four bundled models side by side, and how long a newcomer waits for the first text.

Tokens/s: 400 tokens of one text on one thread, always the likeliest. Perplexity: of models/corpus-sample.txt, which was
held out of the training, in chunks of 128 tokens, about half of a story. First text: from `git clone` of this
repository into an empty folder to the first character of `make run`, packages installed and nothing compiled.
"""

import os
import re
import shutil
import subprocess
import time

from common import ROOT, WORK, binary, medians, output, progress, stats

VARIANTS = ("mha", "gqa", "mqa", "mla")
TOKENS = 400
COLUMNS = {"parameters": "{:,.0f}", "perplexity": "{:.2f}", "KV bytes a token": "{:,.0f}", "tokens/s": "{:,.0f}"}


def measure(rounds: int) -> dict:
    runs = {name: [] for name in VARIANTS}
    waits = []
    for number in range(rounds):
        progress("bundled models", number, rounds)
        for name, figures in runs.items():
            figures.append(decode(name))
        waits.append(first_text())
    rows = {name: medians(figures) | {"perplexity": perplexity(name)} for name, figures in runs.items()}
    wait = medians([{"seconds": seconds} for seconds in waits])["seconds"]
    print("\n" + "\n".join(table(rows)) + f"\n\nfrom clone to text: {wait:.0f} s")
    return {"medians": rows, "rounds": runs, "from clone to text, s": waits}


def table(rows: dict) -> list[str]:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    cells = {name: [form.format(row[column]) for column, form in COLUMNS.items()] for name, row in rows.items()}
    return lines + [f"| tiny-{name} | " + " | ".join(row) + " |" for name, row in cells.items()]


def weights(name: str):
    return ROOT / "models" / f"tiny-{name}.safetensors"


def decode(name: str) -> dict:
    """The first token comes out of the prompt."""
    text = ("-i", "Once upon a time", "-n", TOKENS + 1, "--temperature", 0, "--ignore-eos", "-t", 1)
    report = stats(weights(name), *text)
    return {
        "parameters": report["parameters"],
        "KV bytes a token": report["kv_bytes_per_token"],
        "tokens/s": report["decode_steps_per_second"],
    }


def perplexity(name: str) -> float:
    text = ROOT / "models" / "corpus-sample.txt"
    scored = output(binary(weights(name)), weights(name), "--perplexity", text, "-c", 128, "-q")
    return float(re.search(r"perplexity ([\d.]+)", scored)[1])


def first_text() -> float:
    """Seconds. What make found out of this checkout is not the clone's."""
    clone = WORK / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "MAKEFLAGS", "MAKELEVEL")}
    start = time.perf_counter()
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    with subprocess.Popen(
        ["make", "run"], cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        begun = run.stdout.read(1)
        seconds = time.perf_counter() - start
        run.stdout.read()
    if not begun or run.returncode != 0:
        raise SystemExit(f"failed: make run in {clone}")
    shutil.rmtree(clone)
    return seconds
