"""Tensor names: from Hugging Face's and GGUF's to the model file's, or to those of parts to be split or stacked."""

import re

from exporter.architectures import Architecture
from exporter.errors import ExportError
from exporter.source import Source
from exporter.weights import Tensor

MODULES = {  # Hugging Face's names inside a layer
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "self_attn.kv_a_proj_with_mqa": "kv_a_proj",
    "self_attn.kv_a_layernorm": "kv_a_norm",
    "self_attn.q_a_layernorm": "q_a_norm",
    "self_attn.sinks": "sinks",
    "mlp.gate": "router",
    "mlp.router": "router",
    "mlp.gate.e_score_correction_bias": "router.bias",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_attn": "qkv_proj",
    "attn.c_proj": "o_proj",
    "mlp.c_fc": "up_proj",
    "mlp.c_proj": "down_proj",
} | {
    f"self_attn.{name}": name
    for name in (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"),
        *("q_a_proj", "q_b_proj", "kv_b_proj"),
    )
}
TOP = {
    "embed_tokens": "embed_tokens",
    "norm": "norm",
    "lm_head": "lm_head",
    "wte": "embed_tokens",
    "wpe": "position_embedding",
    "ln_f": "norm",
}
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
    "attn_sinks": "sinks",
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
    "exp_probs_b": "router.bias",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_gate_shexp": "shared_experts.gate_proj",
    "ffn_up_shexp": "shared_experts.up_proj",
    "ffn_down_shexp": "shared_experts.down_proj",
}
GGUF_TOP = {
    "token_embd": "embed_tokens",
    "position_embd": "position_embedding",
    "output_norm": "norm",
    "output": "lm_head",
    "rope_freqs": "rope_freqs",
}
IGNORED = re.compile(
    r"^freq_cis$|^rope_factors_(short|long)\.weight$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    r"|\.attn\.(masked_)?bias$|(^|\.)position_ids$|^(model\.)?(vision_tower|multi_modal_projector)\."
)
EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(?:(\d+)\.)?(.+)")
WHOLE_NAMES = ("router.bias", "sinks")  # in the model file, with neither .weight nor .bias after them
EXPERT_MODULES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def canonical_name(source: Source, architecture: Architecture, name: str) -> str | None:
    """The model file's name of a source's tensor (or of a part to be split or stacked); None where it is not known."""
    if source.kind == "llama2c":
        return name
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        stem, suffix = name, "weight"
    if source.kind == "gguf":
        layer, modules, top = re.fullmatch(r"blk\.(\d+)\.(.+)", stem), GGUF_MODULES | architecture.modules, GGUF_TOP
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
        if part.endswith("_bias"):
            part, suffix = part.removesuffix("_bias"), "bias"
        module = ".".join(filter(None, ("experts", number, EXPERT_MODULES.get(part, part))))
    elif source.kind == "hf" and re.fullmatch(r"mlp\.(shared_experts\.)?(gate|up|gate_up|down)_proj", module):
        module = module.removeprefix("mlp.")
    else:
        return None
    if module in WHOLE_NAMES:
        return f"layers.{index}.{module}"
    if (module, suffix) == ("router", "bias"):
        suffix = "logit_bias"  # of its logits; router.bias is one of the choice alone
    return f"layers.{index}.{module}.{suffix}"


def canonical_tensors(source: Source, architecture: Architecture, n_layers: int, ahead: int) -> dict[str, Tensor]:
    """ahead: layers after the last that predict several tokens at once (DeepSeek V3), and are left out."""
    tensors = {}
    for name, tensor in source.tensors.items():
        layer = re.search(r"(?:layers|h|blk)\.(\d+)\.", name)
        if IGNORED.search(name) or (layer and n_layers <= int(layer[1]) < n_layers + ahead):
            continue
        if tensor.problem:
            raise ExportError(tensor.problem)
        target = canonical_name(source, architecture, name)
        if target is None:
            raise ExportError(
                f"{source.path}: tensor {name} is not known for this architecture: export another checkpoint"
            )
        if target in tensors:
            raise ExportError(f"{source.path}: tensor {name} is there twice, as {target}: remove one")
        tensors[target] = tensor
    return tensors
