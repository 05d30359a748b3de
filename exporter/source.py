"""What every source of a model gives: a config, lazily read tensors, and what the tokenizer needs."""

import itertools
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
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ExportError(f"{path}: a folder, a pipe or a device: give a regular file")
    return os.fdopen(descriptor, "rb")


def is_listed(path: Path) -> bool:
    """Whether a folder has this name: a link that leads nowhere is an error then, and no file that is not there."""
    return os.path.lexists(path)


def whole_file(path: Path, most: int = 1 << 28) -> bytes:
    """A side file: a setting, a vocabulary, a template."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ExportError(f"{path}: {size} bytes, and no file of its kind has more than {most}: fetch it again")
        return file.read(size)


class File:
    """A file of weights, read where it is asked for: mapped, one that is cut meanwhile would end the program."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = open_file(path)
            self.size = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise ExportError(f"{path}: {error.strerror}: give a file that can be read") from error
        if not self.size:
            raise ExportError(f"{path}: empty file: fetch it again")
        if bytes(self.read(0, min(self.size, 20))) == b"version https://git-":
            raise ExportError(f"{path}: a pointer of Git LFS in place of the file: fetch it with git lfs pull")

    def read(self, offset: int, length: int) -> np.ndarray:
        """uint8 [length]."""
        data = np.empty(length, np.uint8)
        self.read_into(data, offset)
        return data

    def read_into(self, data: np.ndarray, offset: int) -> None:
        left = data.reshape(-1).data
        while left:
            count = os.preadv(self.file.fileno(), [left], offset)
            if not count:
                now = os.fstat(self.file.fileno()).st_size
                raise ExportError(f"{self.path}: was cut from {self.size} to {now} bytes meanwhile: fetch it again")
            left, offset = left[count:], offset + count

    def rows(self, offset: int, row_bytes: int, index: np.ndarray) -> np.ndarray:
        """uint8 [len(index), row_bytes]: some of the rows that lie one after the other from `offset` on."""
        wanted, places = np.unique(index, return_inverse=True)
        data = np.empty((len(wanted), row_bytes), np.uint8)
        begins = np.flatnonzero(np.diff(wanted, prepend=-2) != 1).tolist()  # of neighbours, which are read at once
        for begin, end in itertools.pairwise([*begins, len(wanted)]):
            self.read_into(data[begin:end], offset + int(wanted[begin]) * row_bytes)
        return data if np.array_equal(wanted, index) else data[places]


def array_tensor(file: File, offset: int, dtype: str, type: str, shape: tuple[int, ...]) -> Tensor:
    """A row-major array of the file's own bytes, in a type that needs no unpacking."""
    row_bytes = (1 if len(shape) == 1 else shape[-1]) * np.dtype(dtype).itemsize

    def read(index: np.ndarray) -> Weight:
        rows = file.rows(offset, row_bytes, index).view(dtype)
        return Weight(type, rows.astype(np.float32) if dtype == "<f8" else rows)

    return Tensor(shape, type, read)
