"""What a source's config and tensors mean: from Hugging Face's or GGUF's names to the model file's (README.md).

What differs between architectures is the data in ARCHITECTURES; the code below has no names of models in it.
"""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from exporter import rope
from exporter.config import Keys
from exporter.errors import ExportError
from exporter.sources import Source
from exporter.weights import Tensor, apply, concat, of_array, select

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True)
class Architecture:
    """defaults: of Hugging Face's config class, for keys that a config.json leaves out."""

    defaults: dict
    norm: str = "rms"
    rotates: bool = True
    modules: dict = field(default_factory=dict)  # module names that mean something else than in MODULES
    fused: str = ""  # layout of c_attn's rows: 'blocks' (all q, all k, all v) or 'heads' (q, k, v of each head)
    conv1d: bool = False  # linear layers are stored [inputs, outputs]
    interleaved: bool = False  # RoPE rotates neighbours, not halves
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    windows: str = "none"  # 'none', 'all', 'upper' (from max_window_layers), 'pattern'
    mla: bool = False
    needs: str = "$"  # names of tensors, beyond those of every model, that must be there
    experts: dict = field(default_factory=dict)  # the experts' fields of our config that do not follow from the file's


LLAMA = dict(hidden_act="silu", tie_word_embeddings=False, rope_theta=10000.0, norm_eps=1e-6)
QWEN = LLAMA | dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
GEMMA3 = dict(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, rope_theta=1e6, rope_local_base_freq=10000.0, norm_eps=1e-6,
              query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=6, head_dim=256)
GPT2 = dict(tie_word_embeddings=True, scale_attn_weights=True, norm_eps=1e-5)
DEEPSEEK = LLAMA | dict(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                        rope_interleave=True)
MIXTRAL_MODULES = {"block_sparse_moe.gate": "router"}
QK_NORMS = r"[qk]_norm\.weight"
GPT2_NEEDS = r"(norm|[qkvo]_proj|up_proj|down_proj)\.bias|position_embedding\.weight"
GEMMA_MODULES = {"post_attention_layernorm": "attention_post_norm"}

ARCHITECTURES = {
    "llama": Architecture(LLAMA),
    "llama2c": Architecture(LLAMA | dict(norm_eps=1e-5), interleaved=True),
    "mistral": Architecture(LLAMA | dict(sliding_window=None), windows="all"),
    "qwen2": Architecture(QWEN, windows="upper", needs=r"[qkv]_proj\.bias"),
    "qwen3": Architecture(QWEN | dict(head_dim=128), windows="upper", needs=QK_NORMS),
    "gemma3_text": Architecture(GEMMA3, windows="pattern", modules=GEMMA_MODULES, norm_plus_one=True, scaled_embedding=True,
                                needs=QK_NORMS + r"|post_norm\.weight"),
    "gpt2": Architecture(GPT2 | dict(hidden_act="gelu_new"), norm="layer", rotates=False, fused="blocks", conv1d=True,
                         needs=GPT2_NEEDS),
    "gpt_bigcode": Architecture(GPT2 | dict(hidden_act="gelu_pytorch_tanh", multi_query=True), norm="layer", rotates=False,
                                fused="heads", needs=GPT2_NEEDS),
    "mixtral": Architecture(LLAMA | dict(norm_eps=1e-5, rope_theta=1e6, sliding_window=None), windows="all",
                            modules=MIXTRAL_MODULES, experts=dict(norm_topk_prob=True)),
    "qwen3_moe": Architecture(QWEN | dict(norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[]), windows="all",
                              needs=QK_NORMS),
    "deepseek_v2": Architecture(DEEPSEEK | dict(n_shared_experts=2, topk_method="greedy", norm_topk_prob=False,
                                                first_k_dense_replace=0, routed_scaling_factor=1.0, scoring_func="softmax"),
                                mla=True, interleaved=True, needs=r"_a_norm\.weight", experts=dict(group_score="max")),
    "deepseek_v3": Architecture(DEEPSEEK | dict(n_shared_experts=1, topk_method="noaux_tc", norm_topk_prob=True,
                                                first_k_dense_replace=3, routed_scaling_factor=2.5, scoring_func="sigmoid",
                                                n_group=8, topk_group=4),
                                mla=True, interleaved=True, needs=r"_a_norm\.weight", experts=dict(group_score="top2_sum")),
}

# Names ----------------------------------------------------------------------------------------------------------------

