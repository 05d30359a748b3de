"""Tiny checkpoints of tests/checkpoints.py as GGUF files, converted as llama.cpp's convert_hf_to_gguf.py does.

Names of tensors and of metadata come from the gguf package: its tables are the witness of ours.
"""

import math

import checkpoints
import gguf
import numpy as np

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "glm": gguf.MODEL_ARCH.CHATGLM,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_bigcode": gguf.MODEL_ARCH.STARCODER,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}
PERMUTED = ("llama", "mixtral", "smollm3", "granite", "granitemoe")


def arrays(reference):
    """name -> float32 array of a checkpoint; the experts of a layer stacked."""
    tensors = {}
    n_layers = reference["config"].get("num_hidden_layers")
    for name in reference["tensors"]:
        if name.endswith((".attn.bias", "inv_freq")) or f"layers.{n_layers}." in name:
            continue  # as the converter does: masks, tables, layers that predict several tokens
        dtype, array = checkpoints.stored(name, reference["tensors"], reference)
        tensors[name] = (
            (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)
        )
    for name in [name for name in tensors if ".experts.0." in name]:
        parts = [
            tensors.pop(name.replace(".experts.0.", f".experts.{i}.")) for i in range(experts(reference["config"]))
        ]
        part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        module = name.split(".experts.0.")[1].removesuffix(".weight")
        layer = name.split(".")[2]
        tensors[f"model.layers.{layer}.mlp.experts.{part.get(module, module)}.weight"] = np.stack(parts)
    return tensors


def experts(config):
    return config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")


def permute(x, heads):
    """Halves to neighbours, as convert_hf_to_gguf.py does for Llama."""
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def turned(name, x, config):
    """[(name, array)] as GGUF has them."""
    kind = config["model_type"]
    if kind in PERMUTED and "q_proj" in name:
        return [(name, permute(x, config["num_attention_heads"]))]
    if kind in PERMUTED and "k_proj" in name:
        return [(name, permute(x, config["num_key_value_heads"]))]
    if kind == "gpt2" and x.ndim == 2 and any(part in name for part in ("c_attn", "c_proj", "c_fc")):
        return [(name, x.T)]
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return [(name, x + 1)]
    if kind == "gpt_oss" and ".experts." in name:  # two of a kind take turns, matrices are [inputs, outputs]
        suffix = ".bias" if name.endswith("_bias") else ".weight"
        x = x if x.ndim == 2 else x.swapaxes(1, 2)
        stem = name.removesuffix("_bias")
        if "gate_up" not in stem:
            return [(stem + suffix, x)]
        return [(stem.replace("gate_up", part) + suffix, x[:, i::2]) for i, part in enumerate(("gate", "up"))]
    if name.endswith("input_linear.weight"):
        parts = zip(("w1", "w3"), np.split(x, 2, axis=1), strict=True)
        return [(name.replace("input_linear", f"experts.{part}"), half) for part, half in parts]
    if name.endswith(".sinks"):
        return [(name + ".weight", x)]
    if name.endswith("kv_b_proj.weight"):
        heads = config["num_attention_heads"]
        x = x.reshape(heads, -1, x.shape[-1])
        k, v = np.split(x, [config["qk_nope_head_dim"]], axis=1)
        return [(name.replace("kv_b", "k_b"), k.transpose(0, 2, 1)), (name.replace("kv_b", "v_b"), v)]
    return [(name, x)]


