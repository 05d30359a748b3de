"""Damaged sources of every kind: each is exported or refused in one line, and nothing else happens.

    python tests/fuzz_export.py [SECONDS] [SEED]

A fault is any exception but ExportError, or an answer that takes longer than a damaged header may take.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402
import gguf_models  # noqa: E402

from exporter.errors import ExportError  # noqa: E402
from exporter.model import build  # noqa: E402
from exporter.sources import open_source  # noqa: E402

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
    {"a": 1},
    float("nan"),
)
SLOWEST = 20  # seconds for one damaged file, on a machine that others use too


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


def damaged(whole: Path, place: Path, rng: random.Random) -> Path:
    """A copy of a source with one thing wrong."""
    source = place / whole.name
    if whole.is_file():
        shutil.copyfile(whole, source)
        damage_bytes(source, rng, rng.choice((64, 4000, 1 << 30)))
        return source
    shutil.copytree(whole, source)
    weights = rng.choice(sorted(source.glob("*.safetensors")))
    what = rng.randrange(4)
    if what == 0:
        damage_bytes(weights, rng, 4000)
    elif what == 1:
        damage_header(weights, rng)
    else:
        side = source / "config.json"
        if what == 3:
            side = rng.choice([side, *source.glob("*.index.json")])
        side.write_text(json.dumps(damage_json(json.loads(side.read_text()), rng)))
    return source


def attempt(source: Path) -> str:
    """'' or what went wrong."""
    begin = time.monotonic()
    try:
        build(open_source(source))
    except ExportError:
        pass
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "slow" if time.monotonic() - begin > SLOWEST else ""


def fuzz(seconds: float, seed: int, least: int = 0) -> list[str]:
    """Runs for so long, and at least so many files; returns the faults."""
    faults, end, count = [], time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wholes = [checkpoints.build(checkpoints.load(name), place / name) for name in FOLDERS]
        wholes += [gguf_models.build(checkpoints.load(name), place / f"{name}.gguf") for name in GGUFS]
        while count < least or time.monotonic() < end:
            rng = random.Random(f"{seed} {count}")
            place = Path(folder) / "damaged"
            place.mkdir()
            whole = wholes[count % len(wholes)]
            fault = attempt(damaged(whole, place, rng))
            if fault:
                faults.append(f"seed {seed}, file {count} ({whole.name}): {fault}")
            shutil.rmtree(place)
            count += 1
    return faults


if __name__ == "__main__":
    found = fuzz(*(int(argument) for argument in (*sys.argv[1:], *("60", "1")[len(sys.argv) - 1 :])))
    print("\n".join(found) or "no faults")
    sys.exit(bool(found))