MODULES = {  # Hugging Face's names inside a layer
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "self_attn.kv_a_proj_with_mqa": "kv_a_proj",
    "self_attn.kv_a_layernorm": "kv_a_norm",
    "self_attn.q_a_layernorm": "q_a_norm",
    "mlp.gate": "router",
    "mlp.gate.e_score_correction_bias": "router.bias",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_attn": "qkv_proj",
    "attn.c_proj": "o_proj",
    "mlp.c_fc": "up_proj",
    "mlp.c_proj": "down_proj",
} | {f"self_attn.{name}": name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "q_a_proj", "q_b_proj",
                                           "kv_b_proj")}
TOP = {"embed_tokens": "embed_tokens", "norm": "norm", "lm_head": "lm_head", "wte": "embed_tokens", "wpe": "position_embedding",
       "ln_f": "norm"}
GGUF_MODULES = {
    "attn_norm": "attention_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_output": "o_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_norm",
    "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj",
    "attn_kv_a_norm": "kv_a_norm",
    "attn_kv_b": "kv_b_proj",
    "attn_k_b": "k_b_proj",
    "attn_v_b": "v_b_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "ffn_gate_inp": "router",
    "exp_probs_b": "router",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_gate_shexp": "shared_experts.gate_proj",
    "ffn_up_shexp": "shared_experts.up_proj",
    "ffn_down_shexp": "shared_experts.down_proj",
}
GGUF_TOP = {"token_embd": "embed_tokens", "position_embd": "position_embedding", "output_norm": "norm", "output": "lm_head",
            "rope_freqs": "rope_freqs"}
IGNORED = re.compile(r"^freq_cis$|rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^(model\.)?(vision_tower|multi_modal_projector)\.")
EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(?:(\d+)\.)?(.+)")
EXPERT_MODULES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def canonical_name(source: Source, architecture: Architecture, name: str) -> str | None:
    """The model file's name of a source's tensor (or of a part to be split or stacked); None where it is not known."""
    if source.kind == "llama2c":
        return name
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, suffix = name, "weight"
    if source.kind == "gguf":
        layer, modules, top = re.fullmatch(r"blk\.(\d+)\.(.+)", stem), GGUF_MODULES, GGUF_TOP
    else:
        stem = re.sub(r"^(language_model\.|model\.|transformer\.)+", "", stem)
        layer, modules, top = re.fullmatch(r"(?:layers|h)\.(\d+)\.(.+)", stem), MODULES | architecture.modules, TOP
    if not layer:
        return f"{top[stem]}.{suffix}" if stem in top else None
    index, module = layer.groups()
    expert = EXPERT.fullmatch(module)
    if module in modules:
        module = modules[module]
    elif expert:
        number, part = expert.groups()
        module = ".".join(filter(None, ("experts", number, EXPERT_MODULES.get(part, part))))
    elif source.kind == "hf" and re.fullmatch(r"mlp\.(shared_experts\.)?(gate|up|down)_proj", module):
        module = module.removeprefix("mlp.")
    else:
        return None
    return f"layers.{index}.{module}" if module == "router.bias" else f"layers.{index}.{module}.{suffix}"


def canonical_tensors(source: Source, architecture: Architecture, n_layers: int, tied: bool) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in source.tensors.items():
        if IGNORED.search(name):
            continue
        target = canonical_name(source, architecture, name)
        if target is None:
            raise ExportError(f"{source.path}: tensor {name} is not known for this architecture: export another checkpoint")
        layer = re.match(r"layers\.(\d+)\.", target)
        if layer and int(layer[1]) >= n_layers:  # DeepSeek V3's layers for predicting several tokens
            continue
        if target in tensors:
            raise ExportError(f"{source.path}: tensor {name} is there twice, as {target}: remove one")
        if not (tied and target == "lm_head.weight"):
            tensors[target] = tensor
    return tensors


# Config ---------------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """What is written: config as README.md lists it, tensors by the model file's names."""

    config: dict
    tensors: dict[str, Tensor]


