"""From a checkpoint's tensors, under canonical names, to the model file's: split, stacked, permuted and checked."""

import re
from pathlib import Path

import numpy as np

from exporter.architectures import Architecture
from exporter.errors import ExportError
from exporter.source import Source
from exporter.weights import Tensor, Weight, apply, concat, select, turn_each

FIELDS = {  # of the config, that a tensor of the wrong shape disagrees with
    "q_proj": "num_attention_heads, head_dim or qk_nope_head_dim and qk_rope_head_dim",
    "k_proj": "num_key_value_heads, head_dim",
    "v_proj": "num_key_value_heads, head_dim",
    "o_proj": "num_attention_heads, head_dim or v_head_dim",
    "q_a_proj": "q_lora_rank",
    "q_a_norm": "q_lora_rank",
    "q_b_proj": "q_lora_rank, num_attention_heads, qk_nope_head_dim, qk_rope_head_dim",
    "kv_a_proj": "kv_lora_rank, qk_rope_head_dim",
    "kv_a_norm": "kv_lora_rank",
    "kv_b_proj": "kv_lora_rank, num_attention_heads, qk_nope_head_dim, v_head_dim",
    "w_uk": "kv_lora_rank, num_attention_heads, qk_nope_head_dim",
    "w_uv": "kv_lora_rank, num_attention_heads, v_head_dim",
    "gate_proj": "intermediate_size",
    "up_proj": "intermediate_size",
    "down_proj": "intermediate_size",
    "experts": "num_experts, num_local_experts or n_routed_experts; moe_intermediate_size",
    "shared_experts": "n_shared_experts, moe_intermediate_size",
    "router": "num_experts, num_local_experts or n_routed_experts",
}


def arrange(
    source: Source, architecture: Architecture, config: dict, interleaved: int, tensors: dict[str, Tensor]
) -> None:
    """Changes `tensors` in place; interleaved: elements of a head that the checkpoint's RoPE rotates as neighbours, and
    the model file's by halves; 0 where the checkpoint's does so too."""
    if architecture.conv1d:
        for name, tensor in tensors.items():
            if re.search(r"(qkv|o|up|down)_proj\.weight$", name):
                tensors[name] = apply(tensor, np.transpose, shape=tensor.shape[::-1])
    if architecture.fused:
        split_qkv(source.path, config, architecture.fused, tensors)
    split_gate_up(tensors)
    if architecture.mla:
        split_kv_b(source.path, config, tensors)
    if config.get("n_routed_experts"):
        stack_experts(source.path, config["n_routed_experts"], tensors)
        split_experts(source.path, architecture, tensors)
    if interleaved:
        to_halves(config, interleaved, tensors)
    if architecture.norm_plus_one:
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensors[name] = apply(tensor, lambda x: x + 1)


def neighbours_to_halves(n_heads: int, width: int, first: int, rotated: int) -> np.ndarray:
    """Row numbers that bring RoPE's pairs from neighbours (2i, 2i + 1) to halves (i, i + n), in heads of `width` rows
    of which `rotated` from row `first` on rotate."""
    head = np.arange(width)
    head[first : first + rotated] = first + np.arange(rotated).reshape(-1, 2).T.reshape(-1)
    return (np.arange(n_heads)[:, None] * width + head).reshape(-1)


def split_qkv(where: Path, config: dict, layout: str, tensors: dict[str, Tensor]) -> None:
    n = (config["n_heads"] + 2 * config["n_kv_heads"]) * config["head_dim"]
    for name in [name for name in tensors if ".qkv_proj." in name]:
        fused = tensors.pop(name)
        shape = (n, config["dim"]) if name.endswith("weight") else (n,)
        if fused.shape != shape:
            raise ExportError(
                f"{where}: tensor {name} is {list(fused.shape)}, not {list(shape)} for q, k and v "
                "(num_attention_heads, multi_query, hidden_size): fetch the checkpoint again"
            )
        for part, index in qkv_rows(config, layout).items():
            tensors[name.replace("qkv_proj", part)] = select(fused, index)


