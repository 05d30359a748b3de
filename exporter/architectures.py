"""Every architecture as data: what its config leaves out, and what its tensors mean. No other file names a model."""

from dataclasses import dataclass, field, replace

from exporter.errors import ExportError, shown
from exporter.source import Source


@dataclass(frozen=True)
class Architecture:
    """defaults: of Hugging Face's config class, for keys that a config.json leaves out."""

    defaults: dict
    norm: str = "rms"
    rotates: bool = True
    modules: dict = field(default_factory=dict)  # module names that mean something else than in MODULES
    gguf_modules: dict = field(default_factory=dict)  # the same for GGUF_MODULES
    fused: str = ""  # layout of qkv_proj's rows: 'blocks' (all q, all k, all v) or 'heads' (q, k, v of each head)
    conv1d: bool = False  # linear layers are stored [inputs, outputs]
    interleaved: bool = False  # RoPE rotates neighbours, not halves
    gguf_interleaved: bool = False  # the same for GGUF, where some architectures are kept in another order
    row_norms: bool = False  # q_norm and k_norm run over the whole row, not over each head
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    local_theta: str = ""  # key of the sliding layers' own rope_theta, which no rope_scaling changes; "": as all layers
    windows: str = "none"  # 'none', 'all', 'upper' (from max_window_layers), 'pattern', 'unrotated' (without RoPE)
    mla: bool = False
    needs: str = "$"  # names of tensors, beyond those of every model, that must be there
    lacks: str = "$"  # names of tensors of other models that must not
    biased: str = r"[qkvo]_proj"  # what attention_bias gives a bias
    experts: dict = field(default_factory=dict)  # how experts are chosen, where the file has no say
    turned_experts: bool = False  # stored [expert, inputs, outputs], the outputs of gate and up taking turns


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
GEMMA = dict(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, rope_theta=10000.0, norm_eps=1e-6, head_dim=256)
GEMMA2 = GEMMA | dict(
    query_pre_attn_scalar=256,
    sliding_window=4096,
    sliding_window_pattern=2,
    layer_types=None,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
PHI3 = LLAMA | dict(
    norm_eps=1e-5, sliding_window=None, partial_rotary_factor=1.0, original_max_position_embeddings=4096
)
GLM = LLAMA | dict(norm_eps=1.5625e-7, head_dim=128, partial_rotary_factor=0.5, attention_bias=True)
SMOLLM3 = LLAMA | dict(
    tie_word_embeddings=True,
    rope_theta=2e6,
    use_sliding_window=False,
    sliding_window=None,
    max_window_layers=None,
    layer_types=None,
    no_rope_layers=None,
    no_rope_layer_interval=4,
)
OLMO3 = LLAMA | dict(
    norm_eps=1e-5, rope_theta=500000.0, sliding_window=4096, sliding_window_pattern=4, layer_types=None
)
GRANITE = LLAMA | dict(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
GPT_OSS = LLAMA | dict(
    norm_eps=1e-5,
    rope_theta=150000.0,
    rope_scaling=dict(
        rope_type="yarn",
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=4096,
    ),
    head_dim=64,
    attention_bias=True,
    sliding_window=128,
    sliding_window_pattern=2,
    layer_types=None,
    num_experts=128,
    num_experts_per_tok=4,
    swiglu_limit=7.0,
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
A_NORMS = r"(kv|q)_a_norm\.weight"
GPT2_NEEDS = r"(norm|[qkvo]_proj|up_proj|down_proj)\.bias|position_embedding\.weight"
GATE = r"gate_proj\.(weight|bias)"
GEMMA_MODULES = {"post_attention_layernorm": "attention_post_norm"}
POST_NORMS = r"(attention|mlp)_post_norm\.weight"
GLM4_MODULES = {"post_self_attn_layernorm": "attention_post_norm", "post_mlp_layernorm": "mlp_post_norm"}
GRANITE_MODULES = {
    "block_sparse_moe.router.layer": "router",
    "block_sparse_moe.input_linear": "experts.gate_up_proj",
    "block_sparse_moe.output_linear": "experts.down_proj",
}
FUSED_UP = {"ffn_up": "gate_up_proj"}

ARCHITECTURES = {
    "llama": Architecture(LLAMA, gguf_interleaved=True),
    "llama2c": Architecture(LLAMA | dict(norm_eps=1e-5), interleaved=True),
    "mistral": Architecture(LLAMA | dict(sliding_window=None, layer_types=None), windows="all"),
    "qwen2": Architecture(QWEN | dict(qkv_bias=True), windows="upper", needs=r"[qkv]_proj\.bias"),
    "qwen3": Architecture(QWEN | dict(head_dim=128, use_qk_norm=True), windows="upper", needs=QK_NORMS),
    "gemma": Architecture(GEMMA, norm_plus_one=True, scaled_embedding=True),
    "gemma2": Architecture(
        GEMMA2,
        windows="pattern",
        modules=GEMMA_MODULES,
        norm_plus_one=True,
        scaled_embedding=True,
        needs=POST_NORMS,
    ),
    "gemma3_text": Architecture(
        GEMMA3,
        local_theta="rope_local_base_freq",
        windows="pattern",
        modules=GEMMA_MODULES,
        norm_plus_one=True,
        scaled_embedding=True,
        needs=f"{QK_NORMS}|{POST_NORMS}",
    ),
    "phi3": Architecture(PHI3, windows="all", fused="blocks", gguf_modules=FUSED_UP),
    "olmo2": Architecture(
        LLAMA | dict(norm_eps=1e-5),
        modules=GEMMA_MODULES,
        row_norms=True,
        needs=f"{QK_NORMS}|{POST_NORMS}",
        lacks=r"(attention|mlp)_norm\.weight",
    ),
    "olmo3": Architecture(
        OLMO3,
        modules=GEMMA_MODULES,
        row_norms=True,
        local_theta="rope_theta",
        windows="pattern",
        needs=f"{QK_NORMS}|{POST_NORMS}",
        lacks=r"(attention|mlp)_norm\.weight",
    ),
    "glm": Architecture(
        GLM,
        gguf_modules=FUSED_UP,
        fused="blocks",
        interleaved=True,
        gguf_interleaved=True,
        biased="[qkv]_proj",
    ),
    "glm4": Architecture(
        GLM,
        fused="blocks",
        modules=GLM4_MODULES,
        gguf_modules=FUSED_UP,
        interleaved=True,
        gguf_interleaved=True,
        needs=POST_NORMS,
        biased="[qkv]_proj",
    ),
    "smollm3": Architecture(SMOLLM3, windows="unrotated", gguf_interleaved=True),
    "granite": Architecture(GRANITE, gguf_interleaved=True),
    "granitemoe": Architecture(
        GRANITE | dict(num_experts=8, num_experts_per_tok=2),
        modules=GRANITE_MODULES,
        gguf_interleaved=True,
        experts=dict(norm_topk_prob=True),
    ),
    "gpt2": Architecture(
        GPT2 | dict(hidden_act="gelu_new"),
        norm="layer",
        rotates=False,
        fused="blocks",
        conv1d=True,
        needs=GPT2_NEEDS,
        lacks=GATE,
    ),
    "gpt_bigcode": Architecture(
        GPT2 | dict(hidden_act="gelu_pytorch_tanh", multi_query=True),
        norm="layer",
        rotates=False,
        fused="heads",
        needs=GPT2_NEEDS,
        lacks=GATE,
    ),
    "mixtral": Architecture(
        LLAMA | dict(norm_eps=1e-5, rope_theta=1e6, sliding_window=None, layer_types=None, num_experts=None),
        windows="all",
        modules=MIXTRAL_MODULES,
        gguf_interleaved=True,
        experts=dict(norm_topk_prob=True),
    ),
    "qwen3_moe": Architecture(
        QWEN
        | dict(num_experts=None, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], use_qk_norm=True),
        windows="all",
        needs=QK_NORMS,
    ),
    "gpt_oss": Architecture(
        GPT_OSS,
        windows="pattern",
        gguf_modules={"post_attention_norm": "mlp_norm"},
        needs=r"sinks|router\.logit_bias|(gate|up|down)_proj\.bias",
        experts=dict(norm_topk_prob=True),
        turned_experts=True,
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
        gguf_interleaved=True,
        biased="(kv_a|q_a|o)_proj",
        needs=A_NORMS,
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
        gguf_interleaved=True,
        biased="(kv_a|q_a|o)_proj",
        needs=A_NORMS,
        experts=dict(group_score="top2_sum", scoring_func="sigmoid", topk_methods=("noaux_tc",)),
    ),
}


def architecture_of(source: Source) -> tuple[Architecture, dict]:
    """The architecture and the config of its text part."""
    values = dict(source.config)
    text = values.pop("text_config", None)  # Gemma 3 with a vision tower, of which the text is exported
    if not isinstance(text, dict | None):
        raise ExportError(f"{source.where}: text_config is {shown(text)}: must be an object: fetch the file again")
    values |= text or {}
    name = values.get("model_type")
    name = "gemma3_text" if name == "gemma3" else name
    if name == "gemma" and values.get("hidden_act") == "gelu":  # its first release says so and means tanh's form
        values["hidden_act"] = GEMMA["hidden_act"]
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ExportError(
            f"{source.where}: model_type is {shown(name)}: known are {', '.join(ARCHITECTURES)}: export one of these"
        )
    if source.kind == "gguf":
        # ggml's converter has turned GPT-2's matrices and added 1 to Gemma's norms.
        architecture = replace(
            architecture,
            conv1d=False,
            norm_plus_one=False,
            fused=architecture.fused and "blocks",
            interleaved=architecture.gguf_interleaved,
            modules=architecture.gguf_modules,
            turned_experts=False,
        )
    return architecture, values
