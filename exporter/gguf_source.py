"""GGUF files (ggml's docs/gguf.md): metadata as ggml's converter writes it, weights in ggml's block types."""

import struct
from pathlib import Path

import gguf
import numpy as np

from exporter.errors import ExportError, shown
from exporter.rope import yarn_mscale
from exporter.source import File, Source
from exporter.weights import GROUP, QUANTIZED, Tensor, Weight, size, unreadable

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST_ARRAY = 1 << 26  # of a vocabulary of some hundred thousand tokens there are as many merges

# GGUF key, after the architecture's name -> Hugging Face's, or a name of our own that gguf_config resolves.
GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "value_length",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.dimension_count": "rope_dim",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scale_linear": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attn_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_log_multiplier": "yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor": "yarn_ext_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length_mla": "key_length_mla",
    "attention.value_length_mla": "value_length_mla",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": "expert_gating_func",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.causal": "is_causal",
    "use_parallel_residual": "use_parallel_residual",
}
GGUF_NO_EFFECT = {"rope.scaling.finetuned", "tensor_data_layout", "nextn_predict_layers"}
ZERO_IS_NONE = {  # of which 0 says that the model has no such thing
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_length",
    "attention.temperature_scale",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "rope.scale_linear",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "pooling_type",
    "interleave_moe_layer_step",
}


