"""Where a model comes from: a GGUF file, a Hugging Face folder or its config.json alone, or a llama2.c checkpoint."""

from pathlib import Path

from exporter.errors import ExportError
from exporter.gguf_source import open_gguf
from exporter.hf_source import open_config, open_folder
from exporter.llama2c_source import open_llama2c
from exporter.source import Source, open_file


def open_source(path: Path, tokenizer_file: Path | None = None) -> Source:
    if tokenizer_file is not None and not tokenizer_file.is_file():
        raise ExportError(f"{tokenizer_file}: no such file: give the tokenizer of this model to --tokenizer")
    if path.is_dir():
        return open_folder(path, tokenizer_file)
    try:
        with open_file(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise ExportError(
            f"{path}: {error.strerror}: give a .gguf file, a Hugging Face folder or a llama2.c .bin"
        ) from error
    if magic == b"GGUF":
        return open_gguf(path, tokenizer_file)
    if path.suffix == ".safetensors":
        raise ExportError(
            f"{path}: weights alone: give the folder that holds config.json and the tokenizer beside them"
        )
    if path.suffix == ".json":
        return open_config(path)
    if path.suffix == ".bin":
        return open_llama2c(path, tokenizer_file)
    raise ExportError(
        f"{path}: first bytes {magic!r}: not GGUF: give a .gguf file, a Hugging Face folder or a llama2.c .bin"
    )
