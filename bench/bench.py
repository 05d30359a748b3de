"""attn.cu beside llama.cpp on the same weights: prints a table with ratios and writes bench/results/*.json.

usage: bench.py RUN MODEL.gguf ... [--rounds N]        (make bench: builds and installs what this needs)

Each round runs one process of each side in turn, so that a machine that slows down slows both; figures are medians of
the rounds. llama.cpp is timed by its own counters, attn.cu by `run --bench`. The time to the first token is llama.cpp's
from the start of the load (its counter), attn.cu's from the start of the process.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER = [sys.executable, str(HERE / "llama_cpp_peer.py")]
TEXT, CHUNKS = "/usr/share/common-licenses/GPL-3", "4"
PROMPT = "Once upon a time"


def output(command: list) -> str:
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def first_token_seconds(run: Path, weights: Path) -> float:
    start = time.perf_counter()
    with subprocess.Popen([run, weights, "-i", PROMPT, "-n", "1", "-q"], stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        return time.perf_counter() - start


def ours(run: Path, weights: Path) -> tuple[dict, dict]:
    """Figures by the names that llama_cpp_peer.py uses, and what `run --bench` says of itself."""
    report = json.loads(output([run, weights, "--bench", "-q"]))
    figures = {"first token, s": first_token_seconds(run, weights)}
    for test in report["tests"]:
        kind, n = test["test"][:2], test["test"][2:]
        name = f"prompt {n}, tokens/s" if kind == "pp" else f"decode {n} at {test['context']}, tokens/s"
        figures[name] = test["tokens_per_second"]
        if kind == "tg":
            figures[f"decode {n} at {test['context']}, % of bandwidth"] = test["bandwidth_percent"]
    return figures, {key: value for key, value in report.items() if key != "tests"}


def perplexities(run: Path, weights: Path, gguf: Path, threads: int) -> dict:
    text = output([run, weights, "--perplexity", TEXT, "--chunks", CHUNKS, "-c", "512", "-q"])
    peer = json.loads(output([*PEER, "perplexity", gguf, threads, TEXT, CHUNKS]))
    return {"attn.cu": float(re.search(r"perplexity ([\d.]+)", text)[1]), "llama.cpp": peer["perplexity"]}


def measure(run: Path, gguf: Path, rounds: int) -> dict:
    weights = gguf.with_suffix(".safetensors")
    samples = {"attn.cu": [], "llama.cpp": [], "llama.cpp, flash": []}
    for number in range(rounds):
        print(f"{gguf.stem}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        figures, about = ours(run, weights)
        samples["attn.cu"].append(figures)
        for side, attention in (("llama.cpp", "plain"), ("llama.cpp, flash", "flash")):
            samples[side].append(json.loads(output([*PEER, "speed", gguf, about["threads"], attention])))
    medians = {
        side: {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}
        for side, runs in samples.items()
    }
    return {
        "about": about,
        "medians": medians,
        "perplexity": perplexities(run, weights, gguf, about["threads"]),
        "samples": samples,
    }


def table(name: str, result: dict) -> str:
    """The ratio is to the better of llama.cpp's two; above 1 we are ahead, for seconds too."""
    medians = result["medians"]
    lines = [f"\n{name}: {result['about']}", f"{'':38}{'attn.cu':>10}{'llama.cpp':>11}{'  its flash':>11}{'ratio':>8}"]
    for figure, value in medians["attn.cu"].items():
        peers = [medians[side].get(figure) for side in ("llama.cpp", "llama.cpp, flash")]
        if None in peers:
            lines.append(f"{figure:38}{value:10.1f}")
        else:
            ratio = min(peers) / value if figure.endswith(", s") else value / max(peers)
            lines.append(f"{figure:38}{value:10.3g}{peers[0]:11.3g}{peers[1]:11.3g}{ratio:8.2f}")
    lines.append("{:38}{attn.cu:10.3f}{llama.cpp:11.3f}".format("perplexity, GPL-3, 4 x 512", **result["perplexity"]))
    return "\n".join(lines)


def cpu_model() -> str:
    return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = {gguf.stem: measure(options.run.resolve(), gguf, options.rounds) for gguf in options.models}
    for name, result in results.items():
        print(table(name, result))
    machine = {"cpu": cpu_model(), "system": platform.platform(), "llama-cpp-python": peer_version()}
    path = HERE / "results" / f"{time.strftime('%Y-%m-%d-%H%M')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "results": results}, indent=1) + "\n")
    print(f"\nwritten: {path.relative_to(HERE.parent)}")


def peer_version() -> str:
    return re.search(r"==(.*)", (HERE / "requirements.txt").read_text())[1]


if __name__ == "__main__":
    main()
