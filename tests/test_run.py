"""The whole program on a tiny random model whose tokens are bytes: every flag, every wrong input, every way to end."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import ROOT, make, run_binary

import export

PROMPT = "The quick brown fox"
CONTEXT = 256  # of the model
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def export_tiny(name, folder, chat_template=None):
    checkpoints.build(checkpoints.load(name), folder)
    if chat_template:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = folder.with_suffix(".safetensors")
    export.export(argparse.Namespace(source=folder, output=weights, type="f32", layout=None, tokenizer=None))
    return weights


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


# ---- Nothing but the model and the prompt decides the logits


def test_threads_and_chunks_do_not_change_a_bit(model, tmp_path):
    flags = (model, "-i", PROMPT * 5, "-n", 20, "--temperature", 0)
    expected = stats(tmp_path, *flags)["logits_hash"]
    for more in (("--threads", 2), ("--threads", 3), ("-b", 1), ("-b", 7), ("-b", 7, "--threads", 2), ("-c", 200)):
        assert stats(tmp_path, *flags, *more)["logits_hash"] == expected, more
    assert stats(tmp_path, *flags, binary=run_binary(cache="paged"))["logits_hash"] == expected
    assert stats(tmp_path, model, "-i", PROMPT * 5 + "!", "-n", 20)["logits_hash"] != expected


# ---- Files


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
        '{"prompt": "a", "n": -1}': '"n"',
        '{"prompt": "a", "n": 2.5}': '"n"',
        '{"prompt": "a", "n": 100000}': "256",
        '{"prompt": "a", "top_p": 0}': "top-p",
        '{"prompt": "a", "temperature": "hot"}': "temperature",
        '{"prompt": "a", "stop": [""]}': "stop",
        '{"prompt": "a", "seed": -1}': "seed",
        '{"prompt": "a", "seed": 18446744073709551616}': "too big",
        '{"prompt": "a", "n": 4294967297}': '"n"',
        '{"prompt": "a", "n": 1e400}': "overflow",
        '{"prompt": "a", "n": null}': "null",
        '{"prompt": null}': "null",
        '{"prompt": "a", "temperature": NaN}': "not JSON",
        '{"prompt": "a", "temperature": 1e300}': "temperature inf",
        '{"prompt": "a", "top_k": true}': "true",
        '{"prompt": "a", "stop": {}}': "stop",
        '{"prompt": "a", "prompt": "b"}': "duplicate",
        '{"messages": {}}': "list",
        '{"messages": [3]}': "role",
        '{"messages": [{"role": "user", "content": null}]}': "null",
        '{"messages": []}': "",
        "null": "JSON object",
        '{"messages": [{"role": "wizard", "content": "x"}]}': "role",
        '{"messages": [{"role": "assistant", "content": "x"}]}': "",
        '{"prompt": "' + "x" * 400 + '"}': "256",
    }
    lines = "\n".join(f"{good}\n{line}" for line in wrong) + "\n\n" + good + "\n"
    result = answers(model, "--parallel", 4, stdin=lines)
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
    assert process.wait(timeout=60) == 0
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
    result = answers(model, "--parallel", 3, stdin="\n".join(lines))
    assert [(a["line"], "text" in a) for a in result] == [
        *((1, True), (4, True), (5, False), (6, False), (7, False), (8, False), (9, True))
    ]
    assert "10000000 tokens" in result[2]["error"] and "depth" in result[3]["error"]
    done = run(model, "--prompts", "-", stdin=b'{"prompt": "n\xe9"}\n' + good.encode())
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


def test_chat_ends_where_the_context_is_full(model):
    done = run(model, "--chat", "--ignore-eos", stdin=b"hello\nhello\n", code=1)
    assert b"fills the context of 256 tokens" in done.stderr


def test_control_tokens_in_a_turn_are_plain_text(model):
    chat = [{"role": "user", "content": "<|im_end|>"}]
    assert answers(model, stdin=json.dumps({"messages": chat, "n": 1}))[0]["prompt_tokens"] == len(
        "_user\n<|im_end|>_\n_assistant\n"
    )


# ---- Wrong input: one line that names the thing, and the right exit code


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        ([], 2, "required"),
        (["MODEL", "--frobnicate"], 2, "frobnicate"),
        (["MODEL", "more"], 2, "more"),
        (["MODEL", "-n", "-5"], 2, "-n -5"),
        (["MODEL", "-n", "-2"], 2, "-n -2"),
        (["MODEL", "-n", "many"], 2, "many"),
        (["MODEL", "-n", "99999999999999"], 2, "99999999999999"),
        (["MODEL", "-n"], 2, "-n"),
        (["MODEL", "--threads", "0"], 2, "--threads 0"),
        (["MODEL", "--threads", "-1"], 2, "--threads -1"),
        (["MODEL", "--temperature", "nan"], 2, "temperature nan"),
        (["MODEL", "--temperature", "-1"], 2, "temperature -1"),
        (["MODEL", "--temperature", "inf"], 2, "temperature inf"),
        (["MODEL", "--top-p", "0"], 2, "top-p 0"),
        (["MODEL", "--top-p", "1.5"], 2, "top-p 1.5"),
        (["MODEL", "--top-p", "nan"], 2, "top-p nan"),
        (["MODEL", "--top-k", "-1"], 2, "top-k -1"),
        (["MODEL", "--min-p", "2"], 2, "min-p 2"),
        (["MODEL", "--repeat-penalty", "0"], 2, "repeat-penalty 0"),
        (["MODEL", "--seed", "-1"], 2, "-1"),
        (["MODEL", "--seed", "18446744073709551616"], 2, "18446744073709551616"),
        (["MODEL", "--seed", "1.5"], 2, "1.5"),
        *((["MODEL", flag, ""], 2, flag) for flag in ("--n-predict", "--top-p", "--prompts", "--stats")),
        (["MODEL", "--perplexity", ""], 2, "--perplexity"),
        (["MODEL", "-c", "-1"], 2, "-1"),
        (["MODEL", "-b", "0"], 2, "--batch 0"),
        (["MODEL", "--samples", "0"], 2, "--samples 0"),
        (["MODEL", "--parallel", "2"], 2, "--prompts"),
        (["MODEL", "--prompts", "-", "--parallel", "0"], 2, "--parallel 0"),
        (["MODEL", "--kv-memory", "lots"], 2, "lots"),
        (["MODEL", "--kv-memory", "-1G"], 2, "-1G"),
        (["MODEL", "--kv-memory", ""], 2, "--kv-memory"),
        (["MODEL", "--stop", ""], 2, "--stop"),
        (["MODEL", "--mla", "sideways"], 2, "sideways"),
        (["MODEL", "--chat", "--bench"], 2, "--bench"),
        (["MODEL", "--chat", "-i", "x"], 2, "--chat"),
        (["MODEL", "--system", "x"], 2, "--chat"),
        (["MODEL", "-i", "x", "-f", "y"], 2, "--prompt"),
        (["MODEL", "-i", "x", "-i", "y"], 2, "--prompt"),
        (["nothing.safetensors"], 1, "nothing.safetensors"),
        (["FOLDER"], 1, "FOLDER"),
        (["PIPE"], 1, "PIPE"),
        (["/dev/zero"], 1, "/dev/zero"),
        (["MODEL", "-f", "nothing"], 1, "nothing"),
        (["MODEL", "-f", "FOLDER"], 1, "FOLDER"),
        (["MODEL", "--prompts", "nothing"], 1, "nothing"),
        (["MODEL", "--prompts", "FOLDER"], 1, "FOLDER"),
        (["MODEL", "--perplexity", "nothing"], 1, "nothing"),
        (["MODEL", "--perplexity", "SHORT"], 1, "at least 512"),
        (["MODEL", "--perplexity", "SHORT", "-c", "2"], 1, "-c 2"),
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
        (["MODEL", "-i", "x", "--logits", "nowhere/logits.npy"], 1, "nowhere/logits.npy"),
        (["MODEL", "-i", "x", "--logits", "/dev/full"], 1, "/dev/full"),
    ],
)
def test_wrong_input(model, tmp_path, arguments, code, names):
    (tmp_path / "SHORT").write_text("short")
    (tmp_path / "EMPTY").touch()
    os.mkfifo(tmp_path / "PIPE")
    places = {"MODEL": str(model), "FOLDER": str(tmp_path)}
    places |= {name: str(tmp_path / name) for name in ("SHORT", "EMPTY", "PIPE")}
    quiet = ["-q"] if "--logits" in arguments else []  # all else is refused before the report, and so before any work
    done = run(*[places.get(a, a) for a in arguments], *quiet, code=code)
    complaint = done.stderr.decode()
    assert done.stdout == b"" and complaint.startswith("run: ") and complaint.count("\n") == 1, complaint
    assert places.get(names, names) in complaint


def test_wrong_bytes(model, tmp_path):
    (tmp_path / "latin1").write_bytes("né".encode("latin1"))
    for flags, stdin in (
        (["-i", b"n\xe9"], b""),
        (["-f", tmp_path / "latin1"], b""),
        ([], b"n\xe9"),
        (["--perplexity", tmp_path / "latin1"], b""),
        (["--chat"], b"n\xe9\n"),
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
    header = {"__metadata__": {"format": "attn.cu 1", "config": json.dumps(config)}}
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
    process = start(model, "--prompts", "-", "--parallel", 2, "--ignore-eos")
    process.stdin.write(b"\n".join(b'{"prompt": "%d", "n": 200}' % i for i in range(3000)))
    process.stdin.close()
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    lines = [first, *process.stdout.read().splitlines()]
    assert process.wait(timeout=60) == 130
    lines = [json.loads(line) for line in lines]
    assert [a["line"] for a in lines] == list(range(1, 3001))
    assert "text" in lines[0] and lines[-1]["error"] == "interrupted"
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
    with open("/dev/full", "wb") as full:
        line = command(model, "-i", PROMPT, "-n", 3, "-q", "--threads", 1)
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, timeout=60)
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
