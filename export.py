#!/usr/bin/env python3
"""Turns a checkpoint (GGUF file, Hugging Face folder, llama2.c .bin) into NAME.safetensors and NAME.tokenizer.bin."""

import argparse
import os
import signal
import sys
from pathlib import Path

from exporter import rewrite, writer
from exporter.errors import ExportError
from exporter.model import Model, build
from exporter.sources import open_source
from exporter.tokenizer import write_tokenizer
from exporter.weights import TYPES, size


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"export.py: {message}: see export.py --help\n")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a .gguf file, a Hugging Face folder or a llama2.c .bin"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="NAME.safetensors")
    parser.add_argument("--type", choices=TYPES, help="weights' type (default: the source's own, tensor by tensor)")
    parser.add_argument(
        "--as",
        dest="layout",
        metavar="mha|gqa:G|mla",
        type=rewrite.parse,
        help="the same model in another attention layout, exactly",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="where the source does not hold it (llama2.c)")
    parser.add_argument("--pre", metavar="NAME", help="tokenizer.ggml.pre of a GGUF file that lacks it")
    options = parser.parse_args(argv)
    if options.output.suffix != ".safetensors":
        parser.error(f"argument -o/--output: {options.output}: the name must end in .safetensors")
    return options


def export(options: argparse.Namespace) -> None:
    source = open_source(options.source, options.tokenizer)
    source.pre = options.pre
    model = build(source)
    if options.layout:
        model = rewrite.rewrite(model, *options.layout)
    output, tokenizer = options.output, options.output.with_suffix(".tokenizer.bin")
    unfinished = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in (tokenizer, output)}
    try:
        ends = write_tokenizer(source, unfinished[tokenizer])
        counts = writer.write(model, options.type, unfinished[output], unfinished[tokenizer], source.name)
        for path, part in unfinished.items():
            part.replace(path)
    finally:
        for part in unfinished.values():
            part.unlink(missing_ok=True)
    print(summary(source, model, counts, output, tokenizer, ends))


def summary(source, model: Model, counts, output: Path, tokenizer: Path, ends: list[str]) -> str:
    c = model.config
    parameters = sum(size(tensor.shape) for name, tensor in model.tensors.items() if not name.startswith("rope."))
    if c["attention"] == "mla":
        widths = f"kv_lora_rank {c['kv_lora_rank']}, qk_rope_head_dim {c['qk_rope_head_dim']}"
        cached = c["kv_lora_rank"] + c["qk_rope_head_dim"]
    else:
        widths = f"{c['n_kv_heads']} KV heads of {c['head_dim']}"
        cached = 2 * c["n_kv_heads"] * c["head_dim"]
    lines = [
        f"{output} and {tokenizer.name}, from {source.name}",
        f"  attention   {c['attention']}: {c['n_layers']} layers, {c['n_heads']} heads, {widths}",
        f"  parameters  {parameters / 1e6:.1f} million",
        "  weights     " + ", ".join(f"{kind} {count / 1e6:.1f} MB" for kind, count in sorted(counts.items())),
        f"  KV cache    {2 * cached * c['n_layers']} bytes per token (f16)",
        f"  context     {c['seq_len']} tokens",
        f"  ends        {', '.join(map(repr, ends)) or 'no token ends a text'}",
    ]
    lost = sorted({tensor.note for tensor in model.tensors.values()} - {""})
    if lost:
        lines.append(f"  converted   {', '.join(lost)} tensors were dequantised: no type here holds them as they are")
    return "\n".join(lines)


def stop(number: int, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    code = 1
    try:
        export(arguments(argv))
    except ExportError as error:
        line = str(error)
    except KeyboardInterrupt:
        line, code = "interrupted: nothing was written", 130
    except OSError as error:
        line = f"{error.filename or 'the output'}: {error.strerror}: give a folder that can be written and has room"
    else:
        return 0
    print(f"export.py: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: they would leave unfinished files
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    sys.exit(main())
