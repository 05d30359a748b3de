"""Damaged sources of every kind: each is exported or refused in one line, and nothing else happens.

    python tests/fuzz_export.py [SECONDS] [SEED]

A fault is an exception that gets out of export.py, more than one line, a file that is left behind, a model file that
the safetensors library does not open, much memory, or an answer that takes longer than a damaged header may take.
"""

import contextlib
import io
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402
import gguf_models  # noqa: E402
from llama2c_model import llama2c_file  # noqa: E402
from safetensors import safe_open  # noqa: E402

import export  # noqa: E402
from exporter.gguf_source import GgufHeader  # noqa: E402
from exporter.source import File  # noqa: E402

FOLDERS = ("llama_yarn", "gemma3", "gpt2", "qwen3_moe", "deepseek_v3", "deepseek_v3_fp8")
GGUFS = ("llama_yarn", "gemma3", "gpt2", "mixtral", "deepseek_v3")
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    1e308,
    10**30,
    2**31 - 1,
    2**63,
    "x",
    "",
    [],
    [[]],
    {},
    [1, 2],
    ["a", "a b", "\ud800"],
    {"a": 1},
    "{% for x in y %}",
    float("nan"),
)
SLOWEST = 20  # seconds for one damaged file, on a machine that others use too
MEMORY = 4 << 30  # address space, most of which numpy's libraries have taken already
OPTIONS = ([], ["--type", "q8_0"], ["--type", "f32"], ["--as", "mha"], ["--as", "mla"], ["--as", "gqa:2"])
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
KINDS = [2, 3, 3] + [6] * 256  # of SentencePiece and GGUF alike


# ---- Whole sources, with tokenizers of every kind


def sentencepiece_model() -> bytes:
    """sentencepiece_model.proto: pieces, trainer_spec (BPE), normalizer_spec (identity, nothing removed)."""

    def message(number: int, body: bytes) -> bytes:
        return bytes([number << 3 | 2, len(body)]) + body

    pieces = [
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", 0) + bytes([0x18, kind]))
        for text, kind in zip(PIECES, KINDS, strict=True)
    ]
    return b"".join([*pieces, message(2, b"\x18\x02"), message(3, message(1, b"identity") + b"\x18\x01\x20\x00")])


def folder(name: str, place: Path, tokenizer: str) -> Path:
    """tokenizer: the file that holds it."""
    source = checkpoints.build(checkpoints.load(name), place / f"{name}-{tokenizer}")
    whole = source / "tokenizer.json"
    vocabulary = json.loads(whole.read_text())["model"]["vocab"]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    tokens = {text: 256 + i for i, text in enumerate(checkpoints.SPECIAL)}
    if tokenizer != "tokenizer.json":
        whole.unlink()
    if tokenizer == "tokenizer.model":
        (source / tokenizer).write_bytes(sentencepiece_model())
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if tokenizer == "vocab.json":
        (source / tokenizer).write_text(json.dumps(vocabulary | {"ab": 256}))
        (source / "merges.txt").write_text("#version: 0.2\na b\n")
        (source / "added_tokens.json").write_text(json.dumps(dict(list(tokens.items())[1:])))
        (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": checkpoints.SPECIAL[1]}))
        (source / "chat_template.jinja").write_text(settings["chat_template"])
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    return source


def gguf_file(name: str, place: Path, model: str) -> Path:
    def add_tokenizer(writer):
        writer.add_tokenizer_model(model)
        if model == "llama":
            writer.add_token_list(PIECES)
            writer.add_token_scores([0.0] * len(PIECES))
            writer.add_token_types(KINDS)
            writer.add_bos_token_id(1)
        else:
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list([*checkpoints.byte_alphabet(), "ab", *checkpoints.SPECIAL[1:]])
            writer.add_token_merges(["a b"])
            writer.add_token_types([1] * 257 + [3, 4])
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages[0].content }}")

    return gguf_models.build(checkpoints.load(name), place / f"{name}-{model}.gguf", more=add_tokenizer)


def llama2c(place: Path) -> Path:
    place = place / "llama2c"
    place.mkdir()
    tokens = [(f"<0x{byte:02X}>" if byte < 16 else chr(byte)).encode() for byte in range(40)]
    lines = [struct.pack("<fi", -byte, len(token)) + token for byte, token in enumerate(tokens)]
    (place / "tokenizer.bin").write_bytes(struct.pack("<I", 6) + b"".join(lines))
    llama2c_file(place / "m.bin", 1, True)
    return place / "m.bin"


def whole_sources(place: Path) -> list[Path]:
    sources = [folder(name, place, "tokenizer.json") for name in FOLDERS]
    sources += [folder("llama_yarn", place, "tokenizer.model"), folder("gpt2", place, "vocab.json")]
    sources += [gguf_file(name, place, ("llama", "gpt2")[i % 2]) for i, name in enumerate(GGUFS)]
    return [*sources, llama2c(place)]


