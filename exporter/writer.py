"""Writes the model file: plain safetensors, one chunk of rows after the other."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from exporter.errors import ExportError
from exporter.model import Model
from exporter.weights import CHUNK, GROUP, PARTS, QUANTIZED, Tensor, quantize, size, stored_type

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}


def written_type(name: str, tensor: Tensor, type: str | None) -> str:
    """Vectors, experts' biases, tables and routers are f32; MLA's w_uk and w_uv are never quantised."""
    module = name.split(".")[-2]
    if len(tensor.shape) == 1 or name.endswith(".bias") or module in ("router", "position_embedding"):
        return "f32"
    chosen = stored_type(tensor, type)
    if module in ("w_uk", "w_uv") and chosen in QUANTIZED:
        return "f16" if (tensor.keep or tensor.type) in QUANTIZED else tensor.keep or tensor.type
    return chosen


def stored_parts(name: str, tensor: Tensor, type: str) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(field of Weight, name, dtype, shape) of the tensors that hold one of ours."""
    if type not in QUANTIZED:
        return [(field, name, dtype, tensor.shape) for field, _, dtype, _ in PARTS[type]]
    *outer, k = tensor.shape
    stem = name.removesuffix("weight")
    return [(field, stem + part, dtype, (*outer, k // GROUP * n)) for field, part, dtype, n in PARTS[type]]


def layout(model: Model, type: str | None) -> tuple[dict, list]:
    """The safetensors header, and our tensors in file order: (name, tensor, type, {field: (offset, bytes of a row)}).

    Float32 comes first and the rest has an even number of bytes, so that every tensor is aligned to its type.
    """
    plan = [(name, tensor, written_type(name, tensor, type)) for name, tensor in model.tensors.items()]
    header, entries, offset = {}, [], 0
    for name, tensor, kind in sorted(plan, key=lambda entry: entry[2] != "f32"):
        places = {}
        for field, stored, dtype, shape in stored_parts(name, tensor, kind):
            bytes = size(shape) * BYTES[dtype]
            header[stored] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + bytes]}
            places[field] = (offset, bytes // tensor.n)
            offset += bytes
        entries.append((name, tensor, kind, places))
    return header, entries


def named_types(entries: list) -> dict[str, str]:
    """The type of each matrix that is not plain floats, whose dtype says it."""
    return {name.removesuffix(".weight"): kind for name, _, kind, _ in entries if kind in QUANTIZED}


def write(
    model: Model, type: str | None, path: Path, tokenizer: Path | None, source: str, made_from: str = ""
) -> Counter:
    """Writes `path`, and returns the bytes of each type. source: for people; made_from: made_from.record.

    tokenizer None: the model is one of shapes without values, and the file ends with its header.
    """
    header, entries = layout(model, type)
    header["__metadata__"] = {
        "format": "attn.cu 2",
        "config": json.dumps(model.config),
        "types": json.dumps(named_types(entries)),
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer else "",
        "source": source,
        "made_from": made_from,
    }
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 64 + 56)  # the data starts at a multiple of 64
    counts = Counter()
    for _, tensor, kind, places in entries:
        counts[kind] += sum(row for _, row in places.values()) * tensor.n
    total = counts.total()
    with (
        path.open("wb") as file,
        tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None, leave=False) as bar,
    ):
        file.write(len(text).to_bytes(8, "little") + text)
        if tokenizer:
            file.truncate(8 + len(text) + total)
            for entry in entries:
                write_tensor(file, 8 + len(text), entry, source, bar)
    return counts


def write_tensor(file, start: int, entry: tuple, source: str, bar) -> None:
    name, tensor, kind, places = entry
    step = max(1, CHUNK // tensor.k)
    for first in range(0, tensor.n, step):
        rows = np.arange(first, min(first + step, tensor.n))
        try:
            weight = tensor.read(rows)
            weight = weight if weight.type == kind else quantize(weight.float32(), kind)
        except ExportError as error:
            raise ExportError(f"{source}: tensor {name}: {error}") from error
        for field, (offset, row_bytes) in places.items():
            data = np.ascontiguousarray(getattr(weight, field)).data.cast("B")
            write_at(file.fileno(), data, start + offset + first * row_bytes)
            bar.update(data.nbytes)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of it: a disk that fills up takes a part, and says so only when asked for the rest."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
