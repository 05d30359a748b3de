"""The script for a real GPU (lab/gpu.py), run as a whole without one: stand-ins print what the programs print, a small
module answers for torch."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, exported, run_binary, tool
from test_lab import assert_texts_apart, drawn

sys.path.insert(0, str(ROOT / "lab"))
import gpu
import plot
import random_weights

TESTS = (*gpu.SANITIZED, "attention_test", "matmul_test")
CASE = """echo "$@" >>calls; echo '{"seconds": 0.001, "bytes": 2000000000, "flop": 300000000000}'"""
COPY = """echo '{"bytes/s": 4000000000000}'"""
STEPS = """echo '[{"context": 128, "graph": 0.004, "launches": 0.005}]'"""
RUN = """case "$*" in
*--estimate*) echo '{"variants": [{"own": false}, {"own": true, "seconds_per_step": 0.005}]}';;
*--bench*) [ -s "$1" ] && echo '{"read_gb_per_second": 4000, "tests": [
  {"test": "pp512", "context": 0, "tokens_per_second": 9000},
  {"test": "tg128", "context": 128, "tokens_per_second": 180, "gb_per_second": 2900, "bandwidth_percent": 72}]}';;
esac"""
SMI = """case "$*" in *driver*) echo 580.1;; *) echo Some GPU; echo Another;; esac"""
SANITIZER = 'echo sanitized "$@" >>calls; shift 4; exec "$@"'

# As much of torch as the script calls. It checks SDPA's sizes, has no cuDNN, and no memory for 64 sequences.
TORCH = """
import contextlib, types
class Tensor:
    def __init__(self, *shape): self.shape = shape
    def __getitem__(self, i):
        if isinstance(i, int): return Tensor(*self.shape[1:])
        return Tensor(*self.shape[:-1], len(range(self.shape[-1])[i[1]]))
def randn(*shape, dtype, device):
    if shape[1] == 64 and len(shape) == 5: raise RuntimeError("CUDA out of memory. Tried to allocate\\nmore lines")
    return Tensor(*shape)
def attention(q, k, v, is_causal):
    assert q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]
    assert is_causal == (q.shape[2] == k.shape[2])
    if backend == "cudnn": raise RuntimeError("No available kernel. Aborting execution.")
class Event:
    def __init__(self, enable_timing): pass
    def record(self): pass
    def synchronize(self): pass
    def elapsed_time(self, end): return 8.0
float16, backend = "float16", None
@contextlib.contextmanager
def sdpa_kernel(which):
    global backend
    backend = which
    yield
    backend = None
cuda = types.SimpleNamespace(is_available=lambda: True, empty_cache=lambda: None, synchronize=lambda: None, Event=Event,
    CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: None), graph=lambda graph: contextlib.nullcontext())
nn = types.SimpleNamespace(functional=types.SimpleNamespace(scaled_dot_product_attention=attention),
    attention=types.SimpleNamespace(sdpa_kernel=sdpa_kernel,
        SDPBackend=types.SimpleNamespace(FLASH_ATTENTION="flash", CUDNN_ATTENTION="cudnn")))
