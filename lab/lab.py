"""The lab: variants x caches x kernels, measured, with what the speed calculation says beside it.

usage: lab.py [--quick] [--rounds N] [--minutes N] [--out FOLDER]                          (make lab calls it)

A point is one run of the program and one of its --estimate. The points of a round come in random order: a machine that
slows down slows all sides alike, and the mean of those that are done tells how long the others take. Each is kept in
FOLDER/lab.json as it is finished and not measured again, so a lab that was interrupted or whose minutes were over goes
on where it was. plot.py makes tables and pictures of it.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import paging
from common import ROOT, WORK, binary, config, generate, machine, output, text
from variants import LAYOUTS

DECODE = 128  # tokens
RESERVED = 1024  # tokens that each of many sequences may grow to: what a contiguous cache sets aside
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WIDE = ("mha", "gqa", "mqa", "mla")  # random weights that leave the caches: random_model.py
HIDDEN = 4096


class Point(NamedTuple):
    kind: str  # decode, prompt or batch
    model: str  # FAMILY-ATTENTION
    cache: str
    kernel: str
    size: int  # tokens of the context; of the prompt; sequences


# ---- What is measured


def points(quick: bool) -> list[Point]:
    tiny = sorted(path.stem for path in (ROOT / "models").glob("tiny-*.safetensors"))
    smollm2 = [f"smollm2-{attention}" for attention in LAYOUTS]
    models = [*tiny, *smollm2[:1]] if quick else [*tiny, *smollm2, *(f"wide-{attention}" for attention in WIDE)]
    caches, kernels = (("contiguous",), ("flash",)) if quick else (("contiguous", "paged"), ("flash", "naive"))
    result = []
    for model, cache, kernel in itertools.product(models, caches, kernels):
        plain = (cache, kernel) == ("contiguous", "flash") and not quick  # long contexts are for one combination
        sizes = (64, 256) if model in tiny else (128, 1024, 4096) if plain else (128, 512)
        result += [Point("decode", model, cache, kernel, size) for size in sizes]
    sizes = (64, 128, 256) if quick else (128, 256, 512, 1024)
    result += [Point("prompt", smollm2[0], "contiguous", k, n) for k in ("flash", "naive") for n in sizes]
    sizes = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64)
    return result + [Point("batch", smollm2[0], cache, "flash", n) for cache in ("contiguous", "paged") for n in sizes]


def model_file(name: str) -> Path:
    family, attention = name.split("-")
    if family == "tiny":
        return ROOT / "models" / f"{name}.safetensors"
    if family == "smollm2":
        return exported(SMOLLM2, *LAYOUTS[attention])
    folder = WORK / name
    if not (folder / "tokenizer.json").exists():  # what is written last
        output(sys.executable, ROOT / "lab" / "random_model.py", folder, attention, HIDDEN)
    return exported(folder, "--type", "q8_0")


def exported(source: Path, *flags: str) -> Path:
    return Path(output(sys.executable, ROOT / "export.py", "--into", WORK, *flags, "--", source).strip())


def prompt(point: Point, tokens: int, seed: int = 0) -> str:
    return "a" * tokens if point.model.startswith("wide") else text(tokens, seed)


def estimate(point: Point, weights: Path, *flags) -> dict:
    program = binary(weights, CACHE=point.cache, KERNEL=point.kernel)
    report = json.loads(output(program, weights, "--estimate", "-q", "--stats", "-", *flags))
    return next(variant for variant in report["variants"] if variant["own"])


def decode(point: Point, weights: Path) -> dict:
    run = generate(weights, prompt(point, point.size), DECODE + 1, CACHE=point.cache, KERNEL=point.kernel)
    context = run["prompt_tokens"] + DECODE // 2
    return {
        "context": context,
        "tokens/s": run["median_decode_steps_per_second"],
        "estimated tokens/s": 1 / estimate(point, weights, "-c", context)["seconds_per_step"],
        "reported tokens/s": run["predicted_decode_steps_per_second"],
        "weight bytes": run["weight_bytes_per_token"],
        "KV bytes a token": run["kv_bytes_per_token"],
    }


def heads(weights: Path) -> int:
    return config(weights)["n_heads"]


def whole_prompt(point: Point, weights: Path) -> dict:
    run = generate(weights, prompt(point, point.size), 1, CACHE=point.cache, KERNEL=point.kernel)
    return {
        "seconds of the prompt": run["prompt_seconds"],
        "estimated seconds": estimate(point, weights, "-c", point.size)["prompt_seconds"],
        "activation bytes": run["activation_bytes"],
        "bytes of all scores": 4 * heads(weights) * point.size**2,
    }


def batch(point: Point, weights: Path) -> dict:
    prompts = [prompt(point, paging.PROMPT, seed) for seed in range(point.size)]
    run = paging.answer(point.cache, weights, prompts, "-c", RESERVED)
    expected = estimate(point, weights, "-c", paging.PROMPT + paging.DECODE // 2, "--parallel", point.size)
    return {
        "tokens/s": point.size / run["between_tokens_p50"],
        "estimated tokens/s": point.size / expected["seconds_per_step"],
        "ridge": expected["ridge_batch"],
        "KV bytes": run["peak_blocks"] * run["block_size"] * run["kv_bytes_per_token"],
    }


MEASURE = {"decode": decode, "prompt": whole_prompt, "batch": batch}

# ---- What is kept


def load(path: Path) -> dict:
    """The results that are there, of this machine and this program, or none yet."""
    here = machine()
    if not path.exists():
        return {"machine": here, "points": []}
    try:
        results = json.loads(path.read_text())
        there, _ = results["machine"], [done(record) for record in results["points"]]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"lab: {path}: not the lab's results ({error!r}): remove it, or give --out another folder")
    for what, value in here.items():
        if str(there.get(what)).removesuffix("-dirty") != str(value).removesuffix("-dirty"):
            sys.exit(
                f"lab: {path}: of {what} {there.get(what)}, here is {value}: remove it, or give --out another folder"
            )
    return results


def done(record: dict) -> tuple[int, Point]:
    return record["round"], Point(*(record[field] for field in Point._fields))


def save(path: Path, results: dict) -> None:
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def run(path: Path, results: dict, todo: list[tuple[int, Point]], minutes: float) -> None:
    end = time.monotonic() + 60 * minutes
    files = {}
    for model, cache, kernel in sorted({(p.model, p.cache, p.kernel) for _, p in todo}):
        print(f"lab: making what is measured: {model}, {cache}, {kernel}", file=sys.stderr, flush=True)
        files[model] = model_file(model) if model not in files else files[model]
        binary(files[model], CACHE=cache, KERNEL=kernel)
    for left, (number, point) in zip(range(len(todo), 0, -1), todo, strict=True):
        if time.monotonic() > end:
            print(f"lab: {minutes:g} minutes are over, left: {left}; the same command goes on", file=sys.stderr)
            return
        known = [record["seconds"] for record in results["points"]]
        wait = f", {left * statistics.mean(known) / 60:.1f} min" if known else ""
        print(f"lab: left: {left}{wait}; round {number + 1}:", *point, file=sys.stderr, flush=True)
        start = time.monotonic()
        figures = MEASURE[point.kind](point, files[point.model])
        seconds = time.monotonic() - start
        results["points"].append({"round": number, **point._asdict(), "seconds": seconds, **figures})
        save(path, results)


# ---- The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"lab.py: {message}: see lab.py --help\n")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number > 0")
    return int(text)


def measure(options: argparse.Namespace) -> None:
    path = (options.out or (WORK / "quick" if options.quick else ROOT / "lab" / "results" / "lab")) / "lab.json"
    results = load(path)
    kept = {done(record) for record in results["points"]}
    todo = []
    for number in range(options.rounds):
        left = [(number, point) for point in points(options.quick) if (number, point) not in kept]
        todo += random.Random(number).sample(left, len(left))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, results)  # what cannot be written is known before anything is measured
    except OSError as error:
        sys.exit(f"lab: {path}: {error.strerror}: give --out a folder that can be written")
    run(path, results, todo, options.minutes)
    print(output(sys.executable, ROOT / "lab" / "plot.py", path.parent), end="")


def interrupt(*_) -> None:
    """No program outlives the lab, not even one that is just being started."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    raise KeyboardInterrupt


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few points: to try it")
    parser.add_argument("--rounds", type=count, default=1, metavar="N", help="how often each point is measured (1)")
    parser.add_argument("--minutes", type=count, default=20, metavar="N", help="no point begins after them (20)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(lab/results/lab; with --quick build/lab/quick)")
    try:
        measure(parser.parse_args())
    except KeyboardInterrupt:
        print("\nlab: interrupted: the finished points are kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
