"""Writes a GGUF file of random weights: a Llama of 1.07 B parameters, with the tokenizer of another file.

usage: random_gguf.py TOKENIZER.gguf q8_0|q4_0|q4_k|... OUT.gguf     (with the project's root in PYTHONPATH)

Matrices of as many inputs have the same rows, again and again: a product takes as long for any weights.
"""

import functools
import sys
from pathlib import Path

import gguf
import numpy as np

from exporter.weights import ggml, quantize

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS = 2048, 8192, 16, 32, 8
ROWS = 64  # that differ


@functools.cache
def rows(inputs: int, type: str) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((ROWS, inputs), np.float32) / np.sqrt(inputs).astype(np.float32)
    return quantize(x, type).data


def main(tokenizer: Path, type: str, out: Path) -> None:
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM // HEADS)
    fields = gguf.GGUFReader(tokenizer).fields
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    vocab = len(fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(vocab)

    def matrix(name: str, n: int, inputs: int) -> None:
        writer.add_tensor(f"{name}.weight", np.tile(rows(inputs, type), (n // ROWS, 1)), raw_dtype=ggml(type))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(DIM, np.float32))

    matrix("token_embd", vocab, DIM)
    norm("output_norm")
    for layer in range(LAYERS):
        at, kv = f"blk.{layer}.", DIM // HEADS * KV_HEADS
        norm(at + "attn_norm")
        norm(at + "ffn_norm")
        for name, n in {"attn_q": DIM, "attn_k": kv, "attn_v": kv, "attn_output": DIM}.items():
            matrix(at + name, n, DIM)
        matrix(at + "ffn_gate", HIDDEN, DIM)
        matrix(at + "ffn_up", HIDDEN, DIM)
        matrix(at + "ffn_down", DIM, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
