"""Tiny random checkpoints of every architecture, in the layout of the Hugging Face Hub, made with numpy alone.

tests/reference/tiny_NAME.json, written by make_reference.py, holds a model's config, the names and shapes of its
tensors, the seed, the prompt and the text that transformers continues it with; tiny_NAME.npy holds its logits. The
weights are not stored: they follow from the seed, the name and the shape. Only uniform numbers are drawn, from the
generator that numpy has frozen (RandomState), so they are the same bits on every machine.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).resolve().parent / "reference"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258; the ids below are the bytes themselves
VOCAB_SIZE = 256 + len(SPECIAL)


def names():
    return sorted(path.stem.removeprefix("tiny_") for path in REFERENCE.glob("tiny_*.json"))


def load(name):
    """The committed reference as a dictionary; "logits" is [len(positions), vocab_size] float32."""
    reference = json.loads((REFERENCE / f"tiny_{name}.json").read_text())
    reference["logits"] = np.load(REFERENCE / f"tiny_{name}.npy")
    return reference


def uniform(name, shape, seed):
    """float64 [shape], mean 0, deviation 1."""
    digest = hashlib.sha256(f"{seed} {name} {list(shape)}".encode()).digest()
    return (np.random.RandomState(np.frombuffer(digest, "<u4")).random_sample(shape) - 0.5) * math.sqrt(12)


def weight(name, shape, seed, model_type):
    """float32 [shape]: a tensor whose scale lets every part of the model matter.

    Queries, keys and routers are drawn wide, so that their softmax is far from uniform; norms differ between channels;
    biases are not zero.
    """
    unit = uniform(name, shape, seed)
    if ("norm" in name or "ln_" in name) and name.endswith("weight"):
        return (0.3 * unit + (0 if model_type.startswith("gemma") else 1)).astype(np.float32)  # Gemma adds the 1
    if name.endswith("bias"):
        return (0.1 * unit).astype(np.float32)
    if name.split(".")[-2] in (
        "embed_tokens",
        "wte",
        "wpe",
    ):  # small beside what the layers add, or tied models repeat themselves
        return (0.03 * unit).astype(np.float32)
    wide = (
        "q_proj",
        "k_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "c_attn",
        "qkv_proj",
        "gate",
        "router",
        "layer",
    )
    gain = 1.5 if name.split(".")[-2] in wide else 1.0
    turned = model_type == "gpt2" or (model_type == "gpt_oss" and ".experts." in name)  # [inputs, outputs]
    fan_in = shape[-2] if turned and len(shape) > 1 else shape[-1]
    return (gain / math.sqrt(fan_in) * unit).astype(np.float32)


def bytes_of(name, shape, seed, first, last):
    """uint8 [shape], each of first .. last - 1 as likely as the others."""
    unit = uniform(name, shape, seed) / math.sqrt(12) + 0.5
    return np.clip(first + np.floor(unit * (last - first)), first, last - 1).astype(np.uint8)


def bf16_bits(x):
    """float32 -> the upper half, rounded to nearest even, as uint16."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(name, tensors, reference):
    """(dtype of the safetensors format, array with those bytes) of one tensor."""
    shape, seed, model_type = tensors[name], reference["seed"], reference["config"]["model_type"]
    if name.endswith("_scale_inv"):  # float8: codes are uniform, which makes their deviation about 105
        blocks = 1 + 0.3 * uniform(name, shape, seed)
        return "F32", (blocks / (105 * math.sqrt(tensors[name.removesuffix("_scale_inv")][1]))).astype(np.float32)
    if name.endswith("_blocks"):  # MXFP4: two codes a byte
        return "U8", bytes_of(name, shape, seed, 0, 256)
    if name.endswith("_scales"):  # the codes' deviation is 2.9
        middle = 127 - round(math.log2(2.9 * math.sqrt(32 * shape[-1])))
        return "U8", bytes_of(name, shape, seed, middle - 1, middle + 2)
    if name + "_scale_inv" in tensors:
        codes = np.clip((uniform(name, shape, seed) / math.sqrt(12) + 0.5) * 256, 0, 255).astype(np.uint8)
        return "F8_E4M3", np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # 0x7F is NaN
    x = weight(name, shape, seed, model_type)
    if reference["dtype"] == "BF16":
        return "BF16", bf16_bits(x)
    if reference["dtype"] == "F16":
        return "F16", x.astype(np.float16)
    return "F32", x


def write_safetensors(path, tensors):
    """tensors: name -> (dtype, array)."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(array.tobytes())


def byte_alphabet():
    """[256]: the character that stands for each byte in a byte-level vocabulary, as GPT-2 defined it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + rest.index(byte)) for byte in range(256)]


def write_tokenizer(folder):
    """A byte-level BPE without merges: text becomes its bytes, so that prompts can choose their ids."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": text, **special} for i, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {char: byte for byte, char in enumerate(byte_alphabet())},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build(reference, folder):
    """Writes the checkpoint's folder: config.json, model.safetensors (or shards and their index), tokenizer.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(reference["config"], indent=1))
    write_tokenizer(folder)
    tensors = {name: stored(name, reference["tensors"], reference) for name in reference["tensors"]}
    n_shards = reference["shards"]
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::n_shards]}
        write_safetensors(folder / shard, part)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": sum(a.nbytes for _, a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
