#!/usr/bin/env python3
"""Turns a checkpoint (GGUF file, Hugging Face folder, llama2.c .bin) into NAME.safetensors and NAME.tokenizer.bin.

Of a config.json alone it makes a NAME.safetensors of shapes without weights, for ./run --estimate.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback of theirs

import argparse
import contextlib
import os
import secrets
import sys
from pathlib import Path

from exporter import rewrite, writer
from exporter.errors import ExportError, printable
from exporter.made_from import export_name, inputs, is_current, metadata, record
from exporter.model import Model, build
from exporter.sources import open_source
from exporter.tokenizer import write_tokenizer
from exporter.weights import CHOICES, size

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNFINISHED: dict[Path, Path] = {}  # file -> what is written meanwhile, beside it


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"export.py: {printable(message)}: see export.py --help\n")


def existing(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: give a .gguf file, a Hugging Face folder or a .bin")
    return Path(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "source",
        type=existing,
        metavar="SOURCE",
        help="a .gguf file, a Hugging Face folder or a llama2.c .bin; a config.json: shapes alone",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("-o", "--output", type=Path, metavar="NAME.safetensors")
    place.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="choose the name, export only if the source has changed since, and print the model file's path alone",
    )
    parser.add_argument("--type", choices=CHOICES, help="weights' type (default: the source's own, tensor by tensor)")
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
    if options.output and options.output.suffix != ".safetensors":
        parser.error(f"argument -o/--output: {options.output}: the name must end in .safetensors")
    return options


def export_into(options: argparse.Namespace) -> Path:
    """The model file of a source in the folder --into, made now where it is missing or the source has changed."""
    if options.source.suffix == ".safetensors" and options.source.is_file() and metadata(options.source):
        return options.source
    wanted = record(options.source, options.tokenizer, options.type, options.layout, options.pre)
    options.into.mkdir(parents=True, exist_ok=True)
    tokenizer = options.tokenizer and os.path.realpath(options.tokenizer)
    chosen = (options.type, options.layout, tokenizer, options.pre)
    options.output = options.into / export_name(options.source, options.into, chosen)
    if not is_current(options.output, tokenizer_of(options.output), wanted):
        if options.output.exists() and not metadata(options.output):
            raise ExportError(f"{options.output}: export.py has not made this file: move it away")
        print(export(options), file=sys.stderr)
    return options.output


def tokenizer_of(output: Path) -> Path:
    return output.with_suffix(".tokenizer.bin")


def export(options: argparse.Namespace) -> str:
    """Writes options.output and its tokenizer (of shapes alone there is none), both or neither; returns the summary."""
    made_of = options.source, options.tokenizer, options.type, options.layout, options.pre
    made_from = record(*made_of)
    source = open_source(options.source, options.tokenizer)
    source.pre = options.pre
    model = build(source)
    if options.layout:
        model = rewrite.rewrite(model, *options.layout)
    output, tokenizer = options.output, tokenizer_of(options.output)
    wanted = (output,) if source.kind == "config" else (tokenizer, output)
    for path in wanted:
        check_output(path, options.source, inputs(options.source, options.tokenizer))
    try:
        *texts, weights = (begin(path) for path in wanted)
        chat, ends = write_tokenizer(source, texts[0]) if texts else ("", [])
        counts = writer.write(model, options.type, weights, texts[0] if texts else None, source.name, made_from)
        if record(*made_of) != made_from:
            raise ExportError(f"{options.source}: was changed while it was exported: export it again")
        finish()
    finally:
        discard()
    return summary(source, model, counts, chat, ends, output, tokenizer)


def begin(path: Path) -> Path:
    """An empty file beside `path`, in the end of its name; where `path` is a link, that of what it links to."""
    real = Path(os.path.realpath(path))
    part = real.with_name(f".{real.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    UNFINISHED[real] = part
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        del UNFINISHED[real]  # what is there is another's, perhaps a link that was planted
        raise OSError(error.errno, error.strerror, str(path)) from error
    return part


def finish() -> None:
    """Gives all files their names: from here on a signal is too late to stop the export."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        for path, part in UNFINISHED.items():
            part.replace(path)
        for number in STOPPING:
            if signal.getsignal(number) is stop:
                signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard() -> None:
    for part in UNFINISHED.values():
        part.unlink(missing_ok=True)
    UNFINISHED.clear()


