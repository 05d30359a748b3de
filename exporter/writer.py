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
from exporter.weights import CHUNK, FLOATS, QUANTIZED, Tensor, block, quantize, size, stored_type

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}


def written_type(name: str, tensor: Tensor, type: str | None) -> str:
    """Vectors, experts' biases, tables and routers are f32; MLA's w_uk and w_uv are never quantised."""
    module = name.split(".")[-2]
    if len(tensor.shape) == 1 or name.endswith(".bias") or module in ("router", "position_embedding"):
        return "f32"
    chosen = stored_type(tensor, type)
    if module in ("w_uk", "w_uv") and chosen in QUANTIZED:
        return "f16" if (tensor.keep or tensor.type) in QUANTIZED else tensor.keep or tensor.type
    return chosen


def dtype_of(type: str) -> str:
    return FLOATS.get(type, "U8")


def layout(model: Model, type: str | None) -> tuple[dict, list]:
    """The safetensors header, and our tensors in file order: (name, tensor, type, offset, bytes of a row).

    The widest elements come first, so that every tensor is aligned to its type.
    """
    plan = [(name, tensor, written_type(name, tensor, type)) for name, tensor in model.tensors.items()]
    header, entries, offset = {}, [], 0
    for name, tensor, kind in sorted(plan, key=lambda entry: -BYTES[dtype_of(entry[2])]):
        dtype, shape = dtype_of(kind), list(tensor.shape)
        if kind in QUANTIZED:
            inputs, bytes = block(kind)
            shape[-1] = shape[-1] // inputs * bytes
        end = offset + size(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        entries.append((name, tensor, kind, offset, (end - offset) // tensor.n))
        offset = end
    return header, entries


def named_types(entries: list) -> dict[str, str]:
    """The type of each matrix that is not plain floats, whose dtype says it."""
    return {name.removesuffix(".weight"): kind for name, _, kind, *_ in entries if kind in QUANTIZED}


def write(
    model: Model, type: str | None, path: Path, tokenizer: Path | None, source: str, made_from: str = ""
) -> Counter:
    """Writes `path`, and returns the bytes of each type. source: for people; made_from: made_from.record.

    tokenizer None: the model is one of shapes without values, and the file ends with its header.
    """
    header, entries = layout(model, type)
    header["__metadata__"] = {
        "format": "attn.cu 3",
        "config": json.dumps(model.config),
        "types": json.dumps(named_types(entries)),
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer else "",
        "source": source,
        "made_from": made_from,
    }
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 64 + 56)  # the data starts at a multiple of 64
    counts = Counter()
    for _, tensor, kind, _, row_bytes in entries:
        counts[kind] += row_bytes * tensor.n
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
    name, tensor, kind, offset, row_bytes = entry
    step = max(1, CHUNK // tensor.k)
    for first in range(0, tensor.n, step):
        rows = np.arange(first, min(first + step, tensor.n))
        try:
            weight = tensor.read(rows)
            weight = weight.check() if weight.type == kind else quantize(weight.float32(), kind)
        except ExportError as error:
            raise ExportError(f"{source}: tensor {name}: {error}") from error
        data = np.ascontiguousarray(weight.data).data.cast("B")
        write_at(file.fileno(), data, start + offset + first * row_bytes)
        bar.update(data.nbytes)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of it: a disk that fills up takes a part, and says so only when asked for the rest."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
