"""export.py where something goes wrong under it: signals, a full disk, planted links, a source that changes meanwhile,
metadata that is not what it should be. One line each, and nothing is left behind."""

import errno
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc

import checkpoints
import gguf_models
import pytest
from conftest import ROOT
from llama2c_model import llama2c_file
from test_export import refused

import export
from exporter import writer
from exporter.errors import ExportError
from exporter.source import Source
from exporter.sources import open_source
from exporter.tokenizer import write_tokenizer

EXPORT = str(ROOT / "export.py")


def tiny(folder, name="llama_gqa"):
    return checkpoints.build(checkpoints.load(name), folder)


def python(code, *argv, **more):
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)


# ---- Signals

AT_AN_IMPORT = """
import os, runpy, sys

def profile(frame, event, argument):
    global left, begun
    begun |= frame.f_code.co_filename.endswith("argparse.py")  # export.py's first import but for signal
    if event == "call" and begun:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

script, number, left, begun = sys.argv.pop(1), int(sys.argv.pop()), int(sys.argv.pop()), False
sys.argv[0] = script
sys.setprofile(profile)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [1, 30000])
def test_a_signal_during_the_imports(call, number, tmp_path):
    """The process ends by the signal, without a word and without a file."""
    source = tiny(tmp_path / "source")
    got = python(AT_AN_IMPORT, EXPORT, source, "-o", tmp_path / "m.safetensors", call, int(number))
    assert (got.returncode, got.stdout, got.stderr) == (-number, "", "")
    assert list(tmp_path.iterdir()) == [source]


def stopped_at(call, argv, log):
    """Runs export.py's main in a process of its own, which gets a signal at its call-th call of a function, and appends
    how many there were in all to the log. Returns its status."""
    child = os.fork()
    if child == 0:
        left = call

        def profile(frame, event, argument):
            nonlocal left
            if event == "call":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[call % 2])

        descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        for number in export.STOPPING:
            signal.signal(number, export.stop)
        # tqdm's own lock is shared by forked processes, and stays locked where one ends within it.
        writer.tqdm.set_lock(threading.RLock())
        signal.alarm(60)  # a child that hangs is a failure
        sys.setprofile(profile)
        code = export.main(argv)
        sys.setprofile(None)
        print(call - left, file=sys.stderr, flush=True)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_signal_at_any_moment(tmp_path):
    """Both files, or neither and one line."""
    source, log = tiny(tmp_path / "source"), tmp_path / "log"
    log.touch()
    folder = tmp_path / "out"
    folder.mkdir()
    argv, codes = [str(source), "-o", str(folder / "m.safetensors")], []
    assert stopped_at(1 << 30, argv, log) == 0
    calls = int(log.read_text().splitlines()[-1])
    early = [calls * i // 30 + 1 for i in range(30)]
    for call in (*early, *range(calls - 200, calls, 9)):
        for path in folder.iterdir():
            path.unlink()
        codes.append(stopped_at(call, argv, log))
        made = sorted(path.name for path in folder.iterdir())
        if codes[-1] == 130:
            assert (made, log.read_text()) == ([], "export.py: interrupted: nothing was written\n"), call
        else:
            assert codes[-1] == 0 and made == ["m.safetensors", "m.tokenizer.bin"], (call, log.read_text())
    assert {0, 130} == set(codes)


# ---- Where it writes


def changing(path, change, monkeypatch):
    """`change` happens to the source once the first tensor is written."""
    write_tensor, left = writer.write_tensor, [1]

    def write(*arguments):
        write_tensor(*arguments)
        while left:
            left.pop()
            change(path)

    monkeypatch.setattr(writer, "write_tensor", write)


def cut(path):
    os.truncate(path, 5000)


def touch(path):
    os.utime(path, (1, 1))


@pytest.mark.parametrize("kind", ["gguf", "bin", "folder"])
@pytest.mark.parametrize(("change", "words"), [(cut, "was cut from"), (touch, "was changed while it was exported")])
def test_a_source_that_changes_meanwhile(kind, change, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "write_tokenizer", lambda source, path: path.write_bytes(b"a tokenizer") and ("", []))
    if kind == "gguf":
        source = read = gguf_models.build(checkpoints.load("llama_gqa"), tmp_path / "source.gguf")
    elif kind == "bin":
        source = read = tmp_path / "source.bin"
        llama2c_file(source, 0, True)
    else:
        source = tiny(tmp_path / "source")
        read = source / "model.safetensors"
    changing(read, change, monkeypatch)
    line = refused(capsys, source, "-o", tmp_path / "m.safetensors")
    assert words in line and str(source) in line, line
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("limit", [0, 100_000])
def test_a_file_size_limit(limit, tmp_path):
    source = tiny(tmp_path / "source")
    got = subprocess.run(
        [sys.executable, EXPORT, source, "-o", tmp_path / "m.safetensors"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert got.returncode == 1 and got.stderr.count("\n") == 1 and "File too large" in got.stderr, got.stderr
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("room", [0, 1, 1000, 100_000])
def test_a_disk_that_fills_up(room, tmp_path, capsys, monkeypatch):
    """It takes a part of what it is asked to write, and says so only when asked again."""
    source, left, pwrite = tiny(tmp_path / "source"), [room], os.pwrite

    def full(descriptor, data, offset):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = pwrite(descriptor, data[: left[0]], offset)
        left[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", full)
    line = refused(capsys, source, "-o", tmp_path / "m.safetensors")
    assert "m.safetensors: No space left on device" in line
    assert list(tmp_path.iterdir()) == [source]


def test_planted_links(tmp_path, capsys, monkeypatch):
    """Neither the name of an unfinished file nor the output's leads to a file of somebody else's choice."""
    source, victim = tiny(tmp_path / "source"), tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(export.secrets, "token_hex", lambda n: "0")
    for name in ("m.safetensors", "m.tokenizer.bin"):
        planted = tmp_path / f".{name}.{os.getpid()}-0.partial"
        planted.symlink_to(victim)
        assert "File exists" in refused(capsys, source, "-o", tmp_path / "m.safetensors")
        assert planted.is_symlink() and victim.read_text() == "precious"
        planted.unlink()
    for name in ("m.safetensors", "m.tokenizer.bin"):
        planted = tmp_path / name
        planted.symlink_to(victim)
        monkeypatch.setattr(os, "geteuid", lambda: victim.stat().st_uid + 1)
        assert "a link that another user has made" in refused(capsys, source, "-o", tmp_path / "m.safetensors")
        assert planted.is_symlink() and victim.read_text() == "precious"
        planted.unlink()
    assert sorted(tmp_path.iterdir()) == [source, victim]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere"), os.mkdir])
def test_a_side_file_that_cannot_be_read_is_not_passed_over(name, make, tmp_path, capsys):
    folder = checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "hf")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert str(folder / name) in refused(capsys, folder, "-o", tmp_path / "m.safetensors")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_descriptors(closed, tmp_path):
    """No file takes the number of a standard stream, and what is written to that."""
    source, want = tiny(tmp_path / "source"), []
    for name in ("a", "b"):
        output = tmp_path / name / "m.safetensors"
        output.parent.mkdir()
        close = (lambda: [os.close(number) for number in closed]) if name == "b" else None
        got = subprocess.run([sys.executable, EXPORT, source, "-o", output], capture_output=True, preexec_fn=close)
        assert got.returncode == 0
        want.append([path.read_bytes() for path in sorted(output.parent.iterdir())])
    assert len(want[0]) == 2 and want[0] == want[1]


def test_a_summary_that_nobody_takes(tmp_path):
    source, output = tiny(tmp_path / "source"), tmp_path / "m.safetensors"
    with open("/dev/full", "w") as full:
        got = subprocess.run([sys.executable, EXPORT, source, "-o", output], stdout=full, stderr=-1, text=True)
    assert got.returncode == 1 and got.stderr.count("\n") == 1 and "standard output: No space" in got.stderr
    assert output.is_file()


# ---- Tokenizers


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "▁a"],
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -0.5],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.scores": None,
    "tokenizer.ggml.token_type": None,
    "tokenizer.ggml.unknown_token_id": None,
}


def gguf_tokenizer(changes, path):
    source = Source("gguf", path / "m.gguf", path / "m.gguf", None)
    source.metadata = {key: value for key, value in (SENTENCEPIECE | changes).items() if value is not None}
    return write_tokenizer(source, path / "m.tokenizer.bin")


@pytest.mark.parametrize("base", [{}, BPE])
def test_any_value_of_any_tokenizer_key_is_taken_or_refused(base, tmp_path):
    """Refused: by its name, its value and what to do. The values that are taken are few."""
    gguf_tokenizer(base, tmp_path)
    keys = {*SENTENCEPIECE, *(f"tokenizer.ggml.{key}" for key in ("add_bos_token", "add_eos_token", "eot_token_id"))}
    keys |= {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.merges", "tokenizer.chat_template"}
    values = ["x", "", -1, 0, 3, 1.5, True, [], [1], ["a"], [1.5], [[]], 2**32 - 1, math.nan, "\udcff"]
    taken = 0
    for key, value in itertools.product(sorted(keys), values):
        try:
            gguf_tokenizer(base | {key: value}, tmp_path)
            taken += 1
        except ExportError as error:
            assert str(tmp_path / "m.gguf: ") in str(error) and re.search(r": (convert|use|say|fetch) ", str(error))
            assert key.removeprefix("tokenizer.") in str(error) or "merge" in str(error), (key, value, error)
    assert taken < len(keys) * len(values) / 3


def test_merges_of_what_is_no_token(tmp_path):
    for merge, words in (("ab", "merge 'ab' is not of two tokens"), ("a x", "merge 'a' 'x': 'x' is not in")):
        with pytest.raises(ExportError, match=words):
            gguf_tokenizer(BPE | {"tokenizer.ggml.merges": [merge]}, tmp_path)


def test_a_very_long_token(tmp_path):
    """It would be cut in each of its places, and both parts looked up."""
    tokens = [*SENTENCEPIECE["tokenizer.ggml.tokens"][:-1], "a" * 10_000_000]
    with pytest.raises(ExportError, match=r"token 261, .*, has 10000000 characters"):
        gguf_tokenizer({"tokenizer.ggml.tokens": tokens}, tmp_path)


def test_an_id_far_beyond_the_others(tmp_path):
    """No memory is taken for the sixteen million between them."""
    source = tiny(tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = (1 << 24) - 1
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    tracemalloc.start()
    try:
        with pytest.raises(ExportError, match="token id 16777215 is 16776957 beyond the other tokens"):
            write_tokenizer(open_source(source), tmp_path / "m.tokenizer.bin")
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_half_a_character(tmp_path):
    source = tiny(tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "\ud800"}))
    with pytest.raises(ExportError, match="half of a character"):
        write_tokenizer(open_source(source), tmp_path / "m.tokenizer.bin")


@pytest.mark.parametrize("text", [b"a b\xff\n", b"ab\n", b"a\n"])
def test_damaged_merges(text, tmp_path, capsys):
    source = tiny(tmp_path / "source", "gpt2")
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_bytes(text)
    assert "merge" in refused(capsys, source, "-o", tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\x01",  # pieces, and nothing else
        b"\x0a\x02\x08\x01\x12\x00\x1a\x00",  # a piece whose text is a number
        b"\x0a\x03\x0a\x01\xff\x12\x00\x1a\x00",  # or no UTF-8
        b"\x0a\x05\x0a\x01a\x10\x05\x12\x02\x18\x02\x1a\x00",  # whose score is an integer
        b"\x0a\x03\x0a\x01a\x12\x02\x18\x02\x1a\x02\x08\x01",  # a normalizer's name that is a number
        b"\x80" * 1_000_000,  # a number without end
    ],
)
def test_damaged_sentencepiece(data, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    source = Source("hf", tmp_path, tmp_path / "config.json", path)
    with pytest.raises(ExportError, match=f"{path}: not a SentencePiece model"):
        write_tokenizer(source, tmp_path / "m.tokenizer.bin")
