"""Every quantised type, packed and unpacked, against the gguf package: the same bits, in no more memory."""

import subprocess

import gguf
import numpy as np
import pytest
from conftest import tool

from exporter.weights import QUANTIZED

N, K = 64, 2048


def random_rows(kind, random):
    """[N, bytes] of random bits. Half floats are any number, zero and subnormal ones too; a scale of MXFP4 is any."""
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.randint(0, 256, (N * K // inputs, size)).astype(np.uint8)
    for at in QUANTIZED[kind.name.lower()]:
        exponent = random.randint(0, 31, (len(blocks), 1)) << 10
        blocks[:, at : at + 2] = (
            (random.randint(0, 1 << 16, (len(blocks), 1)) & 0x83FF | exponent).astype("<u2").view("u1")
        )
        blocks[:2, at : at + 2] = [[0, 0], [0, 0x80]]
    if kind.name == "MXFP4":
        blocks[:, 0] = np.arange(len(blocks)) % 253  # a larger one times 6 is no float32
    return blocks.reshape(N, -1)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_same_bits(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    rows = random_rows(kind, np.random.RandomState(1))
    want = gguf.dequantize(rows, kind)
    assert np.isfinite(want).all()
    done = subprocess.run([tool("dequantize"), name, str(N), str(K)], input=rows.tobytes(), capture_output=True)
    assert done.returncode == 0
    assert done.stdout == want.astype("<f4").tobytes()
    assert int(done.stderr) <= 1.02 * rows.nbytes