def write_config(w, c):
    get = lambda *keys: next((c[key] for key in keys if c.get(key) is not None), None)  # noqa: E731
    rows = [
        (w.add_block_count, get("num_hidden_layers", "n_layer")),
        (w.add_context_length, get("max_position_embeddings", "n_positions")),
        (w.add_embedding_length, get("hidden_size", "n_embd")),
        (w.add_feed_forward_length, get("intermediate_size", "n_inner") or 4 * c.get("n_embd", 0)),
        (w.add_head_count, get("num_attention_heads", "n_head")),
        (w.add_head_count_kv, 1 if c.get("multi_query") else get("num_key_value_heads")),
        (w.add_layer_norm_rms_eps, get("rms_norm_eps")),
        (w.add_layer_norm_eps, get("layer_norm_epsilon")),
        (w.add_rope_freq_base, get("rope_theta")),
        (w.add_sliding_window, get("sliding_window") if c["model_type"].startswith("gemma") else None),
        (w.add_sliding_window, (get("sliding_window") or 0) if c["model_type"] in ("phi3", "gpt_oss") else None),
        (w.add_sliding_window, get("sliding_window") if c["model_type"] == "olmo3" else None),
        (
            w.add_sliding_window_pattern,
            [layer_type == "sliding_attention" for layer_type in c["layer_types"]] if "layer_types" in c else None,
        ),
        (w.add_attn_logit_softcapping, get("attn_logit_softcapping")),
        (w.add_final_logit_softcapping, get("final_logit_softcapping")),
        (w.add_attention_scale, get("attention_multiplier")),
        (w.add_embedding_scale, get("embedding_multiplier")),
        (w.add_residual_scale, get("residual_multiplier")),
        (w.add_logit_scale, get("logits_scaling")),
        (w.add_expert_count, experts(c)),
        (w.add_expert_used_count, get("num_experts_per_tok")),
        (
            w.add_expert_feed_forward_length,
            get("moe_intermediate_size", *["intermediate_size"] * (c["model_type"] == "gpt_oss")),
        ),
    ]
    if "kv_lora_rank" in c:
        rows = [row for row in rows if row[0] != w.add_head_count_kv] + mla_rows(w, c)
    elif "head_dim" in c:
        rows += [(w.add_key_length, c["head_dim"]), (w.add_value_length, c["head_dim"])]
    for add, value in rows:
        if value is not None:
            add(value)
    write_rope(w, c)


def mla_rows(w, c):
    rope, rank = c["qk_rope_head_dim"], c["kv_lora_rank"]
    gating = (
        gguf.ExpertGatingFuncType.SIGMOID if c.get("scoring_func") == "sigmoid" else gguf.ExpertGatingFuncType.SOFTMAX
    )
    return [
        (w.add_head_count_kv, 1),
        (w.add_q_lora_rank, c.get("q_lora_rank")),
        (w.add_kv_lora_rank, rank),
        (w.add_key_length, rank + rope),
        (w.add_value_length, rank),
        (w.add_key_length_mla, c["qk_nope_head_dim"] + rope),
        (w.add_value_length_mla, c["v_head_dim"]),
        (w.add_rope_dimension_count, rope),
        (w.add_leading_dense_block_count, c["first_k_dense_replace"]),
        (w.add_expert_shared_count, c["n_shared_experts"]),
        (w.add_expert_weights_scale, c["routed_scaling_factor"]),
        (w.add_expert_weights_norm, c["norm_topk_prob"]),
        (w.add_expert_gating_func, gating),
        (w.add_expert_group_count, c.get("n_group")),
        (w.add_expert_group_used_count, c.get("topk_group")),
    ]


def write_rope(w, c):
    if "partial_rotary_factor" in c:
        head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
        w.add_rope_dimension_count(int(c["partial_rotary_factor"] * head_dim))
    scaling = c.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(kind))
        w.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        for add, key in (
            (w.add_rope_scaling_yarn_beta_fast, "beta_fast"),
            (w.add_rope_scaling_yarn_beta_slow, "beta_slow"),
            (w.add_rope_scaling_yarn_attn_factor, "attention_factor"),
        ):
            if key in scaling:
                add(scaling[key])
    if c["model_type"] == "phi3":
        original = c["original_max_position_embeddings"]
        w.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        w.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(c["max_position_embeddings"] / original) / math.log(original))
        )
        for length in ("long", "short"):
            factors = np.array(scaling[f"{length}_factor"], np.float32)
            w.add_tensor(f"rope_factors_{length}.weight", factors)
    if scaling.get("mscale_all_dim"):
        w.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def build(reference, path, factors=None, more=None):
    """Writes the file, in float32. factors: Llama 3's rope_freqs.weight; more(writer) adds other metadata."""
    config = reference["config"]
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config.get("num_hidden_layers") or config["n_layer"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    write_config(writer, config)
    if more:
        more(writer)
    for name, array in arrays(reference).items():
        for key, x in turned(name, array, config):
            key = key.replace("e_score_correction_bias", "e_score_correction.bias")
            target = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert target, key
            writer.add_tensor(target, np.ascontiguousarray(x, np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
