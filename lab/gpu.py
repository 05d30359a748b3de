"""Checks and measures the kernels on a GPU, beside torch; writes FOLDER/gpu.json.

usage: gpu.py FOLDER [--models NAME.safetensors ...] [--only PART ...]

FOLDER is what `make gpu-kit` has made, carried to a machine with a GPU's driver and a Python with torch: nothing else
is needed there. After the bytes a second that a large copy reads and writes, the parts:

    checks      the tests of every kernel, among them that a row's bits depend on no other row, so on none that shares
                a tensor core's product with it; with compute-sanitizer, where it is installed
    decode      attention of one new token: bytes a second of the cache, beside torch's SDPA
    prompts     attention of a whole prompt: FLOP a second, beside SDPA's flash and cuDNN
    models      the program's --bench of each model: tokens a second, and of decode the share of the bandwidth

What cannot be measured is there as "not measured: " and why. Times are the best of several.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

NOT_CACHED = 256 << 20  # bytes: as lab/attention_case.cpp
REPEATS = 7
SANITIZED = ("batch_test", "kvcache_test", "layers_test", "logits_test", "experts_test")  # the short ones
# Name: query heads, KV heads, key width, value width.
SHAPES = {
    "MHA": (32, 32, 128, 128),
    "GQA 8": (64, 8, 128, 128),
    "MQA": (32, 1, 128, 128),
    "MLA 16": (16, 1, 576, 512),
    "MLA 128": (128, 1, 576, 512),
}
CONTEXTS = (1024, 4096, 16384, 65536)
LAYOUTS = ("contiguous", "paged", "shuffled")


def nvidia_smi(field: str) -> list[str]:
    """Of each GPU; nothing where there is no GPU or no driver."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def attempt(measure, *arguments):
    """What measure(...) returns, or why it could not."""
    try:
        return measure(*arguments)
    except Exception as e:  # torch raises many kinds, and each costs one figure only
        lines = str(e).strip().splitlines()
        return f"not measured: {lines[0] if lines else type(e).__name__}"


