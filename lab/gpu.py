"""Checks and measures the kernels on a GPU, beside torch; keeps each figure in FOLDER/gpu.json as it is found.

usage: gpu.py FOLDER [--only PART ...]

FOLDER is what `make gpu-kit` has made, carried to a machine with a GPU: a driver and Python are all that is needed
there. After the bytes a second that a large copy reads and writes come the parts:

    checks      the tests of every kernel (mma_test: that no row or column of a tensor core's product looks at another)
    decode      attention of one new token: the cache's bytes a second; beside it torch's SDPA, where there is a torch
    prompts     attention of a whole prompt: FLOP a second; beside it SDPA's flash and cuDNN
    models      random weights in the shapes of public models: the program's --bench, and the step of decode as one
                graph and launched kernel by kernel. Each needs room for its file in FOLDER, 31 GB at most
    sanitizer   the short ones of the tests under compute-sanitizer, where it is installed

The same command goes on where it was stopped, and tries again what failed or could not be measured: that is there as
"not measured" with the reason. lab/plot.py makes tables and pictures of gpu.json. Times are the best of several.
"""

import argparse
import functools
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import random_weights

LIMIT = 300  # seconds of one program
NOT_CACHED, LONG, MANY, REPEATS = 256 << 20, 4 << 30, 1024, 7  # as lab/attention_case.cpp
SANITIZED = ("batch_test", "experts_test", "kvcache_test", "layers_test", "logits_test", "mma_test")  # the short ones
SANITIZERS, FAULTY = ("memcheck", "racecheck"), 99  # exit code
# Of decode: query heads, KV heads, key width, value width.
SHAPES = {
    "MHA": (32, 32, 128, 128),
    "GQA 8": (64, 8, 128, 128),
    "MQA": (32, 1, 128, 128),
    "MLA 16": (16, 1, 576, 512),
    "MLA 128": (128, 1, 576, 512),
}
LAYOUTS, SDPA = ("contiguous", "paged", "shuffled"), "torch SDPA"
WIDTHS = {f"d = {d}": (2048 // d, 2048 // d, d, d) for d in (64, 128)}  # of prompts
OURS, BACKENDS = "attn.cu", {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION"}
MODEL_CONTEXTS = (128, 1024, 4096)  # as --bench


class Point(NamedTuple):
    part: str
    what: str  # a test; a variant; a head's width; a model
    side: str  # what runs it
    context: int = 0
    sequences: int = 1


COPY = Point("copy", "from the GPU's memory into itself", "cudaMemcpy")


class Unmeasured(Exception):
    """Why a figure is not there."""


# ---- What is measured


class Kit:
    def __init__(self, folder: Path):
        self.folder = folder

    def points(self) -> list[Point]:
        tests = [Point("checks", path.name, "alone") for path in sorted(self.folder.glob("*_test"))]
        sanitized = [Point("sanitizer", name, tool) for name in SANITIZED for tool in SANITIZERS]
        decode = itertools.product(SHAPES, (1024, 4096, 16384, 65536), (1, 8, 64), (*LAYOUTS, SDPA))
        prompts = itertools.product(WIDTHS, (1024, 2048, 4096, 8192, 16384), (OURS, *BACKENDS))
        models = itertools.product(sorted(path.stem for path in (self.folder / "shapes").iterdir()), ("steps", "bench"))
        return [
            *tests,
            *(Point("decode", what, side, context, n) for what, context, n, side in decode),
            *(Point("prompts", what, side, context) for what, context, side in prompts),
            *(Point("models", what, side) for what, side in models),
            *sanitized,
        ]

    def program(self, name: str, *arguments) -> str:
        done = finished(self.folder / name, *arguments)
        if done.returncode != 0:
            raise Unmeasured(last_line(done))
        return done.stdout

    def case(self, point: Point, new: int) -> dict:
        shape, layout = (SHAPES | WIDTHS)[point.what], "contiguous" if point.side == OURS else point.side
        return json.loads(self.program("attention_case", *shape, layout, point.sequences, point.context, new))

    @functools.cached_property
    def torch(self) -> "Torch":
        return Torch()

    def shapes(self, model: str) -> Path:
        return self.folder / "shapes" / f"{model}.safetensors"

    def run(self, model: str) -> str:
        """The name of the binary for its variant."""
        _, header = random_weights.read_header(self.shapes(model))
        return "run-" + json.loads(header["__metadata__"]["config"])["attention"]

    def weights(self, model: str) -> Path:
        """Its file, made where it is not there. The others make room."""
        path = self.folder / "models" / f"{model}.safetensors"
        if not path.exists():
            shutil.rmtree(path.parent, ignore_errors=True)
            path.parent.mkdir()
            _, header = random_weights.read_header(self.shapes(model))
            needed, free = random_weights.size_of(header), shutil.disk_usage(path.parent).free
            if needed > free:
                raise Unmeasured(f"{path} takes {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} are free")
            random_weights.fill(self.shapes(model), path)
        return path


def finished(*command) -> subprocess.CompletedProcess:
    command = [str(c) for c in command]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Unmeasured(f"{Path(command[0]).name} takes more than {LIMIT} s") from None
    except OSError as error:
        raise Unmeasured(f"{command[0]}: {error.strerror}") from None


def last_line(done: subprocess.CompletedProcess) -> str:
    lines = (done.stderr + done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def estimate(kit: Kit, model: str, *flags) -> dict:
    """On this machine, which is probed for it."""
    return json.loads(kit.program(kit.run(model), kit.shapes(model), "--estimate", "-q", "--stats", "-", *flags))


def copy(kit: Kit, _: Point) -> dict:
    return json.loads(kit.program("copy_case"))


def check(kit: Kit, point: Point) -> dict:
    done = finished(kit.folder / point.what, "--gtest_brief=1")
    return {"passed": True} if done.returncode == 0 else {"failed": (done.stdout + done.stderr)[-4000:]}


def sanitize(kit: Kit, point: Point) -> dict:
    if not shutil.which("compute-sanitizer"):
        raise Unmeasured("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", point.side, "--error-exitcode", FAULTY]
    done = finished(*command, kit.folder / point.what, "--gtest_brief=1")
    if done.returncode not in (0, FAULTY):  # it cannot work here, or the test fails, which is the point of "checks"
        raise Unmeasured(last_line(done))
    return {"passed": True} if done.returncode == 0 else {"failed": (done.stdout + done.stderr)[-4000:]}


def decode(kit: Kit, point: Point) -> dict:
    if point.side != SDPA:
        return kit.case(point, 1)
    _, kv_heads, k_dim, v_dim = SHAPES[point.what]
    row = k_dim if k_dim != v_dim else 2 * k_dim  # MLA's values are a part of its keys
    seconds = kit.torch.attend(SHAPES[point.what], point.sequences, point.context, 1, None)
    return {"seconds": seconds, "bytes": 2 * point.sequences * point.context * kv_heads * row}


def prompt(kit: Kit, point: Point) -> dict:
    if point.side == OURS:
        return kit.case(point, point.context)
    heads, _, width, _ = WIDTHS[point.what]
    n = point.context
    seconds = kit.torch.attend(WIDTHS[point.what], 1, n, n, BACKENDS[point.side])
    return {"seconds": seconds, "flop": 4 * heads * width * n * (n + 1) // 2}


def model(kit: Kit, point: Point) -> dict:
    weights = kit.weights(point.what)
    if point.side == "steps":
        return {"steps": json.loads(kit.program("decode_case", weights, *MODEL_CONTEXTS))}
    report = json.loads(kit.program(kit.run(point.what), weights, "--bench", "-q"))
    for test in report["tests"]:
        if test["context"] > 0:  # decode: of 128 tokens, from this context on
            plan = estimate(kit, point.what, "-c", test["context"] + 64)
            own = next(variant for variant in plan["variants"] if variant["own"])
            test["predicted_tokens_per_second"] = 1 / own["seconds_per_step"]
    return {"read_gb_per_second": report["read_gb_per_second"], "tests": report["tests"]}


MEASURE = {
    "copy": copy,
    "checks": check,
    "decode": decode,
    "prompts": prompt,
    "models": model,
    "sanitizer": sanitize,
}
PARTS = tuple(MEASURE)[1:]


class Torch:
    """What torch makes of the same work."""

    def __init__(self):
        try:
            import torch
            import torch.nn.attention
        except ImportError as error:
            raise Unmeasured(f"{error}: install torch into this Python") from None
        if not torch.cuda.is_available():
            raise Unmeasured("this Python's torch has no GPU")
        self.torch, self.backends = torch, torch.nn.attention.SDPBackend

    def attend(self, shape: tuple, batch: int, context: int, new: int, backend: str | None) -> float:
        """Seconds of scaled_dot_product_attention, as a part of many in a graph."""
        try:
            if backend is None:
                return self.timed(shape, batch, context, new)
            with self.torch.nn.attention.sdpa_kernel(getattr(self.backends, backend)):
                return self.timed(shape, batch, context, new)
        except RuntimeError as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        finally:
            self.torch.cuda.empty_cache()  # our programs need the memory
        raise Unmeasured(why)

    def timed(self, shape: tuple, batch: int, context: int, new: int) -> float:
        torch, (heads, kv_heads, k_dim, v_dim) = self.torch, shape
        layer_bytes = 2 * batch * context * kv_heads * (k_dim + (v_dim if k_dim == v_dim else 0))
        layers = max(1, NOT_CACHED // layer_bytes)  # so that no cache holds them
        calls = max(layers, min(MANY, LONG // layer_bytes))

        def noise(*sizes):
            return torch.randn(*sizes, dtype=torch.float16, device="cuda")

        # In decode the query heads of a KV head are rows of one product: then SDPA repeats no key.
        q = noise(batch, heads, new, k_dim) if new > 1 else noise(batch, kv_heads, heads // kv_heads, k_dim)
        k = noise(layers, batch, kv_heads, context, k_dim)
        v = k[..., :v_dim] if k_dim != v_dim else noise(layers, batch, kv_heads, context, v_dim)

        def work(i: int):
            torch.nn.functional.scaled_dot_product_attention(q, k[i % layers], v[i % layers], is_causal=new > 1)

        work(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                work(i)
        return min(self.seconds(graph.replay) for _ in range(REPEATS)) / calls

    def seconds(self, work) -> float:
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


# ---- What is kept


def nvidia_smi(field: str) -> str:
    """Of the first GPU; "" where there is no GPU or no driver."""
    try:
        done = finished("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
    except Unmeasured:
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def load(path: Path, machine: dict) -> dict:
    """The results that are there, of this machine and this kit, or none yet."""
    if not path.exists():
        return {"machine": machine, "points": []}
    try:
        results = json.loads(path.read_text())
        there, _ = results["machine"], [done(record) for record in results["points"]]
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"gpu.py: {path}: not this script's results ({error!r}): move it away")
    for what in ("device", "driver", "attn.cu"):
        if there.get(what) != machine[what]:
            sys.exit(f"gpu.py: {path}: of {what} {there.get(what)}, here is {machine[what]}: move it away")
    return results


def done(record: dict) -> Point:
    return Point(*(record[field] for field in Point._fields))


def save(path: Path, results: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def shown(part: str, figures: dict, bandwidth: float) -> str:
    if part == "decode" and "seconds" in figures:
        speed = figures["bytes"] / figures["seconds"]
        return f"{speed / 1e9:.0f} GB/s" + (f", {100 * speed / bandwidth:.0f} % of the copy" if bandwidth else "")
    if part == "prompts" and "seconds" in figures:
        return f"{figures['flop'] / figures['seconds'] / 1e12:.1f} TFLOP/s"
    return json.dumps(figures)


def run(kit: Kit, path: Path, results: dict, todo: list[Point]) -> None:
    for left, point in zip(range(len(todo), 0, -1), todo, strict=True):
        start = time.monotonic()
        try:
            figures = MEASURE[point.part](kit, point)
        except Unmeasured as why:
            figures = {"not measured": str(why)}
        record = {**point._asdict(), "took": round(time.monotonic() - start, 2), **figures}
        results["points"] = [other for other in results["points"] if done(other) != point] + [record]
        save(path, results)
        bandwidth = next((r["bytes/s"] for r in results["points"] if done(r) == COPY and "bytes/s" in r), 0)
        print(f"gpu.py: {left}:", *point, "->", shown(point.part, figures, bandwidth), file=sys.stderr, flush=True)


# ---- The command line


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    programs = ("run-gqa", "run-mla", "copy_case", "attention_case", "decode_case", *SANITIZED)
    missing = [
        name for name in (*programs, "shapes", "tokenizer.bin", "version") if not (options.folder / name).exists()
    ]
    if missing:
        parser.error(f"{options.folder} lacks {', '.join(missing)}: carry what `make gpu-kit` has made")
    return options


def measure(options: argparse.Namespace) -> None:
    machine = {
        "device": nvidia_smi("name"),
        "driver": nvidia_smi("driver_version"),
        "attn.cu": (options.folder / "version").read_text().strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if not machine["device"]:
        sys.exit("gpu.py: nvidia-smi lists no GPU here: run this where there is one, with its driver")
    kit, path = Kit(options.folder), options.folder / "gpu.json"
    results = load(path, machine)
    right = {done(record) for record in results["points"] if not {"failed", "not measured"} & set(record)}
    todo = [p for p in (COPY, *kit.points()) if p not in right and p.part in ("copy", *options.only)]
    try:
        run(kit, path, results, todo)
    finally:
        shutil.rmtree(options.folder / "models", ignore_errors=True)
    failed = [f"{record['what']} ({record['side']})" for record in results["points"] if "failed" in record]
    if failed:
        sys.exit(f"gpu.py: failed: {', '.join(failed)}: {path} has what they said")
    missing = sum("not measured" in record for record in results["points"])
    print(f"{path}: {len(results['points'])} points, {missing} of them not measured")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, interrupt)  # subprocess.run ends its program then
    try:
        measure(arguments())
    except KeyboardInterrupt:
        print("\ngpu.py: interrupted: what was found is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