def check_output(path: Path, source: Path, read: list[Path]) -> None:
    """An export replaces neither what it reads nor anything else that makes up the checkpoint."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    if path.is_symlink() and path.lstat().st_uid != os.geteuid():
        raise ExportError(f"{path}: a link that another user has made: give another name to -o")
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: a folder, a pipe or a device: give the name of a file to -o")
    if path.exists() and any(os.path.samefile(path, file) for file in read):
        raise ExportError(f"{path}: this file is read, and would be replaced: give another name to -o")
    inside = source.is_dir() and real.is_relative_to(folder)
    if inside and (real.name == "model.safetensors" or (path.exists() and not is_ours(path))):
        raise ExportError(f"{path}: this is the checkpoint's own file, or would be taken for it: give another to -o")


def is_ours(path: Path) -> bool:
    return path.name.endswith(".tokenizer.bin") or metadata(path) is not None


def summary(source, model: Model, counts, chat: str, ends: list[str], output: Path, tokenizer: Path) -> str:
    c = model.config
    parameters = sum(size(tensor.shape) for name, tensor in model.tensors.items() if not name.startswith("rope."))
    if c["attention"] == "mla":
        widths = f"kv_lora_rank {c['kv_lora_rank']}, qk_rope_head_dim {c['qk_rope_head_dim']}"
        cached = c["kv_lora_rank"] + c["qk_rope_head_dim"]
    else:
        widths = f"{c['n_kv_heads']} KV heads of {c['head_dim']}"
        cached = 2 * c["n_kv_heads"] * c["head_dim"]
    lines = [
        f"{output}{' (shapes alone)' if source.kind == 'config' else f' and {tokenizer.name}'}, from {source.name}",
        f"  attention   {c['attention']}: {c['n_layers']} layers, {c['n_heads']} heads, {widths}",
        f"  parameters  {parameters / 1e6:.1f} million",
        "  weights     " + ", ".join(f"{kind} {count / 1e6:.1f} MB" for kind, count in sorted(counts.items())),
        f"  KV cache    {2 * cached * c['n_layers']} bytes per token (f16)",
        f"  context     {c['seq_len']} tokens",
    ]
    if source.kind != "config":
        lines += [f"  ends        {', '.join(map(repr, ends)) or 'no token ends a text'}", f"  chat        {chat}"]
    lost = sorted({tensor.note for tensor in model.tensors.values()} - {""})
    if lost:
        lines.append(f"  converted   {', '.join(lost)} tensors were dequantised: no type here holds them as they are")
    lines += [f"  note        {note}" for note in source.notes]
    return "\n".join(map(printable, lines))


def stop(number: int, frame):
    """Ends the program where it stands: an exception might be caught, or be lost in a destructor."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    discard()
    with contextlib.suppress(OSError):
        bar = b"\r\x1b[K" if os.isatty(2) else b""
        os.write(2, bar + b"export.py: interrupted: nothing was written\n")  # sys.stderr may be in the middle of a line
    os._exit(130)


def main(argv: list[str] | None = None) -> int:
    try:
        options = arguments(argv)
        text = str(export_into(options) if options.into else export(options))
    except ExportError as error:
        line = str(error)
    except MemoryError:
        line = f"{options.source}: not enough memory for its largest tensor: free some, or export on another machine"
    except OSError as error:
        place = error.filename or options.output
        line = f"{place}: {error.strerror}: give a place that is there, can be read or written, and has room"
    else:
        return say(text)
    print(f"export.py: {printable(line)}", file=sys.stderr)
    return 1


def say(text: str) -> int:
    try:
        print(text, flush=True)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the rest is tried again at the end
        print(f"export.py: standard output: {error.strerror}: the files are written, this is lost", file=sys.stderr)
        return 1


if __name__ == "__main__":
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file that is opened must not take its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # names of files are bytes
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    sys.exit(main())
