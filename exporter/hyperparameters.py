"""The model file's hyper-parameters (docs/model-file.md) from a source's config: a function for each group of keys."""

import math

import numpy as np

from exporter import rope
from exporter.architectures import Architecture
from exporter.config import Keys

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def hyperparameters(keys: Keys, architecture: Architecture) -> tuple[dict, dict[str, np.ndarray]]:
    """The model file's config, and its RoPE tables by the names of their tensors."""
    sizes = dimensions(keys, architecture)
    types = layer_types(keys, architecture, sizes["n_layers"])
    kinds = dict(
        norm=architecture.norm, norm_eps=keys.number("norm_eps"), activation=keys.choice("hidden_act", ACTIVATIONS)
    )
    if "swiglu_limit" in architecture.defaults:
        kinds |= dict(activation="swiglu_oai", swiglu_limit=keys.number("swiglu_limit"))
    attended, tables = attention(keys, architecture, sizes, types)
    config = dict(attention=variant(sizes)) | sizes | kinds | attended | experts(keys, architecture, sizes)
    return config, tables


def dimensions(keys: Keys, architecture: Architecture) -> dict:
    heads, dim = keys.positive("num_attention_heads"), keys.positive("hidden_size")
    sizes = dict(
        dim=dim,
        hidden_dim=keys.positive("intermediate_size", 4 * dim),
        n_layers=keys.positive("num_hidden_layers"),
        n_heads=heads,
        vocab_size=keys.positive("vocab_size"),
        seq_len=keys.positive("max_position_embeddings"),
    )
    kv_heads = keys.positive("num_key_value_heads", 1 if keys.flag("multi_query") else heads)
    if architecture.mla:
        keys.get("head_dim")  # transformers writes qk_rope_head_dim here, and nothing uses it
        return sizes | latent_dimensions(keys)
    if keys.get("head_dim") is None and dim % heads:
        keys.refuse("num_attention_heads", f"does not divide hidden_size {dim}: fetch the file again")
    head_dim = keys.positive("head_dim", dim // heads)
    if heads % kv_heads:
        keys.refuse("num_key_value_heads", f"does not divide num_attention_heads {heads}: fetch the file again")
    if architecture.rotates and head_dim % 2:
        keys.refuse("head_dim", f"heads of {head_dim} elements cannot rotate by halves: fetch the file again")
    if keys.get("value_length", head_dim) != head_dim:
        keys.refuse("value_length", f"must be head_dim, {head_dim}: heads of two widths are not supported")
    return sizes | dict(n_kv_heads=kv_heads, head_dim=head_dim)


def latent_dimensions(keys: Keys) -> dict:
    sizes = {key: keys.positive(key) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    # transformers' norms of the latents have their class's eps, whatever rms_norm_eps says.
    return dict(q_lora_rank=keys.count("q_lora_rank"), latent_norm_eps=1e-6) | sizes


def variant(config: dict) -> str:
    if "kv_lora_rank" in config:
        return "mla"
    return {config["n_heads"]: "mha", 1: "mqa"}.get(config["n_kv_heads"], "gqa")


def layer_types(keys: Keys, architecture: Architecture, n_layers: int) -> list[str]:
    given = keys.get("layer_types")
    window, pattern = keys.get("sliding_window"), keys.get("sliding_window_pattern", 0)
    first = keys.count("max_window_layers")
    beside = keys.get("_sliding_window_pattern", pattern)  # transformers writes it beside layer_types
    on = keys.flag("use_sliding_window", True) and window is not None
    if given is not None:
        if not isinstance(given, list) or len(given) != n_layers or not all(one in (FULL, SLIDING) for one in given):
            keys.refuse(
                "layer_types", f"must be one of {FULL}, {SLIDING} for each of the {n_layers} layers: fetch it again"
            )
        return given if on else [FULL] * n_layers
    rotates = rotating_layers(keys, n_layers)
    if architecture.windows == "pattern" and (not isinstance(pattern, int) or pattern <= 0):
        keys.refuse("sliding_window_pattern", "must be a positive integer: fetch the file again")
    if beside != pattern:
        keys.refuse("_sliding_window_pattern", "means nothing without layer_types: fetch the file again")
    slides = {
        "none": lambda layer: False,
        "all": lambda layer: on,
        "upper": lambda layer: on and layer >= first,
        "pattern": lambda layer: on and (layer + 1) % pattern != 0,
        "unrotated": lambda layer: on and not rotates[layer],
    }[architecture.windows]
    return [SLIDING if slides(layer) else FULL for layer in range(n_layers)]


def rotating_layers(keys: Keys, n_layers: int) -> list[bool]:
    """Whether a layer's queries and keys rotate: SmolLM3 leaves some without positions (NoPE)."""
    given, interval = keys.get("no_rope_layers"), keys.count("no_rope_layer_interval")
    if given is None:
        return [not interval or (layer + 1) % interval != 0 for layer in range(n_layers)]
    if not isinstance(given, list) or len(given) < n_layers or not all(one in (0, 1) for one in given):
        keys.refuse("no_rope_layers", f"must be 1 (rotates) or 0 for each of the {n_layers} layers: fetch it again")
    return [bool(rotates) for rotates in given[:n_layers]]


def attention(keys: Keys, architecture: Architecture, sizes: dict, types: list[str]) -> tuple[dict, dict]:
    """The attention's part of the config, and the RoPE tables by name."""
    width = sizes["head_dim"] if "head_dim" in sizes else sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    scale = keys.number("query_pre_attn_scalar", width) ** -0.5 if keys.flag("scale_attn_weights", True) else 1.0
    kinds, index = rotations(keys, architecture, types)
    scale *= rope.softmax_mscale(kinds[0]) if architecture.mla else 1
    factors, original, tables = rope_tables(keys, kinds, sizes.get("qk_rope_head_dim", width))
    window = keys.positive("sliding_window") if SLIDING in types else 0
    return dict(
        seq_len=context(keys, architecture, kinds, sizes["seq_len"]),
        attention_scale=keys.number("attention_multiplier", scale),
        window=[window if layer_type == SLIDING else 0 for layer_type in types],
        rope=index,
        rope_scale=factors,
        original_seq_len=original,
        attention_softcap=softcap(keys, "attn_logit_softcapping"),
        logit_softcap=softcap(keys, "final_logit_softcapping"),
        logit_scale=1 / keys.number("logits_scaling", 1),
        embedding_scale=math.sqrt(sizes["dim"])
        if architecture.scaled_embedding
        else keys.number("embedding_multiplier", 1),
        residual_scale=keys.number("residual_multiplier", 1),
    ), tables


def rotations(keys: Keys, architecture: Architecture, types: list[str]) -> tuple[list[dict], list[int]]:
    """The different rope.parameters of a model, and for each layer which of them it has, -1 for none."""
    if not architecture.rotates:
        return [], [-1] * len(types)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        keys.get(key)  # known, whatever the kinds of the layers
    kinds, of_type = [], {}
    for layer_type in dict.fromkeys(types):
        local = layer_type == SLIDING and architecture.local_theta
        parameters = rope.parameters(keys, layer_type if local else FULL, local or "rope_theta")
        if parameters not in kinds:
            kinds.append(parameters)
        of_type[layer_type] = kinds.index(parameters)
    rotates = rotating_layers(keys, len(types))
    return kinds, [of_type[layer_type] if on else -1 for layer_type, on in zip(types, rotates, strict=True)]


def rope_tables(keys: Keys, kinds: list[dict], width: int) -> tuple[list[float], int, dict]:
    """Of each kind the factor on cos and sin; original_seq_len; and the tables by name."""
    tables, factors, original = {}, [], 0
    for i, parameters in enumerate(kinds):
        dim = rope.rotated(keys, parameters, width)
        tables[f"rope.{i}.inv_freq"], factor = rope.table(parameters, dim)
        factors.append(factor)
        if parameters["rope_type"] == "longrope":
            tables[f"rope.{i}.long_inv_freq"], _ = rope.table(parameters, dim, long=True)
            original = int(parameters["original_max_position_embeddings"])
    for values in (*tables.values(), *factors):
        if not np.all((values > 0) & (values < 1e6)):
            keys.refuse("rope_scaling", "gives frequencies or factors that no model has: fetch the file again")
    return factors, original, tables


def context(keys: Keys, architecture: Architecture, kinds: list[dict], seq_len: int) -> int:
    """The longest context: max_position_embeddings, made longer by the scaling of any kind of RoPE."""
    if "rope_local_base_freq" not in architecture.defaults:  # Gemma 3's has the factor in it
        seq_len = max((rope.extended_context(parameters, seq_len) for parameters in kinds), default=seq_len)
    if not 0 < seq_len < 1 << 31:
        keys.refuse("max_position_embeddings", f"with the factor of rope_scaling it is {seq_len}: fetch the file again")
    return seq_len


def softcap(keys: Keys, key: str) -> float:
    return 0 if keys.get(key) is None else keys.number(key)


def experts(keys: Keys, architecture: Architecture, sizes: dict) -> dict:
    if not keys.count("num_experts"):
        if keys.values.get("num_experts_per_tok"):
            keys.refuse(
                "num_experts",
                "num_experts_per_tok says that there are experts: num_experts (num_local_experts, n_routed_experts) "
                "must say how many: fetch the file again",
            )
        return {}
    n, chosen = keys.positive("num_experts"), keys.positive("num_experts_per_tok")
    if chosen > n:
        keys.refuse("num_experts_per_tok", f"more than the {n} experts: fetch the file again")
    rules = architecture.experts
    scoring, methods = rules.get("scoring_func", "softmax"), rules.get("topk_methods", ("greedy",))
    keys.choice("scoring_func", {scoring: True}, default=scoring)
    grouped = keys.choice("topk_method", {method: method != "greedy" for method in methods}, default=methods[0])
    norm = rules.get("norm_topk_prob", keys.flag("norm_topk_prob"))
    if norm and rules.get("group_score") == "max":
        keys.refuse("norm_topk_prob", "implementations of this architecture differ on what it means: it must be false")
    groups, best = keys.positive("n_group", 1), keys.positive("topk_group", 1)
    if n % groups or best > groups:
        keys.refuse("n_group", f"does not divide the {n} experts, or is less than topk_group, {best}: fetch it again")
    if grouped and chosen > n // groups * best:
        keys.refuse(
            "num_experts_per_tok",
            f"more than the {n // groups * best} experts of topk_group {best} of the {groups} groups: fetch it again",
        )
    found = dict(
        n_routed_experts=n,
        num_experts_per_tok=chosen,
        n_shared_experts=keys.count("n_shared_experts"),
        moe_intermediate_size=keys.positive("moe_intermediate_size", sizes["hidden_dim"]),
        moe_layers=moe_layers(keys, sizes["n_layers"]),
        scoring_func=scoring,
        norm_topk_prob=norm,
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        n_group=groups if grouped else 1,
        topk_group=best if grouped else 1,
        group_score=rules.get("group_score", "max"),
    )
    return found if any(found["moe_layers"]) else {}


def moe_layers(keys: Keys, n_layers: int) -> list[int]:
    """1 where a layer's MLP is experts: DeepSeek's first layers are dense, Qwen's where the file says so."""
    first, step = keys.count("first_k_dense_replace"), keys.positive("decoder_sparse_step", 1)
    dense = keys.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        keys.refuse("mlp_only_layers", "must be a list of layers: fetch the file again")
    return [int(layer >= first and layer not in dense and (layer + 1) % step == 0) for layer in range(n_layers)]
