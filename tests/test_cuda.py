"""The program of DEVICE=cuda, as a whole: where there is no GPU it says so and changes nothing."""

import shutil
import subprocess

import pytest
from conftest import ROOT, SANITIZE, make, run_binary
from test_run import export_tiny


def has_gpu():
    return shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("says", "device"),
    [
        ("echo 9.0", "cuda"),
        ("echo 9.0; echo 12.0", "cuda"),
        ("echo NVIDIA-SMI has failed; exit 9", "cpu"),
        (":", "cpu"),
    ],
)
def test_device_is_cuda_where_there_is_a_gpu(says, device, tmp_path):
    for name, script in {"nvidia-smi": says, "nvcc": ":"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["DEVICE", "cpu", "cuda", device] in lines, done.stderr


@pytest.fixture(scope="module")
def program():
    if not shutil.which("nvcc") and not list(ROOT.glob(".venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc")):
        pytest.skip("no nvcc, on the PATH or in .venv: `make cuda-check` fetches it")
    return ROOT / make("binary", "DEVICE=cuda", "CUDA_ARCH=90").strip()


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(SANITIZE == "1", reason="the sanitizers' own library does not travel")
def test_libraries_travel_with_it(program):
    """All but the C library's own, which every Linux has."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split(".")[0].rpartition("/")[2] for line in listed.splitlines()}
    assert names <= {"linux-vdso", "libc", "libm", "librt", "libdl", "libpthread", "ld-linux-x86-64"}


@pytest.mark.skipif(has_gpu(), reason="a GPU is here")
def test_without_a_gpu_it_names_the_cpu_build(program, tmp_path):
    model = export_tiny("llama_gqa", tmp_path / "tiny")
    done = run(program, model, "-i", "hello", "--stats", tmp_path / "stats.json")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("run: kernels/device.cu:") and "make DEVICE=cpu" in line
    assert not (tmp_path / "stats.json").exists()


@pytest.mark.skipif(not has_gpu(), reason="no GPU is here")
def test_writes_the_text_of_the_cpu(tmp_path):
    model = export_tiny("llama_gqa", tmp_path / "tiny")
    on_gpu = ROOT / make("binary", "DEVICE=cuda").strip()
    texts = [run(program, model, "-i", "hello", "--temperature", 0).stdout for program in (run_binary(), on_gpu)]
    assert texts[0] == texts[1] != ""


def test_what_needs_no_gpu_works_without(program):
    config = ROOT / "tests" / "data" / "configs" / "llama-3-8b.json"
    assert config.exists()
    assert run(program, "--help").returncode == 0
    assert "H100" in run(program, "--estimate", "--gpu", "list").stdout


@pytest.mark.parametrize(
    ("kv", "what", "cure"), [("f32", "KV=f32 with KERNEL=flash", "KERNEL=naive"), ("q4", "KV=q4", "KV=q8")]
)
def test_a_choice_that_no_gpu_has_is_refused(kv, what, cure):
    done = subprocess.run(["make", "-n", "DEVICE=cuda", f"KV={kv}"], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and what in line and cure in line
