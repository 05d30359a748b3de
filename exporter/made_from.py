"""What a model file was made from: enough to see that its source has changed since, and no path that would travel.

A file stands here by its name, its size and its times; of export.py there is a hash. The record lies in the model
file, under "made_from".
"""

import hashlib
import json
import os
from pathlib import Path

from exporter.hf_source import weight_files
from exporter.source import open_file

SIDE_FILES = (".json", ".jinja", ".model", ".txt")  # a folder's, beside the weights
EXPORTER = Path(__file__).resolve().parent


def inputs(source: Path, tokenizer: Path | None) -> list[Path]:
    """Every file that an export of this source may read: a side file that appears later is a change too."""
    if source.is_dir():
        places = (source, source / "additional_chat_templates")
        files = [file for place in places if place.is_dir() for file in place.iterdir() if file.suffix in SIDE_FILES]
        if (source / "config.json").exists():  # without it nothing is read
            files += [source / name for name in weight_files(source)[0]]
    else:
        files = [source, source.parent / "tokenizer.bin"]
    return sorted({file for file in (*files, tokenizer) if file is not None and file.exists()})


def record(
    source: Path, tokenizer: Path | None, type: str | None, layout: tuple[str, int] | None, pre: str | None = None
) -> str:
    """JSON. It is taken before anything is read, so that a source that changes meanwhile is seen as changed."""
    folder = source if source.is_dir() else source.parent
    files = {}
    for file in inputs(source, tokenizer):
        name, status = file.relative_to(folder) if file.is_relative_to(folder) else file.name, file.stat()
        files[os.fsencode(name).decode("utf-8", "backslashreplace")] = [
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,  # a time that no `touch` or `cp -p` sets back
        ]
    options = {"type": type, "as": layout, "tokenizer": tokenizer and os.fsdecode(tokenizer.name), "pre": pre}
    return json.dumps({"export.py": version(), "options": options, "files": files}, sort_keys=True)


def version() -> str:
    code = [EXPORTER.parent / "export.py", *sorted(EXPORTER.glob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in code)).hexdigest()[:16]


def export_name(source: Path, into: Path, options: tuple) -> str:
    """The model file's name in a folder, another one for every source and every choice of options.

    A GGUF file of that very folder has its own; whatever comes from elsewhere gets a hash of its place.
    """
    place = Path(os.path.realpath(source))
    if source.suffix == ".gguf" and not any(options) and os.path.samefile(source.parent, into):
        return f"{source.stem}.safetensors"
    digest = hashlib.sha256(os.fsencode(place) + repr(options).encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{place.name.removesuffix('.gguf')[:40]}-{digest}.safetensors"


def metadata(path: Path) -> dict[str, str] | None:
    """A model file's __metadata__; None where export.py has not written the file."""
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 1 << 27 else {}
        values = header["__metadata__"]
        return values if values["format"].startswith("attn.cu ") else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_current(path: Path, tokenizer: Path, wanted: str) -> bool:
    """Whether this pair of files (of shapes alone: this file) was made from what `wanted` records."""
    if not path.is_file():
        return False
    values = metadata(path) or {}
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else ""
    return values.get("made_from") == wanted and values.get("tokenizer_sha256") == digest
