"""Weight types, and tensors that are read row by row only when they are written.

The types are those of docs/model-file.md: f32, bf16, f16, q8 and q4 (groups of 32 inputs with a float16
scale, in q4 with a float16 minimum too). A Tensor is lazy: a shape, a type and a function that reads some of its rows,
so that an export needs the memory of a few rows, whatever the size of the model. Choosing, repeating and joining rows
(permuted heads, split or fused projections, stacked experts) commutes with quantisation, so it loses nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from exporter.errors import ExportError

GROUP = 32  # inputs that share a scale in q8 and q4
CHUNK = 1 << 20  # elements that are read at a time

# How each type lies in the model file: (field of Weight, name of the part, its dtype, elements for each quant group).
FLOATS = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
PARTS = {kind: (("data", "weight", dtype, 1),) for kind, dtype in FLOATS.items()} | {
    "q8": (("data", "weight", "I8", 32), ("scale", "scale", "F16", 1)),
    "q4": (("data", "weight", "U8", 16), ("scale", "scale", "F16", 1), ("min", "min", "F16", 1)),
}
TYPES = tuple(PARTS)
QUANTIZED = tuple(kind for kind in PARTS if kind not in FLOATS)


@dataclass
class Weight:
    """Some rows of a tensor in one type, its data [n, k] (q4: [n, k / 2]) and, where quantised, [n, k / 32] of each."""

    type: str
    data: np.ndarray  # float32, uint16 (the bits of bfloat16), float16, int8, uint8
    scale: np.ndarray | None = None  # float16
    min: np.ndarray | None = None  # float16

    def parts(self) -> tuple:
        return self.data, self.scale, self.min

    def float32(self) -> np.ndarray:
        if self.type == "bf16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        if self.type in ("f32", "f16"):
            return self.data.astype(np.float32, copy=False)
        scale = self.scale.astype(np.float32)[:, :, None]
        if self.type == "q8":
            groups = self.data.reshape(*self.scale.shape, GROUP) * scale
        else:
            q = np.stack([self.data & 15, self.data >> 4], axis=-1).reshape(*self.scale.shape, GROUP)
            groups = q * scale + self.min.astype(np.float32)[:, :, None]
        return groups.reshape(len(self.data), -1)


def quantize(x: np.ndarray, type: str) -> Weight:
    """x [n, k] float32 in another type, rounded to nearest; in q8 and q4 the error is half a scale, or what
    float16's rounding of scale and minimum clips at the ends."""
    peak = np.abs(x).max(initial=0)
    if not np.isfinite(peak):
        raise ExportError("holds an infinite or undefined value: the checkpoint is damaged")
    if type == "f32":
        return Weight("f32", x)
    if type == "bf16":
        bits = x.view(np.uint32)
        return Weight("bf16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    limit = np.float32(np.finfo(np.float16).max)
    if peak > limit * (127 if type == "q8" else 1):
        raise ExportError(f"holds {peak:g}, more than {type} can hold: export with --type bf16")
    if type == "f16":
        return Weight("f16", x.astype(np.float16))
    groups = x.reshape(len(x), -1, GROUP)
    low = groups.min(axis=-1, keepdims=True).astype(np.float16)
    # Against the scale and the minimum as stored, so that their own rounding costs nothing but at the ends.
    if type == "q8":
        scale = (np.abs(groups).max(axis=-1, keepdims=True) / 127).astype(np.float16)
        q = np.rint(groups / nonzero(scale)).clip(-127, 127).astype(np.int8)
        return Weight("q8", q.reshape(x.shape), scale[..., 0])
    scale = ((groups.max(axis=-1, keepdims=True) - low) / 15).astype(np.float16)
    q = np.rint((groups - low) / nonzero(scale)).clip(0, 15).astype(np.uint8).reshape(x.shape)
    return Weight("q4", q[:, 0::2] | (q[:, 1::2] << 4), scale[..., 0], low[..., 0])


FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the values of e2m1


def mxfp4(codes: np.ndarray, exponents: np.ndarray) -> Weight:
    """MXFP4 (OCP Microscaling Formats 1.0): w = e2m1 * 2^(exponent - 127); codes [n, k] 0 .. 15, exponents [n, k / 32].

    In q8 as it is, with half of that power as scale, as long as float16 holds it; a smaller one rounds to 0 there."""
    scale = np.ldexp(np.float32(0.5), exponents.astype(np.int32) - 127)
    if scale.max(initial=0) > np.finfo(np.float16).max:
        raise ExportError("holds a scale that is more than float16 can hold: the checkpoint is damaged")
    return Weight("q8", FP4[codes], scale.astype(np.float16))


def nonzero(scale: np.ndarray) -> np.ndarray:
    """The scale as float32, with 1 where it is 0: such a group rounds to its minimum, or to 0."""
    return np.where(scale == 0, np.float32(1), scale.astype(np.float32))


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
        parts = [part if part is None else np.where(zero[:, None], part.dtype.type(0), part) for part in weight.parts()]
        return Weight(weight.type, *parts)

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
        columns = zip(*(piece.parts() for piece in pieces), strict=True)
        return Weight(type, *(None if column[0] is None else np.concatenate(column) for column in columns))

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
    """The type in which a matrix is written: `type` or its own; rows of q8 and q4 are whole groups."""
    type = type or tensor.keep or tensor.type
    return "f16" if type in QUANTIZED and tensor.k % GROUP else type
