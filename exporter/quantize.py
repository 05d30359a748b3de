"""Quantises to ggml's K types: blocks of 256 weights, whose groups have a scale, and a min in some, of a few bits each:

    weight = scale * code - min        scale = d * factor, min = d_min * factor

First each group has the float scale and min of the least squared error, found among codes for several scales. These
are rounded to factors of the block's half floats. Then the codes are taken anew, for the rounded numbers: with the
factors next to them where those fit better.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

BLOCK = 256
SLICE = 256  # blocks at a time: what is computed of them stays in the processor's cache
COVERS = np.linspace(0.7, 1.15, 16, dtype=np.float32)  # how much of a group's range its codes cover, as tried


@dataclass(frozen=True)
class Field:
    """Numbers of `bits` bits from byte `at` on: `run` bytes hold one each in their lowest bits, then one each above."""

    at: int
    bits: int
    run: int

    def put(self, numbers: np.ndarray, blocks: np.ndarray) -> None:
        """The lowest bits of numbers [blocks, count]."""
        parts = (numbers & ((1 << self.bits) - 1)).astype(np.uint8).reshape(len(blocks), -1, 8 // self.bits, self.run)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        bytes = np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(blocks), -1)
        blocks[:, self.at : self.at + bytes.shape[1]] = bytes


@dataclass(frozen=True)
class KType:
    """As in kernels/ggml_blocks.h: where the numbers of a block are."""

    bytes: int
    group: int
    code_bits: int
    factor_bits: int
    codes: tuple[Field, ...]  # the lowest bits first
    factors: tuple[Field, ...]  # of the scales, then of the mins; () is the order of q4_k
    halves: tuple[int, ...]  # the half floats d and, where groups have mins, d_min

    @property
    def has_min(self) -> bool:
        return len(self.halves) == 2

    def code_range(self) -> tuple[int, int]:
        """Codes have a sign where there is no min."""
        return signed_range(self.code_bits, not self.has_min)

    def factor_range(self) -> tuple[int, int]:
        return signed_range(self.factor_bits, not self.has_min)

    @property
    def most(self) -> int:
        """A weight that d and d_min of 1 are enough for, whatever the search finds: half the largest."""
        smallest, largest = self.factor_range()
        return (largest if self.has_min else smallest * self.code_range()[0]) // 2


K_TYPES = {
    "q2_k": KType(84, 16, 2, 4, (Field(16, 2, 32),), (Field(0, 4, 16),), (80, 82)),
    "q3_k": KType(110, 16, 3, 6, (Field(32, 2, 32), Field(0, 1, 32)), (Field(96, 4, 8), Field(104, 2, 4)), (108,)),
    "q4_k": KType(144, 32, 4, 6, (Field(16, 4, 32),), (), (0, 2)),
    "q5_k": KType(176, 32, 5, 6, (Field(48, 4, 32), Field(16, 1, 32)), (), (0, 2)),
    "q6_k": KType(210, 16, 6, 8, (Field(0, 4, 64), Field(128, 2, 32)), (Field(192, 8, 16),), (208,)),
}


def signed_range(bits: int, signed: bool) -> tuple[int, int]:
    half = 1 << bits - 1
    return (-half, half - 1) if signed else (0, 2 * half - 1)


def quantize_k(x: np.ndarray, name: str) -> np.ndarray:
    """x [n, k] float32, k a multiple of 256 -> uint8 [n, bytes]"""
    kind = K_TYPES[name]
    groups = x.reshape(-1, BLOCK // kind.group, kind.group)
    blocks = np.concatenate([quantize_blocks(groups[i : i + SLICE], kind) for i in range(0, len(groups), SLICE)])
    return blocks.reshape(len(x), -1)


def quantize_blocks(x: np.ndarray, kind: KType) -> np.ndarray:
    """x [blocks, groups, group] -> uint8 [blocks, bytes]"""
    scale, low = fit_groups(x, kind)
    d, factor = factors_of(scale, kind)
    d_min, min_factor = factors_of(low, kind) if kind.has_min else (np.zeros_like(d), np.zeros_like(factor))
    factor, min_factor = best_factors(x, kind, d, factor, d_min, min_factor)
    codes = rounded_codes(x, d[:, None] * factor, d_min[:, None] * min_factor, kind)
    return packed(kind, codes, factor, min_factor, d, d_min)


def rounded_codes(x: np.ndarray, scale: np.ndarray, low: np.ndarray, kind: KType) -> np.ndarray:
    """The codes, as float32, whose scale * code - low is nearest to x."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    codes = (x + low[..., None]) * inverse[..., None]
    return np.clip(np.rint(codes, out=codes), *kind.code_range(), out=codes)


def dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.einsum("bgi,bgi->bg", x, y)


