"""Hugging Face folders: config.json and .safetensors files, one or many; block-scaled fp8 as DeepSeek V3 has it, MXFP4
as gpt-oss."""

import json
import struct
from pathlib import Path

import numpy as np

from exporter.errors import ExportError
from exporter.source import Source, array_tensor, map_file
from exporter.weights import GROUP, Tensor, Weight, mxfp4, size

SAFETENSORS_TYPES = {
    "F64": ("<f8", "f32"),
    "F32": ("<f4", "f32"),
    "F16": ("<f2", "f16"),
    "BF16": ("<u2", "bf16"),
    "F8_E4M3": ("u1", "fp8"),
}
MXFP4_PARTS = ("_blocks", "_scales")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ExportError(
            f"{path}: {error.strerror}: a Hugging Face folder holds config.json and .safetensors files"
        ) from error
    except ValueError as error:
        raise ExportError(f"{path}: not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: not a JSON object: fetch it again")
    return value


def open_folder(path: Path, tokenizer_file: Path | None) -> Source:
    source = Source("hf", path, path / "config.json", tokenizer_file)
    source.config = read_json(source.where)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ExportError(f'{index}: "weight_map" does not name a file for each tensor: fetch it again')
        files = sorted(set(listed.values()))
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise ExportError(
            f"{path}: no .safetensors file: save the model with save_pretrained(..., safe_serialization=True)"
        )
    for file in files:
        source.tensors.update(read_safetensors(path / file))
    dequantize(source)
    return source


def read_safetensors(path: Path) -> dict[str, Tensor]:
    data = map_file(path)
    try:
        length = struct.unpack_from("<Q", data, 0)[0]
        header = json.loads(bytes(data[8 : 8 + length]))
        start, tensors = 8 + length, {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"]) or (1,)
            dtype, type = SAFETENSORS_TYPES.get(entry["dtype"], (None, None))
            if entry["dtype"] == "U8" and name.endswith(MXFP4_PARTS):
                dtype, type = "u1", "u8"
            if dtype is None:
                raise ExportError(
                    f"{path}: tensor {name} has dtype {entry['dtype']}, not one of "
                    f"{', '.join(SAFETENSORS_TYPES)}: convert the checkpoint to bfloat16"
                )
            if not 0 <= begin <= end <= len(data) - start or end - begin != size(shape) * np.dtype(dtype).itemsize:
                raise ExportError(
                    f"{path}: tensor {name} {list(shape)} does not fit its bytes {begin} to {end} of "
                    f"{len(data) - start}: the file is truncated: fetch it again"
                )
            tensors[name] = array_tensor(data[start + begin : start + end], dtype, type, shape)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ExportError(f"{path}: its header is truncated or damaged: fetch it again") from error
    return tensors


def dequantize(source: Source) -> None:
    settings = source.config.pop("quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        raise ExportError(f"{source.where}: quantization_config is {settings!r}: must be an object: fetch it again")
    method = (settings or {}).get("quant_method")
    if settings and (method not in ("fp8", "mxfp4") or settings.get("fmt", "e4m3") != "e4m3"):
        raise ExportError(
            f"{source.where}: quantization_config.quant_method is {method!r}, only fp8 (e4m3) and mxfp4 "
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
        bytes = blocks.read((index[:, None] * groups + np.arange(groups)).reshape(-1)).data
        codes = np.stack([bytes & 15, bytes >> 4], axis=-1).reshape(len(index), -1)
        return mxfp4(codes, scales.read(index).data)

    return Tensor((*scales.shape[:-1], groups * GROUP), "q8", read, note="MXFP4")


def dequantize_fp8(source: Source, settings: dict | None) -> None:
    """Block-scaled fp8 (DeepSeek V3, arXiv 2412.19437, section 3.3): w = float8 * weight_scale_inv of its block."""
    block = (settings or {}).get("weight_block_size")
    known = isinstance(block, list) and len(block) == 2 and all(type(length) is int and length > 0 for length in block)
    for name, tensor in list(source.tensors.items()):
        if tensor.type != "fp8":
            continue
        scale = source.tensors.pop(name + "_scale_inv", None)
        if scale is None or not known or scale.shape != (-(-tensor.n // block[0]), -(-tensor.k // block[1])):
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
