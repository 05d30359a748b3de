"""A model cut over 2, 3, 4, 7 processes says what one process says, bit for bit; what goes wrong is said in a line."""

import functools
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import ROOT, SANITIZE, exported, run_binary, tiny
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.skipif(SANITIZE == "1", reason="Open MPI's own leaks would be reported")

PROMPT = "The quick brown fox jumps over the lazy dog and says"
FLAGS = ("-i", PROMPT, "--temperature", 0, "--ignore-eos")
GREEDY = (*FLAGS, "-n", 24)
# Open MPI wants to be told that root is meant, and that more processes than cores are.
ENVIRONMENT = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPIRUN = ("mpirun", "--oversubscribe")


@functools.cache
def cut(name):
    """(n_heads, the variant, path of the exported model)"""
    weights = tiny(name)[1]
    config = config_of(weights)
    return config["n_heads"], config["attention"], weights


def config_of(weights):
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])


def bundled(variant):
    return ROOT / "models" / f"tiny-{variant}.safetensors"


def command(ranks, binary, *arguments, mpirun=MPIRUN):
    return [str(a) for a in (*mpirun, "-n", ranks, binary, *arguments)]


def finished(line, code=0):
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=120, env=ENVIRONMENT)
    assert done.returncode == code, f"{line}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def said(line):
    """(text, the report as JSON)"""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        done = finished([*line, "--stats", file.name])
        return done.stdout, json.loads(Path(file.name).read_text())


@functools.cache
def alone(weights, variant, *arguments, **build):
    return said([str(a) for a in (run_binary(variant, **build), weights, "-t", 1, *arguments)])


def together(ranks, weights, variant, *arguments, mpirun=MPIRUN, threads=1, **build):
    binary = run_binary(variant, dist="mpi", **build)
    return said(command(ranks, binary, weights, "-t", threads, *arguments, mpirun=mpirun))


def assert_same(ranks, weights, variant, *arguments, **more):
    text, report = together(ranks, weights, variant, *arguments, **more)
    more.pop("mpirun", None)
    expected, expected_report = alone(weights, variant, *arguments, **more)
    assert text == expected
    assert report["logits_hash"] == expected_report["logits_hash"]
    assert len(report["ranks"]) == ranks and report["gathered_bytes"] > 0
    return report


@pytest.mark.parametrize("name", checkpoints.names())
def test_every_architecture(name):
    """Experts, MLA, learned positions, biases, sinks, norms: 3 ranks; with one KV head two of them have none."""
    n_heads, variant, weights = cut(name)
    assert_same(min(3, n_heads), weights, variant, *GREEDY)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "mla"])
def test_every_variant(variant, ranks):
    assert_same(ranks, bundled(variant), variant, *GREEDY)


@pytest.mark.parametrize("name", ["smollm2", "llama_gqa", "olmo2"])
def test_counts_that_do_not_divide(name):
    """7 ranks of 9 heads in 3 groups, of 144 columns and 259 tokens; 5 of 6 heads in 2 and in 3 groups."""
    n_heads, variant, weights = cut(name)
    assert_same(7 if n_heads > 6 else 5, weights, variant, *GREEDY)


def test_threads_and_prompts_in_pieces():
    weights = bundled("gqa")
    expected, report = alone(weights, "gqa", *GREEDY)
    text, report_of_two = together(2, weights, "gqa", *GREEDY, "-b", 3, threads=2)
    assert text == expected and report_of_two["logits_hash"] == report["logits_hash"]


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_forms_of_mla(form):
    assert_same(3, bundled("mla"), "mla", *GREEDY, "--mla", form)


def test_over_tcp():
    """Through the loopback device, as between machines."""
    assert_same(3, bundled("gqa"), "gqa", *GREEDY, mpirun=(*MPIRUN, "--mca", "btl", "tcp,self"))


