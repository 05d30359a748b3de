"""One sequence beside llama.cpp and OpenVINO GenAI on the same file: prompt, decode, start, memory, perplexity.

Both are timed by their own counters, attn.cu by `run --bench` (medians of 5 in each process). The first token comes
after the start of the process for attn.cu, of the load for llama.cpp (its counter). What is resident is each process's
peak over a prompt of 512 tokens and 128 of decode; of llama.cpp's, what Python held before the load is taken off.
Bytes of a token: every matrix once, the classifier with its embedding where they are tied, and the keys and values of
its context; not the rows of an embedding. The perplexity of random weights is left out.
"""

import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import WORK, bench, binary, generate, medians, openvino, output, peer, progress, text

TEXT, CHUNKS = "/usr/share/common-licenses/GPL-3", "4"
PROMPT, DECODE, LONG = 512, 128, 4096
AT_LONG = f"decode {DECODE} at {LONG}, tokens/s"
PEERS = {"llama.cpp": ("plain", "f16"), "its flash": ("flash", "f16"), "flash, KV q8": ("flash", "q8")}
RIVALS = (*PEERS, "OpenVINO")


def measure(gguf: Path, rounds: int) -> dict:
    weights = gguf.with_suffix(".safetensors")
    runs = {side: [] for side in ("attn.cu", "its KV q8", *RIVALS)}
    with tempfile.TemporaryDirectory(dir=WORK) as folder:  # llama.cpp's caches of LONG tokens, which take it long
        for number in range(rounds):
            progress(f"speed, {gguf.stem}", number, rounds)
            figures, about = ours(weights)
            runs["attn.cu"].append(figures)
            runs["its KV q8"].append(ours_kv_q8(weights))
            for side, (attention, kv) in PEERS.items():
                state = Path(folder) / f"{attention}-{kv}"
                runs[side].append(peer("speed", gguf, about["threads"], attention, kv, LONG, state))
            runs["OpenVINO"].append(openvino(gguf, about["threads"], LONG))
    result = {
        "about": about,
        "medians": {side: medians(figures) for side, figures in runs.items()},
        "memory": memory(weights, gguf),
        "perplexity": {} if gguf.stem.startswith("random") else perplexities(weights, gguf, about["threads"]),
        "rounds": runs,
    }
    print_table(gguf.stem, result)
    return result


def ours(weights: Path) -> tuple[dict, dict]:
    """Figures by the names that llama_cpp_peer.py uses, and what `run --bench` says of itself."""
    report = bench(weights)
    figures = {"first token, s": statistics.median(first_token_seconds(weights) for _ in range(3))}
    for test in report.pop("tests"):
        if test["test"].startswith("pp"):
            figures[f"prompt {PROMPT}, tokens/s"] = test["tokens_per_second"]
            continue
        name = f"decode {DECODE} at {test['context']}"
        figures |= {f"{name}, tokens/s": test["tokens_per_second"], f"{name}, GB/s": test["gb_per_second"]}
        figures[f"{name}, % of the read bandwidth"] = test["bandwidth_percent"]
    figures["read bandwidth, GB/s"] = report["read_gb_per_second"]
    return figures, report


def ours_kv_q8(weights: Path) -> dict:
    run = generate(weights, text(LONG, 0), DECODE + 1, KV="q8")
    return {AT_LONG: run["decode_steps_per_second"]}


def first_token_seconds(weights: Path) -> float:
    start = time.perf_counter()
    command = [binary(weights), weights, "-i", "Once upon a time", "-n", "1", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        return time.perf_counter() - start


def memory(weights: Path, gguf: Path) -> dict:
    """What is resident, in MB; at most weights, KV and 64 MB is the goal."""
    run = generate(weights, text(PROMPT, 0), DECODE + 1)
    theirs = peer("resident", gguf, run["threads"], PROMPT, DECODE)
    return {
        "attn.cu": run["resident"] / 1e6,
        "llama.cpp": theirs["resident"] / 1e6,
        "weights": run["weight_bytes"] / 1e6,
        "KV": run["kv_bytes"] / 1e6,
    }


def perplexities(weights: Path, gguf: Path, threads: int) -> dict:
    scored = output(binary(weights), weights, "--perplexity", TEXT, "--chunks", CHUNKS, "-c", "512", "-q")
    theirs = peer("perplexity", gguf, threads, TEXT, CHUNKS)
    return {"attn.cu": float(re.search(r"perplexity ([\d.]+)", scored)[1]), "llama.cpp": theirs["perplexity"]}


def print_table(name: str, result: dict) -> None:
    """The ratio is that of attn.cu to the best of the others; above 1 we are ahead, for seconds and MB too."""
    sides = result["medians"]
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in result["about"].items()))
    print(f"{'':44}" + "".join(f"{side:>14}" for side in sides) + f"{'ratio':>8}")
    for figure, value in sides["attn.cu"].items():
        cells = "".join(f"{figures[figure]:14.4g}" if figure in figures else f"{'':14}" for figures in sides.values())
        peers = [sides[side][figure] for side in RIVALS if figure in sides[side]]
        ratio = (min(peers) / value if figure.endswith(", s") else value / max(peers)) if peers else None
        print(f"{figure:44}{cells}" + (f"{ratio:8.2f}" if ratio else ""))
    used, scored = result["memory"], result["perplexity"]
    print(pair("resident, MB", used) + f"{'':28}{used['llama.cpp'] / used['attn.cu']:8.2f}", end="")
    print(f"; at most {used['weights'] + used['KV'] + 64:.1f}: weights {used['weights']:.1f}, KV {used['KV']:.1f}, 64")
    if scored:
        print(pair("perplexity, GPL-3, 4 x 512", scored))


def pair(figure: str, values: dict) -> str:
    return f"{figure:44}{values['attn.cu']:14.4g}{'':14}{values['llama.cpp']:14.4g}"