import sys
sys.modules |= {"torch.nn": nn, "torch.nn.attention": nn.attention}
"""


def program(path, script):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\ncd {path.parent}\n{script}\n")
    path.chmod(0o755)


def small_shapes(folder, attention, type):
    """Of a model that is made in no time."""
    config = {
        "model_type": "deepseek_v2" if attention == "mla" else "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if attention == "mla" else 2,
        "vocab_size": 2048,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    latent = {"q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config | (latent if attention == "mla" else {})))
    (folder / "shapes").mkdir(exist_ok=True)
    return exported(folder / "config.json", folder / "shapes" / f"{attention}-{type}.safetensors", type)


@pytest.fixture
def kit(tmp_path):
    folder = tmp_path / "kit"
    for name in TESTS:
        program(folder / name, f"echo {name} >>calls")
    programs = {"copy_case": COPY, "attention_case": CASE, "decode_case": STEPS, "run-gqa": RUN, "run-mla": RUN}
    for name, script in programs.items():
        program(folder / name, script)
    (folder / "version").write_text("1234567\n")
    (folder / "tokenizer.bin").write_bytes((ROOT / "tokenizer.bin").read_bytes())
    small_shapes(folder, "gqa", "bf16")
    small_shapes(folder, "mla", "bf16")
    program(tmp_path / "bin" / "nvidia-smi", SMI)
    program(tmp_path / "bin" / "compute-sanitizer", SANITIZER.replace("calls", str(folder / "calls")))
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "torch.py").write_text(TORCH)
    return folder


def command(kit, *arguments):
    environment = {"PATH": f"{kit.parent}/bin:/usr/bin:/bin", "PYTHONPATH": str(kit.parent / "python")}
    return [sys.executable, str(ROOT / "lab" / "gpu.py"), str(kit), *arguments], environment


def measure(kit, *arguments, code=0):
    """All that is kept, by point, and what the script says last."""
    line, environment = command(kit, *arguments)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert not (kit / "models").exists()
    return kept(kit), (done.stderr if code else done.stdout).splitlines()[-1]


def kept(kit):
    return {gpu.done(record): record for record in json.loads((kit / "gpu.json").read_text())["points"]}


def test_one_run_has_every_figure(kit):
    found, last = measure(kit)
    assert set(found) == {gpu.COPY, *gpu.Kit(kit).points()} and last.endswith("points, 30 of them not measured")
    unmeasured = {point: record["not measured"] for point, record in found.items() if "not measured" in record}
    assert set(unmeasured.values()) == {
        "CUDA out of memory. Tried to allocate",
        "No available kernel. Aborting execution.",
    }
    assert {(p.part, p.side) for p in unmeasured} == {("decode", "torch SDPA"), ("prompts", "SDPA cuDNN")}
    results = json.loads((kit / "gpu.json").read_text())
    assert results["machine"] | {"date": ""} == {
        "device": "Some GPU",
        "driver": "580.1",
        "attn.cu": "1234567",
        "date": "",
    }
    assert found[gpu.COPY]["bytes/s"] == 4e12
    test = found[gpu.Point("models", "mla-bf16", "bench")]["tests"][1]
    assert test["tokens_per_second"] == 180 and test["predicted_tokens_per_second"] == 200
    torch = found[gpu.Point("decode", "GQA 8", "torch SDPA", 16384, 8)]
    assert torch["bytes"] == 2 * 8 * 16384 * 8 * 256  # 537 MB: 8 calls make 4 GB, and two layers do not fit a cache
    assert torch["seconds"] == 0.001
    calls = (kit / "calls").read_text().splitlines()
    assert {
        "32 1 128 128 shuffled 64 65536 1",
        "128 1 576 512 paged 1 1024 1",
        "16 16 128 128 contiguous 1 8192 8192",
    } <= {*calls}
    assert f"sanitized --tool racecheck --error-exitcode 99 {kit}/mma_test --gtest_brief=1" in calls
    assert sum(call in TESTS for call in calls) == len(TESTS) + 2 * len(gpu.SANITIZED)


def test_what_failed_is_named_and_tried_again(kit):
    program(kit / "matmul_test", "echo 'rows 3: 1.5 is not 1.25'; exit 1")
    found, last = measure(kit, "--only", "checks", "models", code=1)
    failed = found[gpu.Point("checks", "matmul_test", "alone")]
    assert failed["failed"] == "rows 3: 1.5 is not 1.25\n" and "failed: matmul_test (alone)" in last
    assert {point.part for point in found} == {"copy", "checks", "models"}  # the others were measured all the same
    (kit / "calls").unlink()
    program(kit / "matmul_test", "echo matmul_test >>calls")
    measure(kit, "--only", "checks", "models")
    assert (kit / "calls").read_text() == "matmul_test\n"


def test_faults_that_the_sanitizer_finds_are_failures(kit):
    sanitizer = kit.parent / "bin" / "compute-sanitizer"
    program(sanitizer, "case $* in *racecheck*) echo a race; exit 99;; *) echo Device not supported; exit 1;; esac")
    found, last = measure(kit, "--only", "sanitizer", code=1)
    assert (
        found[gpu.Point("sanitizer", "mma_test", "racecheck")]["failed"] == "a race\n"
        and "mma_test (racecheck)" in last
    )
    assert found[gpu.Point("sanitizer", "mma_test", "memcheck")]["not measured"] == "Device not supported"
    sanitizer.unlink()
    found, _ = measure(kit, "--only", "sanitizer")
    assert (
        found[gpu.Point("sanitizer", "mma_test", "racecheck")]["not measured"] == "compute-sanitizer is not installed"
    )


def test_without_torch_the_rest_is_measured(kit):
    (kit.parent / "python" / "torch.py").write_text("raise ImportError('No module named torch')")
    found, _ = measure(kit, "--only", "decode", "prompts")
    torch = [record for point, record in found.items() if "SDPA" in point.side]
    assert {record["not measured"] for record in torch} == {"No module named torch: install torch into this Python"}
    assert all("not measured" not in record for point, record in found.items() if "SDPA" not in point.side)


def running(process):
    """Not one that has ended and that nobody has asked for yet."""
    status = Path("/proc", process, "stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_where_it_was(kit, number):
    program(kit / "attention_case", f"[ $(grep -c 128 calls) -lt 5 ] || {{ echo $$ >pid; exec sleep 60; }}\n{CASE}")
    (kit / "calls").touch()
    line, environment = command(kit, "--only", "decode")
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 50
        while not ((kit / "pid").exists() and (kit / "pid").read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("gpu.py: interrupted")
    assert not running((kit / "pid").read_text().strip())
    before = (kit / "calls").read_text().splitlines()
    assert len(before) == 5 and len(kept(kit)) == 7  # the copy, and torch once
    program(kit / "attention_case", CASE)
    found, _ = measure(kit, "--only", "decode")
    after = (kit / "calls").read_text().splitlines()
    assert len(set(after)) == len(after) == 180 and len(found) == 241


def test_a_program_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 0.1)
    with pytest.raises(gpu.Unmeasured, match=r"sleep takes more than 0\.1 s"):
        gpu.finished("sleep", "60")


def test_a_model_for_which_there_is_no_room_is_not_begun(kit, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda path: gpu.shutil._ntuple_diskusage(2, 1, 1000))
    with pytest.raises(gpu.Unmeasured, match=r"mla-bf16.safetensors takes 0\.0 GB, of which 0\.0 are free"):
        gpu.Kit(kit).weights("mla-bf16")


def test_what_it_cannot_use_is_one_line(kit):
    def error(code):
        line, environment = command(kit)
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == code
        return done.stderr.splitlines()[-1]

    (kit / "gpu.json").write_text(json.dumps({"machine": {"device": "A smaller GPU"}, "points": []}))
    assert "of device A smaller GPU, here is Some GPU: move it away" in error(1)
    (kit / "gpu.json").write_text("{")
    assert "not this script's results" in error(1)
    program(kit.parent / "bin" / "nvidia-smi", "echo No devices were found; exit 6")
    assert "nvidia-smi lists no GPU here" in error(1)
    (kit / "mma_test").unlink()
    assert "lacks mma_test: carry what `make gpu-kit` has made" in error(2)


def test_the_programs_print_what_it_reads(tmp_path, monkeypatch):
    """The real ones, as this machine's CPU runs them."""
    for attention in ("gqa", "mla"):
        small_shapes(tmp_path, attention, "bf16")
        (tmp_path / f"run-{attention}").symlink_to(run_binary(attention))
    for name in ("copy_case", "attention_case", "decode_case"):
        (tmp_path / name).symlink_to(tool(name))
    (tmp_path / "tokenizer.bin").symlink_to(ROOT / "tokenizer.bin")
    monkeypatch.setattr(gpu, "SHAPES", {"GQA": (4, 2, 64, 64), "MLA": (4, 1, 576, 512)})
    monkeypatch.setattr(gpu, "WIDTHS", {"d = 64": (2, 2, 64, 64)})
    monkeypatch.setattr(gpu, "MODEL_CONTEXTS", (128,))
    kit = gpu.Kit(tmp_path)
    assert gpu.copy(kit, gpu.COPY)["bytes/s"] > 1e8
    for layout in gpu.LAYOUTS:
        assert gpu.decode(kit, gpu.Point("decode", "GQA", layout, 512, 2))["bytes"] == 2 * 2 * 512 * 2 * 128
    assert gpu.decode(kit, gpu.Point("decode", "MLA", "paged", 256, 1))["bytes"] == 2 * 256 * 576
    prompt = gpu.prompt(kit, gpu.Point("prompts", "d = 64", "attn.cu", 96))
    assert prompt["flop"] == 2 * 4 * 64 * 96 * 97 / 2 and 1e-6 < prompt["seconds"] < 1
    steps = gpu.model(kit, gpu.Point("models", "mla-bf16", "steps"))["steps"]
    assert [(step["context"], step["graph"] > 0, step["launches"] > 0) for step in steps] == [(128, True, True)]
    report = gpu.model(kit, gpu.Point("models", "gqa-bf16", "bench"))
    assert [test["context"] for test in report["tests"]] == [0, *gpu.MODEL_CONTEXTS]
    assert all(
        test["bandwidth_percent"] > 0 and test["predicted_tokens_per_second"] > 0 for test in report["tests"][1:]
    )
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["gqa-bf16.safetensors"]


