"""Writes a model file anew, with all weights as float32 of the same values.

usage: as_f32.py MODEL.safetensors OUT.safetensors     (with export.py's packages and the project's root in PYTHONPATH)
"""

import json
import sys
from pathlib import Path

import numpy as np

from exporter.weights import Weight, block

STORED = {"F32": ("f32", np.float32), "F16": ("f16", np.float16), "BF16": ("bf16", np.uint16)}
ROWS_OF = 1 << 24  # elements at a time


def main(source: Path, out: Path) -> None:
    data = np.memmap(source, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    metadata = header.pop("__metadata__")
    types = json.loads(metadata["types"])
    metadata["types"] = "{}"
    tensors, offset = {}, 0
    for name, tensor in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
        type, stored = STORED.get(tensor["dtype"], (types.get(name.removesuffix(".weight")), np.uint8))
        inputs, elements = block(type)
        shape = [*tensor["shape"][:-1], tensor["shape"][-1] // elements * inputs]
        begin, end = tensor["data_offsets"]
        rows = data[start + begin : start + end].view(stored).reshape(-1, tensor["shape"][-1])
        tensors[name] = (type, rows)
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for type, rows in tensors.values():
            for i in range(0, len(rows), max(1, ROWS_OF // rows.shape[1])):
                part = rows[i : i + max(1, ROWS_OF // rows.shape[1])]
                file.write(Weight(type, np.array(part)).float32().tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