def test_perplexity_and_logits(tmp_path):
    """Every token's logits are gathered."""
    (tmp_path / "text").write_text((ROOT / "models" / "corpus-sample.txt").read_text()[:6000])
    weights = bundled("gqa")
    flags = ("--perplexity", tmp_path / "text", "-c", 256, "--chunks", 2)
    report = assert_same(2, weights, "gqa", *flags)
    assert report["perplexity"] == alone(weights, "gqa", *flags)[1]["perplexity"]


def requests(path, n=12):
    """Two families of prompts, each with a long beginning in common."""
    beginnings = ["Once upon a time there was a little girl who had a red ball and a dog. " * 2, "One day a fox and a "]
    lines = [
        {"id": i, "prompt": beginnings[i % 2] + f"Story {i}", "n": 20 + 5 * (i % 3), "seed": i, "temperature": i % 2}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(text):
    """But for what depends on the time, and on how many blocks there are."""
    varies = ("seconds", "cached_tokens")
    return [{k: v for k, v in json.loads(line).items() if k not in varies} for line in text.splitlines()]


@pytest.mark.parametrize("variant", ["gqa", "mla"])
def test_requests(variant, tmp_path):
    """Many at once over paged blocks that do not suffice: prefixes are found, sequences preempted."""
    weights = bundled(variant)
    bytes_per_token = alone(weights, variant, *GREEDY, cache="paged")[1]["kv_bytes_per_token"]
    flags = ("--prompts", requests(tmp_path / "requests"), "--parallel", 6, "--ignore-eos", "-c", 128)
    # As many blocks in both: a rank of two has half of the KV heads, but the whole latent.
    each = {"gqa": 2, "mla": 1}[variant]
    room = 10 * 16 * bytes_per_token
    expected, _ = alone(weights, variant, *flags, "--kv-memory", room, cache="paged")
    text, report = together(2, weights, variant, *flags, "--kv-memory", room // each, cache="paged")
    assert answers(text) == answers(expected)
    assert report["preemptions"] > 0 and report["cached_tokens"] > 0


def test_samples_copy_blocks():
    assert_same(2, bundled("gqa"), "gqa", "-i", PROMPT, "-n", 20, "--samples", 3, "--seed", 5, cache="paged")


def test_as_many_bytes_as_calculated():
    """--estimate knows what is gathered: 24 tokens, a step each after the first, at 10^9 bytes a second."""
    weights = bundled("gqa")
    flags = ("--estimate", "--bandwidth", 1, "--flops", 1, "--memory", 1, "--ranks", 2, "--link", "1,0", "-q")
    done = finished([str(a) for a in (run_binary("gqa"), weights, *flags, "--stats", "-")])
    a_step = json.loads(done.stdout)["ranks"][1]["seconds_of_gathering"] * 1e9
    reports = [together(2, weights, "gqa", *FLAGS, "-n", n)[1] for n in (40, 24)]
    assert reports[0]["gathers"] - reports[1]["gathers"] == 16 * (5 * 4 + 2)
    embeddings = 128 * 4 * 16 / 2  # a token's is with one of the two ranks: more or fewer come in
    assert abs(reports[0]["gathered_bytes"] - reports[1]["gathered_bytes"] - 16 * a_step) <= embeddings


def test_a_rank_takes_its_part():
    """The weights of a rank: its share of the matrices, padded to whole panels, and what all keep; half of the KV."""
    whole = alone(bundled("gqa"), "gqa", *GREEDY)[1]
    report = together(2, bundled("gqa"), "gqa", *GREEDY)[1]
    for rank in report["ranks"]:
        assert rank["weight_bytes"] < 0.52 * whole["weight_bytes"]
        assert rank["kv_bytes"] < 0.5 * whole["kv_bytes"] + 4096
    assert report["kv_bytes_per_token"] == whole["kv_bytes_per_token"] / 2


# ---- What goes wrong.


def refused(line, *words, code=1):
    began = time.monotonic()
    done = finished(line, code)
    ours = [text for text in done.stderr.splitlines() if text.startswith("run: ")]
    assert len(ours) == 1, done.stderr
    for word in words:
        assert word in ours[0]
    assert done.stdout == "" and time.monotonic() - began < 30


def test_more_ranks_than_heads():
    binary = run_binary("gqa", dist="mpi")
    refused(command(5, binary, bundled("gqa"), *GREEDY), "5 ranks are more than the 4 heads", "at most 4")


def two_programs(first, second):
    """mpirun of two command lines, a rank each."""
    return [str(a) for a in (*MPIRUN, "-n", 1, *first, ":", "-n", 1, *second)]


def test_another_file(tmp_path):
    binary = run_binary("gqa", dist="mpi")
    other = tmp_path / "other.safetensors"
    data = bytearray(bundled("gqa").read_bytes())
    for at in range(len(data) // 2, len(data)):
        data[at] ^= 1
    other.write_bytes(data)
    (tmp_path / "other.tokenizer.bin").write_bytes((ROOT / "tokenizer.bin").read_bytes())
    line = two_programs((binary, bundled("gqa"), *GREEDY), (binary, other, *GREEDY))
    refused(line, "rank 1 on", "another model file")


def test_another_build():
    builds = [run_binary("gqa", cache=cache, dist="mpi") for cache in ("contiguous", "paged")]
    refused(two_programs(*((build, bundled("gqa"), *GREEDY) for build in builds)), "rank 1 on", "another build")


def test_no_file_on_one_rank(tmp_path):
    binary = run_binary("gqa", dist="mpi")
    line = two_programs((binary, bundled("gqa"), *GREEDY), (binary, tmp_path / "none.safetensors", *GREEDY))
    refused(line, "rank 1: ", "none.safetensors")


def test_wrong_flags():
    binary = run_binary("gqa", dist="mpi")
    refused(command(2, binary, bundled("gqa"), "--batch", 0), "--batch 0", code=2)
    refused(command(2, binary, bundled("gqa"), "--explain", "-i", PROMPT), "one process", code=2)


def children(pid):
    """The processes that this one started, in order: mpirun's are the ranks."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def alive(pid):
    """Not even as what its parent has yet to ask after."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def test_a_cache_that_overflows_on_another_rank(tmp_path):
    """The one KV head is on rank 1, whose cache cannot hold its values; rank 0 names the cure."""
    checkpoint = checkpoints.build(checkpoints.load("llama_mqa"), tmp_path / "large") / "model.safetensors"
    tensors = {n: t * np.float32(3e5) if "v_proj" in n else t for n, t in load_file(checkpoint).items()}
    save_file(tensors, checkpoint)
    weights = exported(tmp_path / "large", tmp_path / "large.safetensors", "f32")
    binary = run_binary(config_of(weights)["attention"], dist="mpi")
    done = finished(command(2, binary, weights, *FLAGS, "-n", 4, "-q"), code=1)
    ours = [text for text in done.stderr.splitlines() if text.startswith("run: ")]
    assert len(ours) == 1 and "KV f16 cannot hold: make KV=bf16" in ours[0]


def test_resident_memory():
    """Of each of 2 ranks: half of the weights and the KV, what the plan says it computes in, and 64 MB."""
    model = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.safetensors"
    if not model.exists():
        pytest.skip("make smollm2 downloads it")
    whole = alone(model, "gqa", *FLAGS, "-n", 4)[1]
    binary = run_binary("gqa", dist="mpi")
    line = command(2, binary, model, "--prompts", "-", "-t", 1, "-c", 256, "--stats", "/dev/null")
    run = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    run.stdin.write(json.dumps({"prompt": PROMPT, "n": 4}).encode() + b"\n")
    run.stdin.flush()
    assert json.loads(run.stdout.readline())["generated_tokens"] == 4
    peaks = [re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{p}/status").read_text())[1] for p in children(run.pid)]
    run.communicate(timeout=60)
    most = whole["weight_bytes"] / 2 + 256 * whole["kv_bytes_per_token"] / 2 + 30e6 + 64e6
    assert len(peaks) == 2 and all(1024 * int(peak) < most for peak in peaks), peaks


REQUESTS = 61  # enough for an interrupt to find some undone


def rest_of(out):
    """The errors of the answers after the first: those that were finished, as None, come before all others."""
    rest = [json.loads(line) for line in out.splitlines()]
    assert [answer["line"] for answer in rest] == [*range(2, REQUESTS + 1)]
    errors = [answer.get("error") for answer in rest]
    assert errors == sorted(errors, key=lambda error: error is not None) and errors[-1]
    return [error for error in errors if error]


def put_to_work(*start, **environment):
    """Three ranks with requests on their way, run by the command `start`; the pipe to them stays open."""
    binary = run_binary("gqa", dist="mpi")
    flags = ("--prompts", "-", "-t", 1, "--ignore-eos", "-c", 512, "--parallel", 2)
    line, pipe = command(3, *start, binary, bundled("gqa"), *flags), subprocess.PIPE
    run = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT | environment)
    for n in (4, *[400] * (REQUESTS - 1)):
        run.stdin.write(json.dumps({"prompt": PROMPT, "n": n}).encode() + b"\n")
    run.stdin.flush()
    return run


@pytest.fixture
def at_work():
    """A run of three ranks that has answered the first of its requests."""
    run = put_to_work()
    first = json.loads(run.stdout.readline())
    assert first["generated_tokens"] == 4
    yield run
    run.kill()
    run.wait()


def test_a_rank_that_dies(at_work):
    """The first answer is there, the others are errors that name the rank, and nobody is left."""
    began = time.monotonic()
    ranks = children(at_work.pid)
    os.kill(ranks[1], signal.SIGKILL)
    out, errors = at_work.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert "rank 1" in rest_of(out)[0]
    ours = [text for text in errors.decode().splitlines() if text.startswith("run: ")]
    assert len(ours) == 1 and "rank 1" in ours[0]
    assert at_work.returncode != 0 and not any(map(alive, ranks))


def test_a_rank_that_hangs(at_work):
    """No launcher tells of it: it has 10 seconds."""
    ranks = children(at_work.pid)
    os.kill(ranks[2], signal.SIGSTOP)
    out, _ = at_work.communicate(timeout=60)
    assert all("rank 2" in error for error in rest_of(out))
    assert at_work.returncode != 0 and not any(map(alive, ranks))


def test_the_first_rank_dies(at_work):
    began = time.monotonic()
    ranks = children(at_work.pid)
    os.kill(ranks[0], signal.SIGKILL)
    at_work.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert at_work.returncode != 0 and not any(map(alive, ranks))


def test_interrupt(at_work):
    """Ctrl-C: the requests end with what they are, the report comes, all ranks leave."""
    ranks = children(at_work.pid)
    os.kill(ranks[0], signal.SIGINT)
    out, errors = at_work.communicate(timeout=60)
    assert set(rest_of(out)) == {"interrupted"}
    assert "logits   hash" in errors.decode()
    assert at_work.returncode == 130 and not any(map(alive, ranks))


def test_interrupt_of_mpirun(tmp_path):
    """Which makes a kill of it, and waits a second; it may lose what is in its own pipe then, so a file takes that."""
    answers = tmp_path / "answers"
    answers.touch()
    run = put_to_work("sh", "-c", 'exec "$0" "$@" >>"$ANSWERS"', ANSWERS=str(answers))
    until = time.monotonic() + 60
    while not answers.read_bytes().count(b"\n") and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGINT)
    run.communicate(timeout=60)
    assert set(rest_of(answers.read_bytes().partition(b"\n")[2])) == {"interrupted"}