def test_the_kit_has_every_program():
    done = subprocess.run(
        ["make", "-n", "kit-programs", "DEVICE=cuda", "CUDA_ARCH=90a", "SANITIZE=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    stripped = next(line for line in done.stdout.splitlines() if "strip" in line)
    assert {"copy_case", "attention_case", "decode_case", *TESTS} <= {
        path.rpartition("/")[2] for path in stripped.replace(";", " ").split()
    }


# ---- Models that are made there


@pytest.mark.parametrize("type", ["f32", "bf16", "f16", "q8_0", "q4_k"])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_random_weights_are_a_model(attention, type, tmp_path):
    shapes = small_shapes(tmp_path, attention, type)
    weights = tmp_path / "models" / "random.safetensors"
    weights.parent.mkdir()
    (tmp_path / "tokenizer.bin").symlink_to(ROOT / "tokenizer.bin")
    random_weights.fill(shapes, weights)
    logits = tmp_path / "logits.npy"
    line = [run_binary(attention), weights, "-i", "Once upon a time", "--logits", logits, "-q"]
    subprocess.run([str(a) for a in line], check=True)
    deviation = np.load(logits).std()
    assert 0.3 < deviation < 3  # weights of about 1 / sqrt(inputs)


# ---- Pictures, of made-up figures


def made_up():
    """Every point, with figures of a plausible size; nothing of it was measured."""
    points = [{**gpu.COPY._asdict(), "bytes/s": 4.2e12}]
    cases = itertools.product(gpu.SHAPES, (1024, 4096, 16384, 65536), (1, 8, 64), (*gpu.LAYOUTS, gpu.SDPA))
    for shape, context, n, side in cases:
        _, kv_heads, k_dim, _ = gpu.SHAPES[shape]
        cache = 2 * context * n * kv_heads * k_dim * (1 if k_dim == 576 else 2)
        seconds = cache / {"torch SDPA": 2.2e12, "shuffled": 3.5e12}.get(side, 3.6e12) + 5e-6
        figures = (
            {"not measured": "no memory"} if side == "torch SDPA" and n == 64 else {"seconds": seconds, "bytes": cache}
        )
        points.append({**gpu.Point("decode", shape, side, context, n)._asdict(), **figures})
    sides = {"attn.cu": 330e12, "SDPA flash": 360e12, "SDPA cuDNN": 560e12}
    for width, n, (side, flops) in itertools.product(gpu.WIDTHS, (1024, 2048, 4096, 8192, 16384), sides.items()):
        flop = 4 * 2048 * n * (n + 1) / 2
        points.append({**gpu.Point("prompts", width, side, n)._asdict(), "seconds": flop / flops + 2e-5, "flop": flop})
    models = {"smollm2-135m-bf16": 0.27, "llama-3-8b-bf16": 16, "llama-3-8b-q8_0": 8.5, "llama-3-8b-q4_k": 4.5}
    for model, gigabytes in (models | {"deepseek-v2-lite-bf16": 5.2}).items():
        step = {context: gigabytes / 3500 + 2e-4 + context * 3e-8 for context in gpu.MODEL_CONTEXTS}
        steps = [{"context": c, "graph": s, "launches": s + 1e-3} for c, s in step.items()]
        tests = [{"context": 0, "tokens_per_second": 9000.0}]
        for c, s in step.items():
            tests.append({"context": c, "tokens_per_second": 0.98 / s, "predicted_tokens_per_second": 1.2 / s})
            tests[-1]["bandwidth_percent"] = 81.0
        points.append({**gpu.Point("models", model, "bench")._asdict(), "tests": tests})
        points.append({**gpu.Point("models", model, "steps")._asdict(), "steps": steps})
    points.append({**gpu.Point("checks", "mma_test", "alone")._asdict(), "passed": True})
    return {"machine": {"device": "made up", "driver": "0", "attn.cu": "none", "date": "never"}, "points": points}


def test_a_gpus_pictures_and_tables_are_made(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(made_up()))
    page = drawn(tmp_path, "gpu.md", plot.GPU_PICTURES)
    # 68.7 GB at 3.6 TB/s and 5 us more, of 4.2 TB/s
    assert "| MHA | 65536 | 64 | 3599 (86 %) | 3599 (86 %) | 3499 (83 %) |  |" in page
    assert "| llama-3-8b-bf16 | 1024 | 204.1 | 208.2 | 172.3 | 249.9 | 81 |" in page
    assert "- decode, MHA, torch SDPA, 65536 x 64: no memory" in page and "| mma_test | alone | passed |" in page


@pytest.mark.parametrize("name", plot.GPU_PICTURES)
def test_a_gpus_texts_are_within_the_picture_and_apart(name):
    assert_texts_apart(plot.GPU_PICTURES[name][0](made_up()["points"]))
