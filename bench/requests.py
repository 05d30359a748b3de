"""Many sequences at once: beside llama.cpp, and what paging is worth.

usage: requests.py MODEL.gguf [--rounds N]        (part of make bench; in the bench's own environment)

1. 8 and 32 sequences of 128 + 64 tokens, attn.cu paged and llama.cpp in turn.
2. 256 requests with a common prefix of 512 tokens and a pool of 1 GB, paged and contiguous.
3. One sequence at 4096 tokens of context, paged and contiguous in turn.
Figures are medians of the rounds.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = [sys.executable, ROOT / "bench" / "llama_cpp_peer.py"]
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "that",
    "with",
    "as",
    "by",
    "at",
    "from",
    "it",
    "his",
    "an",
    "were",
    "which",
]  # a token each


def output(*command) -> str:
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def binary(cache: str) -> Path:
    return ROOT / output("make", "-s", "binary", "ATTENTION=gqa", f"CACHE={cache}").strip()


def text(n: int, seed: int) -> str:
    """n tokens."""
    rng = random.Random(seed)
    return "".join(" " + rng.choice(WORDS) for _ in range(n))


def run_requests(cache: str, weights: Path, prompts: list[str], n: int, *flags: str) -> dict:
    folder = ROOT / "build" / "bench-requests"
    folder.mkdir(parents=True, exist_ok=True)
    requests = [json.dumps({"prompt": prompt, "n": n, "temperature": 0}) + "\n" for prompt in prompts]
    (folder / "requests").write_text("".join(requests))
    stats = folder / "stats"
    parallel = ("--prompts", folder / "requests", "--parallel", len(prompts), "--ignore-eos")
    output(binary(cache), weights, *parallel, "-q", "--stats", stats, *flags)
    return json.loads(stats.read_text())


def beside_llama_cpp(gguf: Path, weights: Path, count: int, rounds: int) -> dict:
    ours, theirs = [], []
    for number in range(rounds):
        stats = run_requests("paged", weights, [text(128, number * count + i) for i in range(count)], 64, "-c", "256")
        assert stats["prompt_tokens"] == 128 * count, stats["prompt_tokens"]
        decode, everything = stats["decode_steps_per_second"] * count, stats["total_tokens_per_second"]
        ours.append({"decode, tokens/s": decode, "in all, generated tokens/s": everything})
        theirs.append(json.loads(output(*PEER, "requests", gguf, stats["threads"], count, 128, 64)))
    result = {}
    for figure in ours[0]:
        a, b = (statistics.median(run[figure] for run in side) for side in (ours, theirs))
        result[figure] = {"attn.cu": a, "llama.cpp": b}
        print(f"{count:3} sequences, {figure:28} attn.cu {a:8.1f}  llama.cpp {b:8.1f}  ratio {a / b:.2f}")
    return result


def shared_prefix(weights: Path) -> dict:
    prompts = [text(512, 0) + text(192, 1 + i) for i in range(256)]
    result = {}
    for cache in ("paged", "contiguous"):
        stats = run_requests(cache, weights, prompts, 64, "--kv-memory", "1G")
        result[cache] = stats
        print(
            f"256 requests of 512 shared + 192 + 64 tokens, 1 GB, {cache:10}: {stats['peak_sequences']} at once, "
            f"waste {100 * stats['waste']:.1f} %, {stats['cached_tokens']} prompt tokens found in the cache, "
            f"{stats['total_tokens_per_second']:.0f} tokens/s"
        )
    return result


def one_sequence(weights: Path, rounds: int) -> dict:
    speeds = {"paged": [], "contiguous": []}
    for _ in range(rounds):
        for cache, list_ in speeds.items():
            tests = json.loads(output(binary(cache), weights, "--bench", "-q"))["tests"]
            list_.append(next(t["tokens_per_second"] for t in tests if t["context"] == 4096))
    medians = {cache: statistics.median(list_) for cache, list_ in speeds.items()}
    ratios = [p / c for p, c in zip(speeds["paged"], speeds["contiguous"], strict=True)]
    print(
        f"one sequence at 4096: paged {medians['paged']:.1f}, contiguous {medians['contiguous']:.1f} tokens/s, "
        f"ratio {statistics.median(ratios):.3f} (median of pairs)"
    )
    return {"medians": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    weights = options.model.with_suffix(".safetensors").resolve()
    gguf = options.model.resolve()
    result = {f"{count} sequences": beside_llama_cpp(gguf, weights, count, options.rounds) for count in (8, 32)}
    result |= {"shared prefix": shared_prefix(weights), "one sequence": one_sequence(weights, options.rounds)}
    (ROOT / "bench" / "results" / "requests.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
