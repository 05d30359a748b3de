"""One model in three attention layouts, and experts beside a dense MLP: does decode follow the bytes?

The model is exported as it is (GQA), as MHA and as MLA (export.py --as): the same text, other KV bytes. Predicted is
the speed at which a token's bytes pass at the rate that GQA reached at the shortest context. Experts and the dense
model have random weights (random_model.py) and the same active bytes, far more than the CPU's caches hold.
"""

import sys
from pathlib import Path

from common import ROOT, WORK, bench, generate, medians, output, progress, text

CONTEXTS, DECODE = (128, 1024, 4096), 128
LAYOUTS = {"gqa": (), "mha": ("--as", "mha"), "mla": ("--as", "mla")}
EXPERTS = {"experts": ("gqa", 2048, 8, 2), "dense": ("gqa", 4096)}  # hidden size; how many, of which a token takes


def measure(gguf: Path, rounds: int) -> dict:
    return {"layouts": layouts(gguf, rounds), "experts": experts(rounds)}


def export(source: Path, name: str, *flags) -> Path:
    weights = WORK / f"{name}.safetensors"
    output(sys.executable, ROOT / "export.py", source, "-o", weights, *flags)
    return weights


def decode(weights: Path, prompt: str) -> dict:
    report = generate(weights, prompt, DECODE + 1)
    speed, bytes_per_second = report["decode_steps_per_second"], report["decode_bytes_per_second"]
    return {
        "tokens/s": speed,
        "GB/s": bytes_per_second / 1e9,
        "bytes": bytes_per_second / speed,
        "KV bytes": report["kv_bytes_per_token"],
    }


def read_bandwidth(weights: Path) -> dict:
    """With a short context: the bandwidth alone is wanted."""
    return {"GB/s": bench(weights, "-c", CONTEXTS[0] + DECODE)["read_gb_per_second"]}


def layouts(gguf: Path, rounds: int) -> dict:
    weights = {name: export(gguf, name, *flags) for name, flags in LAYOUTS.items()}
    runs = {(name, context): [] for name in LAYOUTS for context in CONTEXTS}
    reads = []
    for number in range(rounds):
        progress("variants, layouts", number, rounds)
        reads.append(read_bandwidth(weights["gqa"]))
        for (name, context), figures in runs.items():
            figures.append(decode(weights[name], text(context, 0)))
    read = medians(reads)["GB/s"]
    rows = {key: medians(figures) for key, figures in runs.items()}
    rate = rows["gqa", CONTEXTS[0]]["GB/s"]
    print(f"\n{gguf.stem}, decode; reads {read:.1f} GB/s; predicted: all bytes at {rate:.1f} GB/s")
    print(f"{'layout':8}{'KV bytes':>10}{'context':>9}{'MB a token':>12}{'tokens/s':>10}", end="")
    print(f"{'predicted':>11}{'ratio':>7}{'% of the read':>15}")
    for (name, context), row in rows.items():
        predicted = rate * 1e9 / row["bytes"]
        print(f"{name:8}{row['KV bytes']:10}{context:9}{row['bytes'] / 1e6:12.1f}{row['tokens/s']:10.1f}", end="")
        print(f"{predicted:11.1f}{row['tokens/s'] / predicted:7.2f}{100 * row['GB/s'] / read:15.0f}")
    return {
        "read GB/s": reads,
        "rounds": {f"{name} at {context}": figures for (name, context), figures in runs.items()},
    }


def experts(rounds: int) -> dict:
    weights = {}
    for name, sizes in EXPERTS.items():
        output(sys.executable, ROOT / "lab" / "random_model.py", WORK / name, *sizes)
        weights[name] = export(WORK / name, f"{name}-q8", "--type", "q8_0")
    runs = {name: [] for name in EXPERTS}
    for number in range(rounds):
        progress("variants, experts", number, rounds)
        for name, figures in runs.items():
            figures.append(decode(weights[name], "a" * CONTEXTS[0]))
    rows = {name: medians(figures) for name, figures in runs.items()}
    print("\nexperts beside a dense model, random weights, q8")
    print(f"{'':16}{'MB a token':>12}{'tokens/s':>10}{'GB/s':>8}")
    for name, row in rows.items():
        print(f"{name:16}{row['bytes'] / 1e6:12.1f}{row['tokens/s']:10.1f}{row['GB/s']:8.1f}")
    print(f"ratio {rows['experts']['tokens/s'] / rows['dense']['tokens/s']:.2f}")
    return {"rounds": runs}
