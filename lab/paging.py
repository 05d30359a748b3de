"""Many sequences at once: beside llama.cpp, and what paging is worth.

1. 8 and 32 sequences of 128 + 64 tokens, attn.cu paged and llama.cpp in turn, both always taking the likeliest token;
   llama.cpp with a cache for each sequence and with one for all: the ratio is to the better of the two.
2. 256 requests with a common prefix of 512 tokens and a pool of 1 GB, paged and contiguous, which reserves the whole
   context for each: how many are in the cache at once. Once, since nothing but the speed could differ.
3. One sequence at 4096 tokens of context, contiguous, paged, and paged with its blocks in a shuffled order: a step of
   each in turn (paging_bench.cpp).
"""

import json
from pathlib import Path

from common import WORK, medians, output, peer, progress, stats, text

PROMPT, DECODE = 128, 64
PREFIX, SUFFIX, REQUESTS = 512, 192, 256


def measure(gguf: Path, rounds: int, paging_bench: Path) -> dict:
    weights = gguf.with_suffix(".safetensors")
    result = {f"{count} sequences": beside_llama_cpp(gguf, weights, count, rounds) for count in (8, 32)}
    return result | {
        "shared prefix": shared_prefix(weights),
        "one sequence": one_sequence(paging_bench, weights, rounds),
    }


def answer(cache: str, weights: Path, prompts: list[str], *flags) -> dict:
    lines = [json.dumps({"prompt": prompt, "n": DECODE, "temperature": 0}) + "\n" for prompt in prompts]
    (WORK / "requests").write_text("".join(lines))
    many = ("--prompts", WORK / "requests", "--parallel", len(prompts), "--ignore-eos")
    return stats(weights, *many, *flags, CACHE=cache)


def beside_llama_cpp(gguf: Path, weights: Path, count: int, rounds: int) -> dict:
    """Decode is counted by the median time between two tokens of a sequence: while all of them run."""
    runs = {"attn.cu": [], "llama.cpp": [], "llama.cpp, unified": []}
    for number in range(rounds):
        progress(f"paging, {count} sequences", number, rounds)
        prompts = [text(PROMPT, number * count + i) for i in range(count)]
        ours = answer("paged", weights, prompts, "-c", PROMPT + DECODE)
        assert ours["prompt_tokens"] + ours["cached_tokens"] == PROMPT * count, "the prompts are not of this length"
        decode, everything = count / ours["between_tokens_p50"], ours["total_tokens_per_second"]
        runs["attn.cu"].append({"decode, tokens/s": decode, "in all, generated tokens/s": everything})
        for side, kv in (("llama.cpp", "apart"), ("llama.cpp, unified", "unified")):
            runs[side].append(peer("requests", gguf, ours["threads"], count, PROMPT, DECODE, kv))
    sides = {side: medians(figures) for side, figures in runs.items()}
    print(f"\n{count} sequences of {PROMPT} + {DECODE} tokens")
    print(f"{'':30}{'attn.cu':>10}{'llama.cpp':>11}{'  unified':>11}{'ratio':>8}")
    for figure, ours in sides["attn.cu"].items():
        apart, unified = sides["llama.cpp"][figure], sides["llama.cpp, unified"][figure]
        print(f"{figure:30}{ours:10.1f}{apart:11.1f}{unified:11.1f}{ours / max(apart, unified):8.2f}")
    return {"medians": sides, "rounds": runs}


def shared_prefix(weights: Path) -> dict:
    prompts = [text(PREFIX, 0) + text(SUFFIX, 1 + i) for i in range(REQUESTS)]
    result = {}
    for cache in ("paged", "contiguous"):
        progress(f"paging, shared prefix, {cache}", 0, 1)
        result[cache] = answer(cache, weights, prompts, "--kv-memory", "1G")
    print(f"\n{REQUESTS} requests of {PREFIX} shared + {SUFFIX} + {DECODE} tokens, 1 GB of cache")
    print(f"{'':30}{'paged':>10}{'contiguous':>12}{'ratio':>8}")
    for name, key, factor in (
        ("sequences at once", "peak_sequences", 1),
        ("waste, %", "waste", 100),
        ("prompt tokens computed", "prompt_tokens", 1),
        ("prompt tokens found", "cached_tokens", 1),
        ("preempted", "preemptions", 1),
        ("generated tokens/s in all", "total_tokens_per_second", 1),
    ):
        paged, contiguous = (factor * result[cache][key] for cache in ("paged", "contiguous"))
        ratio = f"{paged / contiguous:8.2f}" if contiguous else ""
        print(f"{name:30}{paged:10.4g}{contiguous:12.4g}{ratio}")
    return result


def one_sequence(paging_bench: Path, weights: Path, rounds: int) -> dict:
    runs = []
    for number in range(rounds):
        progress("paging, one sequence", number, rounds)
        runs.append(json.loads(output(paging_bench, weights)))
    print("\none sequence at 4096 tokens of context")
    for side in runs[0]:
        figures = medians([run[side] for run in runs])
        print(f"{side:12}{figures['tokens_per_second']:8.1f} tokens/s, {figures['ratio']:.3f} of contiguous")
    return {side: [run[side] for run in runs] for side in runs[0]}
