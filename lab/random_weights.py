"""Fills a model file that has shapes alone with random weights; needs Python alone.

usage: random_weights.py SHAPES.safetensors NAME.safetensors

export.py makes the shapes of a config.json. A weight has either sign and such a size that a row's product with numbers
around 1 is around 1: the speed is that of real weights, since zeros would be quicker to multiply. Vectors are ones.
"""

import json
import math
import random
import struct
import sys
from pathlib import Path

PIECE = 4 << 20  # bytes that are made at a time; a matrix repeats them


def binary16(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}e", *numbers)


# Of a type: the bits of a block that are noise, and the others, for weights of about `size`.
TYPES = {
    "F32": lambda size: (b"\xff\xff\x7f\x80", struct.pack("<f", two_to_below(size))),
    "BF16": lambda size: (b"\x7f\x80", struct.pack("<f", two_to_below(size))[2:]),
    "F16": lambda size: (b"\xff\x83", binary16(two_to_below(size))),
    "q8_0": lambda size: (bytes(2) + b"\xff" * 32, binary16(size / 74) + bytes(32)),  # scale q
    # scale f q - min g: f and g up to 63, q up to 15
    "q4_k": lambda size: (bytes(4) + b"\xff" * 140, binary16(size / 256, 7.5 * size / 256) + bytes(140)),
}


def two_to_below(size: float) -> float:
    """With noise for a mantissa, this is what numbers of about `size` have for an exponent."""
    return 2.0 ** math.floor(math.log2(size))


def noise(kind: str, inputs: int) -> bytes:
    """About PIECE bytes of blocks."""
    random_bits, fixed = TYPES[kind](1 / math.sqrt(inputs))
    n = PIECE // len(fixed)
    bits = int.from_bytes(random.Random(0).randbytes(n * len(fixed)), "big")
    return (bits & int.from_bytes(random_bits * n, "big") | int.from_bytes(fixed * n, "big")).to_bytes(
        n * len(fixed), "big"
    )


def read_header(shapes: Path) -> tuple[bytes, dict]:
    """As it is in the file, and what it says."""
    data = shapes.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    if len(data) > length:
        sys.exit(f"random_weights.py: {shapes} has weights already: give what export.py makes of a config.json")
    return data, header


def size_of(header: dict) -> int:
    """Bytes of all tensors."""
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def fill(shapes: Path, weights: Path) -> None:
    data, header = read_header(shapes)
    metadata = header.pop("__metadata__")
    types = json.loads(metadata["types"])
    pieces = {}
    partial = weights.with_suffix(".partial")
    with partial.open("wb") as out:
        out.write(data)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if len(entry["shape"]) == 1:
                out.write(struct.pack("<f", 1) * ((end - begin) // 4))
                continue
            kind, inputs = types.get(name.removesuffix(".weight"), entry["dtype"]), entry["shape"][-1]
            if kind not in TYPES:
                sys.exit(f"random_weights.py: {shapes}: {name} is {kind}, not one of {', '.join(TYPES)}")
            if (kind, inputs) not in pieces:
                pieces[kind, inputs] = noise(kind, inputs)
            piece = memoryview(pieces[kind, inputs])
            for at in range(begin, end, len(piece)):
                out.write(piece[: end - at])
    partial.replace(weights)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: random_weights.py SHAPES.safetensors NAME.safetensors")
    fill(Path(sys.argv[1]), Path(sys.argv[2]))
