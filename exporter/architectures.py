"""Every architecture as data: what its config leaves out, and what its tensors mean. No other file names a model."""

from dataclasses import dataclass, field, replace

from exporter.errors import ExportError
from exporter.source import Source


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
    experts: dict = field(default_factory=dict)  # how experts are chosen, where the file has no say


LLAMA = dict(hidden_act="silu", tie_word_embeddings=False, rope_theta=10000.0, norm_eps=1e-6)
QWEN = LLAMA | dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None)
GEMMA3 = dict(
    vocab_size=262208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=131072,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    rope_theta=1e6,
    rope_local_base_freq=10000.0,
    norm_eps=1e-6,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    sliding_window_pattern=6,
    _sliding_window_pattern=None,
    layer_types=None,
    head_dim=256,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
GPT2 = dict(tie_word_embeddings=True, scale_attn_weights=True, norm_eps=1e-5)
DEEPSEEK = LLAMA | dict(
    num_experts=None,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_interleave=True,
)
MIXTRAL_MODULES = {"block_sparse_moe.gate": "router"}
QK_NORMS = r"[qk]_norm\.weight"
GPT2_NEEDS = r"(norm|[qkvo]_proj|up_proj|down_proj)\.bias|position_embedding\.weight"
GEMMA_MODULES = {"post_attention_layernorm": "attention_post_norm"}

ARCHITECTURES = {
    "llama": Architecture(LLAMA),
    "llama2c": Architecture(LLAMA | dict(norm_eps=1e-5), interleaved=True),
    "mistral": Architecture(LLAMA | dict(sliding_window=None, layer_types=None), windows="all"),
    "qwen2": Architecture(QWEN | dict(qkv_bias=True), windows="upper", needs=r"[qkv]_proj\.bias"),
    "qwen3": Architecture(QWEN | dict(head_dim=128, use_qk_norm=True), windows="upper", needs=QK_NORMS),
    "gemma3_text": Architecture(
        GEMMA3,
        windows="pattern",
        modules=GEMMA_MODULES,
        norm_plus_one=True,
        scaled_embedding=True,
        needs=QK_NORMS + r"|post_norm\.weight",
    ),
    "gpt2": Architecture(
        GPT2 | dict(hidden_act="gelu_new"), norm="layer", rotates=False, fused="blocks", conv1d=True, needs=GPT2_NEEDS
    ),
    "gpt_bigcode": Architecture(
        GPT2 | dict(hidden_act="gelu_pytorch_tanh", multi_query=True),
        norm="layer",
        rotates=False,
        fused="heads",
        needs=GPT2_NEEDS,
    ),
    "mixtral": Architecture(
        LLAMA | dict(norm_eps=1e-5, rope_theta=1e6, sliding_window=None, layer_types=None, num_experts=None),
        windows="all",
        modules=MIXTRAL_MODULES,
        experts=dict(norm_topk_prob=True),
    ),
    "qwen3_moe": Architecture(
        QWEN
        | dict(num_experts=None, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], use_qk_norm=True),
        windows="all",
        needs=QK_NORMS,
    ),
    "deepseek_v2": Architecture(
        DEEPSEEK
        | dict(
            n_shared_experts=2,
            norm_topk_prob=False,
            first_k_dense_replace=0,
            routed_scaling_factor=1.0,
        ),
        mla=True,
        interleaved=True,
        needs=r"_a_norm\.weight",
        experts=dict(group_score="max", scoring_func="softmax", topk_methods=("greedy", "group_limited_greedy")),
    ),
    "deepseek_v3": Architecture(
        DEEPSEEK
        | dict(
            n_shared_experts=1,
            norm_topk_prob=True,
            first_k_dense_replace=3,
            routed_scaling_factor=2.5,
            n_group=8,
            num_nextn_predict_layers=1,
            topk_group=4,
        ),
        mla=True,
        interleaved=True,
        needs=r"_a_norm\.weight",
        experts=dict(group_score="top2_sum", scoring_func="sigmoid", topk_methods=("noaux_tc",)),
    ),
}


def architecture_of(source: Source) -> tuple[Architecture, dict]:
    """The architecture and the config of its text part."""
    values = dict(source.config)
    text = values.pop("text_config", None)  # Gemma 3 with a vision tower, of which the text is exported
    values |= text if isinstance(text, dict) else {}
    name = values.get("model_type")
    name = "gemma3_text" if name == "gemma3" else name
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ExportError(
            f"{source.where}: model_type is {name!r}: known are {', '.join(ARCHITECTURES)}: export one of these"
        )
    if source.kind == "gguf":
        # ggml's converter has turned GPT-2's matrices and added 1 to Gemma's norms, and Llama rotates neighbours there.
        architecture = replace(
            architecture,
            conv1d=False,
            norm_plus_one=False,
            fused=architecture.fused and "blocks",
            interleaved=architecture.mla or source.metadata.get("general.architecture") == "llama",
        )
    return architecture, values
