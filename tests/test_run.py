"""The whole program on a tiny random model whose tokens are bytes: every flag, every wrong input, every way to end."""

import fcntl
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import ROOT, SANITIZE, exported, make, run_binary
from safetensors.numpy import load_file, save_file

PROMPT = "The quick brown fox"
CONTEXT = 256  # of the model
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def export_tiny(name, folder, chat_template=None):
    checkpoints.build(checkpoints.load(name) if isinstance(name, str) else name, folder)
    if chat_template:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return exported(folder, folder.with_suffix(".safetensors"), "f32")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return export_tiny("llama_gqa", tmp_path_factory.mktemp("models") / "tiny", CHATML)


@pytest.fixture(scope="session")
def model_without_chat(tmp_path_factory):
    return export_tiny("llama_gqa", tmp_path_factory.mktemp("models") / "plain")


def command(*arguments, binary=None):
    return [str(a) for a in (binary or run_binary(), *arguments)]


def run(*arguments, stdin=b"", code=0, binary=None):
    """The finished process; one thread unless the arguments say otherwise: many tests share the machine."""
    threads = () if "--threads" in arguments else ("--threads", 1)
    done = subprocess.run(command(*arguments, *threads, binary=binary), input=stdin, capture_output=True, timeout=300)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stderr.decode(errors='replace')}"
    return done


def text(*arguments, **more):
    return one_replacement(run(*arguments, "-q", **more).stdout.decode())


def stats(tmp_path, *arguments, **more):
    run(*arguments, "--stats", tmp_path / "stats.json", **more)
    return json.loads((tmp_path / "stats.json").read_text())


def generated_ids(*arguments):
    """Ids are the lines after the empty one."""
    lines = text(*arguments, "--tokens").split("\n")
    return [int(line.split("\t")[0]) for line in lines[lines.index("") + 1 :] if line]


def greedy(model, prompt=PROMPT, n=40):
    return generated_ids(model, "-i", prompt, "-n", n, "--temperature", 0, "--ignore-eos")


def readable(ids):
    return one_replacement(bytes(i for i in ids if i < 256).decode(errors="replace"))


def one_replacement(text):
    """How many U+FFFD stand for a run of wrong bytes is a matter of taste."""
    return re.sub("\ufffd+", "\ufffd", text)


# ---- Text


def test_text_is_the_prompt_and_its_continuation(model):
    done = run(model, "-i", PROMPT, "-n", 40, "--temperature", 0, "--ignore-eos")
    assert one_replacement(done.stdout.decode()) == PROMPT + readable(greedy(model)) + "\n"
    report = done.stderr.decode()
    for what in (
        "model ",
        "gqa",
        "contiguous",
        "flash",
        "KV f16",
        "bytes a token",
        "needed",
        "free",
        "prompt ",
        "decode ",
    ):
        assert what in report, report
    assert re.search(r"logits +hash [0-9a-f]{16} of 40 rows", report), report


@pytest.mark.parametrize("choices", [(), ("CACHE=paged", "KERNEL=naive", "KV=q8", "BLOCK=8")])
def test_hello_writes_what_run_writes(model, choices):
    hello, binary = (ROOT / make(target, *choices).strip() for target in ("hello", "binary"))
    said = subprocess.run([hello, model, PROMPT], capture_output=True, timeout=300, check=True).stdout
    expected = text(model, "-i", PROMPT, "-n", 64, "--temperature", 0, binary=binary)
    assert one_replacement(PROMPT + said.decode(errors="replace")) == expected
    refused = subprocess.run([hello, "no.safetensors", PROMPT], capture_output=True, timeout=60)
    assert refused.returncode == 1 and b"no.safetensors" in refused.stderr


def test_quiet_says_nothing(model):
    assert run(model, "-i", PROMPT, "-n", 3, "-q").stderr == b""


def test_the_prompt_comes_from_flag_file_or_standard_input(model, tmp_path):
    (tmp_path / "prompt").write_text("a prompt,\nof two lines\n")
    flags = (model, "-n", 9, "--temperature", 0)
    expected = text(*flags, "-i", "a prompt,\nof two lines")
    assert text(*flags, "-f", tmp_path / "prompt") == expected
    assert text(*flags, stdin=b"a prompt,\nof two lines\n") == expected
    assert text(*flags, "-f", "-", stdin=b"a prompt,\nof two lines\n") == expected


def test_tokens(model):
    lines = text(model, "-i", "a\tb", "-n", 2, "--tokens", "--ignore-eos").split("\n")
    assert [line.split("\t")[0] for line in lines[:3]] == ["97", "9", "98"]
    assert json.loads(lines[0].split("\t")[1]) == "a"
    assert lines[3] == "" and len(lines) == 7 and lines[6] == ""
    lines = text(model, "-i", '"\\', "-n", 1, "--tokens").split("\n")
    assert [json.loads(line.split("\t")[1]) for line in lines[:2]] == ['"', "\\"]


def test_number_of_tokens(model):
    flags = (model, "-i", PROMPT, "--ignore-eos")
    for n in (1, 2, 40, CONTEXT - len(PROMPT)):
        assert len(generated_ids(*flags, "-n", n)) == n
    for n in (0, -1):
        assert len(generated_ids(*flags, "-n", n)) == CONTEXT - len(PROMPT)
    assert len(generated_ids(*flags)) == CONTEXT - len(PROMPT)  # the default, 256, is cut to what fits
    assert len(generated_ids(*flags, "-n", 0, "-c", 64)) == 64 - len(PROMPT)


def test_seeds(model):
    flags = (model, "-i", PROMPT, "-n", 30, "--ignore-eos")
    assert text(*flags, "--seed", 1) == text(*flags, "--seed", 1)
    assert text(*flags, "--seed", 1) != text(*flags, "--seed", 2)
    assert text(*flags, "--temperature", 0, "--seed", 1) == text(*flags, "--temperature", 0, "--seed", 2)
    assert text(*flags, "--top-k", 1, "--seed", 1) == text(*flags, "--temperature", 0)


def test_samples_are_the_texts_of_consecutive_seeds(model):
    flags = (model, "-i", PROMPT, "-n", 30, "--ignore-eos")
    alone = [text(*flags, "--seed", seed).removesuffix("\n") for seed in (5, 6, 7)]
    together = text(*flags, "--seed", 5, "--samples", 3)
    assert together == "\n".join(f"--- sample {i + 1}\n{alone[i]}" for i in range(3)) + "\n"


def test_repeat_penalty(model):
    repeated = generated_ids(model, "-i", "aaaa", "-n", 60, "--temperature", 0, "--repeat-penalty", 1e9, "--ignore-eos")
    assert len(set(repeated)) == 60


def test_stop_texts(model):
    full = readable(greedy(model, n=200))
    places = [i for i in range(20, len(full) - 2) if re.fullmatch("[!-~]{2}", full[i : i + 2])]
    late, early = (full[places[i] : places[i] + 2] for i in (-1, 0))
    flags = (model, "-i", PROMPT, "-n", 200, "--temperature", 0, "--ignore-eos")
    assert text(*flags, "--stop", late) == PROMPT + full[: full.index(late)] + "\n"
    assert text(*flags, "--stop", late + "never") == PROMPT + full + "\n"  # what was held back comes after all
    cut = min(full.index(late), full.index(early))
    assert text(*flags, "--stop", late, "--stop", early) == PROMPT + full[:cut] + "\n"


def test_standard_output_is_utf8_whatever_the_model_says(model):
    for seed in range(3):
        run(model, "-i", "é", "-n", 200, "--temperature", 2, "--top-k", 0, "--seed", seed).stdout.decode()


ODD_TEXTS = ("[scene]", "[a,b]", "[]", "[", "{x}", "--chat", "-q", "--", "-", "-5 degrees", "%%", "++", "'a'", '"a"')
ODD_TEXTS += ("a,b", "a=b", " a ", "#a", "@a", "true", "$HOME", "\\n", "[[x]]")


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_every_text_flag_takes_every_text(model, odd):
    assert text(model, "-i", odd, "-n", 1).startswith(odd)
    assert text(model, f"--prompt={odd}", "-n", 1).startswith(odd)
    full = readable(greedy(model, "a", 60))
    expected = "a" + full[: full.index(odd)] if odd in full else "a" + full
    for stop in (("--stop", odd), (f"--stop={odd}",), ("--stop", "never", "--stop", odd)):
        assert text(model, "-i", "a", "-n", 60, "--temperature", 0, "--ignore-eos", *stop) == expected + "\n"
    chat = [{"role": "system", "content": odd}, {"role": "user", "content": "u"}]
    s = answers(model, stdin=json.dumps({"messages": chat, "n": 3, "temperature": 0}))[0]["text"]
    flags = ("--chat", "--system", odd, "-n", 3, "--temperature", 0)
    assert run(model, *flags, "-q", stdin=b"u\n").stdout.decode() == s + "\n"


