"""What every source of a model gives: a config, lazily read tensors, and what the tokenizer needs."""

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from exporter.errors import ExportError
from exporter.weights import Tensor, Weight


class Source:
    """kind: 'gguf', 'hf', 'llama2c' or 'config' (shapes without values). path: as given. where: the file that holds the
    config, for error lines. type, expert_type: of the matrices of a 'config'.

    config: HF-style dictionary (its "model_type" picks the architecture). tensors: name -> Tensor.
    metadata: a GGUF file's key -> value (scalars, strings and lists), {} elsewhere.
    folder: a Hugging Face folder, None elsewhere. tokenizer_file, pre: --tokenizer and --pre, None where not given.
    notes: what a reader of the summary should know, such as files and keys that were passed over.
    """

    def __init__(self, kind: str, path: Path, where: Path, tokenizer_file: Path | None):
        self.kind = kind
        self.path = path
        self.where = where
        self.folder = path if kind == "hf" else None
        self.tokenizer_file = tokenizer_file
        self.pre: str | None = None
        self.config: dict = {}
        self.metadata: dict = {}
        self.tensors: dict[str, Tensor] = {}
        self.type = self.expert_type = ""
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        return self.path.resolve().name


def open_file(path: Path):
    """A regular file, opened for reading: a pipe would wait for a writer, and a device need never end."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ExportError(f"{path}: a folder, a pipe or a device: give a regular file")
    return file


def map_file(path: Path) -> np.ndarray:
    """The file's bytes, mapped."""
    try:
        with open_file(path) as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}: give a file that can be read") from error
    except ValueError as error:
        raise ExportError(f"{path}: empty file: fetch it again") from error
    if bytes(data[:20]) == b"version https://git-":
        raise ExportError(f"{path}: a pointer of Git LFS in place of the file: fetch it with git lfs pull")
    return data


def array_tensor(data: np.ndarray, dtype: str, type: str, shape: tuple[int, ...]) -> Tensor:
    """A row-major array of the file's own bytes, in a type that needs no unpacking."""
    rows = np.frombuffer(data, dtype).reshape(-1, 1 if len(shape) == 1 else shape[-1])
    if dtype == "<f8":
        return Tensor(shape, type, lambda index: Weight(type, rows[index].astype(np.float32)))
    return Tensor(shape, type, lambda index: Weight(type, rows[index]))