def program(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")[-500:])
    return done.stdout


def check(folder: Path) -> dict:
    """Of each test: "passed", or what it said."""
    results = {}
    for test in sorted(folder.glob("*_test")):
        done = subprocess.run([str(test), "--gtest_brief=1"], capture_output=True, text=True)
        results[test.name] = "passed" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    for name in SANITIZED:
        if not shutil.which("compute-sanitizer"):
            results[f"{name}, compute-sanitizer"] = "not measured: compute-sanitizer is not installed"
            continue
        command = ["compute-sanitizer", "--error-exitcode", "1", str(folder / name), "--gtest_brief=1"]
        done = subprocess.run(command, capture_output=True, text=True)
        results[f"{name}, compute-sanitizer"] = "passed" if done.returncode == 0 else done.stdout[-2000:]
    return results


class Torch:
    """What torch makes of the same work. Imported late: the arguments are checked without it."""

    def __init__(self):
        import torch
        import torch.nn.attention

        self.torch, self.backends = torch, torch.nn.attention.SDPBackend

    def best(self, work, times: int) -> float:
        """Seconds of work(i), of which `times` run one after the other."""
        best = float("inf")
        for _ in range(REPEATS):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for i in range(times):
                work(i)
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3 / times)
        return best

    def copy(self) -> float:
        a = self.torch.zeros(1 << 30, dtype=self.torch.uint8, device="cuda")
        b = self.torch.empty_like(a)
        return 2 * a.numel() / self.best(lambda _: b.copy_(a), 10)

    def attend(self, shape, batch: int, context: int, new: int, backend: str | None) -> float:
        """Seconds of scaled_dot_product_attention, over as many layers as no cache holds."""
        torch, (heads, kv_heads, k_dim, v_dim) = self.torch, shape
        layers = max(1, min(64, NOT_CACHED // (2 * batch * context * kv_heads * (k_dim + v_dim))))

        def noise(n_heads, n, width, copies=1):
            return torch.randn(copies, batch, n_heads, n, width, dtype=torch.float16, device="cuda")

        q, k = noise(heads, new, k_dim)[0], noise(kv_heads, context, k_dim, layers)
        v = k[..., :v_dim] if k_dim != v_dim else noise(kv_heads, context, v_dim, layers)

        def work(i):
            torch.nn.functional.scaled_dot_product_attention(
                q, k[i], v[i], is_causal=new > 1, enable_gqa=heads != kv_heads
            )

        if backend is None:
            return self.best(work, layers)
        with torch.nn.attention.sdpa_kernel(getattr(self.backends, backend)):
            return self.best(work, layers)


def case(folder: Path, shape, layout: str, batch: int, context: int, new: int) -> dict:
    return json.loads(program(folder / "attention_case", *shape, layout, batch, context, new))


def decode(folder: Path, torch: Torch, bandwidth: float) -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        for context in CONTEXTS:
            for batch in (1, 8, 64):
                row = {"variant": name, "context": context, "sequences": batch}
                read = 0
                for layout in LAYOUTS:
                    found = attempt(case, folder, shape, layout, batch, context, 1)
                    if isinstance(found, dict):
                        read = found["bytes"]
                        speed = read / found["seconds"]
                        found = {"GB/s": speed / 1e9, "%": 100 * speed / bandwidth}
                    row[layout] = found
                seconds = attempt(torch.attend, shape, batch, context, 1, None)
                row["torch SDPA"] = {"GB/s": read / seconds / 1e9} if isinstance(seconds, float) else seconds
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    return rows


def prompts(folder: Path, torch: Torch) -> list[dict]:
    rows = []
    for width in (64, 128):
        shape = (2048 // width, 2048 // width, width, width)
        for n in (1024, 4096, 16384):
            row = {"head_dim": width, "tokens": n}
            found = attempt(case, folder, shape, "contiguous", 1, n, n)
            flop = 4 * shape[0] * width * n * (n + 1) / 2
            row["attn.cu"] = {"TFLOP/s": flop / found["seconds"] / 1e12} if isinstance(found, dict) else found
            for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
                seconds = attempt(torch.attend, shape, 1, n, n, backend)
                row[backend] = {"TFLOP/s": flop / seconds / 1e12} if isinstance(seconds, float) else seconds
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def bench(folder: Path, weights: Path) -> dict:
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    attention = json.loads(header["__metadata__"]["config"])["attention"]
    report = json.loads(program(folder / f"run-{attention}", weights, "--bench", "-q"))
    return report | {"model": weights.name}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("checks", "decode", "prompts", "models")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--models", type=Path, nargs="+", default=[], metavar="NAME.safetensors")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    options = parser.parse_args()
    missing = [name for name in ("run-gqa", "attention_case", *SANITIZED) if not (options.folder / name).exists()]
    if missing:
        parser.error(f"{options.folder} lacks {', '.join(missing)}: carry what `make gpu-kit` has made")
    for weights in options.models:
        if not weights.exists():
            parser.error(f"{weights} is not there")
    return options


def main() -> None:
    options = arguments()
    if not nvidia_smi("name"):
        sys.exit("gpu.py: nvidia-smi lists no GPU here: run this where there is one, with its driver")
    try:
        torch = Torch()
    except ImportError as e:
        sys.exit(f"gpu.py: {e}: install torch into this Python")
    results = {
        "device": nvidia_smi("name")[0],
        "driver": nvidia_smi("driver_version")[0],
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "torch": torch.torch.__version__,
    }
    bandwidth = results["copy, bytes/s"] = torch.copy()  # the others are compared to it
    parts = {
        "checks": lambda: check(options.folder),
        "decode": lambda: decode(options.folder, torch, bandwidth),
        "prompts": lambda: prompts(options.folder, torch),
        "models": lambda: [attempt(bench, options.folder, weights) for weights in options.models],
    }
    path = options.folder / "gpu.json"
    for name, part in parts.items():
        results[name] = part() if name in options.only else "not measured: not asked for"
        path.write_text(json.dumps(results, indent=1) + "\n")  # what is there survives what comes
    print(path)


if __name__ == "__main__":
    main()
