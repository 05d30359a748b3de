"""export.py: what it writes against the gguf package and float64, what it refuses, and what it leaves behind."""

import contextlib
import copy
import itertools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import checkpoints
import fuzz_export
import gguf
import gguf_models
import numpy as np
import pytest
from conftest import ROOT
from llama2c_model import llama2c_file
from numpy_model import NumpyModel, load
from published_configs import PUBLISHED
from safetensors import safe_open

import export
from exporter import rope, writer
from exporter.architectures import ARCHITECTURES
from exporter.errors import ExportError
from exporter.gguf_source import gguf_config
from exporter.hf_source import dequantize
from exporter.model import Model, build, read_config
from exporter.source import Source
from exporter.sources import open_source
from exporter.weights import QUANTIZED, Tensor, Weight, of_array, quantize, stored_type


@pytest.fixture(autouse=True)
def plain_tokenizer(monkeypatch):
    """Tokenizers have their own tests."""
    monkeypatch.setattr(export, "write_tokenizer", lambda source, path: path.write_bytes(b"a tokenizer") and ("", []))


def run(source, output, *flags):
    """The model file's (config, float64 tensors)."""
    assert export.main([str(source), "-o", str(output), *flags]) == 0
    return load(output)[:2]


def refused(capsys, *argv, code=1):
    """The one line on standard error."""
    try:
        got = export.main([str(argument) for argument in argv])
    except SystemExit as stop:
        got = stop.code
    line = capsys.readouterr().err
    assert got == code, line
    assert line.startswith("export.py: ") and line.count("\n") == 1, line
    return line


def changed(name, **config):
    """The tiny checkpoint `name` with other config keys; None removes a key."""
    reference = copy.deepcopy(checkpoints.load(name))
    reference["config"] |= config
    reference["config"] = {key: value for key, value in reference["config"].items() if value is not None}
    return reference