def dimensions(keys: Keys, architecture: Architecture) -> dict:
    heads, dim = keys.positive("num_attention_heads"), keys.positive("hidden_size")
    sizes = dict(dim=dim, hidden_dim=keys.positive("intermediate_size", 4 * dim), n_layers=keys.positive("num_hidden_layers"),
                 n_heads=heads, vocab_size=keys.positive("vocab_size"), seq_len=keys.positive("max_position_embeddings"))
    kv_heads = keys.positive("num_key_value_heads", 1 if keys.get("multi_query", False) else heads)
    if architecture.mla:
        keys.get("head_dim")  # transformers writes qk_rope_head_dim here, and nothing uses it
        return sizes | latent_dimensions(keys)
    if keys.get("head_dim") is None and dim % heads:
        keys.refuse("num_attention_heads", f"does not divide hidden_size {dim}: fetch the file again")
    head_dim = keys.positive("head_dim", dim // heads)
    if heads % kv_heads:
        keys.refuse("num_key_value_heads", f"does not divide num_attention_heads {heads}: fetch the file again")
    for key in ("value_length", "rope_dim"):
        if keys.get(key, head_dim) != head_dim:
            keys.refuse(key, f"must be head_dim, {head_dim}: heads of two widths are not supported")
    return sizes | dict(n_kv_heads=kv_heads, head_dim=head_dim)


def latent_dimensions(keys: Keys) -> dict:
    sizes = {key: keys.positive(key) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    if abs(keys.number("norm_eps") - 1e-6) > 1e-9:
        keys.refuse("norm_eps", "the latent's norm has 1e-6 whatever this says, so it must be 1e-6")
    return dict(q_lora_rank=keys.get("q_lora_rank", 0)) | sizes


def variant(config: dict) -> str:
    if "kv_lora_rank" in config:
        return "mla"
    return {config["n_heads"]: "mha", 1: "mqa"}.get(config["n_kv_heads"], "gqa")


def layer_types(keys: Keys, architecture: Architecture, n_layers: int) -> list[str]:
    given = keys.get("layer_types")
    window, pattern = keys.get("sliding_window"), keys.get("sliding_window_pattern", 0)
    first = keys.get("max_window_layers", 0)
    on = keys.get("use_sliding_window", True) and window is not None
    if given is not None:
        if not isinstance(given, list) or len(given) != n_layers or not set(given) <= {FULL, SLIDING}:
            keys.refuse("layer_types", f"must be one of {FULL}, {SLIDING} for each of the {n_layers} layers")
        return given
    if architecture.windows == "pattern" and (not isinstance(pattern, int) or pattern <= 0):
        keys.refuse("sliding_window_pattern", "must be a positive integer")
    slides = {
        "none": lambda layer: False,
        "all": lambda layer: on,
        "upper": lambda layer: on and layer >= first,
        "pattern": lambda layer: on and (layer + 1) % pattern != 0,
    }[architecture.windows]
    return [SLIDING if slides(layer) else FULL for layer in range(n_layers)]


def attention(keys: Keys, architecture: Architecture, sizes: dict, types: list[str]) -> tuple[dict, list]:
    """The attention's part of the config, and the RoPE tables."""
    width = sizes["head_dim"] if "head_dim" in sizes else sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    scale = keys.number("query_pre_attn_scalar", width) ** -0.5 if keys.get("scale_attn_weights", True) else 1.0
    tables, index = [], {}
    for layer_type in dict.fromkeys(types) if architecture.rotates else ():
        local = layer_type == SLIDING and "rope_local_base_freq" in architecture.defaults
        parameters = rope.parameters(keys, layer_type if local else FULL, "rope_local_base_freq" if local else "rope_theta")
        if parameters not in tables:
            tables.append(parameters)
        index[layer_type] = tables.index(parameters)
    scale *= rope.softmax_mscale(tables[0]) if architecture.mla else 1
    tables = [rope.table(parameters, sizes.get("qk_rope_head_dim", width)) for parameters in tables]
    window = keys.positive("sliding_window") if SLIDING in types else 0
    return dict(
        attention_scale=scale,
        window=[window if layer_type == SLIDING else 0 for layer_type in types],
        rope=[index.get(layer_type, -1) for layer_type in types],
        rope_scale=[factor for _, factor in tables],
        attention_softcap=keys.get("attn_logit_softcapping", 0),
        logit_softcap=keys.get("final_logit_softcapping", 0),
        embedding_scale=math.sqrt(sizes["dim"]) if architecture.scaled_embedding else 1,
    ), [inv_freq for inv_freq, _ in tables]


def experts(keys: Keys, architecture: Architecture, sizes: dict) -> dict:
    n = keys.get("num_experts", 0)
    if not n:
        return {}
    keys.positive("num_experts")
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    first = keys.get("first_k_dense_replace", 0)
    method, norm = keys.get("topk_method", "greedy"), architecture.experts.get("norm_topk_prob", keys.get("norm_topk_prob", False))
    grouped = {"greedy": False, "group_limited_greedy": True, "noaux_tc": True}
    if method not in grouped:
        keys.refuse("topk_method", f"known are {', '.join(grouped)}")
    if norm and method in ("greedy", "group_limited_greedy") and architecture.mla:
        keys.refuse("norm_topk_prob", "implementations of this architecture differ on what it means")
    if keys.positive("num_experts_per_tok") > n:
        keys.refuse("num_experts_per_tok", f"more than the {n} experts")
    groups = keys.positive("n_group", 1)
    if n % groups or keys.positive("topk_group", 1) > groups:
        keys.refuse("n_group", f"does not divide the {n} experts, or topk_group {keys.get('topk_group')} is more")
    return dict(
        n_routed_experts=n,
        num_experts_per_tok=keys.get("num_experts_per_tok"),
        n_shared_experts=keys.get("n_shared_experts", 0),
        moe_intermediate_size=keys.positive("moe_intermediate_size", sizes["hidden_dim"]),
        moe_layers=[int(layer >= first and layer not in dense and (layer + 1) % step == 0) for layer in range(sizes["n_layers"])],
        scoring_func=keys.choice("scoring_func", {"softmax": "softmax", "sigmoid": "sigmoid"}) if architecture.mla else "softmax",
        norm_topk_prob=norm,
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        n_group=groups if grouped[method] else 1,
        topk_group=keys.get("topk_group", 1) if grouped[method] else 1,
        group_score=architecture.experts.get("group_score", "max"),
    )


# Tensors --------------------------------------------------------------------------------------------------------------


def neighbours_to_halves(n_heads: int, kept: int, rotated: int) -> np.ndarray:
    """Row numbers that bring RoPE's pairs from neighbours (2i, 2i + 1) to halves (i, i + n), in heads of which the first
    `kept` rows do not rotate."""
    head = np.concatenate([np.arange(kept), kept + np.arange(0, rotated, 2), kept + np.arange(1, rotated, 2)])
    return (np.arange(n_heads)[:, None] * (kept + rotated) + head).reshape(-1)


def split_qkv(rows: dict[str, np.ndarray], tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".qkv_proj." in name]:
        fused = tensors.pop(name)
        if fused.n != sum(map(len, rows.values())):
            raise ExportError(f"tensor {name} has {fused.n} rows, not {sum(map(len, rows.values()))} for q, k and v")
        for part, index in rows.items():
            tensors[name.replace("qkv_proj", part)] = select(fused, index)


def qkv_rows(config: dict, layout: str) -> dict[str, np.ndarray]:
    q, kv = config["n_heads"] * config["head_dim"], config["n_kv_heads"] * config["head_dim"]
    order = np.arange(q + 2 * kv)
    if layout == "heads" and q == kv:
        order = order.reshape(config["n_heads"], 3, -1).transpose(1, 0, 2).reshape(-1)
    return dict(q_proj=order[:q], k_proj=order[q : q + kv], v_proj=order[q + kv :])


def split_kv_b(config: dict, tensors: dict[str, Tensor]) -> None:
    """kv_b_proj [n_heads (nope + v), rank] -> w_uk [n_heads, nope, rank], w_uv [n_heads, v, rank]."""
    heads, nope, v, rank = (config[key] for key in ("n_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
    rows = np.arange(heads * (nope + v)).reshape(heads, -1)
    for name in list(tensors):
        stem = name.removesuffix("weight").rpartition("kv_b_proj")[0]
        if name.endswith("kv_b_proj.weight"):
            whole = tensors.pop(name)
            if whole.shape != (rows.size, rank):
                raise ExportError(f"tensor {name} is {list(whole.shape)}, the config says {[rows.size, rank]}")
            tensors[stem + "w_uk.weight"] = select(whole, rows[:, :nope].reshape(-1), (heads, nope, rank))
            tensors[stem + "w_uv.weight"] = select(whole, rows[:, nope:].reshape(-1), (heads, v, rank))
        elif name.endswith("k_b_proj.weight"):  # GGUF: already split, w_uk turned for the absorbed form
            turned = tensors.pop(name)
            stem = name.removesuffix("k_b_proj.weight")
            tensors[stem + "w_uk.weight"] = apply(turned, lambda x: x.transpose(0, 2, 1), shape=(heads, nope, rank))
        elif name.endswith(".v_b_proj.weight"):
            tensors[name.replace("v_b_proj", "w_uv")] = tensors.pop(name)


def stack_experts(n: int, tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if re.search(r"\.experts\.0\.", name)]:
        parts = [tensors.pop(name.replace(".experts.0.", f".experts.{i}."), None) for i in range(n)]
        if None in parts:
            raise ExportError(f"tensor {name} is there for expert 0 but not for expert {parts.index(None)} of {n}")
        tensors[name.replace(".experts.0.", ".experts.")] = concat(parts, (n, *parts[0].shape))
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj.weight")]:
        both = tensors.pop(name)
        hidden = both.shape[1] // 2
        rows = np.arange(both.n).reshape(both.shape[0], 2, hidden)
        for half, part in enumerate(("gate_proj", "up_proj")):
            tensors[name.replace("gate_up_proj", part)] = select(both, rows[:, half].reshape(-1), (len(rows), hidden, both.k))


def to_halves(config: dict, tensors: dict[str, Tensor]) -> None:
    heads, nope, rotated = config["n_heads"], config.get("qk_nope_head_dim", 0), config.get("qk_rope_head_dim")
    if rotated:
        q = neighbours_to_halves(heads, nope, rotated)
        rows = dict(q_proj=q, q_b_proj=q, kv_a_proj=neighbours_to_halves(1, config["kv_lora_rank"], rotated))
    else:
        rows = dict(q_proj=neighbours_to_halves(heads, 0, config["head_dim"]),
                    k_proj=neighbours_to_halves(config["n_kv_heads"], 0, config["head_dim"]))
    for name, tensor in tensors.items():
        index = rows.get(name.split(".")[-2])
        if index is not None and len(index) == tensor.n:  # a wrong shape is refused by check_shapes
            tensors[name] = select(tensor, index, tensor.shape)


def expected_shapes(config: dict, needs: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every tensor of a model with this config: its shape, and whether it must be there (README.md, "The model file")."""
    c = config
    dim, heads, vocab = c["dim"], c["n_heads"], c["vocab_size"]
    shapes = {"embed_tokens.weight": ((vocab, dim), True), "lm_head.weight": ((vocab, dim), False),
              "lm_head.bias": ((vocab,), False), "norm.weight": ((dim,), True), "norm.bias": ((dim,), False),
              "position_embedding.weight": ((c["seq_len"], dim), False)}

    def add(prefix: str, modules: dict, required: bool = True, suffixes=("weight", "bias")):
        for module, shape in modules.items():
            for suffix in suffixes:
                shapes[f"{prefix}{module}.{suffix}"] = (shape if suffix == "weight" else shape[:1], required and suffix == "weight")

    def mlp(hidden: int) -> dict:
        return dict(gate_proj=(hidden, dim), up_proj=(hidden, dim), down_proj=(dim, hidden))

    if c["attention"] == "mla":
        rank, nope, rotated, v = (c[key] for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        q_rank, q = c["q_lora_rank"], heads * (nope + rotated)
        projections = dict(kv_a_proj=(rank + rotated, dim), w_uk=(heads, nope, rank), w_uv=(heads, v, rank), o_proj=(dim, heads * v))
        projections |= dict(q_a_proj=(q_rank, dim), q_b_proj=(q, q_rank)) if q_rank else dict(q_proj=(q, dim))
        norms = dict(kv_a_norm=(rank,), q_a_norm=(q_rank,))
    else:
        q, kv = heads * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
        projections = dict(q_proj=(q, dim), k_proj=(kv, dim), v_proj=(kv, dim), o_proj=(dim, q))
        norms = dict(q_norm=(c["head_dim"],), k_norm=(c["head_dim"],))
    for layer in range(c["n_layers"]):
        prefix = f"layers.{layer}."
        add(prefix, projections)
        add(prefix, dict(attention_norm=(dim,), mlp_norm=(dim,)))
        add(prefix, norms | dict(attention_post_norm=(dim,), mlp_post_norm=(dim,)), False, ("weight",))
        if not c.get("n_routed_experts") or not c["moe_layers"][layer]:
            add(prefix, mlp(c["hidden_dim"]))
            shapes[prefix + "gate_proj.weight"] = ((c["hidden_dim"], dim), False)
            continue
        n, hidden = c["n_routed_experts"], c["moe_intermediate_size"]
        add(prefix, dict(router=(n, dim)))
        add(prefix + "experts.", {part: (n, *shape) for part, shape in mlp(hidden).items()}, suffixes=("weight",))
        if c["n_shared_experts"]:
            add(prefix + "shared_experts.", mlp(c["n_shared_experts"] * hidden), suffixes=("weight",))
    return {name: (shape, required or bool(re.search(f"(^|[._])({needs})$", name))) for name, (shape, required) in shapes.items()}


def check_shapes(source: Source, config: dict, tensors: dict[str, Tensor], needs: str) -> None:
    expected = expected_shapes(config, needs)
    for name, tensor in tensors.items():
        if name not in expected:
            raise ExportError(f"{source.path}: tensor {name} {list(tensor.shape)} has no place in this architecture: "
                              "export another checkpoint")
        if tensor.shape != expected[name][0]:
            raise ExportError(f"{source.path}: tensor {name} is {list(tensor.shape)}, {source.where.name} says "
                              f"{list(expected[name][0])}: fetch both again")
    for name, (shape, required) in expected.items():
        if required and name not in tensors:
            raise ExportError(f"{source.path}: tensor {name} {list(shape)} is missing: fetch the checkpoint again, with all its files")


def architecture_of(source: Source) -> tuple[Architecture, dict]:
    """The architecture and the config of its text part."""
    values = dict(source.config)
    name = values.get("model_type")
    if "text_config" in values:  # Gemma 3 with a vision tower, of which the text is exported
        values = values | {"tie_word_embeddings": values.get("tie_word_embeddings")} | values.pop("text_config")
        name = values.get("model_type", name)
        del values["model_type"]
        values.pop("text_config", None)
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ExportError(f"{source.where}: model_type is {name!r}: known are {', '.join(ARCHITECTURES)}: export one of these")
    return architecture, values


def build(source: Source) -> Model:
    architecture, values = architecture_of(source)
    if source.kind == "gguf":  # ggml's converter turned and offset what its kernels want, and rotates Llama's by neighbours
        from dataclasses import replace
        architecture = replace(architecture, conv1d=False, norm_plus_one=False, fused=architecture.fused and "blocks",
                               interleaved=architecture.mla or "llama" == source.metadata.get("general.architecture"))
    keys = Keys(source, values, architecture.defaults)
    sizes = dimensions(keys, architecture)
    types = layer_types(keys, architecture, sizes["n_layers"])
    config, tables = attention(keys, architecture, sizes, types)
    config = dict(attention=variant(sizes)) | sizes | dict(
        norm=architecture.norm, norm_eps=keys.number("norm_eps"), activation=keys.choice("hidden_act", ACTIVATIONS)) | config
    config |= experts(keys, architecture, sizes)
    for key in ("attention_bias", "mlp_bias"):  # said by the tensors
        keys.get(key)
    interleaved = architecture.interleaved and keys.get("rope_interleave", True)
    tied = keys.get("tie_word_embeddings")
    keys.finish()

    tensors = canonical_tensors(source, architecture, sizes["n_layers"], tied)
    if not tied and "lm_head.weight" not in tensors:
        raise ExportError(f"{source.path}: tensor lm_head.weight is missing and tie_word_embeddings is false: fetch the "
                          "checkpoint again, with all its files")
    if architecture.conv1d:
        for name, tensor in tensors.items():
            if re.search(r"(qkv|o|up|down)_proj\.weight$", name):
                tensors[name] = apply(tensor, np.transpose, shape=tensor.shape[::-1])
    if architecture.fused:
        split_qkv(qkv_rows(config, architecture.fused), tensors)
    if architecture.mla:
        split_kv_b(config, tensors)
    if config.get("n_routed_experts"):
        stack_experts(config["n_routed_experts"], tensors)
    if interleaved:
        to_halves(config, tensors)
    if architecture.norm_plus_one:
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensors[name] = apply(tensor, lambda x: x + 1)
    factors = tensors.pop("rope_freqs.weight", None)  # Llama 3's rope_scaling, as GGUF carries it
    check_shapes(source, config, tensors, architecture.needs)
    for i, inv_freq in enumerate(tables):
        tensors[f"rope.{i}.inv_freq"] = of_array(inv_freq / factors.float32() if factors else inv_freq)
    return Model(config, tensors)