class GgufHeader:
    """A cursor over a GGUF header (ggml's docs/gguf.md). The gguf package reads it too, thirty times slower."""

    def __init__(self, file: File):
        self.file, self.at = file, 0
        self.view = memoryview(b"")  # the file's beginning, as far as it was needed

    def take(self, length: int) -> int:
        """Where the next `length` bytes of the view are."""
        begin, self.at = self.at, self.at + length
        if self.at > self.file.size:
            raise ValueError(f"{length} bytes that are not there")
        if self.at > len(self.view):
            self.view = memoryview(self.file.read(0, min(self.file.size, max(2 * self.at, 1 << 20))))
        return begin

    def scalar(self, code: str):
        begin = self.take(struct.calcsize("<" + code))  # before the view is looked at, which take may make longer
        return struct.unpack_from("<" + code, self.view, begin)[0]

    def string(self) -> str:
        begin = self.take(self.scalar("Q"))
        return str(self.view[begin : self.at], "utf-8", "surrogateescape")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        kind, length = self.scalar("I"), self.scalar("Q")
        if length > min(self.file.size - self.at, LONGEST_ARRAY):
            raise ValueError(f"an array of {length} elements")
        if kind in (STRING, ARRAY):
            return [self.value(kind) for _ in range(length)]
        code = "<" + SCALARS[kind]
        begin = self.take(length * struct.calcsize(code))
        return np.frombuffer(self.view, code, length, begin).tolist()

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dims = self.string(), self.scalar("I")
        if dims > 4:
            raise ValueError(f"tensor {name} of {dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1] or (1,)  # GGUF lists the innermost first
        return name, self.scalar("I"), shape, self.scalar("Q")


def open_gguf(path: Path, tokenizer_file: Path | None) -> Source:
    source = Source("gguf", path, path, tokenizer_file)
    file = File(path)
    header = GgufHeader(file)
    try:
        header.take(4)
        version = header.scalar("I")
        if version in (2 << 24, 3 << 24):
            raise ExportError(f"{path}: a big-endian GGUF file: convert it with gguf-convert-endian {path.name} little")
        if version not in (2, 3):
            raise ExportError(f"{path}: GGUF version {version}: convert it again, with a tool that writes version 3")
        n_tensors, n_keys = header.scalar("Q"), header.scalar("Q")
        for _ in range(n_keys):
            key = header.string()
            if key in source.metadata:
                raise ExportError(f"{path}: the key {shown(key)} is there twice: convert it again")
            source.metadata[key] = header.value(header.scalar("I"))
        tensors = [header.tensor() for _ in range(n_tensors)]
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ExportError(f"{path}: its header is truncated or damaged at byte {header.at}: fetch it again") from error
    align = source.metadata.get("general.alignment", 32)
    if type(align) is not int or align <= 0:
        raise ExportError(f"{path}: general.alignment is {shown(align)}, it must be a positive integer: fetch it again")
    start = -(-header.at // align) * align
    for name, kind, shape, offset in tensors:
        if name in source.tensors:
            raise ExportError(f"{path}: tensor {name} is there twice: convert the file again")
        source.tensors[name] = gguf_tensor(file, name, kind, shape, start + offset)
    source.config = gguf_config(source)
    return source


# Types that ggml has taken back; other tools wrote files with them.
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


def gguf_tensor(file: File, name: str, number: int, shape: tuple[int, ...], offset: int) -> Tensor:
    """number: of the tensor's type. A type that cannot be read is a problem only for a model that has a place for the
    tensor."""
    where = f"{file.path}: tensor {name} {shown(list(shape))}"
    problem = problem_of_type(number)
    if problem:
        return unreadable(
            shape, f"{where} {problem}: quantise the model again, to Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, F16, BF16 or F32"
        )
    kind = gguf.GGMLQuantizationType(number)
    blocks, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    k = shape[-1] if len(shape) > 1 else 1
    n = size(shape) // k if k else 0
    row_bytes = k * block_bytes // blocks
    if n <= 0 or k % blocks:
        raise ExportError(f"{where} cannot be of {kind.name}: its rows are whole blocks of {blocks}: convert it again")
    if offset + n * row_bytes > file.size:
        raise ExportError(
            f"{where} of {kind.name} reaches past the end of the file ({file.size} bytes): it is truncated: "
            "fetch it again"
        )
    if kind.name in FLOAT_TYPES:
        dtype, type, made = FLOAT_TYPES[kind.name]

        def read(index: np.ndarray) -> Weight:
            return Weight(type, file.rows(offset, row_bytes, index).view(dtype).astype(made, copy=False))

        return Tensor(shape, type, read)
    if kind.name.lower() in QUANTIZED:
        type = kind.name.lower()
        return Tensor(shape, type, lambda index: Weight(type, file.rows(offset, row_bytes, index)))

    def dequantize(index: np.ndarray) -> Weight:
        rows = gguf.dequantize(file.rows(offset, row_bytes, index), kind)
        return Weight("f32", rows.astype(np.float32, copy=False))

    return Tensor(shape, "f32", dequantize, keep="q8_0" if k % GROUP == 0 else "f16", note=kind.name)


def problem_of_type(number: int) -> str:
    """Why tensors of this type cannot be read; "" where they can."""
    if number in REMOVED:
        return f"has type {number} ({REMOVED[number]}), which ggml has removed"
    try:
        kind = gguf.GGMLQuantizationType(number)
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in FLOAT_TYPES:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return f"has type {kind.name}, out of which the gguf package reads no weights"
    except (ValueError, KeyError):
        return f"has type {number}, which is not known"
    return ""


FLOAT_TYPES = {  # GGUF type -> dtype in the file, our type and its dtype; F64 to the nearest float32
    "F64": ("<f8", "f32", np.float32),
    "F32": ("<f4", "f32", np.float32),
    "F16": ("<f2", "f16", np.float16),
    "BF16": ("<u2", "bf16", np.uint16),
}


MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "starcoder": "gpt_bigcode",
    "qwen3moe": "qwen3_moe",
    "deepseek2": "deepseek_v2",
    "chatglm": "glm",
    "gpt-oss": "gpt_oss",
}
# llama.cpp has no query_pre_attn_scalar: it is head_dim, but in the 27B, known by its layers, hidden_size / heads.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def gguf_config(source: Source) -> dict:
    """The metadata under Hugging Face's names; an unknown key keeps its own, and is refused later."""
    architecture, parts = source.metadata.get("general.architecture"), source.metadata.get("split.count", 0)
    if not isinstance(architecture, str):
        raise ExportError(
            f"{source.path}: general.architecture is {shown(architecture)}: must be a name: fetch it again"
        )
    if parts not in (0, 1):
        raise ExportError(f"{source.path}: split.count is {shown(parts)}: join the parts with llama-gguf-split --merge")
    config = {"model_type": MODEL_TYPES.get(architecture, architecture)}
    for key, value in source.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or name in GGUF_NO_EFFECT:
            continue
        if name == "attention.sliding_window_pattern" and isinstance(value, list):
            config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in value]
            continue
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            value = value[0]  # one value a layer, all the same
        if not isinstance(value, str if name == "rope.scaling.type" else int | float) and name in GGUF_KEYS:
            raise ExportError(
                f"{source.path}: {key} is {shown(value)}: must be one number for all layers: use another model"
            )
        config[GGUF_KEYS.get(name, key)] = None if name in ZERO_IS_NONE and value == 0 else value
    config["tie_word_embeddings"] = "output.weight" not in source.tensors
    if "token_embd.weight" in source.tensors:
        config["vocab_size"] = source.tensors["token_embd.weight"].shape[0]
    if config.get("num_experts"):
        gguf_experts(config)
    if architecture in GEMMA_27B_LAYERS:
        wide = config.get("num_hidden_layers") == GEMMA_27B_LAYERS[architecture]
        scalar = config.get("head_dim", 256)
        if wide and config.get("num_attention_heads"):
            scalar = config.get("hidden_size", 0) // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = scalar
    if architecture == "olmo2" and config.get("sliding_window"):
        config["model_type"] = "olmo3"
    if architecture == "deepseek2":
        gguf_latent(config)
    gguf_rope(source, config)
    return config


