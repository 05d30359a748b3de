"""Exact rewrites of attention: the same model in another layout of its KV cache (--as).

mha, gqa:G   Each KV head is repeated for the heads that shared it. A norm of each head is the same for all heads, so it
             needs no change; a norm of the whole row is repeated with it, and its mean stays what it was.
mla          One row a token, as wide as all KV heads' K and V together: the values are the latent, the rotated keys are
             the rope part that all heads share. A query is padded with zeros but for its own KV head's slice, so that
             it sees that head's key alone; w_uv picks that head's slice of the latent. There is no part without
             rotation, and a norm of the latent that is not there is not computed. Windows and soft caps need no change;
             norms of keys are refused. Nothing is compressed: that, MLA learns by training.
"""

import argparse
import re

import numpy as np

from exporter.errors import ExportError
from exporter.hyperparameters import variant
from exporter.model import Model
from exporter.weights import Tensor, concat, of_array, select

NOPE = 16  # the loader wants a part without rotation: one vector of zeros


def parse(text: str) -> tuple[str, int]:
    """'mha', 'gqa:G' or 'mla' -> (variant, G or 0)."""
    kind, _, groups = text.partition(":")
    if text in ("mha", "mla"):
        return text, 0
    if kind == "gqa" and re.fullmatch("[1-9][0-9]{0,5}", groups):
        return kind, int(groups)
    raise argparse.ArgumentTypeError(f"{text!r}: must be mha, mla or gqa:G with a number G of KV heads, as in gqa:4")


def rewrite(model: Model, kind: str, groups: int) -> Model:
    c = model.config
    if c["attention"] == "mla":
        raise ExportError(f"--as {kind}: attention is mla: only mha, mqa and gqa can be rewritten: leave --as out")
    return as_mla(model) if kind == "mla" else repeat_heads(model, groups or c["n_heads"])


def repeat_heads(model: Model, groups: int) -> Model:
    c = model.config
    heads, have, width = c["n_heads"], c["n_kv_heads"], c["head_dim"]
    if groups % have or heads % groups:
        raise ExportError(
            f"--as gqa:{groups}: n_kv_heads is {have}: G must be a multiple of it and divide n_heads, {heads}"
        )
    rows = np.arange(have * width).reshape(have, width).repeat(groups // have, axis=0).reshape(-1)
    tensors = {}
    for name, tensor in model.tensors.items():
        module = name.split(".")[-2]
        repeated = module in ("k_proj", "v_proj") or (module == "k_norm" and tensor.n == len(rows) * have // groups)
        tensors[name] = select(tensor, rows) if repeated else tensor
    config = c | {"n_kv_heads": groups}
    return Model(config | {"attention": variant(config)}, tensors)


def as_mla(model: Model) -> Model:
    c = model.config
    heads, groups, width = c["n_heads"], c["n_kv_heads"], c["head_dim"]
    norm = next((name for name in model.tensors if name.endswith(("q_norm.weight", "k_norm.weight"))), None)
    if norm:
        raise ExportError(
            f"--as mla: {norm}: a norm of each head's keys has no place in a latent row: use --as mha or gqa:G"
        )
    if any(name.endswith(".sinks") for name in model.tensors):
        raise ExportError("--as mla: a model with attention sinks has no form as mla: use --as mha or gqa:G")
    for name in model.tensors:  # a row of the latent is biased whole
        other = name.replace("k_proj", "v_proj") if "k_proj" in name else name.replace("v_proj", "k_proj")
        if other not in model.tensors:
            raise ExportError(f"--as mla: tensor {name} is there but {other} is not: use --as mha or gqa:G")
    latent = groups * width
    # RoPE rotates the halves of the whole row: first the first halves of all heads, then their second halves, then what
    # does not rotate.
    half = next((tensor.n for name, tensor in model.tensors.items() if name.endswith(".inv_freq")), width // 2)
    head_rows = np.arange(latent).reshape(groups, width)
    parts = np.split(head_rows, [half, 2 * half], axis=1)
    k_rows = np.concatenate([part.reshape(-1) for part in parts])
    q_rows = np.full((heads, NOPE + latent), -1)
    for head in range(heads):
        group = head // (heads // groups)
        own = k_rows // width == group
        q_rows[head, NOPE:][own] = head * width + k_rows[own] % width
    w_uv = np.zeros((heads, width, latent))
    for head in range(heads):
        group = head // (heads // groups)
        w_uv[head, :, group * width : (group + 1) * width] = np.eye(width)
    constants = {"w_uk": zero_or_one(np.zeros((heads, NOPE, latent))), "w_uv": zero_or_one(w_uv)}

    tensors = {}
    for name, tensor in model.tensors.items():
        module = name.split(".")[-2]
        if module == "q_proj":
            tensors[name] = select(tensor, q_rows.reshape(-1))
        elif module == "k_proj":
            values = model.tensors[name.replace("k_proj", "v_proj")]
            tensors[name.replace("k_proj", "kv_a_proj")] = concat([values, select(tensor, k_rows)])
        elif name.startswith("rope."):
            tensors[name] = of_array(np.tile(tensor.float32(), groups))
        elif module != "v_proj":
            tensors[name] = tensor
    for layer in range(c["n_layers"]):
        tensors |= {f"layers.{layer}.{name}.weight": tensor for name, tensor in constants.items()}
    config = {"attention": "mla"} | {key: c[key] for key in c if key not in ("attention", "n_kv_heads", "head_dim")}
    widths = dict(q_lora_rank=0, kv_lora_rank=latent, qk_nope_head_dim=NOPE, qk_rope_head_dim=latent, v_head_dim=width)
    return Model(config | widths, tensors)


def zero_or_one(array: np.ndarray) -> Tensor:
    tensor = of_array(array)
    tensor.keep = "f16"
    return tensor
