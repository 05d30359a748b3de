"""Measurements: prints tables with ratios and writes lab/results/DATE-TIME.json.

usage: measure.py PART ... [--models MODEL.gguf ...] [--rounds N] [--programs PROGRAM ...]   (make measure calls it)

Each round runs every side in turn, so that a machine that slows down slows all; figures are medians of the rounds.
kernels and paging need their programs; large takes the models of random weights, speed and types the others, paging and
variants the first. See the parts' own files.
bundled is the table of the README.
"""

import argparse
import json
import time
from pathlib import Path

import bundled
import kernel_speed
import paging
import speed
import variants
import weight_types
from common import ROOT, machine

PARTS = ("kernels", "speed", "large", "types", "paging", "variants", "bundled")


def measure(part: str, options: argparse.Namespace) -> dict:
    if part == "kernels":
        return kernel_speed.measure([options.programs[name] for name in kernel_speed.PROGRAMS])
    if part == "bundled":
        return bundled.measure(options.rounds)
    if part in ("speed", "large", "types"):
        models = [gguf for gguf in options.models if gguf.stem.startswith("random") == (part == "large")]
        if part == "types":
            return {gguf.stem: weight_types.measure(gguf) for gguf in models}
        return {gguf.stem: speed.measure(gguf, options.rounds) for gguf in models}
    if part == "paging":
        return paging.measure(options.models[0], options.rounds, options.programs["paging_bench"])
    return variants.measure(options.models[0], options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--models", type=lambda path: Path(path).resolve(), nargs="+", default=[])
    parser.add_argument("--programs", type=lambda path: Path(path).resolve(), nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.programs = {program.name: program for program in options.programs}
    path = ROOT / "lab" / "results" / f"{time.strftime('%Y-%m-%d-%H%M')}.json"
    path.parent.mkdir(exist_ok=True)
    peers = ", ".join((ROOT / "lab" / "requirements.txt").read_text().split())
    results = {"machine": {**machine(), "peers": peers}, "rounds": options.rounds}
    for part in options.parts:
        results[part] = measure(part, options)
        path.write_text(json.dumps(results, indent=1) + "\n")  # after each: an interrupted run keeps what it has
    print(f"\nwritten: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