def gguf_experts(config: dict) -> None:
    gating, known = config.pop("expert_gating_func", 0), {"deepseek_v2": (0, 1, 2), "gpt_oss": (0, 3)}
    if gating not in known.get(config["model_type"], (0, 1)):
        config["expert_gating_func"] = gating  # which is refused by name
    sigmoid = gating == 2
    if config["model_type"] == "llama":
        config["model_type"] = "mixtral"
    elif config["model_type"] == "qwen3_moe":
        config.setdefault("norm_topk_prob", True)  # llama.cpp always does
    elif sigmoid:
        config["model_type"] = "deepseek_v3"
        config.setdefault("norm_topk_prob", False)
        config.setdefault("n_group", 1)
        config.setdefault("topk_group", 1)
    elif config.get("n_group", 1) > 1:
        config["topk_method"] = "group_limited_greedy"


def gguf_latent(config: dict) -> None:
    """DeepSeek's widths: GGUF has those of an expanded head, in newer files beside the latent's (key_length_mla)."""
    key, value = config.pop("head_dim", 0), config.pop("value_length", 0)
    key, config["v_head_dim"] = config.pop("key_length_mla", key), config.pop("value_length_mla", value)
    config["qk_rope_head_dim"] = config.pop("rope_dim", 0)
    config["qk_nope_head_dim"] = key - config["qk_rope_head_dim"]
    config["num_key_value_heads"] = config.get("num_attention_heads")
    config.setdefault("q_lora_rank", None)


def gguf_rope(source: Source, config: dict) -> None:
    """GGUF's rope.scaling keys -> rope_scaling; attn_factor multiplies the factor on cos and sin.

    LongRoPE has no kind there: it is where the tensors of its factors are.
    """
    names = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
    scaling = {name: config.pop(name) for name in names if name in config}
    kind, extra, multiplier = (config.pop(name, None) for name in ("rope_type", "attn_factor", "yarn_log_multiplier"))
    if kind is None and (scaling.get("factor") or 1) != 1:
        kind = "linear"  # files from before the key, and llama.cpp's default
    factors = {name: source.tensors.get(f"rope_factors_{name}.weight") for name in ("short", "long")}
    if None not in factors.values():
        kind = "longrope"
        scaling |= {f"{name}_factor": tensor.float32().reshape(-1).tolist() for name, tensor in factors.items()}
        if extra:
            scaling["attention_factor"] = extra
    elif kind in (None, "none"):
        if extra not in (None, 1):
            config["attn_factor"] = extra  # which is refused by name
        return
    if multiplier:  # DeepSeek: 0.1 mscale_all_dim; its mscale is the same
        scaling["mscale"] = scaling["mscale_all_dim"] = multiplier / 0.1
    if kind != "longrope" and extra not in (None, 1):
        own = 1 if multiplier else yarn_mscale(scaling.get("factor") or 1)
        scaling["attention_factor"] = extra * scaling.get("attention_factor", own)
    if config["model_type"] == "gpt_oss":
        scaling["truncate"] = False  # GGUF has no key for it
    config["rope_scaling"] = scaling | {"rope_type": kind}
