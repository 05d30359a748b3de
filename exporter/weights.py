"""Weight types, and tensors that are read row by row only when they are written.

The types are those of docs/model-file.md: floats, and ggml's quantised types as the blocks of bytes that they are in a
GGUF file, which the gguf package makes and reads. A Tensor is lazy: a shape, a type and a function that reads some of
its rows, so that an export needs the memory of a few rows, whatever the size of the model. Choosing, repeating and
joining rows (permuted heads, split or fused projections, stacked experts) commutes with quantisation, so it loses
nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import gguf
import numpy as np

from exporter.errors import ExportError
from exporter.quantize import K_TYPES, quantize_k

GROUP = 32  # inputs that share a scale in most types
CHUNK = 1 << 20  # elements that are read at a time

FLOATS = {"f32": "F32", "bf16": "BF16", "f16": "F16"}  # and their dtype in the model file
# ggml's types, whose dtype is U8: where the half floats of a block are.
QUANTIZED = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    **{name: kind.halves for name, kind in K_TYPES.items()},
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "mxfp4": (),
}
CHOICES = (*FLOATS, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", *K_TYPES)  # what weights can be turned into
# A K type's next of at least its bits, for rows that are no whole blocks of 256.
OF_SMALLER_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def ggml(type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type.upper()]


def block(type: str) -> tuple[int, int]:
    """The inputs of a row that are stored together, and the elements that they take."""
    return (1, 1) if type in FLOATS else gguf.GGML_QUANT_SIZES[ggml(type)]


@dataclass
class Weight:
    """Some rows of a tensor in one type: [n, k], or [n, bytes of k inputs' blocks]."""

    type: str
    data: np.ndarray  # float32, uint16 (the bits of bfloat16), float16, uint8

    def float32(self) -> np.ndarray:
        if self.type == "bf16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        if self.type in FLOATS:
            return self.data.astype(np.float32, copy=False)
        return gguf.dequantize(self.data, ggml(self.type))

    def check(self) -> "Weight":
        """Itself, if no block has a scale that is infinite or no number."""
        blocks = self.data.reshape(-1, block(self.type)[1])
        halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16) for at in QUANTIZED.get(self.type, ())]
        if not all(np.isfinite(half).all() for half in halves) or (
            self.type == "mxfp4" and (blocks[:, 0] == 255).any()
        ):
            raise ExportError("has a scale that is infinite or no number: the checkpoint is damaged")
        return self