# ---- Damage


def damage_json(value, rng: random.Random):
    """One value somewhere in it replaced, dropped or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.3:
        return rng.choice(VALUES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        value.pop(key)
    else:
        value[key] = damage_json(value[key], rng)
    return value


def damage_bytes(path: Path, rng: random.Random, within: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(within, len(data)))
        data[at : at + 8] = rng.choice((bytes([rng.randrange(256)]) + data[at + 1 : at + 8], b"\xff" * 8, bytes(8)))
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def damage_header(path: Path, rng: random.Random) -> None:
    """A .safetensors file whose header is JSON still, and says something else."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(damage_json(json.loads(data[8 : 8 + length]), rng)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def gguf_value(value) -> bytes | None:
    """The type and the bytes of a value in a GGUF header; None for what it cannot hold."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value) if abs(value) < 1 << 63 else None
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return struct.pack("<IQ", 8, len(text)) + text
    if isinstance(value, list):
        parts = [part for part in map(gguf_value, value) if part]
        kind = parts[0][:4] if parts else struct.pack("<I", 4)
        parts = [part[4:] for part in parts if part[:4] == kind]
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + b"".join(parts)
    return None


def damage_metadata(path: Path, rng: random.Random) -> None:
    """A GGUF file of which one key has another value."""
    data, header = path.read_bytes(), GgufHeader(File(path))
    header.take(8)
    n_tensors, n_keys = header.scalar("Q"), header.scalar("Q")
    metadata = {header.string(): header.value(header.scalar("I")) for _ in range(n_keys)}
    begin = header.at
    for _ in range(n_tensors):
        header.tensor()
    key = rng.choice(list(metadata))
    metadata[key] = damage_json(metadata[key], rng)
    values = {key: gguf_value(value) for key, value in metadata.items()}
    keys = [gguf_value(key)[4:] + value for key, value in values.items() if value]
    head = data[:16] + struct.pack("<Q", len(keys)) + b"".join(keys) + data[begin : header.at]
    path.write_bytes(head + bytes(-len(head) % 32) + data[-(-header.at // 32) * 32 :])


def damage_file(path: Path, rng: random.Random) -> None:
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        damage_header(path, rng)
    elif path.suffix == ".gguf" and rng.random() < 0.6:
        damage_metadata(path, rng)
    elif path.suffix == ".json" and rng.random() < 0.9:
        path.write_text(json.dumps(damage_json(json.loads(path.read_text()), rng)))
    else:
        damage_bytes(path, rng, rng.choice((64, 4000, 1 << 30)))


def damaged(whole: Path, place: Path, rng: random.Random) -> Path:
    """A copy of a source, and of what lies beside it, with one thing wrong."""
    source = place / whole.parent.name if whole.suffix == ".bin" else place / whole.name
    if whole.suffix == ".gguf":
        shutil.copyfile(whole, source)
        damage_file(source, rng)
        return source
    shutil.copytree(whole.parent if whole.suffix == ".bin" else whole, source)
    damage_file(rng.choice(sorted(source.iterdir())), rng)
    return source / whole.name if whole.suffix == ".bin" else source


# ---- Trials


def attempt(source: Path, output: Path, options: list[str]) -> str:
    """'' or what went wrong."""
    begin, said = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = export.main([str(source), "-o", str(output), *options])
        if code == 0:
            safe_open(output, "numpy")
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    made = [path.name for path in output.parent.iterdir()]
    if len(made) != (2 if code == 0 else 0) or said.getvalue().count("\n") != (code != 0):
        return f"left {made}, said {said.getvalue()}"
    if "not enough memory" in said.getvalue():
        return said.getvalue()
    return "slow" if time.monotonic() - begin > SLOWEST else ""


def fuzz(seconds: float, seed: int, least: int = 0) -> list[str]:
    """Runs for so long, and at least so many files; returns the faults."""
    faults, end, count = [], time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as name:
        wholes = whole_sources(Path(name))
        while count < least or time.monotonic() < end:
            rng = random.Random(f"{seed} {count}")
            place, output = Path(name) / "damaged", Path(name) / "out"
            place.mkdir()
            output.mkdir()
            whole = wholes[count % len(wholes)]
            fault = attempt(damaged(whole, place, rng), output / "m.safetensors", rng.choice(OPTIONS))
            if fault:
                faults.append(f"seed {seed}, file {count} ({whole.name}): {fault}")
            shutil.rmtree(place)
            shutil.rmtree(output)
            count += 1
    return faults


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found = fuzz(*(int(argument) for argument in (*sys.argv[1:], *("60", "1")[len(sys.argv) - 1 :])))
    print("\n".join(found) or "no faults")
    sys.exit(bool(found))
