"""What int8 activations cost: the perplexity of each weight type, beside that of the same values as float32.

The checkpoint as it is, and quantised anew by `export.py --type`. A file's twin has each of its weights dequantised: it
is multiplied in float32, with activations in float32. Both keep f16 in the cache.
"""

import re
import sys
from pathlib import Path

from common import ROOT, WORK, binary, output, progress

TEXT, CHUNKS = "/usr/share/common-licenses/GPL-3", "4"
TYPES = ("", "q8_0", "q6_k", "q5_k", "q4_k", "q5_1", "q5_0", "q4_1", "q4_0")


def measure(gguf: Path) -> dict:
    result = {}
    for number, type in enumerate(TYPES):
        progress(f"types, {gguf.stem}, {type or 'as it is'}", number, len(TYPES))
        weights, twin = WORK / "typed.safetensors", WORK / "twin.safetensors"
        output(sys.executable, "export.py", gguf, "-o", weights, *(["--type", type] if type else []))
        output("env", f"PYTHONPATH={ROOT}", sys.executable, "lab/as_f32.py", weights, twin)
        twin.with_suffix(".tokenizer.bin").write_bytes(weights.with_suffix(".tokenizer.bin").read_bytes())
        result[type or "as it is"] = {"int8": perplexity(weights), "float32": perplexity(twin)}
        for path in (weights, twin):
            path.unlink()
            path.with_suffix(".tokenizer.bin").unlink()
    print_table(gguf.stem, result)
    return result


def perplexity(weights: Path) -> float:
    said = output(binary(weights), weights, "--perplexity", TEXT, "--chunks", CHUNKS, "-c", "512", "-q")
    return float(re.search(r"perplexity ([\d.]+)", said)[1])


def print_table(name: str, result: dict) -> None:
    print(f"\n{name}, perplexity of {Path(TEXT).name}\n{'weights':12}{'':>10}{'as float32':>12}{'cost, %':>10}")
    for type, of in result.items():
        print(f"{type:12}{of['int8']:10.4f}{of['float32']:12.4f}{100 * (of['int8'] / of['float32'] - 1):+10.2f}")