def test_a_stop_text_in_brackets_is_one_text(model):
    """The model's text contains "[" alone: it must not end there."""
    full = readable(greedy(model, n=200))
    inside = next(c for c in full[20:] if re.fullmatch("[!-~]", c))
    flags = (model, "-i", PROMPT, "-n", 200, "--temperature", 0, "--ignore-eos")
    assert text(*flags, "--stop", f"[{inside}]") == PROMPT + full + "\n"
    assert text(*flags, "--stop", f"[{inside},never]") == PROMPT + full + "\n"


def test_flags_as_people_type_them(model, tmp_path):
    flags = ("-i", PROMPT, "--temperature", 0, "--ignore-eos")
    expected = text(model, *flags, "-n", 5)
    assert text("-m", model, *flags, "-n", 5) == expected
    assert text(*flags, "--model", model, "--predict", 5, "--batch-size", 7, "--ctx-size", 100) == expected
    assert text(model, "-i", PROMPT, "-n", 5, "--temp", "-1", "--ignore-eos") == expected
    assert text(model, *flags, "-n", "005", "--threads", -1) == expected
    assert len(generated_ids(model, *flags, "-n", -2)) == CONTEXT - len(PROMPT)
    assert stats(tmp_path, model, *flags, "-n", 5, "-c", 0)["context"] == CONTEXT
    seeds = {stats(tmp_path, model, *flags, "-n", 1, "-s", -1)["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert stats(tmp_path, model, *flags, "-n", "010", "-s", "010")["seed"] == 10
    (tmp_path / "prompt").write_text(PROMPT)
    assert text(model, "--file", tmp_path / "prompt", *flags[2:], "-n", 5) == expected


def test_escapes(model):
    flags = (model, "-n", 1, "--temperature", 0)
    assert text(*flags, "-i", r"a\tb\nc\x41\\n\"\'", "-e") == text(*flags, "-i", "a\tb\ncA\\n\"'")
    assert text(*flags, "-i", r"a\tb").startswith(r"a\tb")
    full = readable(greedy(model, n=200))
    cut = next(c for c in full[20:] if re.fullmatch("[!-~]", c))
    stop = "".join(f"\\x{b:02X}" for b in cut.encode())
    assert text(model, "-i", PROMPT, "-n", 200, "--temperature", 0, "--ignore-eos", "-e", "--stop", stop) == (
        PROMPT + full[: full.index(cut)] + "\n"
    )


# ---- Nothing but the model and the prompt decides the logits


def test_threads_and_chunks_do_not_change_a_bit(model, tmp_path):
    flags = (model, "-i", PROMPT * 5, "-n", 20, "--temperature", 0)
    expected = stats(tmp_path, *flags)["logits_hash"]
    for more in (("--threads", 2), ("--threads", 3), ("-b", 1), ("-b", 7), ("-b", 7, "--threads", 2), ("-c", 200)):
        assert stats(tmp_path, *flags, *more)["logits_hash"] == expected, more
    assert stats(tmp_path, *flags, binary=run_binary(cache="paged"))["logits_hash"] == expected
    assert stats(tmp_path, model, "-i", PROMPT * 5 + "!", "-n", 20)["logits_hash"] != expected


# ---- Files


def test_openmp_settings_do_not_change_the_number_of_threads(model, tmp_path):
    def threads(**settings):
        line = command(model, "-i", PROMPT, "-n", 1, "--stats", tmp_path / "stats.json")
        subprocess.run(line, env={**os.environ, **settings}, capture_output=True, timeout=300, check=True)
        return json.loads((tmp_path / "stats.json").read_text())["threads"]

    assert threads(OMP_PROC_BIND="true", OMP_PLACES="{0}", GOMP_CPU_AFFINITY="0", OMP_NUM_THREADS="1") == threads()


def test_logits(model, tmp_path):
    path = tmp_path / "logits.npy"
    run(model, "-i", PROMPT, "--logits", path)
    logits = np.load(path)
    assert logits.shape == (len(PROMPT), checkpoints.VOCAB_SIZE) and logits.dtype == np.float32
    for n in (1, 7, len(PROMPT)):  # causal: a prefix has the same logits
        assert logits[n - 1].argmax() == greedy(model, PROMPT[:n], 1)[0]
    assert list(tmp_path.iterdir()) == [path]


def test_perplexity_is_that_of_the_logits(model, tmp_path):
    score = bytes(np.random.RandomState(3).randint(32, 127, 64 * 3 + 20).astype(np.uint8))
    (tmp_path / "text").write_bytes(score)
    losses = []
    for chunk in range(3):
        ids = np.frombuffer(score[chunk * 64 : chunk * 64 + 64], np.uint8)
        run(model, "-i", bytes(ids).decode(), "--logits", tmp_path / "logits.npy")
        x = np.load(tmp_path / "logits.npy").astype(np.float64)
        log_p = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
        losses += [-log_p[p, ids[p + 1]] for p in range(32, 63)]
    flags = (model, "--perplexity", tmp_path / "text", "-c", 64)
    assert stats(tmp_path, *flags)["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert stats(tmp_path, *flags, "--chunks", 2)["perplexity"] == pytest.approx(np.exp(np.mean(losses[:62])), rel=1e-5)
    assert f"perplexity {np.exp(np.mean(losses)):.2f}" in text(*flags)


def test_stats(model, tmp_path):
    s = stats(tmp_path, model, "-i", PROMPT, "-n", 12, "--ignore-eos")
    assert (s["prompt_tokens"], s["generated_tokens"], s["decode_steps"]) == (len(PROMPT), 12, 11)
    assert s["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2  # K and V, layers, heads, head_dim, f16
    assert s["context"] == len(PROMPT) + 12 and s["kv_bytes"] >= s["context"] * s["kv_bytes_per_token"]
    assert s["first_token_after_start"] > 0 and s["decode_bytes_per_second"] > 0


def test_bench(model):
    report = json.loads(text(model, "--bench"))
    assert {t["test"] for t in report["tests"]} == {"pp255", "tg128"}
    assert all(t["tokens_per_second"] > 0 for t in report["tests"]) and report["read_gb_per_second"] > 0


# ---- Where output goes


def beside(model, folder):
    """A copy of the model that may be lost."""
    shutil.copy(model, folder / "m.safetensors")
    shutil.copy(model.with_suffix(".tokenizer.bin"), folder / "m.tokenizer.bin")
    return folder / "m.safetensors"


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "stdin", "stdout"),
    [
        (["-i", "x", "--stats", "m.safetensors"], None, None),
        (["-i", "x", "--stats", "./sub/../m.safetensors"], None, None),
        (["-i", "x", "--stats", "link"], None, None),
        (["-i", "x", "--stats", "hard"], None, None),
        (["-i", "x", "--stats", "m.tokenizer.bin"], None, None),
        (["-m", "sub/link.safetensors", "-i", "x", "--stats", "m.tokenizer.bin"], None, None),
        (["-i", "x", "--logits", "m.safetensors"], None, None),
        (["-f", "prompt", "--stats", "prompt"], None, None),
        (["-f", "prompt", "--logits", "prompt"], None, None),
        (["--stats", "prompt"], "prompt", None),
        (["--prompts", "requests", "--stats", "requests"], None, None),
        (["--prompts", "-", "--stats", "requests"], "requests", None),
        (["--perplexity", "prompt", "--stats", "prompt"], None, None),
        (["--chat", "--chat-template", "prompt", "--stats", "prompt"], None, None),
        (["-i", "x", "--stats", "out"], None, "out"),
        (["-i", "x", "--stats", "new", "--logits", "new"], None, None),
        (["-i", "x", "--stats", "new", "--logits", "sub/../new"], None, None),
        (["-i", "x", "--stats", "to_new", "--logits", "new"], None, None),
    ],
)
def test_no_output_goes_over_what_the_run_reads(model, tmp_path, arguments, stdin, stdout):
    beside(model, tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "prompt").write_text("a prompt")
    (tmp_path / "requests").write_text('{"prompt": "a", "n": 1}\n')
    (tmp_path / "out").touch()
    (tmp_path / "link").symlink_to("m.safetensors")
    (tmp_path / "sub/link.safetensors").symlink_to("../m.safetensors")
    (tmp_path / "hard").hardlink_to(tmp_path / "m.safetensors")
    (tmp_path / "to_new").symlink_to("new")
    before = contents(tmp_path)
    line = command(*([] if "-m" in arguments else ["m.safetensors"]), *arguments, "-q", "-t", 1)
    with open(tmp_path / (stdin or "/dev/null")) as source, open(tmp_path / (stdout or "sub/out"), "w") as to:
        done = subprocess.run(line, cwd=tmp_path, stdin=source, stdout=to, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert b"give another name" in done.stderr and contents(tmp_path) == before


def test_no_output_goes_where_standard_error_goes(model, tmp_path):
    with open(tmp_path / "err", "wb") as err:
        done = subprocess.run(command(model, "-i", "x", "-t", 1, "--stats", tmp_path / "err"), stderr=err)
    assert done.returncode == 2 and b"that is where standard error goes" in (tmp_path / "err").read_bytes()


def test_links_devices_and_modes_stay(model, tmp_path):
    flags = ("-i", PROMPT, "-n", 3, "--ignore-eos")
    (tmp_path / "folder").mkdir()
    for target, link in (("folder/stats", "link"), ("folder/new", "dangling")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "folder/stats").write_text("old")
    (tmp_path / "folder/stats").chmod(0o600)
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    for link in ("chain", "dangling"):
        run(model, *flags, "--stats", tmp_path / link)
        assert (tmp_path / link).is_symlink() and json.loads((tmp_path / link).read_text())["generated_tokens"] == 3
    assert (tmp_path / "folder/stats").stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["new", "stats"]
    run(model, *flags, "--stats", "/dev/null")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "LINK"])
@pytest.mark.parametrize("to_file", [False, True])
def test_stats_on_standard_output(model, tmp_path, name, to_file):
    """After the text, in a pipe and in a file, and the device is there afterwards."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    name = name.replace("LINK", str(tmp_path / "link"))
    line = command(model, "-i", PROMPT, "-n", 3, "--ignore-eos", "-q", "-t", 1, "--stats", name)
    if to_file:
        with open(tmp_path / "out", "wb") as out:
            done = subprocess.run(line, stdout=out, cwd=tmp_path)
        written = (tmp_path / "out").read_bytes()
    else:
        done = subprocess.run(line, stdout=subprocess.PIPE, cwd=tmp_path)
        written = done.stdout
    assert done.returncode == 0 and written.startswith(PROMPT.encode())
    assert json.loads(written[written.index(b"\n{") :])["generated_tokens"] == 3
    assert os.path.islink("/dev/stdout") and {p.name for p in tmp_path.iterdir()} <= {"link", "out"}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_send_nothing_into_files(model, tmp_path, closed):
    path = tmp_path / "stats.json"
    line = [
        "bash",
        "-c",
        f'"$0" "$@" {closed}',
        *command(model, "-i", PROMPT, "-n", 3, "--ignore-eos", "-t", 1, "--stats", path),
    ]
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert json.loads(path.read_text())["generated_tokens"] == 3


def test_a_closed_pipe_on_standard_error_does_not_end_the_text(model):
    reader, writer = os.pipe()
    os.close(reader)
    line = command(model, "-i", PROMPT, "-n", 3, "-t", 1, "--temperature", 0)
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and one_replacement(done.stdout.decode()) == text(
        model, "-i", PROMPT, "-n", 3, "--temperature", 0
    )


def test_unfinished_files_are_nobody_elses(model, tmp_path):
    """A link planted where an unfinished file might go is not followed; two runs do not meet."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "stats.json"
    flags = ("-i", PROMPT, "-n", 200, "--samples", 200, "--ignore-eos", "--stats", path)
    (tmp_path / "stats.json.partial").symlink_to(victim)
    two = [start(model, *flags) for _ in range(2)]
    for process in two:
        process.stdout.read(1)
    unfinished = {p.name for p in tmp_path.iterdir()} - {"victim", "stats.json.partial"}
    assert unfinished == {f"stats.json.partial.{process.pid}" for process in two}
    for process in two:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert victim.read_text() == "precious" and json.loads(path.read_text())["generated_tokens"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "stats.json.partial", "stats.json"}
    line = command(model, "-i", PROMPT, "-n", 1, "-q", "-t", 1, "--stats", path)
    planted = 'ln -s victim stats.json.partial.$$ && exec "$@"'  # the name that it takes first
    subprocess.run(["bash", "-c", planted, "bash", *line], cwd=tmp_path, capture_output=True, check=True)
    assert victim.read_text() == "precious" and json.loads(path.read_text())["generated_tokens"] == 1
    long = tmp_path / ("x" * 255)
    run(model, "-i", PROMPT, "-n", 1, "--ignore-eos", "--stats", long)
    assert json.loads(long.read_text())["generated_tokens"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
@pytest.mark.parametrize("mode", ["prompt awaited", "request awaited", "generating"])
def test_a_signal_leaves_nothing_unfinished(model, tmp_path, number, mode):
    flags = {
        "prompt awaited": (),
        "request awaited": ("--prompts", "-"),
        "generating": ("-i", PROMPT, "--samples", 300, "-n", 200, "--ignore-eos"),
    }
    process = start(model, *flags[mode], "--stats", tmp_path / "stats.json")
    while not list(tmp_path.iterdir()):  # it is there from the start on
        assert process.poll() is None
    if mode == "generating":
        process.stdout.read(1)
    process.send_signal(number)
    if number == signal.SIGINT:  # where it works, the first one only asks
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in ((-number, 130) if number == signal.SIGINT else (-number,))
    assert {p.name for p in tmp_path.iterdir()} <= {"stats.json"}
    assert process.returncode == 130 or not list(tmp_path.iterdir())


def test_a_second_interrupt_ends_at_once(model, tmp_path):
    """The first one asks, and here nobody takes the text that would come before the end."""
    process = start(model, "--prompts", "-", "--stats", tmp_path / "stats.json")
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    process.stdin.write(b'{"prompt": "a", "n": 1}\n' * 300)
    process.stdin.flush()
    while not select.select([process.stdout], [], [], 0)[0]:
        assert process.poll() is None
    wait_until_it_waits(process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        while "ShdPnd:\t0000000000000000" not in Path(f"/proc/{process.pid}/status").read_text():
            pass
    try:
        assert process.wait(timeout=20) == -signal.SIGINT and not list(tmp_path.iterdir())
    finally:
        process.kill()
        process.communicate()


def test_a_hangup_that_is_ignored_stays_so(model):
    process = subprocess.Popen(
        ["nohup", *command(model, "--prompts", "-", "-t", 1, "-q")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(b'{"prompt": "a", "n": 2}\n')
    process.stdin.flush()
    assert b"text" in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(b'{"prompt": "a", "n": 2}\n', timeout=60)
    assert process.returncode == 0 and b"text" in out


@pytest.mark.parametrize("kilobytes", [4, 19])
def test_a_file_size_limit_is_an_error(model, tmp_path, kilobytes):
    """Also where it cuts the last row alone: the file would have 19812 bytes."""
    path = tmp_path / "logits.npy"
    line = command(model, "-i", PROMPT, "-q", "-t", 1, "--logits", path)
    done = subprocess.run(["bash", "-c", f'ulimit -f {kilobytes}; exec "$0" "$@"', *line], capture_output=True)
    assert done.returncode == 1 and done.stderr == f"run: cannot write {path}: File too large\n".encode()
    assert not list(tmp_path.iterdir())


# ---- Requests


def answers(*arguments, stdin, code=0, **more):
    done = run(*arguments, "--prompts", "-", stdin=stdin.encode(), code=code, **more)
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def test_requests_come_back_in_order_and_do_not_see_each_other(model):
    requests = [
        {"prompt": PROMPT[: 3 + i], "n": 5 + 7 * (i % 3), "seed": i, "temperature": 0.5 * (i % 3)} for i in range(12)
    ]
    lines = "\n".join(map(json.dumps, requests))
    alone = [answers(model, stdin=json.dumps(r))[0] for r in requests]
    for binary in (run_binary(), run_binary(cache="paged")):
        for parallel in (1, 5, 12):
            together = answers(model, "--parallel", parallel, stdin=lines, binary=binary)
            assert [a["line"] for a in together] == list(range(1, 13))
            for a, b in zip(together, alone, strict=True):
                assert (a["text"], a["logits_hash"], a["finish"]) == (b["text"], b["logits_hash"], b["finish"])


def test_a_pool_too_small_for_all_changes_nothing(model, tmp_path):
    lines = "\n".join(json.dumps({"prompt": PROMPT, "n": 60, "seed": i}) for i in range(8))
    paged = run_binary(cache="paged")
    plenty = answers(model, "--parallel", 8, "--ignore-eos", stdin=lines, binary=paged)
    flags = ("--parallel", 8, "--ignore-eos", "--kv-memory", "48K", "-c", 80, "--stats", tmp_path / "stats.json")
    tight = answers(model, *flags, stdin=lines, binary=paged)
    assert [a["logits_hash"] for a in tight] == [a["logits_hash"] for a in plenty]
    s = json.loads((tmp_path / "stats.json").read_text())
    assert s["preemptions"] > 0 and s["peak_blocks"] <= s["blocks"]


def test_request_fields(model):
    full = answers(model, stdin=json.dumps({"prompt": PROMPT, "n": 40, "temperature": 0}))[0]["text"]
    stop = full[10:12]
    cut = answers(model, stdin=json.dumps({"prompt": PROMPT, "n": 40, "temperature": 0, "stop": [stop]}))[0]
    assert cut["text"] == full[: full.index(stop)] and cut["finish"] == "stop"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answer = answers(model, stdin=json.dumps({"messages": chat, "n": 3}))[0]
    assert answer["prompt_tokens"] == len("_system\ns_\n_user\nu_\n_assistant\n") and answer["generated_tokens"] <= 3


def test_an_id_comes_back(model):
    ids = ["a", 7, 1.5, {"x": [1, None]}, "é\n", False]
    lines = [json.dumps({"id": i, "prompt": "a", "n": 1}) for i in ids] + ['{"prompt": "a", "n": 1, "id": null}']
    lines += ['{"id": "wrong", "n": 1}', '{"id": "nonsense"', '{"prompt": "a", "n": 1}']
    result = answers(model, "--parallel", 3, stdin="\n".join(lines), code=1)
    assert [a.get("id", "none") for a in result] == [*ids, "none", "wrong", "none", "none"]
    assert ["error" in a for a in result] == [False] * 7 + [True, True, False]


def test_what_a_request_may_leave_out_or_say_otherwise(model):
    flags = (model, "--temperature", 0, "-n", 5, "--stop", "never")
    plain = {"prompt": PROMPT}
    nothing = dict.fromkeys(
        ("messages", "n", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop", "id", "special")
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    same = (
        (plain, plain | nothing),
        (plain, plain | {"temperature": -1}),
        (plain | {"n": 0}, plain | {"n": -1}),
        (plain | {"n": 0}, plain | {"n": -2}),
        *(
            ({"messages": [{"role": "user", "content": a}]}, {"messages": [{"role": "user", "content": b}]})
            for a, b in (("one\ntwo", parts), ("one", parts[:1]), ("", []))
        ),
    )
    for a, b in same:
        one, two = answers(*flags, stdin=json.dumps(a) + "\n" + json.dumps(b))
        assert (one["text"], one["prompt_tokens"], one["generated_tokens"]) == (
            two["text"],
            two["prompt_tokens"],
            two["generated_tokens"],
        ), b
    two = answers(model, "-n", 40, stdin='{"prompt": "a", "seed": -1, "temperature": 2}\n' * 2)
    assert two[0]["text"] != two[1]["text"]


def test_special_tokens_in_a_prompt(model):
    text = "<|im_start|>a<|im_end|>"
    plain, special = answers(
        model, stdin="".join(json.dumps({"prompt": text, "n": 1, "special": s}) + "\n" for s in (False, True))
    )
    assert plain["prompt_tokens"] == len(text) and special["prompt_tokens"] == 3
    assert "<|im_start|>" in plain["note"] and "note" not in special
    assert answers(model, "--special", stdin=json.dumps({"prompt": text, "n": 1}))[0]["prompt_tokens"] == 3
    lines = text_of_tokens(model, "-i", text, "-n", 1, "--special")
    assert [line.split("\t")[0] for line in lines[:3]] == ["257", "97", "258"] and lines[3] == ""
    done = run(model, "-i", text, "-n", 1, "-q")
    assert done.stderr == b"run: the prompt has <|im_start|> as plain text; with --special it is that token\n"
    assert run(model, "-i", text, "-n", 1, "-q", "--special").stderr == b""
    done = run(model, "--chat", "-n", 1, "-q", stdin=b"<|im_end|>\n")
    assert done.stderr == b"run: this turn has <|im_end|> as plain text\n"


def text_of_tokens(*arguments):
    return text(*arguments, "--tokens").split("\n")


def test_a_line_that_is_too_long_costs_itself_alone(model, tmp_path):
    good = '{"prompt": "a", "n": 1}\n'
    fits, over = good[:-1] + " " * (1025 - len(good)) + "\n", good[:-1] + " " * (1026 - len(good)) + "\n"
    flags = ("--max-line", "1K", "--parallel", 2)
    lines = [fits, over, fits[:-1] + "\r\n", "x" * 3_000_000 + "\n", good, "y" * 70_000]
    result = answers(model, *flags, stdin="".join(lines), code=1)
    assert [("text" in a, a["line"]) for a in result] == [
        *((True, 1), (False, 2), (True, 3), (False, 4), (True, 5), (False, 6))
    ]
    assert all("more than 1024 bytes: --max-line" in a["error"] for a in result if "error" in a)
    done = run(model, "--chat", "-n", 1, "-q", "--max-line", 100, stdin=b"x" * 101 + b"\nhello\n", code=1)
    assert done.stderr == b"run: line 1 is left out: it has more than 100 bytes (--max-line)\n"
    assert done.stdout.endswith(b"\n")


@pytest.mark.skipif(SANITIZE == "1", reason="AddressSanitizer takes terabytes of addresses")
def test_a_long_line_is_not_kept(model):
    """A line of 800 MB passes through a process that has addresses for 600 MB."""
    limited = ["bash", "-c", 'ulimit -v 600000; exec "$0" "$@"', *command(model, "--prompts", "-", "-q", "-t", 1)]
    with subprocess.Popen(limited, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for _ in range(800):
            process.stdin.write(b"x" * 1_000_000)
        process.stdin.write(b'\n{"prompt": "a", "n": 1}\n')
        process.stdin.close()
        long, good = map(json.loads, process.stdout)
    assert process.returncode == 1 and "--max-line" in long["error"] and "text" in good


def test_a_wrong_request_gets_an_error_in_its_place(model):
    good = json.dumps({"prompt": "a", "n": 2})
    wrong = {
        "{": "not JSON",
        "[1]": "JSON object",
        '{"prompt": "a", "foo": 1}': "foo",
        '{"n": 2}': "prompt",
        '{"prompt": "a", "messages": []}': "either",
        '{"prompt": 3}': "text",
        '{"prompt": ""}': "empty",
        '{"prompt": "a", "n": -3}': '"n"',
        '{"prompt": "a", "n": 2.5}': '"n"',
        '{"prompt": "a", "n": 100000}': "256",
        '{"prompt": "a", "top_p": 0}': "top-p",
        '{"prompt": "a", "temperature": "hot"}': "temperature",
        '{"prompt": "a", "stop": [""]}': "stop",
        '{"prompt": "a", "seed": -2}': "seed",
        '{"prompt": "a", "seed": 18446744073709551616}': "too big",
        '{"prompt": "a", "n": 4294967297}': '"n"',
        '{"prompt": "a", "n": 1e400}': "overflow",
        '{"prompt": null}': "either",
        '{"prompt": "a", "repeat_penalty": 1e-38}': "repeat-penalty",
        '{"prompt": "a", "repeat_penalty": 1e10}': "repeat-penalty",
        '{"prompt": "a", "special": 1}': "special",
        '{"messages": [{"role": "user", "content": "x"}], "special": true}': "special",
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}': "image_url",
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}': "text",
        '{"messages": [{"role": "user", "content": ["x"]}]}': "part",
        '{"prompt": "a", "temperature": NaN}': "not JSON",
        '{"prompt": "a", "temperature": 1e300}': "temperature inf",
        '{"prompt": "a", "top_k": true}': "true",
        '{"prompt": "a", "stop": {}}': "stop",
        '{"prompt": "a", "prompt": "b"}': "duplicate",
        '{"messages": {}}': "list",
        '{"messages": [3]}': "role",
        '{"messages": [{"role": "user", "content": null}]}': "content",
        '{"messages": []}': "",
        "null": "JSON object",
        '{"messages": [{"role": "wizard", "content": "x"}]}': "role",
        '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": [1]}': "must be an object, not [1]",
        '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 1}}': "leave it out",
        '{"prompt": "a", "chat_template_kwargs": {}}': 'goes with "messages"',
        '{"prompt": "' + "x" * 400 + '"}': "256",
    }
    lines = "\n".join(f"{good}\n{line}" for line in wrong) + "\n\n" + good + "\n"
    result = answers(model, "--parallel", 4, stdin=lines, code=1)
    assert len(result) == 2 * len(wrong) + 1
    for i, (line, names) in enumerate(wrong.items()):
        assert "text" in result[2 * i], result[2 * i]
        assert names in result[2 * i + 1]["error"], (line, result[2 * i + 1])
        assert result[2 * i + 1]["line"] == 2 * i + 2
    assert result[-1]["line"] == 2 * len(wrong) + 2 and "text" in result[-1]


def test_requests_are_answered_while_others_are_still_to_come(model):
    process = start(model, "--prompts", "-", "--parallel", 4)

    def send(line):
        process.stdin.write(line)
        process.stdin.flush()

    send(b'{"prompt": "a", "n": 3}\n')
    assert json.loads(process.stdout.readline())["line"] == 1
    send(b'\r\n{"prompt": "a", "n": 5, "seed": 1}\r\n{"prompt": ')
    assert json.loads(process.stdout.readline())["line"] == 3
    send(b'"b", "n": 0}\nnonsense\n{"prompt": "c", "n": 2}')  # no newline at the end
    process.stdin.close()
    rest = [json.loads(line) for line in process.stdout]
    assert [a["line"] for a in rest] == [4, 5, 6] and "not JSON" in rest[1]["error"]
    assert process.wait(timeout=60) == 1
    process.stdout.close()
    process.stderr.close()


def test_parallel_bounds_what_runs_at_once(model, tmp_path):
    lines = "".join(json.dumps({"prompt": PROMPT[: 1 + i], "n": 20, "seed": i}) + "\n" for i in range(12))
    (tmp_path / "requests").write_text(lines)
    for parallel in (1, 5):
        flags = ("--prompts", tmp_path / "requests", "--parallel", parallel, "--ignore-eos")
        assert stats(tmp_path, model, *flags)["peak_sequences"] == parallel


def test_requests_as_a_stranger_writes_them(model):
    good = '{"prompt": "a", "n": 1}'
    long = '{"prompt": "' + "x" * 10_000_000 + '"}'
    lines = ["\ufeff" + good, "", " \t", good + "\r", long, "[" * 100_000, "\0", '"', good]
    result = answers(model, "--parallel", 3, stdin="\n".join(lines), code=1)
    assert [(a["line"], "text" in a) for a in result] == [
        *((1, True), (4, True), (5, False), (6, False), (7, False), (8, False), (9, True))
    ]
    assert "10000000 tokens" in result[2]["error"] and "depth" in result[3]["error"]
    done = run(model, "--prompts", "-", stdin=b'{"prompt": "n\xe9"}\n' + good.encode(), code=1)
    assert b"decode byte 0xe9" in done.stdout.splitlines()[0] and b"text" in done.stdout.splitlines()[1]
    assert answers(model, stdin="") == [] and answers(model, stdin="\n\n") == []


# ---- Talk


def test_chat_keeps_its_cache_and_says_what_a_request_says(model, tmp_path):
    flags = ("--temperature", 0, "-n", 12, "--system", "be brief", "--stats", tmp_path / "stats.json", "-q")
    done = run(model, "--chat", *flags, stdin=b"first\n\nsecond\n")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "first"}]
    one = answers(model, stdin=json.dumps({"messages": messages, "n": 12, "temperature": 0}))[0]
    messages += [{"role": "assistant", "content": one["text"]}, {"role": "user", "content": "second"}]
    two = answers(model, stdin=json.dumps({"messages": messages, "n": 12, "temperature": 0}))[0]
    assert done.stdout.decode() == one["text"] + "\n" + two["text"] + "\n"
    s = json.loads((tmp_path / "stats.json").read_text())
    assert s["cached_tokens"] >= one["prompt_tokens"]


def chat_prompt(messages):
    """CHATML's bytes where each token is a byte, and <|im_start|> and <|im_end|> are one token each."""
    text = "".join(f"_{role}\n{content}_\n" for role, content in messages) + "_assistant\n"
    return text.encode()


def test_an_empty_system_message_is_one(model, tmp_path):
    for flags, system in ((), []), (("--system", ""), [("system", "")]):
        told = stats(tmp_path, model, "--chat", "-n", 1, *flags, "-q", stdin=b"hi\n")
        assert told["prompt_tokens"] == len(chat_prompt([*system, ("user", "hi")]))


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_message(model, tmp_path):
    """Each answer is what a request of the turns that are left says."""
    turns = [f"turn {i} of a long talk" for i in range(14)]
    flags = (model, "-n", 4, "--temperature", 0)
    done = run(*flags, "--chat", "--system", "be brief", "-q", stdin="\n".join(turns).encode())
    messages, expected = [("system", "be brief")], ""
    for turn in turns:
        messages.append(("user", turn))
        if len(chat_prompt(messages)) > CONTEXT - 4:
            while len(messages) > 2 and len(chat_prompt(messages)) > CONTEXT / 2:
                del messages[1:3]
        request = {"messages": [{"role": role, "content": content} for role, content in messages]}
        messages.append(("assistant", answers(*flags, stdin=json.dumps(request))[0]["text"]))
        expected += messages[-1][1] + "\n"
    assert len(messages) < 2 * len(turns) - 4
    assert done.stdout.decode() == expected
    assert done.stderr.count(b"\n") == 1 and b"the context of 256 tokens is full: from now on" in done.stderr


def test_a_turn_that_never_fits_is_left_out(model):
    flags = (model, "--chat", "-n", 3, "--temperature", 0, "-q")
    done = run(*flags, stdin=b"x" * 300 + b"\nhello\n", code=1)
    assert b"this turn is left out" in done.stderr
    assert done.stdout == run(*flags, stdin=b"hello\n").stdout


def test_an_answer_that_the_context_cuts_says_so(model):
    done = run(model, "--chat", "--ignore-eos", "-q", stdin=b"hello\n")
    assert done.stderr == b"run: the answer ends here: the context is full\n"


def test_wrong_bytes_in_a_turn_are_replaced_and_said(model):
    flags = (model, "--chat", "-n", 5, "--temperature", 0, "-q")
    done = run(*flags, stdin=b"n\xe9\n")
    assert done.stderr == b"run: line 1 has bytes that are not UTF-8: each became U+FFFD\n"
    assert done.stdout == run(*flags, stdin="n\ufffd\n".encode()).stdout


def test_several_lines_in_one_turn(model):
    flags = ("-n", 5, "--temperature", 0)
    chat = run(model, "--chat", *flags, "-q", stdin=b"one\\\ntwo\\\n\\\nthree\n").stdout.decode()
    messages = [{"role": "user", "content": "one\ntwo\n\nthree"}]
    assert chat == answers(model, *flags, stdin=json.dumps({"messages": messages}))[0]["text"] + "\n"


def test_control_tokens_in_a_turn_are_plain_text(model):
    chat = [{"role": "user", "content": "<|im_end|>"}]
    assert answers(model, stdin=json.dumps({"messages": chat, "n": 1}))[0]["prompt_tokens"] == len(
        "_user\n<|im_end|>_\n_assistant\n"
    )


def test_a_template_of_the_command_line_and_its_variables(model, tmp_path):
    """A request's own variables come before the command line's, and none becomes a control token."""
    (tmp_path / "t.jinja").write_text("<|im_start|>{{ a }}.{{ b }}|{{ messages[0].content }}")
    flags = ("--chat-template", tmp_path / "t.jinja", "--chat-template-kwargs", '{"a": "1", "b": "<|im_end|>"}')
    flags += ("--temperature", 0, "-n", 5)
    messages = [{"role": "user", "content": "hello"}]
    requests = [{"messages": messages, "chat_template_kwargs": own} for own in (None, {"b": "22"})]
    one, two = answers(model, *flags, stdin="\n".join(map(json.dumps, requests)))
    assert one["prompt_tokens"] == len("_1.<|im_end|>|hello") and two["prompt_tokens"] == len("_1.22|hello")
    assert run(model, "--chat", *flags, "-q", stdin=b"hello\n").stdout.decode() == one["text"] + "\n"
    again = answers(model, *flags[:2], *flags[4:], stdin=json.dumps(requests[1]))[0]
    assert again["prompt_tokens"] == len("_.22|hello")


def test_a_template_that_takes_no_system_message_says_so_at_once(model, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x")
    done = run(model, "--chat", "--system", "s", "--chat-template", template, code=1)
    assert done.stderr.endswith(b": no system here\n") and done.stderr.count(b"\n") == 1


# ---- Wrong input: one line that names the thing, and the right exit code

WHOLE = ("-n", "-c", "-b", "-t", "--top-k", "--samples", "--parallel", "--layer", "--head", "--chunks")
NUMBERS = ("--temperature", "--top-p", "--min-p", "--repeat-penalty", "--bandwidth", "--flops", "--memory")
SAMPLING = ("--temperature", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--seed")


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        ([], 2, "required"),
        (["MODEL", "--frobnicate"], 2, "frobnicate"),
        (["MODEL", "more"], 2, "more"),
        (["MODEL", "-n", "-5"], 2, "-n -5"),
        (["MODEL", "-n", "many"], 2, "many"),
        (["MODEL", "-n", "99999999999999"], 2, "99999999999999"),
        (["MODEL", "-n"], 2, "-n"),
        (["MODEL", "--threads", "0"], 2, "--threads 0"),
        (["MODEL", "--threads", "-2"], 2, "--threads -2"),
        (["MODEL", "--temperature", "nan"], 2, "temperature nan"),
        (["MODEL", "--temperature", "inf"], 2, "temperature inf"),
        (["MODEL", "--top-p", "0"], 2, "top-p 0"),
        (["MODEL", "--top-p", "1.5"], 2, "top-p 1.5"),
        (["MODEL", "--top-p", "nan"], 2, "top-p nan"),
        (["MODEL", "--top-k", "-1"], 2, "top-k -1"),
        (["MODEL", "--min-p", "2"], 2, "min-p 2"),
        (["MODEL", "--repeat-penalty", "0"], 2, "repeat-penalty 0"),
        (["MODEL", "--repeat-penalty", "1e-10"], 2, "repeat-penalty 1e-10"),
        (["MODEL", "--repeat-penalty", "nan"], 2, "repeat-penalty nan"),
        (["MODEL", "--temperature", "-nan"], 2, "temperature -nan"),
        (["MODEL", "--seed", "-2"], 2, "-2"),
        (["MODEL", "--seed", "18446744073709551616"], 2, "18446744073709551616"),
        (["MODEL", "--seed", "1.5"], 2, "--seed 1.5: must be a whole number"),
        *((["MODEL", flag, word], 2, f" {word}: must be a whole") for flag in WHOLE for word in ("nan", "1e3", "0x10")),
        *((["MODEL", flag, "many"], 2, " many: must be a number") for flag in NUMBERS),
        *((["MODEL", "-i", "x", "--explain", flag, "1"], 2, f"{flag} makes no sense") for flag in SAMPLING),
        (["MODEL", "--perplexity", "SHORT", "--ignore-eos"], 2, "--ignore-eos makes no sense"),
        *((["MODEL", flag, ""], 2, flag) for flag in ("--n-predict", "--top-p", "--prompts", "--stats")),
        (["MODEL", "--perplexity", ""], 2, "--perplexity"),
        (["MODEL", "-c", "-1"], 2, "-1"),
        (["MODEL", "-b", "0"], 2, "--batch 0"),
        (["MODEL", "--samples", "0"], 2, "--samples 0"),
        (["MODEL", "--parallel", "2"], 2, "--prompts"),
        (["MODEL", "--prompts", "-", "--parallel", "0"], 2, "--parallel 0"),
        (["MODEL", "--kv-memory", "lots"], 2, "lots"),
        (["MODEL", "--kv-memory", "-1G"], 2, "-1G"),
        (["MODEL", "--kv-memory", "1\n\x1b[31m"], 2, "1??[31m"),
        (["MODEL", "--top-k", "1\n\x1b[31m"], 2, "1??[31m"),
        (["MODEL", "--kv-memory", ""], 2, "--kv-memory"),
        (["MODEL", "--stop", ""], 2, "--stop"),
        (["MODEL", "-e", "-i", r"\q"], 2, r"--prompt \q"),
        (["MODEL", "-e", "-i", "\\"], 2, "--prompt \\"),
        (["MODEL", "-e", "-i", r"\x4"], 2, r"--prompt \x4"),
        (["MODEL", "-e", "-i", r"\xgg"], 2, r"--prompt \xgg"),
        (["MODEL", "-e", "-i", r"\xe9"], 1, "byte 0xe9"),
        (["MODEL", "-e"], 2, "--escape"),
        (["MODEL", "--special", "--chat"], 2, "--special"),
        (["MODEL", "--max-line", "1M"], 2, "--max-line"),
        (["MODEL", "--prompts", "-", "--max-line", "much"], 2, "--max-line much"),
        (["MODEL", "--mla", "sideways"], 2, "sideways"),
        (["MODEL", "--chat", "--bench"], 2, "--bench"),
        (["MODEL", "--chat", "-i", "x"], 2, "--chat"),
        (["MODEL", "--system", "x"], 2, "--chat"),
        (["MODEL", "-i", "x", "--chat-template", "TEMPLATE"], 2, "--chat-template needs --chat or --prompts"),
        (["MODEL", "-i", "x", "--chat-template-kwargs", "{}"], 2, "--chat-template-kwargs needs --chat or --prompts"),
        (["MODEL", "--chat", "--chat-template-kwargs", "{"], 2, "--chat-template-kwargs is not JSON"),
        (["MODEL", "--chat", "--chat-template-kwargs", "[1]"], 2, "--chat-template-kwargs [1]"),
        (["MODEL", "--chat", "--chat-template-kwargs", ""], 2, "--chat-template-kwargs"),
        (["MODEL", "--chat", "--chat-template-kwargs", '{"messages": 1}'], 1, '"messages"'),
        (["MODEL", "--chat", "--chat-template", "nothing"], 1, "--chat-template nothing"),
        (["MODEL", "--chat", "--chat-template", "FOLDER"], 1, "--chat-template FOLDER"),
        (["MODEL", "--chat", "--chat-template", "/dev/zero"], 1, "--chat-template /dev/zero"),
        (["MODEL", "--chat", "--chat-template", "EMPTY"], 1, "is empty"),
        (["MODEL", "--prompts", "-", "--chat-template", "TEMPLATE"], 1, "TEMPLATE, line 2, column"),
        (["MODEL", "-i", "x", "-f", "y"], 2, "--prompt"),
        (["MODEL", "-i", "x", "-i", "y"], 2, "--prompt"),
        (["nothing.safetensors"], 1, "nothing.safetensors"),
        (["FOLDER"], 1, "make run MODEL=FOLDER"),
        (["PIPE"], 1, "PIPE"),
        (["/dev/zero"], 1, "/dev/zero"),
        (["MODEL", "-f", "nothing"], 1, "nothing"),
        (["MODEL", "-f", "FOLDER"], 1, "FOLDER"),
        (["MODEL", "-f", "/dev/zero"], 1, "/dev/zero has more than"),
        (["MODEL", "--prompts", "nothing"], 1, "nothing"),
        (["MODEL", "--prompts", "FOLDER"], 1, "FOLDER"),
        (["MODEL", "--perplexity", "nothing"], 1, "nothing"),
        (["MODEL", "--perplexity", "SHORT"], 1, "at least 512"),
        (["MODEL", "--perplexity", "SHORT", "-c", "2"], 1, "-c 2"),
        (["MODEL", "--perplexity", "-"], 1, "standard input"),
        (["MODEL", "-i", ""], 1, "the prompt is empty"),
        (["MODEL"], 1, "standard input is empty"),
        (["MODEL", "--perplexity", "EMPTY"], 1, "EMPTY"),
        (["MODEL", "-i", "x", "--kv-memory", "1"], 1, "none fits"),
        (["MODEL", "-i", "x" * 300], 1, "300 tokens"),
        (["MODEL", "-i", "x" * 256], 1, "256 tokens"),
        (["MODEL", "-i", "x" * 20, "-c", "10"], 1, "-c"),
        (["MODEL", "-i", "x", "-n", "256"], 1, "context of 256 tokens"),
        (["MODEL", "-i", "x", "-n", "2147483647"], 1, "context of 256 tokens"),
        (["MODEL", "-i", "x", "-c", "257"], 1, "-c 257"),
        (["MODEL", "-i", "x", "-c", "200", "--kv-memory", "20K"], 1, "the largest context that fits is -c"),
        (["MODEL", "-i", "x", "--mla", "absorbed"], 1, "gqa"),
        (["MODEL", "-i", "x", "--stats", "nowhere/stats.json"], 1, "nowhere/stats.json"),
        (["MODEL", "-i", "x", "--stats", "FOLDER"], 1, "FOLDER"),
        (["MODEL", "-i", "x", "--stats", "y" * 256], 1, "File name too long"),
        (["MODEL", "-i", "x", "--logits", "nowhere/logits.npy"], 1, "nowhere/logits.npy"),
        (["MODEL", "-i", "x", "--heatmap", "nowhere/picture.png"], 1, "nowhere/picture.png"),
        (["MODEL", "-i", "x", "--explain", "--layer", "9"], 1, "--layer 9: this model has layers 0 .. 1"),
        (["MODEL", "-i", "x", "--logits", "/dev/full"], 1, "/dev/full"),
    ],
)
def test_wrong_input(model, tmp_path, arguments, code, names):
    (tmp_path / "SHORT").write_text("short")
    (tmp_path / "EMPTY").touch()
    (tmp_path / "TEMPLATE").write_text("a\n{{ (")
    os.mkfifo(tmp_path / "PIPE")
    places = {"MODEL": str(model), "FOLDER": str(tmp_path)}
    places |= {name: str(tmp_path / name) for name in ("SHORT", "EMPTY", "PIPE", "TEMPLATE")}
    quiet = ["-q"] if "/dev/full" in arguments else []  # all else is refused before the report, and so before any work
    done = run(*[places.get(a, a) for a in arguments], *quiet, code=code)
    complaint = done.stderr.decode()
    assert done.stdout == b"" and complaint.startswith("run: ") and complaint.count("\n") == 1, complaint
    assert names.replace("FOLDER", str(tmp_path)).replace("PIPE", str(tmp_path / "PIPE")) in complaint


def test_wrong_bytes(model, tmp_path):
    (tmp_path / "latin1").write_bytes("né".encode("latin1"))
    for flags, stdin in (
        (["-i", b"n\xe9"], b""),
        (["-f", tmp_path / "latin1"], b""),
        ([], b"n\xe9"),
        (["--perplexity", tmp_path / "latin1"], b""),
        (["--chat", "--system", b"n\xe9"], b""),
        (["--chat", "--chat-template", tmp_path / "latin1"], b""),
        (["-i", "x", "--stop", b"n\xe9"], b""),
    ):
        line = [*command(model, "-q", "--threads", 1), *flags]
        done = subprocess.run(line, input=stdin, capture_output=True, timeout=60)
        assert done.returncode == 1 and b"not UTF-8: byte 0xe9 at offset 1" in done.stderr, done.stderr


def test_wrong_model_files(model, model_without_chat, tmp_path):
    weights, tokenizer = tmp_path / "m.safetensors", tmp_path / "m.tokenizer.bin"

    def complaint():
        done = run(weights, "-i", "x", "-q", code=1)
        assert done.stderr.count(b"\n") == 1
        return done.stderr.decode()

    shutil.copy(model, weights)
    assert "m.tokenizer.bin" in complaint()
    tokenizer.write_bytes(b"")
    assert "m.tokenizer.bin" in complaint()
    shutil.copy(model_without_chat.with_suffix(".tokenizer.bin"), tokenizer)
    assert "m.tokenizer.bin" in complaint()  # another model's
    shutil.copy(model.with_suffix(".tokenizer.bin"), tokenizer)
    run(weights, "-i", "x", "-n", 1)
    weights.write_bytes(model.read_bytes()[:-1])
    assert "m.safetensors" in complaint()
    weights.write_bytes(b"")
    assert "m.safetensors" in complaint()


@pytest.mark.parametrize(
    "kind", ["gguf", "pytorch", "tokenizer", "hugging face", "hugging face without metadata", "folder"]
)
def test_a_file_of_another_kind_names_the_command(model, tmp_path, kind):
    folder = tmp_path / "checkpoint"
    checkpoints.build(checkpoints.load("llama_gqa"), folder)
    path = next(folder.glob("*.safetensors"))
    fix = f"make run MODEL={folder} "
    if kind in ("gguf", "pytorch"):
        path = folder / "weights.bin"
        path.write_bytes({"gguf": b"GGUF\3\0\0\0", "pytorch": b"PK\3\4 and more"}[kind] + bytes(100))
        fix = f"make run MODEL={path if kind == 'gguf' else folder} "
    elif kind == "tokenizer":
        path, fix = model.with_suffix(".tokenizer.bin"), "the model lies beside it"
    elif kind == "hugging face without metadata":
        header = json.dumps({"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    elif kind == "folder":
        path = folder
    done = run(path, "-i", "x", code=1)
    assert done.stderr.count(b"\n") == 1 and fix in done.stderr.decode(), done.stderr


def test_a_linked_model_finds_its_tokenizer(model, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(model)
    flags = ("-i", PROMPT, "-n", 5, "--temperature", 0)
    assert text(tmp_path / "link.safetensors", *flags) == text(model, *flags)


@pytest.mark.parametrize("size", ["header", "middle", "last byte", "rewritten"])
def test_a_model_that_changes_while_it_is_read_is_refused(model, tmp_path, size):
    """Past a new end there is no memory (SIGBUS), and zeros up to the end of its page."""
    weights = beside(model, tmp_path)
    process = start(weights, "-n", 3, "-q", "--stats", tmp_path / "stats.json")
    process.stdin.write(b"x")
    process.stdin.flush()
    while b"m.safetensors" not in pathlib.Path(f"/proc/{process.pid}/maps").read_bytes():
        assert process.poll() is None
    if size == "rewritten":
        data = weights.read_bytes()
        with open(weights, "r+b") as file:
            file.write(data)
    else:
        whole = weights.stat().st_size
        os.truncate(weights, {"header": 1000, "middle": whole // 2, "last byte": whole - 1}[size])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith(b"run: ") and err.count(b"\n") == 1, err
    assert b"m.safetensors" in err
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", "m.tokenizer.bin"}


# ---- Numbers that are none


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """The tiny model with values 3e5 times as large, and the output projection as much smaller: the same function."""

    def make(name, change):
        folder = tmp_path_factory.mktemp("models") / name
        reference = checkpoints.load("llama_mha")
        reference["shards"] = 1
        checkpoints.build(reference, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({n: change(n, t.copy()) for n, t in tensors.items()}, folder / "model.safetensors")
        return exported(folder, folder.with_suffix(".safetensors"), "f32")

    return make


OVERFLOWS = [
    ("v_proj", "o_proj", 3e5, "f16"),
    ("k_proj", "q_proj", 3e5, "f16"),
    ("v_proj", "o_proj", 1e9, "q8"),
    ("v_proj", "o_proj", 3e5, "q4"),
]


@pytest.mark.parametrize(("large", "small", "factor", "kv"), OVERFLOWS)
def test_what_the_cache_cannot_hold_names_the_cure(scaled, tmp_path, large, small, factor, kv):
    def change(name, tensor):
        return (
            tensor * np.float32(factor) if large in name else tensor / np.float32(factor) if small in name else tensor
        )

    weights, plain = scaled(f"{large}-{kv}", change), scaled(f"plain-{large}-{kv}", lambda name, tensor: tensor)
    narrow, bf16 = run_binary("mha", kv=kv), run_binary("mha", kv="bf16")
    (tmp_path / "score").write_text(PROMPT * 20)
    for mode in (
        ("-i", PROMPT, "-n", 5),
        ("-i", PROMPT, "-n", 5, "--temperature", 1, "--samples", 3),
        ("-i", PROMPT, "--logits", tmp_path / "logits.npy"),
        ("--perplexity", tmp_path / "score", "-c", 32),
        ("--bench",),
    ):
        done = run(weights, *mode, "-q", code=1, binary=narrow)
        assert f"KV {kv} cannot hold: make KV=bf16" in done.stderr.decode() and done.stderr.count(b"\n") == 1
        assert b"export" not in done.stderr and not (tmp_path / "logits.npy").exists()
    flags = ("-i", PROMPT, "-n", 5, "--temperature", 0)
    assert text(weights, *flags, binary=bf16) == text(plain, *flags, binary=bf16)


def test_what_the_cache_cannot_hold_costs_its_request_alone(scaled):
    """The values of Z alone are too large; the others come into the blocks that it leaves, and share its steps."""

    def change(name, tensor):
        if "embed_tokens" in name:
            tensor[:, 0] = 0
            tensor[ord("Z"), 0] = 1
        if "layers.0" in name and "v_proj" in name:
            tensor[:, 0] = 1e6
        return tensor

    weights, binary = scaled("one-token", change), run_binary("mha", kv="f16")
    prompts = ["hello", "a Z, and more of it", "hello world", "Z", "more", "ZZ", "a"]
    lines = [json.dumps({"prompt": prompt, "n": 4, "temperature": 0}) for prompt in prompts]
    alone = [answers(weights, "-q", stdin=line, code="Z" in line, binary=binary)[0] for line in lines]
    for parallel in 1, 3:
        together = answers(weights, "-q", "--parallel", parallel, stdin="\n".join(lines), code=1, binary=binary)
        for prompt, one, other in zip(prompts, alone, together, strict=True):
            if "Z" in prompt:
                assert "KV f16 cannot hold: make KV=bf16" in other["error"] and "text" not in other
            else:
                assert (other["text"], other["logits_hash"]) == (one["text"], one["logits_hash"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_model_says_so_in_every_mode(scaled, tmp_path, value):
    def change(name, tensor):
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor[3, 5] = value
        return tensor

    weights, binary = scaled(f"damaged-{value}", change), run_binary("mha")
    for mode in (("-i", PROMPT, "-n", 5), ("-i", PROMPT, "--logits", tmp_path / "logits.npy"), ("--bench",)):
        done = run(weights, *mode, "-q", code=1, binary=binary)
        assert b"not finite" in done.stderr and b"export the model again" in done.stderr
        assert done.stderr.count(b"\n") == 1 and not list(tmp_path.iterdir())
    result = answers(weights, stdin='{"prompt": "a", "n": 2, "id": 1}\n{"prompt": "b"}\n', code=1, binary=binary)
    assert [a["line"] for a in result] == [1, 2] and all("not finite" in a["error"] for a in result)
    assert run(weights, "--chat", "-q", stdin=b"hi\n", code=1, binary=binary).stderr.count(b"\n") == 1


def test_weights_larger_than_the_memory_are_refused_before_they_are_read(model, tmp_path):
    """A sparse file of 1 TB."""
    with open(model, "rb") as f:
        tokenizer_sha256 = json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]["tokenizer_sha256"]
    shutil.copy(model.with_suffix(".tokenizer.bin"), tmp_path / "m.tokenizer.bin")
    vocab, dim, layer = 1 << 24, 1 << 14, "layers.0."
    config = {"attention": "gqa", "dim": dim, "hidden_dim": 1, "n_layers": 1, "vocab_size": vocab, "seq_len": 256}
    config |= {"n_heads": 1, "n_kv_heads": 1, "head_dim": 1, "norm": "rms", "norm_eps": 1e-5, "activation": "silu"}
    config |= {"attention_scale": 1, "window": [0], "rope": [-1], "rope_scale": []}
    shapes = {"embed_tokens": [vocab, dim], layer + "o_proj": [dim, 1], layer + "down_proj": [dim, 1]}
    shapes |= {layer + name: [1, dim] for name in ("q_proj", "k_proj", "v_proj", "up_proj")}
    header = {"__metadata__": {"format": "attn.cu 3", "config": json.dumps(config), "types": "{}"}}
    header["__metadata__"]["tokenizer_sha256"] = tokenizer_sha256
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name + ".weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "m.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    complaint = run(tmp_path / "m.safetensors", "-i", "x", code=1).stderr
    assert b"m.safetensors: its weights take 10995" in complaint and complaint.count(b"\n") == 1, complaint


def test_another_variant(tmp_path):
    weights = export_tiny("llama_mqa", tmp_path / "mqa")
    assert b"make ATTENTION=mqa" in run(weights, "-i", "x", code=1).stderr


def test_chat_without_a_template(model_without_chat):
    assert b"chat template" in run(model_without_chat, "--chat", stdin=b"hi\n", code=1).stderr


def test_the_largest_context_that_fits_does_fit(model):
    flags = (model, "-i", "x", "-n", 1, "--kv-memory", "20K", "-c")
    most = int(re.search(rb"fits is -c (\d+)", run(*flags, 200, code=1).stderr)[1])
    run(*flags, most)
    run(*flags, most + 1, code=1)


# ---- Ends from outside


def start(*arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments, "--threads", 1), stdin=pipe, stdout=pipe, stderr=pipe)


def wait_until_it_waits(process):
    """It has one thread and its answer was read: where that sleeps, it waits for its standard input."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline, "it does not wait"
        time.sleep(0.001)


def test_interrupted_text_is_whole_and_reported(model, tmp_path):
    flags = ("-i", PROMPT, "--samples", 400, "-n", 200, "--stats", tmp_path / "stats.json")
    process = start(model, *flags, "--ignore-eos")
    begin = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n") and b"logits   hash" in err
    (begin + out).decode()
    assert json.loads((tmp_path / "stats.json").read_text())["generated_tokens"] > 0


def test_interrupted_requests_say_what_is_not_finished(model):
    requests = [b'{"prompt": "%d", "n": 200}' % i for i in range(3000)]
    requests[2990] = b"x" * 1025
    process = start(model, "--prompts", "-", "--parallel", 2, "--ignore-eos", "--max-line", "1K")
    process.stdin.write(b"\n".join(requests))
    process.stdin.close()
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    lines = [first, *process.stdout.read().splitlines()]
    assert process.wait(timeout=60) == 130
    lines = [json.loads(line) for line in lines]
    assert [a["line"] for a in lines] == list(range(1, 3001))
    assert "text" in lines[0] and lines[-1]["error"] == "interrupted" and "--max-line" in lines[2990]["error"]
    process.stderr.close()


def test_interrupt_while_waiting_for_a_request(model):
    process = start(model, "--prompts", "-")
    process.stdin.write(b'{"prompt": "a", "n": 2}\n')
    process.stdin.flush()
    assert b"text" in process.stdout.readline()
    wait_until_it_waits(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert b"logits   hash" in process.stderr.read() and process.stdout.read() == b""
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def test_interrupt_while_waiting_for_a_turn(model):
    process = start(model, "--chat", "-n", 5)
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.readline()
    wait_until_it_waits(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert b"logits   hash" in process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


@pytest.mark.parametrize("mode", [("-i", PROMPT, "--samples", 400), ("--prompts", "-", "--parallel", 4)])
def test_closed_pipe_ends_quietly(model, mode):
    process = start(model, *mode, "-n", 200, "--ignore-eos")
    if "--prompts" in mode:
        process.stdin.write(b"\n".join(b'{"prompt": "%d"}' % i for i in range(3000)))
    process.stdin.close()
    process.stdout.read(30)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert b"run:" not in process.stderr.read()
    process.stderr.close()


def test_full_disk(model):
    for flags in ((model, "-i", PROMPT, "-n", 3, "-q", "--threads", 1), ("--help",)):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command(*flags), stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 1 and b"cannot write to standard output: No space left" in done.stderr


def test_help_names_every_flag_of_the_readme():
    flags = set(re.findall(r"--[a-z][a-z-]+", text_of_help()))
    readme = (checkpoints.REFERENCE.parents[1] / "README.md").read_text()
    table = readme[readme.index("### Flags") :].split("\n#")[0]
    named = set(re.findall(r"`(?:-\w, )?(--[a-z][a-z-]+)", table))
    assert len(named) > 20 and named <= flags, named - flags


def text_of_help():
    done = subprocess.run(command("--help"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout
