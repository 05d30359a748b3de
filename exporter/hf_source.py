"""Hugging Face folders: config.json and .safetensors files, one or many; block-scaled fp8 as DeepSeek V3 has it, MXFP4
as gpt-oss."""

import json
import os
import re
import struct
from pathlib import Path

import numpy as np

from exporter.errors import ExportError, shown
from exporter.names import IGNORED
from exporter.source import File, Source, array_tensor, whole_file
from exporter.weights import GROUP, Tensor, Weight, size, unreadable

SAFETENSORS_TYPES = {
    "F64": ("<f8", "f32"),
    "F32": ("<f4", "f32"),
    "F16": ("<f2", "f16"),
    "BF16": ("<u2", "bf16"),
    "F8_E4M3": ("u1", "fp8"),
}
MXFP4_PARTS, MXFP4_TYPE = ("_blocks", "_scales"), "mxfp4"
TORCH_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes, of the safetensors format
WEIGHTS_NAME = re.compile(r".*\.safetensors|pytorch_model.*\.bin|consolidated.*\.pth")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(whole_file(path).decode("utf-8"))
    except OSError as error:
        raise ExportError(
            f"{path}: {error.strerror}: a Hugging Face folder holds config.json and .safetensors files"
        ) from error
    except ValueError as error:
        raise ExportError(f"{path}: not JSON ({error}): fetch it again") from error
    except RecursionError as error:
        raise ExportError(f"{path}: nested too deep: fetch it again") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: not a JSON object: fetch it again")
    return value


def open_folder(path: Path, tokenizer_file: Path | None) -> Source:
    source = Source("hf", path, path / "config.json", tokenizer_file)
    source.config = read_json(source.where)
    files, listed = weight_files(path)
    for file in files:
        for name, tensor in read_safetensors(path / file).items():
            if name in source.tensors:
                raise ExportError(f"{path / file}: tensor {name} is in another shard too: fetch the checkpoint again")
            source.tensors[name] = tensor
    for name, file in listed.items():
        if name not in source.tensors and not IGNORED.search(name):
            raise ExportError(f"{path / file}: tensor {name} is missing, {INDEX} lists it: fetch both again")
    passed_over = [name for name in weights_in(path) if name not in files]
    if passed_over:
        source.notes.append(f"{', '.join(passed_over)}: not read, {WEIGHTS if WEIGHTS in files else INDEX} comes first")
    dequantize(source)
    return source


def open_config(path: Path) -> Source:
    """A config.json without its folder: all that is known of the weights is what it says of their type."""
    source = Source("config", path, path, None)
    source.config = read_json(path)
    named = source.config.get("torch_dtype") or source.config.get("dtype") or "bfloat16"
    if not isinstance(named, str) or named not in TORCH_TYPES:
        raise ExportError(f"{path}: torch_dtype is {shown(named)}: known are {', '.join(TORCH_TYPES)}: fetch it again")
    source.type = source.expert_type = TORCH_TYPES[named]
    settings = source.config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == "mxfp4":  # of the experts alone
        source.expert_type = MXFP4_TYPE
    dequantize(source)
    return source


def weight_files(path: Path) -> tuple[list[str], dict[str, str]]:
    """The files that transformers would load, in its order, and the index's tensor -> file where there is one.

    As _get_resolved_checkpoint_files of modeling_utils.py: the single file comes before the index, always.
    """
    if os.path.lexists(path / WEIGHTS):
        return [WEIGHTS], {}
    if os.path.lexists(path / INDEX):
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(is_file_name(file) for file in listed.values()):
            raise ExportError(
                f'{path / INDEX}: "weight_map" does not name a file of this folder for each tensor: fetch it again'
            )
        if listed:
            return sorted(set(listed.values())), listed
    there = weights_in(path)
    raise ExportError(
        f"{path}: neither {WEIGHTS} nor {INDEX} names any weights{f' (there are {shown(there)})' if there else ''}: "
        "fetch what is missing, or save the model with save_pretrained(..., safe_serialization=True)"
    )


def is_file_name(value) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & {"/", "\0"}


def weights_in(path: Path) -> list[str]:
    """Everything that looks like weights, for people."""
    return sorted(file.name for file in path.iterdir() if WEIGHTS_NAME.fullmatch(file.name))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    file = File(path)
    try:
        length = struct.unpack("<Q", file.read(0, min(file.size, 8)))[0]
        header = json.loads(bytes(file.read(8, min(length, LONGEST_HEADER, file.size - 8))))
        return {
            name: safetensors_tensor(file, name, 8 + length, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExportError(f"{path}: its header is truncated or damaged: fetch it again") from error


def safetensors_tensor(file: File, name: str, start: int, entry: dict) -> Tensor:
    """One of a header's entries; the data starts at `start`. A tensor that cannot be read is a problem only for a model
    that has a place for it."""
    where, kind = f"{file.path}: tensor {name}", entry["dtype"]
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"]) or (1,)
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)) or not isinstance(kind, str):
        raise ValueError("a shape or an offset is no natural number")
    dtype, type_ = SAFETENSORS_TYPES.get(kind, (None, ""))
    if kind == "U8" and name.endswith(MXFP4_PARTS):
        dtype, type_ = "u1", "u8"
    wanted = end - begin if dtype is None else size(shape) * np.dtype(dtype).itemsize
    if not begin <= end <= file.size - start or end - begin != wanted:
        raise ExportError(
            f"{where} {shown(list(shape))} does not fit its bytes {shown(begin)} to {shown(end)} of "
            f"{file.size - start}: the file is truncated: fetch it again"
        )
    if dtype is None:
        known = ", ".join(SAFETENSORS_TYPES)
        return unreadable(shape, f"{where} has dtype {kind}, not one of {known}: convert the checkpoint to bfloat16")
    if not size(shape):
        return unreadable(shape, f"{where} {shown(list(shape))} is empty: save the checkpoint again, with its weights")
    return array_tensor(file, start + begin, dtype, type_, shape)


def dequantize(source: Source) -> None:
    settings = source.config.pop("quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        raise ExportError(
            f"{source.where}: quantization_config is {shown(settings)}: must be an object: fetch it again"
        )
    method = (settings or {}).get("quant_method")
    if settings and (method not in ("fp8", "mxfp4") or settings.get("fmt", "e4m3") != "e4m3"):
        raise ExportError(
            f"{source.where}: quantization_config.quant_method is {shown(method)}, only fp8 (e4m3) and mxfp4 "
            "are known: export the checkpoint that it was made from"
        )
    if method == "mxfp4":
        dequantize_mxfp4(source)
    dequantize_fp8(source, settings)


def dequantize_mxfp4(source: Source) -> None:
    """X_blocks [..., k / 32, 16] of two codes a byte, the low half first, and X_scales [..., k / 32] -> X [..., k]."""
    for name in [name for name in source.tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = source.tensors.pop(name), source.tensors.pop(stem + "_scales", None)
        known = scales is not None and (scales.type, blocks.type) == ("u8", "u8") and len(scales.shape) > 1
        if not known or blocks.shape != (*scales.shape, GROUP // 2):
            raise ExportError(
                f"{source.path}: tensor {name} is MXFP4, and {stem}_scales with one scale for each 32 elements is not "
                "there: export another checkpoint"
            )
        source.tensors[stem] = mxfp4_tensor(blocks, scales)


def mxfp4_tensor(blocks: Tensor, scales: Tensor) -> Tensor:
    groups = scales.k

    def read(index: np.ndarray) -> Weight:
        """ggml's blocks: the scale, then bytes of code i and, in the high half, code i + 16."""
        bytes = blocks.read((index[:, None] * groups + np.arange(groups)).reshape(-1)).data
        codes = np.stack([bytes & 15, bytes >> 4], axis=-1).reshape(-1, 2, GROUP // 2)
        exponents = scales.read(index).data.reshape(-1, 1)
        block = np.concatenate([exponents, codes[:, 0] | codes[:, 1] << 4], axis=1)
        return Weight("mxfp4", block.reshape(len(index), -1))

    return Tensor((*scales.shape[:-1], groups * GROUP), MXFP4_TYPE, read)


def dequantize_fp8(source: Source, settings: dict | None) -> None:
    """Block-scaled fp8 (DeepSeek V3, arXiv 2412.19437, section 3.3): w = float8 * weight_scale_inv of its block."""
    block = (settings or {}).get("weight_block_size")
    known = isinstance(block, list) and len(block) == 2 and all(type(length) is int and length > 0 for length in block)
    for name, tensor in list(source.tensors.items()):
        if tensor.type != "fp8":
            continue
        scale = source.tensors.pop(name + "_scale_inv", None)
        if (
            scale is None
            or scale.problem
            or not known
            or scale.shape != (-(-tensor.n // block[0]), -(-tensor.k // block[1]))
        ):
            raise ExportError(
                f"{source.path}: tensor {name} is fp8, and {name}_scale_inv with one scale for each "
                "weight_block_size of quantization_config is not there: export another checkpoint"
            )
        source.tensors[name] = fp8_tensor(tensor, scale.float32(), block)


def fp8_tensor(tensor: Tensor, scale: np.ndarray, block: list[int]) -> Tensor:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[(codes & 127) == 127] = np.nan
    table = np.where(codes & 128, -values, values).astype(np.float32)

    def read(index: np.ndarray) -> Weight:
        scales = np.repeat(scale[index // block[0]], block[1], axis=1)[:, : tensor.k]
        return Weight("f32", table[tensor.read(index).data] * scales)

    return Tensor(tensor.shape, "f32", read, keep="bf16", note="F8_E4M3")