def qkv_rows(config: dict, layout: str) -> dict[str, np.ndarray]:
    q, kv = config["n_heads"] * config["head_dim"], config["n_kv_heads"] * config["head_dim"]
    order = np.arange(q + 2 * kv)
    if layout == "heads" and q == kv:
        order = order.reshape(config["n_heads"], 3, -1).transpose(1, 0, 2).reshape(-1)
    return dict(q_proj=order[:q], k_proj=order[q : q + kv], v_proj=order[q + kv :])


def split_gate_up(tensors: dict[str, Tensor]) -> None:
    """gate_up_proj [2 hidden, dim] -> gate_proj, up_proj [hidden, dim]."""
    for name in [name for name in tensors if ".gate_up_proj." in name and ".experts." not in name]:
        both = tensors.pop(name)
        hidden = both.n // 2
        tensors[name.replace("gate_up_proj", "gate_proj")] = select(both, np.arange(hidden))
        tensors[name.replace("gate_up_proj", "up_proj")] = select(both, np.arange(hidden, both.n))


def split_kv_b(where: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """kv_b_proj [n_heads (nope + v), rank] -> w_uk [n_heads, nope, rank], w_uv [n_heads, v, rank]."""
    heads, nope, v, rank = (config[key] for key in ("n_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))

    def pop(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise ExportError(
                f"{where}: tensor {name} is {list(tensor.shape)}, the config says {list(shape)} "
                f"({FIELDS['kv_b_proj']}): fetch both again"
            )
        return tensor

    for name in list(tensors):
        stem = name.removesuffix("weight").rpartition("kv_b_proj")[0]
        if name.endswith("kv_b_proj.weight"):
            whole = pop(name, (heads * (nope + v), rank))
            rows = np.arange(whole.n).reshape(heads, -1)
            tensors[stem + "w_uk.weight"] = select(whole, rows[:, :nope].reshape(-1), (heads, nope, rank))
            tensors[stem + "w_uv.weight"] = select(whole, rows[:, nope:].reshape(-1), (heads, v, rank))
        elif name.endswith("k_b_proj.weight"):  # GGUF: already split, w_uk turned for the absorbed form
            turned = pop(name, (heads, rank, nope))
            stem = name.removesuffix("k_b_proj.weight")
            tensors[stem + "w_uk.weight"] = apply(turned, lambda x: x.transpose(0, 2, 1), shape=(heads, nope, rank))
        elif name.endswith(".v_b_proj.weight"):
            tensors[name.replace("v_b_proj", "w_uv")] = tensors.pop(name)


def stack_experts(where: Path, n: int, tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if re.search(r"\.experts\.0\.", name)]:
        parts = [tensors.pop(name.replace(".experts.0.", f".experts.{i}."), None) for i in range(n)]
        if None in parts:
            raise ExportError(
                f"{where}: tensor {name} is there for expert 0 but not for expert {parts.index(None)} of the {n} that "
                f"the config has ({FIELDS['experts']}): fetch both again"
            )
        odd = next((i for i, part in enumerate(parts) if part.shape != parts[0].shape), None)
        if odd is not None:
            raise ExportError(
                f"{where}: tensor {name} is {list(parts[0].shape)}, expert {odd}'s is {list(parts[odd].shape)}: "
                "fetch the checkpoint again"
            )
        tensors[name.replace(".experts.0.", ".experts.")] = concat(parts, (n, *parts[0].shape))
    for name in tensors:
        if re.search(r"\.experts\.\d+\.", name):
            raise ExportError(
                f"{where}: tensor {name} is there, but the config has {n} experts ({FIELDS['experts']}): "
                "fetch both again"
            )


def split_experts(where: Path, architecture: Architecture, tensors: dict[str, Tensor]) -> None:
    """experts.gate_up_proj [experts, 2 hidden, dim] and its bias [experts, 2 hidden] -> gate_proj, up_proj."""
    for name in [name for name in tensors if ".experts." in name] if architecture.turned_experts else ():
        if len(tensors[name].shape) == 3 and tensors[name].type != "mxfp4":  # which lies [expert, outputs, inputs]
            tensors[name] = turn_each(tensors[name])
    for name in [name for name in tensors if ".experts.gate_up_proj." in name]:
        both = tensors.pop(name)
        if len(both.shape) != (2 if name.endswith(".bias") else 3) or both.shape[1] % 2:
            raise ExportError(
                f"{where}: tensor {name} is {list(both.shape)}, not [experts, 2 moe_intermediate_size"
                f"{'' if name.endswith('.bias') else ', hidden_size'}]: fetch the checkpoint again"
            )
        n, hidden = both.shape[0], both.shape[1] // 2
        rows = np.arange(2 * n * hidden)
        rows = rows.reshape(n, hidden, 2).swapaxes(1, 2) if architecture.turned_experts else rows.reshape(n, 2, hidden)
        for half, part in enumerate(("gate_proj", "up_proj")):
            own, target = rows[:, half], name.replace("gate_up_proj", part)
            if name.endswith(".bias"):
                tensors[target] = apply(both, lambda x, own=own: x.reshape(-1)[own], (n, hidden))
            else:
                tensors[target] = select(both, own.reshape(-1), (n, hidden, both.k))


def to_halves(config: dict, rotated: int, tensors: dict[str, Tensor]) -> None:
    heads = config["n_heads"]
    if config["attention"] == "mla":
        nope, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
        q = (heads, nope + rotated, nope)
        layout = dict(q_proj=q, q_b_proj=q, kv_a_proj=(1, rank + rotated, rank))
    else:
        layout = dict(q_proj=(heads, config["head_dim"], 0), k_proj=(config["n_kv_heads"], config["head_dim"], 0))
    for name, tensor in tensors.items():
        heads, width, first = layout.get(name.split(".")[-2], (0, 0, 0))
        if heads and heads * width == tensor.n:  # a wrong shape is refused by check_shapes
            tensors[name] = select(tensor, neighbours_to_halves(heads, width, first, rotated), tensor.shape)


def expected_shapes(
    config: dict, architecture: Architecture, biased: list[str]
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every tensor of a model with this config: its shape, and whether it must be there (docs/model-file.md).

    biased: patterns of the biases that the config announces."""
    c = config
    dim, vocab = c["dim"], c["vocab_size"]
    shapes = {
        "embed_tokens.weight": ((vocab, dim), True),
        "lm_head.weight": ((vocab, dim), False),
        "lm_head.bias": ((vocab,), False),
        "norm.weight": ((dim,), True),
        "norm.bias": ((dim,), False),
        "position_embedding.weight": ((c["seq_len"], dim), False),
    }
    projections, norms = attention_shapes(config, architecture)
    for layer in range(c["n_layers"]):
        prefix = f"layers.{layer}."
        shapes |= modules_of(prefix, projections | dict(attention_norm=(dim,), mlp_norm=(dim,)))
        shapes |= modules_of(prefix, norms | dict(attention_post_norm=(dim,), mlp_post_norm=(dim,)), False, ("weight",))
        shapes |= {} if c["attention"] == "mla" else {prefix + "sinks": ((c["n_heads"],), False)}
        shapes |= mlp_shapes(config, layer)
    needs, lacks = (
        f"(^|[._])({pattern})$" for pattern in ("|".join([architecture.needs, *biased]), architecture.lacks)
    )
    return {
        name: (shape, required or bool(re.search(needs, name)))
        for name, (shape, required) in shapes.items()
        if not re.search(lacks, name)
    }


def modules_of(prefix: str, modules: dict, required: bool = True, suffixes=("weight", "bias")) -> dict:
    """{tensor name: (shape, required)}; a bias may always be missing."""
    return {
        f"{prefix}{module}.{suffix}": (
            shape if suffix == "weight" or len(shape) == 1 else shape[:-1],
            required and suffix == "weight",
        )
        for module, shape in modules.items()
        for suffix in suffixes
    }


def attention_shapes(config: dict, architecture: Architecture) -> tuple[dict, dict]:
    """({projection: shape}, {norm: shape}) of a layer"""
    c, dim, heads = config, config["dim"], config["n_heads"]
    if c["attention"] != "mla":
        q, kv = heads * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
        projections = dict(q_proj=(q, dim), k_proj=(kv, dim), v_proj=(kv, dim), o_proj=(dim, q))
        widths = (q, kv) if architecture.row_norms else (c["head_dim"], c["head_dim"])
        return projections, dict(q_norm=widths[:1], k_norm=widths[1:])
    rank, nope, rotated, v = (c[key] for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank, q = c["q_lora_rank"], heads * (nope + rotated)
    projections = dict(
        kv_a_proj=(rank + rotated, dim), w_uk=(heads, nope, rank), w_uv=(heads, v, rank), o_proj=(dim, heads * v)
    )
    projections |= dict(q_a_proj=(q_rank, dim), q_b_proj=(q, q_rank)) if q_rank else dict(q_proj=(q, dim))
    return projections, dict(kv_a_norm=(rank,)) | (dict(q_a_norm=(q_rank,)) if q_rank else {})


def mlp_shapes(config: dict, layer: int) -> dict:
    """Of a dense layer, or of one with experts."""
    c, dim, prefix = config, config["dim"], f"layers.{layer}."

    def mlp(hidden: int) -> dict:
        return dict(gate_proj=(hidden, dim), up_proj=(hidden, dim), down_proj=(dim, hidden))

    if not c.get("n_routed_experts") or not c["moe_layers"][layer]:
        return modules_of(prefix, mlp(c["hidden_dim"]))
    n, hidden = c["n_routed_experts"], c["moe_intermediate_size"]
    shapes = modules_of(prefix, dict(router=(n, dim))) | {prefix + "router.logit_bias": ((n,), False)}
    shapes |= modules_of(prefix + "experts.", {part: (n, *shape) for part, shape in mlp(hidden).items()})
    if c["n_shared_experts"]:
        shapes |= modules_of(prefix + "shared_experts.", mlp(c["n_shared_experts"] * hidden), suffixes=("weight",))
    return shapes


def tensors_of(
    source: Source, config: dict, architecture: Architecture, biased: list[str], tied: bool
) -> dict[str, Tensor]:
    """The tensors of a model of which the config is all there is: shapes without values."""
    expected = expected_shapes(config, architecture, biased)
    names = [name for name, (_, required) in expected.items() if required or (name == "lm_head.weight" and not tied)]
    types = {name: source.expert_type if ".experts." in name else source.type for name in names}
    return {name: Tensor(expected[name][0], types[name], no_values) for name in names}


def no_values(index: np.ndarray) -> Weight:
    raise ExportError("is a shape without values")


def check_shapes(
    source: Source, architecture: Architecture, config: dict, tensors: dict[str, Tensor], biased: list[str]
) -> None:
    expected = expected_shapes(config, architecture, biased)
    for name, tensor in tensors.items():
        if name not in expected:
            raise ExportError(
                f"{source.path}: tensor {name} {list(tensor.shape)} has no place in this architecture: "
                "export another checkpoint"
            )
        if tensor.shape != expected[name][0]:
            fields = next((FIELDS[part] for part in name.split(".") if part in FIELDS), "")
            raise ExportError(
                f"{source.path}: tensor {name} is {list(tensor.shape)}, {source.where.name} says "
                f"{list(expected[name][0])}{fields and f' ({fields})'}: fetch both again"
            )
    for name, (shape, required) in expected.items():
        if required and name not in tensors:
            raise ExportError(
                f"{source.path}: tensor {name} {list(shape)} is missing: fetch the checkpoint again, with all its files"
            )