def quantize(x: np.ndarray, type: str) -> Weight:
    """x [n, k] float32 in another type: rounded to nearest, by the gguf package, or with a search of the scales."""
    peak = np.abs(x).max(initial=0)
    if not np.isfinite(peak):
        raise ExportError("holds an infinite or undefined value: the checkpoint is damaged")
    if type == "f32":
        return Weight("f32", x)
    if type == "bf16":
        bits = x.view(np.uint32)
        return Weight("bf16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    limit = np.float32(np.finfo(np.float16).max)
    # Of half floats: the weight, its minimum or the scale, which is the largest weight divided by this.
    most = {"q8_0": 127, "q4_0": 8, "q5_0": 16, "mxfp4": np.inf} | {k: kind.most for k, kind in K_TYPES.items()}
    if peak > limit * most.get(type, 1):
        raise ExportError(f"holds {peak:g}, more than {type} can hold: export with --type bf16")
    if type == "f16":
        return Weight("f16", x.astype(np.float16))
    return Weight(type, quantize_k(x, type) if type in K_TYPES else gguf.quantize(x, ggml(type)))


@dataclass
class Tensor:
    """n rows of k elements (a vector has n rows of one), read(rows) -> Weight of these rows."""

    shape: tuple[int, ...]
    type: str  # of what read gives
    read: Callable[[np.ndarray], Weight]
    keep: str = ""  # the type to write it in where that is not `type`: the source's is none of ours
    note: str = ""  # the source's type then, for the summary
    problem: str = ""  # why it cannot be read: an error where a model needs it, and nothing where none does

    @property
    def k(self) -> int:
        return 1 if len(self.shape) < 2 else self.shape[-1]

    @property
    def n(self) -> int:
        return size(self.shape) // self.k if self.k else 0

    def float32(self) -> np.ndarray:
        return self.read(np.arange(self.n)).float32().reshape(self.shape)


def size(shape) -> int:
    return math.prod(shape)  # exact: a file may hold any number


def unreadable(shape: tuple[int, ...], problem: str) -> Tensor:
    """A tensor whose bytes mean nothing here; canonical_tensors refuses it where the model has a place for it."""

    def read(index: np.ndarray) -> Weight:
        raise ExportError(problem)

    return Tensor(shape, "", read, problem=problem)


def of_array(array: np.ndarray) -> Tensor:
    """An array in memory, as float32."""
    rows = np.ascontiguousarray(array, np.float32)
    tensor = Tensor(rows.shape, "f32", lambda index: Weight("f32", rows.reshape(tensor.n, tensor.k)[index]))
    return tensor


def select(tensor: Tensor, rows: np.ndarray, shape: tuple[int, ...] | None = None) -> Tensor:
    """The given rows, in their order, some perhaps repeated; a row of zeros for each negative number."""
    shape = shape or (len(rows), *tensor.shape[-1:][: len(tensor.shape) - 1])

    def read(index: np.ndarray) -> Weight:
        weight = tensor.read(np.maximum(rows[index], 0))
        zero = rows[index] < 0
        if not zero.any():
            return weight
        return Weight(weight.type, np.where(zero[:, None], weight.data.dtype.type(0), weight.data))

    return replace(tensor, shape=shape, read=read)


def turn_each(tensor: Tensor) -> Tensor:
    """[count, k, n] -> [count, n, k], of a float type."""
    count, k, n = tensor.shape

    def read(index: np.ndarray) -> Weight:
        matrix, column = np.divmod(index, n)
        rows = {i: tensor.read(np.arange(i * k, (i + 1) * k)).data for i in np.unique(matrix).tolist()}
        return Weight(tensor.type, np.stack([rows[i][:, j] for i, j in zip(matrix.tolist(), column, strict=True)]))

    return replace(tensor, shape=(count, n, k), read=read)


def concat(tensors: list[Tensor], shape: tuple[int, ...] | None = None) -> Tensor:
    """The rows of all, one tensor after the other, in the common type (f32 where they differ)."""
    type = tensors[0].type if len({t.type for t in tensors}) == 1 else "f32"
    keep = tensors[0].keep if len({t.keep for t in tensors}) == 1 else ""
    starts = np.cumsum([0] + [t.n for t in tensors])

    def read(index: np.ndarray) -> Weight:
        part = np.searchsorted(starts, index, side="right") - 1
        cuts = np.flatnonzero(np.diff(part)) + 1  # runs of rows of one tensor, in order
        pieces = []
        for run in np.split(index, cuts):
            p = int(np.searchsorted(starts, run[0], side="right")) - 1
            piece = tensors[p].read(run - starts[p])
            pieces.append(piece if piece.type == type else Weight("f32", piece.float32()))
        return Weight(type, np.concatenate([piece.data for piece in pieces]))

    return Tensor(shape or (int(starts[-1]), *tensors[0].shape[1:]), type, read, keep, tensors[0].note)


def apply(tensor: Tensor, function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None) -> Tensor:
    """function of the whole tensor's float32 values; a quantised one is then kept as f16."""
    shape = shape or tensor.shape
    k = 1 if len(shape) == 1 else shape[-1]
    keep = tensor.keep or tensor.type
    return Tensor(
        shape,
        "f32",
        lambda index: Weight("f32", function(tensor.float32()).reshape(-1, k)[index]),
        "f16" if keep in QUANTIZED else keep,
        tensor.note,
    )


def same_values(a: Tensor, b: Tensor) -> bool:
    step = max(1, CHUNK // a.k)
    chunks = (np.arange(first, min(first + step, a.n)) for first in range(0, a.n, step))
    return a.shape == b.shape and all(np.array_equal(a.read(i).float32(), b.read(i).float32()) for i in chunks)


def stored_type(tensor: Tensor, type: str | None) -> str:
    """The type in which a matrix is written: `type` or its own; rows of quantised types are whole blocks."""
    type = type or tensor.keep or tensor.type
    while tensor.k % block(type)[0]:
        type = OF_SMALLER_BLOCKS.get(type, "f16")
    return type