def squared_error(x: np.ndarray, scale: np.ndarray, low: np.ndarray, codes: np.ndarray) -> np.ndarray:
    rest = scale[..., None] * codes - low[..., None] - x
    return dots(rest, rest)


def fit_groups(x: np.ndarray, kind: KType) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the min (as it is subtracted) of each group, [blocks, groups] float32."""
    smallest, largest = kind.code_range()
    if kind.has_min:
        start = np.maximum(-x.min(axis=2), 0)
        unit = (x.max(axis=2) + start) / largest
    else:  # the largest magnitude has the code that the other sign has not
        start = np.zeros(x.shape[:2], np.float32)
        unit = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)[..., 0] / smallest
    scale, low, least = unit, start, np.inf
    for cover in COVERS:
        codes = rounded_codes(x, unit * cover, start, kind)
        tried_scale, tried_low = least_squares(x, codes, kind)
        error = squared_error(x, tried_scale, tried_low, codes)
        better = error < least
        scale, low = np.where(better, tried_scale, scale), np.where(better, tried_low, low)
        least = np.minimum(error, least)
    return scale, low


def least_squares(x: np.ndarray, codes: np.ndarray, kind: KType) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the min of each group with which scale * codes - min is nearest to x."""
    n, xc, cc = np.float32(kind.group), dots(x, codes), dots(codes, codes)
    alone = np.divide(xc, cc, out=np.zeros_like(xc), where=cc > 0)
    if not kind.has_min:
        return alone, np.zeros_like(alone)
    sum_x, sum_c = x.sum(axis=2), codes.sum(axis=2)
    determinant = n * cc - sum_c * sum_c
    differ = determinant > 0
    scale = np.divide(n * xc - sum_x * sum_c, determinant, out=np.zeros_like(xc), where=differ)
    low = np.divide(sum_c * xc - cc * sum_x, determinant, out=-sum_x / n, where=differ)
    return np.where(low < 0, alone, scale), np.maximum(low, 0)


def factors_of(numbers: np.ndarray, kind: KType) -> tuple[np.ndarray, np.ndarray]:
    """numbers [blocks, groups] as half float [blocks] * factor [blocks, groups]"""
    smallest, largest = kind.factor_range()
    extreme = np.take_along_axis(numbers, np.abs(numbers).argmax(axis=1)[:, None], axis=1)
    half = (extreme / (smallest or largest)).astype(np.float16).astype(np.float32)
    factor = np.divide(numbers, half, out=np.zeros_like(numbers), where=half != 0)
    return half[:, 0], np.clip(np.rint(factor), smallest, largest)


def best_factors(x, kind, d, factor, d_min, min_factor) -> tuple[np.ndarray, np.ndarray]:
    """The best of the factors of each group's scale and min and their neighbours."""
    best, best_min, least = factor, min_factor, np.inf
    for step, min_step in product((0, -1, 1), (0, -1, 1) if kind.has_min else (0,)):
        tried = np.clip(factor + step, *kind.factor_range())
        tried_min = np.clip(min_factor + min_step, *kind.factor_range())
        scale, low = d[:, None] * tried, d_min[:, None] * tried_min
        error = squared_error(x, scale, low, rounded_codes(x, scale, low, kind))
        better = error < least
        best, best_min = np.where(better, tried, best), np.where(better, tried_min, best_min)
        least = np.minimum(error, least)
    return best, best_min


def packed(kind, codes, factor, min_factor, d, d_min) -> np.ndarray:
    """uint8 [blocks, bytes]"""
    blocks = np.zeros((len(codes), kind.bytes), np.uint8)
    codes = codes.reshape(len(codes), BLOCK).astype(np.int32) - kind.code_range()[0]
    for i, field in enumerate(kind.codes):
        field.put(codes >> sum(f.bits for f in kind.codes[:i]), blocks)
    factor, min_factor = factor.astype(np.int32), min_factor.astype(np.int32)
    if kind.factors:
        both = np.concatenate([factor, min_factor], axis=1) if kind.has_min else factor
        both = both - (kind.factor_range()[0] if kind.factor_bits < 8 else 0)  # whole bytes have a sign
        for i, field in enumerate(kind.factors):
            field.put(both >> sum(f.bits for f in kind.factors[:i]), blocks)
    else:  # 6 bits: those of groups 0 to 3 in the lowest of 4 bytes each, whose upper two are of groups 4 to 7
        blocks[:, 4:8] = factor[:, :4] | factor[:, 4:] >> 4 << 6
        blocks[:, 8:12] = min_factor[:, :4] | min_factor[:, 4:] >> 4 << 6
        blocks[:, 12:16] = factor[:, 4:] & 15 | (min_factor[:, 4:] & 15) << 4
    for at, half in zip(kind.halves, (d, d_min), strict=False):
        blocks[:, at : at + 2] = half.astype("<f2")[:, None].view(np.uint8)
    return blocks
