"""RoPE tables: inverse frequencies with any rope_scaling applied, and the factor on cos and sin.

In float32 and in Hugging Face's order (modeling_rope_utils.py): the table is the one that the model was run with.
"""

import math

import numpy as np

from exporter.config import Keys, is_number

LAYER_TYPES = ("full_attention", "sliding_attention")
LARGEST = {"rope_theta": 1e30, "original_max_position_embeddings": 1 << 31}
NEVER = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
KINDS = {  # rope_type -> its own parameters
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}
LISTS = ("short_factor", "long_factor")


def parameters(keys: Keys, layer_type: str, theta_key: str) -> dict:
    """The parameters of the layers of a type, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    theta, (name, chosen) = keys.get(theta_key), settings(keys, layer_type)
    chosen = {key: value for key, value in (chosen or {}).items() if value is not None}
    kind = chosen.get("rope_type", chosen.get("type", "default"))
    if kind in ("su", "yarn") and "long_factor" in chosen:  # what Phi-3's first configs call it
        kind = "longrope"
    if not isinstance(kind, str) or kind not in KINDS:
        keys.refuse(
            name,
            f"rope_type {kind!r} is not one of {', '.join(KINDS)} (kinds that depend on the length at run time "
            "are not supported): export a model without it",
        )
    for key, value in chosen.items():
        if key not in KINDS[kind] | NEVER:
            keys.refuse(name, f"{key} is not known for rope_type {kind!r}: export a model without it")
        most = LARGEST.get(key, 1e6)  # a table of float32 comes out of them
        if key not in ("type", "rope_type", "truncate", *LISTS) and not (
            is_number(value) and (value == 0 or 1e-6 <= value <= most)
        ):
            keys.refuse(name, f"{key} must be a positive number, {most:g} at most: fetch the file again")
    for key in {"factor", "low_freq_factor", "high_freq_factor", *LISTS} & KINDS[kind]:
        if not chosen.get(key) and (kind, key) != ("longrope", "factor"):
            keys.refuse(name, f"{key} is missing for rope_type {kind!r}: fetch the file again")
    if not isinstance(chosen.get("truncate", True), bool):
        keys.refuse(name, "truncate must be true or false: fetch the file again")
    for key in LISTS:
        factors = chosen.get(key, [1])
        if not isinstance(factors, list) or not all(is_number(x) and 0 < x < 1e9 for x in factors):
            keys.refuse(name, f"{key} must be a list of positive numbers: fetch the file again")
    rope = dict(
        max_position_embeddings=keys.positive("max_position_embeddings"),
        partial_rotary_factor=keys.number("partial_rotary_factor", 1),
        rope_theta=theta,
    )
    rope |= chosen | {"original_max_position_embeddings": original_length(keys, kind, chosen)}
    for key in ("rope_theta", "original_max_position_embeddings"):
        if not is_number(rope[key]) or not 1 < rope[key] <= LARGEST[key]:
            keys.refuse(name if key in chosen else theta_key, f"{key} must be a number above 1: fetch the file again")
    if kind == "llama3" and chosen["high_freq_factor"] <= chosen["low_freq_factor"]:
        keys.refuse(name, "high_freq_factor must be more than low_freq_factor: fetch the file again")
    return rope | {"rope_type": kind}


def original_length(keys: Keys, kind: str, chosen: dict):
    """The context before it was scaled. Where an architecture has a key of its own for it, that is the stronger; where
    it has not, transformers 5 does not look at it, and it must say the same or mean nothing to this kind of RoPE."""
    name = "original_max_position_embeddings"
    stated, default = keys.values.get(name), keys.get(name, keys.positive("max_position_embeddings"))
    used = chosen.get(name, default)
    if name in keys.defaults:
        return stated or used
    if kind in ("default", "linear") or stated == used:
        keys.read.add(name)
    return used


def settings(keys: Keys, layer_type: str) -> tuple[str, dict | None]:
    """The key that the layers of this type go by, and its object.

    As transformers 5 (convert_rope_params_to_dict): rope_scaling takes the place of rope_parameters where both are
    there. Where a model has two kinds of layers (Gemma 3), rope_parameters has an object for each, and rope_scaling
    changes that of full attention alone.
    """
    both = {key: keys.get(key) for key in ("rope_parameters", "rope_scaling")}
    if keys.values.get("rope_parameters") and not keys.values.get("rope_scaling"):
        both["rope_scaling"] = None  # an architecture's default stands for neither
    for key, value in both.items():
        if not isinstance(value, dict | None):
            keys.refuse(key, "must be an object: fetch the file again")
    given, scaling = both["rope_parameters"] or {}, both["rope_scaling"] or {}
    if not any(kind in given for kind in LAYER_TYPES):
        if scaling and layer_type == "full_attention":
            if given:
                keys.notes.append(f"rope_parameters of {keys.where.name}: not read, rope_scaling comes first")
            return "rope_scaling", scaling
        return "rope_parameters", given
    for kind, own in given.items():
        if kind not in LAYER_TYPES or not isinstance(own, dict | None):
            keys.refuse("rope_parameters", f"{kind} must be an object of {' or '.join(LAYER_TYPES)}: fetch it again")
    own = given.get(layer_type) or {}
    if scaling and layer_type == "full_attention":
        return "rope_scaling", own | scaling
    return "rope_parameters", own


def extended_context(rope: dict, seq_len: int) -> int:
    """The longest context, as vLLM derives it (_get_and_verify_max_len): YaRN's and linear scaling's factor times more.

    Llama 3's max_position_embeddings has the factor in it already.
    """
    if rope["rope_type"] == "yarn":
        return int(rope["original_max_position_embeddings"] * rope["factor"])
    return int(seq_len * rope["factor"]) if rope["rope_type"] == "linear" else seq_len


def rotated(keys: Keys, rope: dict, width: int) -> int:
    """Elements at the start of a head of `width` that rotate; GGUF counts them, Hugging Face has a factor."""
    n = keys.get("rope_dim", int(width * min(rope["partial_rotary_factor"], 2)))
    if n != width and "partial_rotary_factor" not in keys.defaults:
        name = "rope_dim" if keys.get("rope_dim") is not None else "partial_rotary_factor"
        keys.refuse(name, f"must be all of a head's {width} elements: export a model that rotates whole heads")
    if not isinstance(n, int) or not 0 < n <= width or n % 2:
        keys.refuse("partial_rotary_factor", f"{n!r} of {width} elements cannot rotate: fetch the file again")
    for key in LISTS:
        if len(rope.get(key, range(n // 2))) != n // 2:
            keys.refuse("rope_scaling", f"{key} must be {n // 2} numbers, half of the rotated: fetch the file again")
    return n


def table(rope: dict, dim: int, long: bool = False) -> tuple[np.ndarray, float]:
    """inv_freq [dim / 2] float32 and the factor on cos and sin, for heads of which dim elements rotate.

    long: for contexts beyond original_max_position_embeddings, where the kind makes a difference (longrope).
    """
    base = np.float32(rope["rope_theta"])
    inv_freq = 1 / base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    if rope["rope_type"] == "linear":
        return inv_freq / np.float32(rope["factor"]), 1.0
    if rope["rope_type"] == "llama3":
        return llama3(inv_freq, rope), 1.0
    if rope["rope_type"] == "yarn":
        return yarn(inv_freq, rope), yarn_attention_factor(rope)
    if rope["rope_type"] == "longrope":
        return inv_freq / np.float32(rope["long_factor" if long else "short_factor"]), longrope_attention_factor(rope)
    return inv_freq, 1.0


def llama3(inv_freq: np.ndarray, rope: dict) -> np.ndarray:
    """Long waves are slowed by the factor, short ones kept, those between interpolated (Llama 3.1)."""
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wave = np.float32(2 * math.pi) / inv_freq
    smooth = (length / wave - low) / (high - low)
    slowed = inv_freq / np.float32(rope["factor"])
    between = (1 - smooth) * slowed + smooth * inv_freq
    return np.where(wave > length / low, slowed, np.where(wave < length / high, inv_freq, between)).astype(np.float32)


def yarn(inv_freq: np.ndarray, rope: dict) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over the dimensions from kept to slowed by the factor."""
    n, length = len(inv_freq), rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        """The dimension that makes so many rotations over the original context."""
        return n * math.log(length / (rotations * 2 * math.pi)) / math.log(rope["rope_theta"])

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n - 1)
    ramp = np.clip((np.arange(n, dtype=np.float32) - low) / (high - low if high != low else 0.001), 0, 1)
    return (inv_freq / np.float32(rope["factor"]) * ramp + inv_freq * (1 - ramp)).astype(np.float32)


def yarn_mscale(factor: float, mscale: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def yarn_attention_factor(rope: dict) -> float:
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def longrope_attention_factor(rope: dict) -> float:
    """LongRoPE (arXiv 2402.13753) as Phi-3 has it: the factor is that of the contexts where it is not given."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    length = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or rope["max_position_embeddings"] / length
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))


def softmax_mscale(rope: dict) -> float:
    """DeepSeek's factor on the softmax scale (DeepseekV3Attention, yarn_apply_mscale): mscale_all_dim's, squared."""
    if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