# ---- What is written


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_source_precision_is_kept(dtype, tmp_path):
    """f32, f16 and bf16 matrices arrive as the bytes they were; any safetensors reader opens the file."""
    reference = checkpoints.load("llama_gqa") | {"dtype": dtype}
    source = checkpoints.build(reference, tmp_path / "source")
    run(source, tmp_path / "m.safetensors")
    want = checkpoints.stored("model.layers.0.mlp.up_proj.weight", reference["tensors"], reference)[1]
    data = (tmp_path / "m.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
    begin, end = header["layers.0.up_proj.weight"]["data_offsets"]
    start = len(data) - max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert data[start + begin : start + end] == want.tobytes()
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert set(file.keys()) == set(header) - {"__metadata__"}
        assert file.metadata()["format"] == "attn.cu 3"


def test_config_keys_are_documented(tmp_path):
    page = (ROOT / "docs/model-file.md").read_text()
    for name in ("gemma3", "deepseek_v3", "qwen3_moe", "gpt_oss"):
        config, _ = run(checkpoints.build(checkpoints.load(name), tmp_path / name), tmp_path / f"{name}.safetensors")
        for key in config:
            assert f"`{key}`" in page, key


def test_layout_is_aligned_and_without_holes(tmp_path):
    """Offsets are a multiple of the type's size, and one tensor follows right after the other (safetensors' rule)."""
    run(checkpoints.build(checkpoints.load("qwen2"), tmp_path / "source"), tmp_path / "m.safetensors", "--type", "q4_1")
    data = (tmp_path / "m.safetensors").read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    assert length % 64 == 56
    spans = sorted((*entry["data_offsets"], entry["dtype"]) for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(data) - 8 - length
    for (_, end, _), (begin, _, dtype) in itertools.pairwise(spans):
        assert begin == end and begin % {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[dtype] == 0


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """One chunk of rows at a time: a tensor of 64 MB is quantised and written within 24 MB, each row in its place."""
    value = np.arange(65536, dtype=np.float32) % 1000
    ones = np.ones((1, 256), np.float32)
    tensor = Tensor((65536, 256), "f32", lambda index: Weight("f32", value[index, None] * ones))
    tracemalloc.start()
    try:
        writer.write(Model({}, {"lm_head.weight": tensor}), "q8_0", tmp_path / "m.safetensors", Path(__file__), "test")
        assert tracemalloc.get_traced_memory()[1] < 24e6
    finally:
        tracemalloc.stop()
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        blocks = file.get_tensor("lm_head.weight").reshape(65536, 8, 34)
    scale = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    assert np.array_equal(scale, np.repeat((value / 127).astype(np.float16)[:, None], 8, axis=1))
    assert np.array_equal(blocks[:, :, 2:] == 127, np.repeat(value > 0, 256).reshape(65536, 8, 32))


# ---- Types


def groups(x):
    return x.reshape(-1, 32).astype(np.float64)


def samples():
    random = np.random.default_rng(1)
    return np.concatenate(
        [
            random.normal(size=(64, 96)) * 10.0 ** random.integers(-3, 3, (64, 1)),
            random.normal(8, 1, (8, 96)),
            np.zeros((1, 96)),
            np.full((1, 96), -3.7),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize(("type", "steps"), [("q8_0", 127), ("q5_1", 31), ("q5_0", 16), ("q4_1", 15), ("q4_0", 8)])
def test_quantized_error(type, steps):
    """Half a scale, where the largest of 2^bits codes may be missing a whole one (q4_0, q5_0), and what float16 rounds
    off the scale, times the code, and off the minimum: 2^-11 of each."""
    x = samples()
    error = np.abs(groups(quantize(x, type).float32()) - groups(x))
    low, high = groups(x).min(axis=1, keepdims=True), groups(x).max(axis=1, keepdims=True)
    peak = np.maximum(-low, high)
    step = (high - low if type.endswith("1") else peak) / steps
    share = 1 if type in ("q4_0", "q5_0") else 0.5
    bound = step * (share + 2.0**-11 * steps) + 2.0**-11 * peak * type.endswith("1") + steps * 2.0**-24
    assert (error <= bound).all()
    assert error.max() > step.max() / 4  # or the bound says nothing


@pytest.mark.parametrize(
    ("type", "normal", "heavy"),
    [
        ("q2_k", 0.29744, 0.34856),
        ("q3_k", 0.15119, 0.18645),
        ("q4_k", 0.07150, 0.09137),
        ("q5_k", 0.03622, 0.04712),
        ("q6_k", 0.01782, 0.02628),
    ],
)
def test_k_types_err_no_more_than_llama_cpp(type, normal, heavy):
    """normal, heavy: the relative error of ggml's quantize_row_*_ref (llama-cpp-python 0.3.36) of the same numbers."""
    random = np.random.RandomState(0)
    for x, theirs in [(random.randn(64, 2048), normal), (random.standard_t(3, (64, 2048)), heavy)]:
        error = quantize(x.astype(np.float32), type).float32() - x
        assert theirs / 2 < np.sqrt((error**2).sum() / (x**2).sum()) <= theirs


@pytest.mark.parametrize("type", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_k_types_of_odd_blocks(type):
    """Blocks that one number fills are off by what float16 rounds off d or d_min alone: 2^-11 of it."""
    x = np.array([5, -5, 0, 3e4, -3e4], np.float32).repeat(256).reshape(5, 256)
    x[2, 7] = 1e-30
    assert (np.abs(quantize(x, type).float32() - x) <= 1.01 * 2.0**-11 * np.abs(x) + 1e-30).all()
    quantize(x * 2, type)
    with pytest.raises(ExportError, match=f"more than {type} can hold"):
        quantize(x * 1e6, type)


def test_rows_that_are_no_blocks_of_a_k_type():
    """They have the next type of no fewer bits, whose blocks are smaller."""
    for wanted, types in {
        "q2_k": ("q2_k", "q4_0", "f16"),
        "q3_k": ("q3_k", "q4_0", "f16"),
        "q4_k": ("q4_k", "q5_0", "f16"),
        "q5_k": ("q5_k", "q5_1", "f16"),
        "q6_k": ("q6_k", "q8_0", "f16"),
    }.items():
        for k, type in zip((512, 576, 100), types, strict=True):
            assert stored_type(of_array(np.zeros((2, k))), wanted) == type


@pytest.mark.parametrize(("type", "bits"), [("f16", 11), ("bf16", 8)])
def test_float_error(type, bits):
    """Rounded to nearest: half a unit in the last place."""
    x = samples()
    error = np.abs(quantize(x, type).float32().astype(np.float64) - x)
    assert (error <= np.abs(x.astype(np.float64)) * 2.0**-bits + 2.0**-25).all()  # float16 has no step below 2^-24


def test_bf16_ties_go_to_even():
    x = np.array([[0x3F808000, 0x3F818000]], np.uint32).view(np.float32)
    assert quantize(x, "bf16").data.tolist() == [[0x3F80, 0x3F82]]


# ---- GGUF


def random_blocks(kind, shape, seed=1):
    """[n, bytes of k weights' blocks] of random bits, but for half floats, which are numbers."""
    random, (inputs, size) = np.random.RandomState(seed), gguf.GGML_QUANT_SIZES[kind]
    blocks = random.randint(0, 256, (math.prod(shape) // inputs, size)).astype(np.uint8)
    for at in QUANTIZED[kind.name.lower()]:
        blocks[:, at : at + 2] = random.normal(0, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = random.randint(100, 140, len(blocks))
    return blocks.reshape(*shape[:-1], -1)


def blocks_of(data, kind):
    """Quantised by the gguf package, or random where it cannot."""
    try:
        return gguf.quantize(data, kind)
    except NotImplementedError:
        return random_blocks(kind, data.shape)


def write_gguf(path, reference, types):
    """The tiny checkpoint as GGUF, each matrix in the next of `types`; {name: dequantised by the gguf package}."""
    float_file = gguf_models.build(reference, path.with_suffix(".f32"))
    reader = gguf.GGUFReader(float_file)
    arch = reader.fields["general.architecture"].contents()
    writer, want = gguf.GGUFWriter(path, arch), {}
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0])
    kinds = itertools.cycle(types)
    for tensor in reader.tensors:
        data, kind = tensor.data, gguf.GGMLQuantizationType.F32
        if data.ndim == 2:
            kind = next(kinds)
            data = blocks_of(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
        want[tensor.name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return want


LOSSLESS = [*(kind.upper() for kind in QUANTIZED), "F16", "BF16", "F32"]


def wide_qwen2(width=64):
    """A small Qwen2 (GGUF permutes nothing in it) whose rows are whole blocks."""
    reference = copy.deepcopy(checkpoints.load("qwen2"))
    config, hidden = reference["config"], 2 * width if width % 256 == 0 else 96
    config |= {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocab = config["vocab_size"]
    sizes = dict.fromkeys(("embed_tokens", "lm_head"), (vocab, width))
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (width // 2, width))
    sizes |= dict(gate_proj=(hidden, width), up_proj=(hidden, width), down_proj=(width, hidden))
    for name in reference["tensors"]:
        shape = sizes.get(name.split(".")[-2], (width, width))
        reference["tensors"][name] = list(shape[: 1 if "norm" in name or name.endswith("bias") else 2])
    return reference


@pytest.mark.parametrize("kind", LOSSLESS)
def test_gguf_types_import_without_loss(kind, tmp_path):
    """Equal bit for bit after dequantisation by the gguf package, and at the width that they had."""
    kind = gguf.GGMLQuantizationType[kind]
    reference = wide_qwen2(max(64, gguf.GGML_QUANT_SIZES[kind][0]))
    want = write_gguf(tmp_path / "m.gguf", reference, [kind])
    _, tensors = run(tmp_path / "m.gguf", tmp_path / "m.safetensors")
    for ours, theirs in {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down", "up_proj": "ffn_up"}.items():
        for layer in range(reference["config"]["num_hidden_layers"]):
            got = tensors[f"layers.{layer}.{ours}.weight"]
            assert np.isfinite(got).all()
            assert np.array_equal(got, want[f"blk.{layer}.{theirs}.weight"].astype(np.float64)), (kind, ours)
    assert np.array_equal(tensors["embed_tokens.weight"], want["token_embd.weight"].astype(np.float64))
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        data = file.get_slice("layers.0.up_proj.weight")
        assert data.get_dtype() == (kind.name if kind.name in ("F32", "F16", "BF16") else "U8")
        inputs, size = gguf.GGML_QUANT_SIZES[kind]
        n, k = reference["tensors"]["model.layers.0.mlp.up_proj.weight"]
        assert math.prod(data.get_shape()) * {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[data.get_dtype()] == (
            n * k // inputs * size
        )


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_scale_that_is_no_number_is_refused(kind, tmp_path):
    blocks = random_blocks(gguf.GGMLQuantizationType[kind.upper()], (3, 512)).reshape(
        -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][1]
    )
    Weight(kind, blocks).check()
    for at in QUANTIZED[kind] or (0,):
        for bad in (b"\x00\x7c", b"\x00\xfc", b"\xff\x7f") if QUANTIZED[kind] else (b"\xff",):
            damaged = blocks.copy()
            damaged[-1, at : at + len(bad)] = np.frombuffer(bad, np.uint8)
            with pytest.raises(ExportError, match="infinite or no number"):
                Weight(kind, damaged).check()


def test_mxfp4_checkpoints_keep_their_values(tmp_path):
    """In a checkpoint of Hugging Face the codes lie in another order than in ggml's blocks."""
    source = checkpoints.build(checkpoints.load("gpt_oss_mxfp4"), tmp_path / "source")
    _, kept = run(source, tmp_path / "m.safetensors")
    _, plain = run(source, tmp_path / "f.safetensors", "--type", "f32")
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["types"])["layers.0.experts.up_proj"] == "mxfp4"
    assert kept.keys() == plain.keys() and all(np.array_equal(kept[name], plain[name]) for name in kept)


UNREADABLE = {"Q8_1": 9, "Q8_K": 15, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "Q1_0": 41}
REMOVED = {"Q4_2": 4, "Q4_3": 5, "Q4_0_4_4": 31, "Q4_0_4_8": 32, "Q4_0_8_8": 33}
REMOVED |= {"IQ4_NL_4_4": 36, "IQ4_NL_4_8": 37, "IQ4_NL_8_8": 38}  # numbers as ggml.h has them


@pytest.mark.parametrize(("kind", "number"), [*(UNREADABLE | REMOVED).items(), ("99", 99)])
def test_gguf_types_that_nobody_reads(kind, number, tmp_path, capsys):
    """The line names the tensor, its type and what can be done."""
    source = gguf_models.build(checkpoints.load("qwen2"), tmp_path / "m.gguf")
    whole = source.read_bytes()
    at = whole.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    source.write_bytes(whole[:at] + number.to_bytes(4, "little") + whole[at + 4 :])
    line = refused(capsys, source, "-o", tmp_path / "m.safetensors")
    assert "tensor blk.0.ffn_up.weight" in line and kind in line and "quantise the model again, to Q8_0" in line
    assert "update" not in line and not list(tmp_path.glob("*m.*s*"))


def test_gguf_types_that_we_lack(tmp_path, capsys):
    """TQ2_0 becomes q8_0, within half a scale (and 127 times what float16 rounds off it) of what the gguf package
    reads; in f32 it is the very same; both say so."""
    kind = gguf.GGMLQuantizationType.TQ2_0
    want = write_gguf(tmp_path / "m.gguf", wide_qwen2(256), [kind])["blk.0.ffn_up.weight"]
    _, tensors = run(tmp_path / "m.gguf", tmp_path / "m.safetensors")
    assert "TQ2_0" in capsys.readouterr().out
    step = np.abs(groups(want)).max(axis=1, keepdims=True) / 127
    error = np.abs(groups(tensors["layers.0.up_proj.weight"]) - groups(want))
    assert error.max() > 0 and (error <= step * (0.5 + 127 * 2.0**-11)).all()
    _, tensors = run(tmp_path / "m.gguf", tmp_path / "m32.safetensors", "--type", "f32")
    assert "TQ2_0" in capsys.readouterr().out
    assert np.array_equal(tensors["layers.0.up_proj.weight"], want.astype(np.float64))


@pytest.mark.parametrize(
    "name",
    [
        "llama_bias",
        "llama_linear",
        "llama_yarn",
        "qwen2",
        "qwen3",
        "gpt2",
        "bigcode_mqa",
        "mixtral",
        "deepseek_v2_dense",
        "deepseek_v2_lite",
        "deepseek_v3",
        "deepseek_v3_plain",
        "gemma",
        "gemma2",
        "phi3",
        "phi4_mini",
        "phi4_mini_long",
        "olmo2",
        "olmo3",
        "glm",
        "glm4",
        "smollm3",
        "granite",
        "granitemoe",
        "gpt_oss",
    ],
)
def test_gguf_means_what_the_checkpoint_means(name, tmp_path):
    """Permuted heads, turned matrices, stacked experts, split latents and metadata: the same file from both."""
    reference = checkpoints.load(name)
    reference["dtype"] = "F32"
    # GGUF has no keys for these: they are what the published models have.
    if name == "gemma2":
        reference["config"]["query_pre_attn_scalar"] = reference["config"]["head_dim"]
    if name == "gpt_oss":
        reference["config"]["swiglu_limit"] = 7.0
    a = run(checkpoints.build(reference, tmp_path / "hf"), tmp_path / "a.safetensors", "--type", "f32")
    b = run(gguf_models.build(reference, tmp_path / "m.gguf"), tmp_path / "b.safetensors", "--type", "f32")
    assert a[0].keys() == b[0].keys() and a[1].keys() == b[1].keys()
    for key, value in a[0].items():
        numbers = isinstance(value, float) or key == "rope_scale"
        same = pytest.approx(value, rel=1e-6) if numbers else value  # GGUF keeps float32
        assert b[0][key] == same, key
    for key, value in a[1].items():
        assert np.array_equal(b[1][key], value), key


def test_gemma_in_gguf(tmp_path):
    """Its norms hold the 1 already, every sixth layer sees all, the other table has base 10000."""
    reference = checkpoints.load("gemma3")
    layers = reference["config"]["num_hidden_layers"]
    a = run(checkpoints.build(reference, tmp_path / "hf"), tmp_path / "a.safetensors", "--type", "f32")
    b = run(gguf_models.build(reference, tmp_path / "m.gguf"), tmp_path / "b.safetensors", "--type", "f32")
    assert all(np.array_equal(a[1][key], b[1][key]) for key in a[1] if not key.startswith("rope."))
    window = reference["config"]["sliding_window"]
    assert b[0]["window"] == [0 if layer % 6 == 5 else window for layer in range(layers)]
    width = reference["config"]["head_dim"]
    assert b[1]["rope.0.inv_freq"] == pytest.approx(10000.0 ** (-np.arange(0, width, 2) / width), rel=1e-6)


def test_rope_freqs_of_gguf(tmp_path):
    """Llama 3's rope_scaling travels as a tensor of divisors."""
    reference = checkpoints.load("llama3")
    config, tensors = run(checkpoints.build(reference, tmp_path / "hf"), tmp_path / "a.safetensors")
    plain = reference["config"]["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    source = gguf_models.build(reference, tmp_path / "m.gguf", plain / tensors["rope.0.inv_freq"])
    got = run(source, tmp_path / "b.safetensors")[1]["rope.0.inv_freq"]
    assert got == pytest.approx(tensors["rope.0.inv_freq"], rel=1e-6)
    assert got != pytest.approx(plain, rel=0.1)


# ---- llama2.c


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_llama2c(version, shared, tmp_path):
    weights = llama2c_file(tmp_path / "m.bin", version, shared)
    config, tensors = run(tmp_path / "m.bin", tmp_path / "m.safetensors")
    assert (config["attention"], config["dim"], config["n_kv_heads"], config["seq_len"]) == ("gqa", 64, 2, 16)
    assert ("lm_head.weight" in tensors) == (not shared)
    for name, value in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # neighbours rotate there, halves here
            want = weights[name].reshape(-1, 8, 2, 64).transpose(0, 2, 1, 3).reshape(-1, 64)
        elif name.startswith("rope."):
            want = 10000.0 ** -(np.arange(8) / 8)
        else:
            want = weights[name]
        assert np.allclose(value, want, rtol=1e-6, atol=0), name


# ---- RoPE


def test_unscaled_table():
    inv_freq, factor = rope.table({"rope_type": "default", "rope_theta": 5e5}, 128)
    assert inv_freq == pytest.approx(5e5 ** (-np.arange(0, 128, 2) / 128), rel=1e-6) and factor == 1


def test_yarn_table():
    """arXiv 2309.00071, equations 17, 23 and 24, with the ramp's ends at whole dimensions."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 4096}
    inv_freq, factor = rope.table(scaling, 64)
    plain = 1e4 ** (-np.arange(0, 64, 2) / 64)
    low, high = (64 * math.log(4096 / (r * 2 * math.pi)) / (2 * math.log(1e4)) for r in (32, 1))
    kept = 1 - np.clip((np.arange(32) - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0, 1)
    assert inv_freq == pytest.approx(plain * kept + plain / 8 * (1 - kept), rel=1e-6)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_longrope_by_its_first_names(name, tmp_path):
    reference = checkpoints.load("phi4_mini")
    want = run(checkpoints.build(reference, tmp_path / "a"), tmp_path / "a.safetensors")
    reference["config"]["rope_scaling"]["type"] = name
    got = run(checkpoints.build(reference, tmp_path / "b"), tmp_path / "b.safetensors")
    assert got[0] == want[0] and all(np.array_equal(got[1][key], want[1][key]) for key in want[1])


@pytest.mark.parametrize("keys", [{}, {"hidden_activation": "gelu_pytorch_tanh"}, {"hidden_activation": None}])
def test_gelu_of_the_first_gemma_is_tanhs(keys, tmp_path):
    reference = checkpoints.load("gemma")
    reference["config"] = {**reference["config"], "hidden_act": "gelu"} | keys
    assert run(checkpoints.build(reference, tmp_path / "m"), tmp_path / "m.safetensors")[0]["activation"] == "gelu_tanh"


# ---- Rewrites


@pytest.mark.parametrize(
    ("name", "layout", "variant"),
    [
        ("llama_gqa", "mha", "mha"),
        ("llama_gqa", "mla", "mla"),
        ("llama_bias", "mla", "mla"),
        ("bigcode_mqa", "gqa:2", "mha"),
        ("gemma3", "gqa:2", "gqa"),
        ("gemma3", "mha", "mha"),
        ("qwen2_window", "mla", "mla"),
        ("mixtral_window", "mla", "mla"),
        ("gpt2", "mla", "mla"),
        ("llama3", "mla", "mla"),
        ("qwen3", "mha", "mha"),
        ("olmo2", "mha", "mha"),
        ("phi4_mini", "mla", "mla"),
        ("glm", "mla", "mla"),
        ("smollm3", "mla", "mla"),
        ("granite", "mla", "mla"),
        ("gpt_oss", "mha", "mha"),
    ],
)
def test_rewrites_are_exact(name, layout, variant, tmp_path):
    """In float64 the rewritten model differs by the order of the sums alone: 1e-11 of the largest logit."""
    reference = checkpoints.load(name)
    source = checkpoints.build(reference, tmp_path / "source")
    run(source, tmp_path / "a.safetensors", "--type", "f32")
    config, _ = run(source, tmp_path / "b.safetensors", "--type", "f32", "--as", layout)
    ids = np.frombuffer(reference["prompt"].encode(), np.uint8)[:24]
    want, got = (NumpyModel(tmp_path / f"{file}.safetensors").logits(ids) for file in "ab")
    assert config["attention"] == variant
    assert np.abs(got - want).max() <= 1e-11 * np.abs(want).max()


def test_rewrites_move_quantised_weights_as_they_are(tmp_path):
    source = checkpoints.build(wide_qwen2(), tmp_path / "source")
    run(source, tmp_path / "a.safetensors", "--type", "q8_0")
    for layout in ("mha", "mla"):
        run(source, tmp_path / "b.safetensors", "--type", "q8_0", "--as", layout)
        ids = np.arange(20)
        want, got = (NumpyModel(tmp_path / f"{file}.safetensors").logits(ids) for file in "ab")
        assert np.abs(got - want).max() <= 1e-11 * np.abs(want).max(), layout


# ---- Refusals


YARN = {"rope_type": "yarn", "factor": 2.0}
FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("llama_gqa", {"no_such_key": 3}, "no_such_key is 3"),
        ("gpt2", {"hidden_size": 64}, "hidden_size is 64 but n_embd is"),
        ("llama_gqa", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("llama_gqa", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("llama_gqa", {"rope_scaling": {"rope_type": "longrope", "short_factor": []}}, "rope_type 'longrope'"),
        ("llama_gqa", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "shift": 1}}, "shift"),
        ("llama_gqa", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ("llama_gqa", {"rope_scaling": 4}, "rope_scaling is 4"),
        ("llama_gqa", {"rope_theta": -1.0}, "rope_theta is -1.0"),
        ("phi4_mini", {"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1: 1 of 16 elements"),
        ("phi4_mini", {"partial_rotary_factor": 0.5}, "short_factor must be 4 numbers"),
        ("phi4_mini", {"rope_scaling": {"type": "su", "long_factor": [1.0] * 6}}, "short_factor is missing"),
        (
            "phi4_mini",
            {"rope_scaling": {"type": "su", "long_factor": [0] * 6, "short_factor": [1]}},
            "long_factor must",
        ),
        ("llama_yarn", {"rope_scaling": YARN | {"truncate": "no"}}, "truncate must be true or false"),
        ("gemma3", {"rope_parameters": {"full_attention": 0}}, "full_attention must be an object"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "rope_theta": 1e4}}, "rope_theta must be an object"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers is ['1']"),
        ("gemma3", {"layer_types": None, "_sliding_window_pattern": 7}, "_sliding_window_pattern is 7"),
        ("deepseek_v3_fp8", {"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, "is fp8, and"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias is True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ("smollm3", {"no_rope_layers": [[]] * 9}, "no_rope_layers is [["),
        ("phi4_mini", {"partial_rotary_factor": 1e308}, "partial_rotary_factor is 1e+308"),
        ("glm4", {"attention_bias": False, "num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("olmo2", {"num_hidden_layers": 1}, "layers.1."),
        ("llama_gqa", {"residual_multiplier": 0.5}, "residual_multiplier is 0.5: this key is not known"),
        ("llama_gqa", {"hidden_act": "relu2"}, "hidden_act is 'relu2'"),
        ("llama_gqa", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama_gqa", {"num_key_value_heads": 5}, "num_key_value_heads is 5"),
        ("llama_gqa", {"vocab_size": 300}, "weight is [259, 96], config.json says [300, 96]"),
        ("llama_gqa", {"num_hidden_layers": 3}, "layers.2."),
        ("llama_gqa", {"num_hidden_layers": 1}, "layers.1."),
        ("llama_gqa", {"attention_bias": True}, "q_proj.bias"),
        ("llama_gqa", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
        ("gpt_oss_mxfp4", {"quantization_config": {"quant_method": "fp8"}}, "down_proj_blocks"),
        ("gpt_oss_mxfp4", {"num_local_experts": 4}, "says [4, 96]"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0"),
        ("gpt_oss", {"swiglu_alpha": 2.0}, "swiglu_alpha is 2.0"),
        ("llama_gqa", {"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        (
            "deepseek_v3_fp8",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
            "weight_block_size",
        ),
        ("llama_gqa", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ("llama_gqa", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama_gqa", {"sliding_window": 8}, "sliding_window is 8: this key is not known"),
        ("llama_gqa", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: this key is not known"),
        ("llama_gqa", {"multi_query": True}, "multi_query is True: this key is not known"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"layer_types": ["chunked_attention"]}, "layer_types is ['chunked_attention']"),
        ("mixtral", {"num_experts_per_tok": 99}, "num_experts_per_tok is 99"),
        ("mixtral", {"num_local_experts": 3}, "experts.3"),
        ("mixtral", {"num_local_experts": 99}, "not for expert 5 of the 99"),
        ("deepseek_v3", {"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ("deepseek_v3", {"topk_method": "random"}, "topk_method is 'random'"),
        ("deepseek_v3", {"n_group": 5}, "n_group is 5"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7: more than the 6"),
        ("deepseek_v3", {"n_routed_experts": 8}, "the config has 8 experts"),
        ("deepseek_v3", {"n_shared_experts": 2}, "[96, 80] (n_shared_experts, moe_intermediate_size)"),
        ("deepseek_v3", {"kv_lora_rank": 31}, "says [264, 31] (kv_lora_rank,"),
        ("deepseek_v3", {"q_lora_rank": 16}, "says [16] (q_lora_rank)"),
        ("deepseek_v3", {"qk_rope_head_dim": 16}, "qk_rope_head_dim)"),
    ],
)
def test_refused_configs(name, config, words, tmp_path, capsys):
    source = checkpoints.build(changed(name, **config), tmp_path / "source")
    line = refused(capsys, source, "-o", tmp_path / "m.safetensors")
    assert words in line and str(source) in line, line
    assert not list(tmp_path.glob("*m.*"))


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama2c"}))
def test_no_architecture_drops_a_key(architecture, tmp_path, capsys):
    name = next(name for name in checkpoints.names() if checkpoints.load(name)["config"]["model_type"] == architecture)
    source = checkpoints.build(changed(name, attention_sinks=4), tmp_path / "source")
    assert "attention_sinks is 4" in refused(capsys, source, "-o", tmp_path / "m.safetensors")


def test_refused_folders(tmp_path, capsys):
    """What config.json cannot be wrong about: the index of the files, and a header that is JSON but no sense."""
    source = checkpoints.build(checkpoints.load("deepseek_v2"), tmp_path / "shards")
    for files in (3, {"lm_head.weight": 1}, {"lm_head.weight": "../m.safetensors"}):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert "weight_map" in refused(capsys, source, "-o", tmp_path / "m.safetensors")
    index = checkpoints.build(checkpoints.load("deepseek_v2"), source) / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {"model.more": next(iter(listed.values()))}}))
    assert "tensor model.more is missing" in refused(capsys, source, "-o", tmp_path / "m.safetensors")
    pointer = checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(capsys, pointer, "-o", tmp_path / "m.safetensors")
    reference = checkpoints.load("mixtral")
    reference["tensors"]["model.layers.0.block_sparse_moe.experts.1.w1.weight"][0] += 2
    source = checkpoints.build(reference, tmp_path / "odd")
    assert "expert 1's is [" in refused(capsys, source, "-o", tmp_path / "m.safetensors")
    source = checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "huge")
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "model.safetensors" in refused(capsys, source, "-o", tmp_path / "m.safetensors")


NEWER = ["gemma2", "phi4_mini_long", "glm4", "smollm3", "granite", "gpt_oss"]
WRONG_VALUES = ["x", -1, 0, 1.5, [], {}, [1, 2], {"a": 1}, True, None, 10**30, math.inf]


def test_keys_that_switch_nothing_on_are_taken(tmp_path):
    """What other architectures have, in the values by which a config says that this one has it not."""
    without = {
        "use_sliding_window": False,
        "num_experts": 0,
        "layer_types": ["full_attention"] * 2,
        "swiglu_limit": None,
    }
    without |= {"partial_rotary_factor": 1.0, "logits_scaling": 1.0, "qkv_bias": False, "use_qk_norm": False}
    without |= {"sliding_window": 0, "max_window_layers": 28, "original_max_position_embeddings": 64, "n_group": 1}
    without |= {"num_experts_per_tok": 0, "mlp_only_layers": [], "routed_scaling_factor": 1.0, "moe_layer_freq": 1}
    source = open_source(checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "source"))
    plain = build(source).config
    whole = source.config
    for key, value in without.items():
        source.config = whole | {key: value}
        assert build(source).config == plain, key
    windows = open_source(checkpoints.build(checkpoints.load("qwen2"), tmp_path / "windows"))
    types = ["sliding_attention"] * windows.config["num_hidden_layers"]
    windows.config |= {"use_sliding_window": False, "sliding_window": 8, "layer_types": types}
    assert set(build(windows).config["window"]) == {0}
    source.config = whole | {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}
    assert build(source).config == plain
    on = {"use_sliding_window": True, "num_experts": 4, "logits_scaling": 2.0, "qkv_bias": True, "sliding_window": 8}
    on |= {"num_experts_per_tok": 2, "routed_scaling_factor": 2.5, "moe_intermediate_size": 64}
    for key, value in on.items():
        source.config = whole | {key: value}
        with pytest.raises(ExportError, match=key):
            build(source)


@pytest.mark.parametrize(
    ("stated", "scaling", "taken"),
    [
        (32, None, True),
        (32, {"rope_type": "linear", "factor": 2.0}, True),
        (32, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, True),
        (48, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, False),
        (48, {"rope_type": "yarn", "factor": 2.0}, False),  # transformers 5 takes max_position_embeddings
    ],
)
def test_an_original_length_beside_rope_scaling(stated, scaling, taken, tmp_path):
    """Of an architecture without that key: it says the same as rope_scaling, or nothing asks for it."""
    source = open_source(checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "source"))
    source.config |= {"rope_scaling": scaling}
    want = build(source).config
    source.config |= {"original_max_position_embeddings": stated}
    if taken:
        assert build(source).config == want
    else:
        with pytest.raises(ExportError, match="original_max_position_embeddings is 48"):
            build(source)


@pytest.mark.parametrize("name", ["gpt_oss", "llama_yarn", "qwen3_yarn", "olmo2"])
def test_rope_parameters_as_transformers_5_saves_them(name, tmp_path):
    """One object in place of rope_theta and rope_scaling, and of what the architecture has by default."""
    source = open_source(checkpoints.build(checkpoints.load(name), tmp_path / "source"))
    want, config = build(source), source.config
    source.config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    source.config["rope_parameters"] = (config.get("rope_scaling") or {}) | {"rope_theta": config["rope_theta"]}
    got, name = build(source), "rope.0.inv_freq"
    assert got.config == want.config and np.array_equal(got.tensors[name].float32(), want.tensors[name].float32())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(name):
    seq_len, config = PUBLISHED[name]
    source = Source("hf", Path(name), Path(name) / "config.json", None)
    source.config = copy.deepcopy(config)
    dequantize(source)  # takes quantization_config
    assert read_config(source).config["seq_len"] == seq_len


def gguf_source_of(name, tmp_path):
    return open_source(gguf_models.build(checkpoints.load(name), tmp_path / "m.gguf"))


def test_gguf_keys_that_switch_nothing_on_are_taken(tmp_path):
    source = gguf_source_of("llama_gqa", tmp_path)
    plain, whole = build(source).config, source.metadata
    zero = ["expert_count", "expert_used_count", "expert_group_count", "leading_dense_block_count", "pooling_type"]
    zero += ["attention.sliding_window", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"]
    zero += ["rope.scale_linear", "rope.scaling.factor", "embedding_scale", "residual_scale", "logit_scale"]
    one = ["rope.scale_linear", "rope.scaling.attn_factor", "embedding_scale", "residual_scale", "logit_scale"]
    one += ["rope.scaling.yarn_ext_factor", "expert_weights_scale", "attention.causal", "rope.scaling.factor"]
    for key, value in [*((key, 0) for key in zero), *((key, 1.0) for key in one)]:
        source.metadata = whole | {f"llama.{key}": value}
        source.config = gguf_config(source)
        assert build(source).config == plain, key
    on = {"attention.sliding_window": 8, "attention.clamp_kqv": 8.0, "logit_scale": 2.0}
    on |= {"rope.scaling.attn_factor": 0.5, "pooling_type": 1, "attention.causal": False, "attention.scale": 0.5}
    words = {
        "logit_scale": "logits_scaling",
        "attention.scale": "attention_multiplier",
        "rope.scaling.attn_factor": "attn_factor",
    }
    words |= {"attention.sliding_window": "sliding_window", "attention.causal": "is_causal"}
    for key, value in on.items():
        source.metadata = whole | {f"llama.{key}": value}
        source.config = gguf_config(source)
        with pytest.raises(ExportError, match=f"{words.get(key, key)} is {value}"):
            build(source)
    source.metadata = whole | {"llama.expert_used_count": 2}
    source.config = gguf_config(source)
    with pytest.raises(ExportError, match="num_experts_per_tok says that there are experts"):
        build(source)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_gguf_factor_without_a_kind_is_linear(key, tmp_path):
    """As llama.cpp reads it: it was the only kind when the key was made."""
    source = gguf_source_of("llama_gqa", tmp_path)
    plain = build(source).tensors["rope.0.inv_freq"].float32()
    source.metadata = source.metadata | {f"llama.{key}": 4.0}
    source.config = gguf_config(source)
    assert np.array_equal(build(source).tensors["rope.0.inv_freq"].float32(), plain / 4)


def test_a_gguf_model_that_rotates_a_part_of_a_head(tmp_path):
    source = gguf_source_of("llama_gqa", tmp_path)
    source.metadata = source.metadata | {"llama.rope.dimension_count": 8}
    source.config = gguf_config(source)
    with pytest.raises(ExportError, match="rope_dim is 8: must be all"):
        build(source)


def test_gguf_experts_chosen_in_another_way(tmp_path):
    source = gguf_source_of("mixtral", tmp_path)
    source.metadata = source.metadata | {"llama.expert_gating_func": 2}
    source.config = gguf_config(source)
    with pytest.raises(ExportError, match="expert_gating_func is 2"):
        build(source)


@pytest.mark.parametrize("kept", ["other values", "the same", "alone", "nothing"])
def test_a_tied_classifier(kept, tmp_path, capsys):
    """tie_word_embeddings is true, as it is in transformers 5: a classifier that is stored with other values is used,
    and it stands for the embedding where that is not there."""
    reference = checkpoints.load("smollm2")
    source = checkpoints.build(reference, tmp_path / "source")
    tensors = {name: checkpoints.stored(name, reference["tensors"], reference) for name in reference["tensors"]}
    name = "model.embed_tokens.weight"
    dtype, embedding = tensors[name]
    if kept == "alone":
        tensors["lm_head.weight"] = tensors.pop(name)
    elif kept != "nothing":
        head = embedding.copy()
        head[-1, -1] = head[-1, -1] if kept == "the same" else 0
        tensors["lm_head.weight"] = dtype, head
    checkpoints.write_safetensors(source / "model.safetensors", tensors)
    got = run(source, tmp_path / "m.safetensors", "--type", "f32")[1]
    assert (got["embed_tokens.weight"][-1, -1] != 0) and ("lm_head.weight" in got) == (kept == "other values")
    assert ("lm_head.weight is stored with other values" in capsys.readouterr().out) == (kept == "other values")
    if kept == "other values":
        assert got["lm_head.weight"][-1, -1] == 0


@pytest.mark.parametrize("name", ["llama_yarn", "gemma3", "gpt2", "qwen3_moe", "deepseek_v3", *NEWER])
def test_any_value_of_any_key_is_taken_or_refused(name, tmp_path):
    """Never another exception than the one that becomes a line."""
    reference = checkpoints.load(name)
    source = open_source(checkpoints.build(reference, tmp_path / "source"))
    whole = source.config
    for key, value in itertools.product(whole, WRONG_VALUES):
        source.config = whole | {key: value}
        with contextlib.suppress(ExportError):
            build(source)


@pytest.mark.parametrize("name", ["llama_yarn", "gemma3", "deepseek_v3", *NEWER])
def test_any_value_of_any_gguf_key_is_taken_or_refused(name, tmp_path):
    source = open_source(gguf_models.build(checkpoints.load(name), tmp_path / "m.gguf"))
    whole = source.metadata
    for key, value in itertools.product(whole, [*WRONG_VALUES, ["a"]]):
        source.metadata = whole | {key: value}
        with contextlib.suppress(ExportError):
            source.config = gguf_config(source)
            build(source)


@pytest.mark.parametrize(
    ("layout", "name", "words"),
    [
        ("gqa:4", "llama_gqa", "n_kv_heads is 2"),
        ("mla", "qwen3", "k_norm.weight"),
        ("mla", "gemma3", "k_norm.weight"),
        ("mla", "gpt_oss", "attention sinks"),
        ("mha", "deepseek_v2", "attention is mla"),
    ],
)
def test_refused_rewrites(layout, name, words, tmp_path, capsys):
    source = checkpoints.build(checkpoints.load(name), tmp_path / "source")
    assert words in refused(capsys, source, "-o", tmp_path / "m.safetensors", "--as", layout)


def test_usage(tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert "SOURCE" in refused(capsys, code=2)
    assert "q3" in refused(capsys, tmp_path, "-o", out, "--type", "q3", code=2)
    assert "gqa:0" in refused(capsys, tmp_path, "-o", out, "--as", "gqa:0", code=2)
    assert "model.bin" in refused(capsys, tmp_path, "-o", tmp_path / "model.bin", code=2)


def test_refused_sources(tmp_path, capsys):
    out = tmp_path / "m.safetensors"

    def line(source, *flags):
        return refused(capsys, source, "-o", out, *flags)

    assert "No such file" in line(tmp_path / "nothing.gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json" in line(tmp_path / "empty")
    (tmp_path / "text.gguf").write_text("hello")
    assert "not GGUF" in line(tmp_path / "text.gguf")
    (tmp_path / "big.gguf").write_bytes(b"GGUF\0\0\0\3" + bytes(16))
    assert "big-endian" in line(tmp_path / "big.gguf")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\1\0\0\0" + bytes(16))
    assert "GGUF version 1" in line(tmp_path / "old.gguf")
    key = struct.pack("<Q1sII", 1, b"a", 4, 0)
    (tmp_path / "twice.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + 2 * key)
    assert "'a' is there twice" in line(tmp_path / "twice.gguf")
    assert r"no\n\x1b[31m.gguf" in line(tmp_path / "no\n\x1b[31m.gguf")
    (tmp_path / "zero.bin").write_bytes(b"")
    assert "empty file" in line(tmp_path / "zero.bin")
    folder = checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "hf")
    assert "no such file" in line(folder, "--tokenizer", tmp_path / "none")
    (folder / "config.json").write_text("{")
    assert "not JSON" in line(folder)
    assert "No such file or directory" in refused(capsys, folder / "x", "-o", out)


@pytest.mark.parametrize("name", ["a&{}&", "`{}`", "$({})", "$(shell {})", "a b;{};", "'\"; {} #"])
@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_make_run_takes_any_name(name, suffix, tmp_path):
    """No part of a file's name is a command, neither to make nor to the shell: the file is missing, and that is all."""
    model = name.format(f"touch {tmp_path}/ran") + suffix
    command = ["make", "-s", "run", f"MODEL={model}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "No such file" in done.stderr
    assert not list(tmp_path.iterdir())


def test_pipes_are_refused(tmp_path):
    """At once: opened as a file, a pipe that nobody writes to would be waited for."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    for name in ("m.gguf", "m.bin", "folder/model.safetensors"):
        pipe = tmp_path / name
        os.mkfifo(pipe)
        source = pipe.parent if pipe.name == "model.safetensors" else pipe
        command = [sys.executable, "export.py", source, "-o", tmp_path / "out.safetensors"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and f"{pipe}: a folder, a pipe" in done.stderr


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "bin"])
def test_truncated_files(kind, tmp_path, capsys):
    """Cut anywhere: one line that names the file, never a traceback, nothing left behind."""
    reference = checkpoints.load("llama_bias")
    if kind == "gguf":
        whole = gguf_models.build(reference, tmp_path / "source.gguf")
    elif kind == "bin":
        whole = tmp_path / "source.bin"
        llama2c_file(whole, 0, True)
    else:
        whole = checkpoints.build(reference, tmp_path / "source") / "model.safetensors"
    data = whole.read_bytes()
    for length in [*range(4, 400, 23), *np.linspace(400, len(data) - 1, 25).astype(int)]:
        whole.write_bytes(data[:length])
        source = whole.parent if kind == "safetensors" else whole
        line = refused(capsys, source, "-o", tmp_path / "m.safetensors")
        assert str(whole.parent) in line and "meanwhile" not in line  # before anything is written
    assert not list(tmp_path.glob("*m.*"))


def test_nothing_half_written(tmp_path, capsys, monkeypatch):
    """A weight that cannot be written ends the export: the folder is as it was, an older file too."""
    reference = checkpoints.load("llama_gqa")
    source = checkpoints.build(reference, tmp_path / "source")
    name = "model.layers.1.mlp.down_proj.weight"
    stored = checkpoints.stored
    for value, type, words in ((np.inf, "q8_0", "infinite"), (1e5, "f16", "100000")):

        def damaged(tensor, tensors, reference, value=value):
            dtype, array = stored(tensor, tensors, reference | {"dtype": "F32"})
            return dtype, np.where(np.arange(array.size).reshape(array.shape) == 7, value, array).astype(
                np.float32
            ) if tensor == name else array

        monkeypatch.setattr(checkpoints, "stored", damaged)
        checkpoints.build(reference, source)
        (tmp_path / "m.safetensors").write_bytes(b"older")
        before = sorted(tmp_path.iterdir())
        line = refused(capsys, source, "-o", tmp_path / "m.safetensors", "--type", type)
        assert "layers.1.down_proj.weight" in line and words in line
        assert sorted(tmp_path.iterdir()) == before and (tmp_path / "m.safetensors").read_bytes() == b"older"
    line = refused(capsys, source, "-o", tmp_path / "nowhere/m.safetensors")
    assert "nowhere/m.tokenizer.bin: No such file" in line


STOPPED_HALF_WAY = """
import os, runpy, sys
from exporter import writer

def write(model, type, path, *rest):
    path.write_bytes(b"half")
    os.kill(os.getpid(), number)

script, number = sys.argv.pop(1), int(sys.argv.pop())
writer.write = write
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(number, tmp_path):
    source = checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "source")
    argv = [ROOT / "export.py", source, "-o", tmp_path / "m.safetensors", str(int(number))]
    done = subprocess.run([sys.executable, "-c", STOPPED_HALF_WAY, *argv], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "export.py: interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == [source]


def test_summary(tmp_path, capsys):
    run(checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "source"), tmp_path / "m.safetensors")
    config, tensors, _ = load(tmp_path / "m.safetensors")
    text = capsys.readouterr().out
    count = sum(x.size for name, x in tensors.items() if not name.startswith("rope."))
    per_token = 2 * 2 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"]
    for words in (
        "gqa",
        f"{count / 1e6:.1f} million",
        "f16 ",
        f"{per_token} bytes per token",
        f"{config['seq_len']} tokens",
    ):
        assert words in text, words


def test_errors_are_one_kind():
    with pytest.raises(ExportError, match="infinite"):
        quantize(np.full((1, 32), np.nan, np.float32), "q8_0")


# ---- Which source, and where to


def test_the_fuzzed_sources_are_whole(tmp_path):
    """Or their damage says nothing."""
    for source in fuzz_export.whole_sources(tmp_path):
        assert export.main([str(source), "-o", str(tmp_path / "m.safetensors")]) == 0


def test_damaged_sources():
    """The first files of `python tests/fuzz_export.py`: exported, or refused in one line."""
    assert fuzz_export.fuzz(0, 1, least=150) == []


def test_the_single_file_comes_before_shards(tmp_path, capsys):
    """transformers' order: model.safetensors, then the index; consolidated files and adapters are passed over."""
    reference = checkpoints.load("llama_gqa")
    source = checkpoints.build(reference | {"shards": 2, "seed": 99}, tmp_path / "source")
    old = run(source, tmp_path / "old.safetensors")[1]
    new = run(checkpoints.build(reference, tmp_path / "new"), tmp_path / "new.safetensors")[1]
    checkpoints.build(reference, source)
    for name in ("consolidated", "adapter_model"):
        (source / f"{name}.safetensors").write_bytes(b"never read")
    capsys.readouterr()
    got = run(source, tmp_path / "m.safetensors")[1]
    assert all(np.array_equal(got[name], new[name]) for name in new)
    assert not np.array_equal(got["norm.weight"], old["norm.weight"])
    assert "consolidated.safetensors" in capsys.readouterr().out


def test_an_export_is_found_by_what_it_was_made_from(tmp_path, capsys):
    """Two folders of one name, one rewritten in place, a new side file: each is exported when it must be, and once."""
    made = {}
    for run_, seed in (("runA", 1), ("runB", 2)):
        source = checkpoints.build(checkpoints.load("llama_gqa") | {"seed": seed}, tmp_path / run_ / "checkpoint-500")

        def export_into(source=source):
            assert export.main([str(source), "--into", str(tmp_path / "models")]) == 0
            output, summary = capsys.readouterr()
            return Path(output.strip()), bool(summary)

        made[run_], exported = export_into()
        assert exported and not export_into()[1]
        for change in ("config.json", "chat_template.jinja"):
            file = source / change
            times = file.exists() and (file.stat().st_atime_ns, file.stat().st_mtime_ns)
            file.write_text(file.read_text() if file.exists() else "x")
            if times:
                os.utime(file, ns=times)  # as cp -p does
            assert export_into() == (made[run_], True) and not export_into()[1]
    assert made["runA"] != made["runB"]
    made["runB"].write_bytes(b"another's")
    line = refused(capsys, source, "--into", tmp_path / "models")
    assert "export.py has not made this file" in line and made["runB"].read_bytes() == b"another's"
    assert str(tmp_path).encode() not in made["runA"].read_bytes()


def test_output_never_replaces_the_source(tmp_path, capsys):
    source = checkpoints.build(checkpoints.load("llama_gqa"), tmp_path / "source")
    weights = source / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(weights)
    (tmp_path / "hard.safetensors").hardlink_to(weights)
    for output in (weights, tmp_path / "link.safetensors", tmp_path / "hard.safetensors"):
        assert str(output) in refused(capsys, source, "-o", output)
    assert weights.read_bytes() == before
    (tmp_path / "other.safetensors").symlink_to(tmp_path / "real.safetensors")
    run(source, tmp_path / "other.safetensors")
    assert (tmp_path / "other.safetensors").is_symlink() and (tmp_path / "real.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "config", "seq_len"),
    [
        ("llama_linear", {"max_position_embeddings": 64}, 256),
        ("qwen3_yarn", {"max_position_embeddings": 64}, 256),
        ("llama3", {}, 256),
        ("gemma3_long", {}, 256),
    ],
)
def test_scaling_raises_the_context(name, config, seq_len, tmp_path):
    """As vLLM: by the factor of linear and YaRN; Llama 3 and Gemma 3 have it in max_position_embeddings."""
    source = checkpoints.build(changed(name, **config), tmp_path / "source")
    assert run(source, tmp_path / "m.safetensors")[0]["seq_len"] == seq_len
