"""config.json of checkpoints as their makers published them: NAME -> (the longest context, the file)."""

COMMON = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
}


def config(model_type, layers, dim, hidden, heads, kv_heads, vocab, length, **rest):
    return (
        COMMON
        | dict(
            model_type=model_type,
            num_hidden_layers=layers,
            hidden_size=dim,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            max_position_embeddings=length,
        )
        | rest
    )


def llama(*sizes, **rest):
    return config("llama", *sizes, hidden_act="silu", rms_norm_eps=1e-5, pretraining_tp=1, **rest)


def llama3_rope(factor):
    return dict(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    )


def qwen(model_type, *sizes, windows, **rest):
    common = dict(hidden_act="silu", rms_norm_eps=1e-6, use_sliding_window=False, bos_token_id=151643)
    return config(model_type, *sizes, **common, max_window_layers=windows, eos_token_id=151645, **rest)


def qwen3(*sizes, **rest):
    common = dict(attention_bias=False, head_dim=128, rope_scaling=None, sliding_window=None, rope_theta=1000000)
    return qwen("qwen3", *sizes, windows=sizes[0], **common | rest)


def qwen3_moe(*sizes, chosen=8, n=128, width=768, **rest):
    experts = dict(num_experts=n, num_experts_per_tok=chosen, moe_intermediate_size=width, norm_topk_prob=True)
    experts |= dict(decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=False, router_aux_loss_coef=0.001)
    common = dict(attention_bias=False, head_dim=128, rope_scaling=None, sliding_window=None, rope_theta=1000000.0)
    return qwen("qwen3_moe", *sizes, windows=sizes[0], **common | experts | rest)


def gemma(model_type, *sizes, **rest):
    common = dict(attention_bias=False, bos_token_id=2, eos_token_id=1, pad_token_id=0, rms_norm_eps=1e-6)
    return config(model_type, *sizes, **common | dict(rope_theta=10000.0, head_dim=256) | rest)


def gemma3(*sizes, **rest):
    common = dict(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        cache_implementation="hybrid",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
    )
    return gemma("gemma3_text", *sizes, **common | rest)


def gemma3_vision(**text):
    return dict(
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        initializer_range=0.02,
        mm_tokens_per_image=256,
        model_type="gemma3",
        text_config=dict(model_type="gemma3_text", rope_scaling=dict(factor=8.0, rope_type="linear")) | text,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
        vision_config=dict(hidden_size=1152, image_size=896, model_type="siglip_vision_model", patch_size=14),
    )


def phi3(*sizes, **rest):
    common = dict(
        attention_bias=False,
        auto_map={
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    return config("phi3", *sizes, **common | rest)


def longrope(name, width):
    return dict(long_factor=[1.0 + i for i in range(width)], short_factor=[1.0] * width, type=name)


def olmo2(model_type, *sizes, **rest):
    common = dict(attention_bias=False, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=500000, pad_token_id=100277)
    return config(model_type, *sizes, **common | dict(tie_word_embeddings=False, clip_qkv=None) | rest)


def granite(model_type, *sizes, **rest):
    common = dict(attention_bias=False, hidden_act="silu", mlp_bias=False, rms_norm_eps=1e-5, rope_scaling=None)
    factors = dict(attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22)
    return config(model_type, *sizes, **common | factors | dict(logits_scaling=8.0, tie_word_embeddings=True) | rest)


def deepseek(model_type, *sizes, mscale, **rest):
    yarn = dict(beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096, type="yarn")
    common = dict(
        attention_bias=False,
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        hidden_act="silu",
        kv_lora_rank=512,
        moe_layer_freq=1,
        pretraining_tp=1,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rms_norm_eps=1e-6,
        rope_scaling=yarn | dict(mscale=mscale, mscale_all_dim=mscale),
        rope_theta=10000,
        tie_word_embeddings=False,
    )
    return config(model_type, *sizes, **common | rest)


def gpt2(layers, dim, heads, **rest):
    return (
        dict(
            activation_function="gelu_new",
            architectures=["GPT2LMHeadModel"],
            attn_pdrop=0.1,
            bos_token_id=50256,
            embd_pdrop=0.1,
            eos_token_id=50256,
            initializer_range=0.02,
            layer_norm_epsilon=1e-5,
            model_type="gpt2",
            n_ctx=1024,
            n_embd=dim,
            n_head=heads,
            n_layer=layers,
            n_positions=1024,
            resid_pdrop=0.1,
            summary_activation=None,
            summary_first_dropout=0.1,
            summary_proj_to_labels=True,
            summary_type="cls_index",
            summary_use_proj=True,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
            vocab_size=50257,
        )
        | rest
    )


def types(layers, every):
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])
DEEPSEEK_V3 = dict(
    ep_size=1,
    first_k_dense_replace=3,
    moe_intermediate_size=2048,
    n_group=8,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=8,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    quantization_config=FP8,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    topk_group=4,
    topk_method="noaux_tc",
)
GPT_OSS_YARN = dict(
    beta_fast=32.0,
    beta_slow=1.0,
    factor=32.0,
    original_max_position_embeddings=4096,
    rope_type="yarn",
    truncate=False,
)
OLMO3_YARN = dict(
    attention_factor=1.2079441541679836,
    beta_fast=32.0,
    beta_slow=1.0,
    factor=8.0,
    original_max_position_embeddings=8192,
    rope_type="yarn",
)

PUBLISHED = {
    "LLaMA-7B": (2048, llama(32, 4096, 11008, 32, 32, 32000, 2048, max_sequence_length=2048, pad_token_id=-1)),
    "Llama-2-7b": (4096, llama(32, 4096, 11008, 32, 32, 32000, 4096, rope_scaling=None, tie_word_embeddings=False)),
    "TinyLlama-1.1B-Chat": (2048, llama(22, 2048, 5632, 32, 4, 32000, 2048, attention_bias=False, rope_theta=1e4)),
    "CodeLlama-7b": (16384, llama(32, 4096, 11008, 32, 32, 32016, 16384, rope_theta=1000000)),
    "Meta-Llama-3-8B": (8192, llama(32, 4096, 14336, 32, 8, 128256, 8192, rope_theta=500000.0, rope_scaling=None)),
    "Llama-3.1-8B-Instruct": (
        131072,
        llama(
            *(32, 4096, 14336, 32, 8, 128256, 131072),
            attention_bias=False,
            eos_token_id=[128001, 128008, 128009],
            mlp_bias=False,
            rope_scaling=llama3_rope(8.0),
            rope_theta=500000.0,
            tie_word_embeddings=False,
        ),
    ),
    "Llama-3.2-1B": (
        131072,
        llama(
            *(16, 2048, 8192, 32, 8, 128256, 131072),
            head_dim=64,
            mlp_bias=False,
            rope_scaling=llama3_rope(32.0),
            rope_theta=500000.0,
            tie_word_embeddings=True,
            unsloth_fixed=True,
        ),
    ),
    "SmolLM2-135M": (
        8192,
        llama(
            *(30, 576, 1536, 9, 3, 49152, 8192),
            is_llama_config=True,
            mlp_bias=False,
            rope_interleaved=False,
            rope_scaling=None,
            rope_theta=100000,
            tie_word_embeddings=True,
            **{"transformers.js_config": {"dtype": "q4"}},
        ),
    ),
    "a Llama out of Qwen2": (
        32768,
        llama(
            *(24, 896, 4864, 14, 2, 151936, 32768),
            attention_bias=False,
            max_window_layers=24,
            original_max_position_embeddings=32768,
            sliding_window=32768,
            use_sliding_window=False,
        ),
    ),
    "Mistral-7B-v0.1": (
        32768,
        config(
            *("mistral", 32, 4096, 14336, 32, 8, 32000, 32768),
            hidden_act="silu",
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=4096,
            tie_word_embeddings=False,
        ),
    ),
    "Mistral-Nemo": (
        131072,
        config(
            *("mistral", 40, 5120, 14336, 32, 8, 131072, 131072),
            head_dim=128,
            hidden_act="silu",
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
    ),
    "Mixtral-8x22B": (
        65536,
        config(
            *("mixtral", 56, 6144, 16384, 48, 8, 32768, 65536),
            hidden_act="silu",
            num_experts_per_tok=2,
            num_local_experts=8,
            output_router_logits=False,
            rms_norm_eps=1e-5,
            rope_theta=1000000,
            router_aux_loss_coef=0.001,
            router_jitter_noise=0.0,
            sliding_window=None,
        ),
    ),
    "Qwen1.5-0.5B": (
        32768,
        qwen("qwen2", 24, 1024, 2816, 16, 16, 151936, 32768, windows=21, sliding_window=32768, rope_theta=1e6),
    ),
    "Qwen2.5-0.5B": (
        32768,
        qwen(
            *("qwen2", 24, 896, 4864, 14, 2, 151936, 32768),
            windows=24,
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=True,
            use_mrope=False,
        ),
    ),
    "QwQ-32B": (
        40960,
        qwen(*("qwen2", 64, 5120, 27648, 40, 8, 152064, 40960), windows=64, rope_theta=1000000.0, sliding_window=32768),
    ),
    "Qwen3-0.6B": (40960, qwen3(28, 1024, 3072, 16, 8, 151936, 40960, tie_word_embeddings=True)),
    "Qwen3-4B-Instruct-2507": (262144, qwen3(36, 2560, 9728, 32, 8, 151936, 262144, rope_theta=5000000)),
    "Qwen3-30B-A3B": (40960, qwen3_moe(48, 2048, 6144, 32, 4, 151936, 40960)),
    "Qwen3-Coder-30B-A3B": (
        262144,
        qwen3_moe(
            *(48, 2048, 6144, 32, 4, 151936, 262144),
            qkv_bias=False,
            rope_theta=10000000,
            shared_expert_intermediate_size=0,
            use_qk_norm=True,
        ),
    ),
    "Qwen3-235B-A22B": (40960, qwen3_moe(94, 4096, 12288, 64, 4, 151936, 40960, width=1536)),
    "gemma-2b": (8192, gemma("gemma", 18, 2048, 16384, 8, 1, 256000, 8192, hidden_act="gelu", rope_scaling=None)),
    "gemma-7b": (
        8192,
        gemma("gemma", 28, 3072, 24576, 16, 16, 256000, 8192, hidden_act="gelu", hidden_activation=None),
    ),
    "gemma-2-27b": (
        8192,
        gemma(
            *("gemma2", 46, 4608, 36864, 32, 16, 256000, 8192),
            _attn_implementation="eager",
            attn_logit_softcapping=50.0,
            cache_implementation="hybrid",
            final_logit_softcapping=30.0,
            head_dim=128,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=144,
            sliding_window=4096,
            sliding_window_size=4096,
        ),
    ),
    "gemma-3-270m": (
        32768,
        gemma3(
            *(18, 640, 2048, 4, 1, 262144, 32768),
            _sliding_window_pattern=6,
            layer_types=types(18, 6),
            use_bidirectional_attention=False,
        ),
    ),
    "gemma-3-1b-it": (32768, gemma3(26, 1152, 6912, 4, 1, 262144, 32768, sliding_window_pattern=6)),
    "gemma-3-4b-it": (
        131072,
        gemma3_vision(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024),
    ),
    "gemma-3-27b-it": (
        131072,
        gemma3_vision(
            head_dim=128,
            hidden_size=5376,
            intermediate_size=21504,
            num_attention_heads=32,
            num_hidden_layers=62,
            num_key_value_heads=16,
            query_pre_attn_scalar=168,
            sliding_window=1024,
        ),
    ),
    "Phi-3-mini-4k": (
        4096,
        phi3(32, 3072, 8192, 32, 32, 32064, 4096, original_max_position_embeddings=4096, sliding_window=2047),
    ),
    "Phi-3-mini-128k": (
        131072,
        phi3(
            *(32, 3072, 8192, 32, 32, 32064, 131072),
            original_max_position_embeddings=4096,
            rope_scaling=longrope("su", 48),
            sliding_window=262144,
        ),
    ),
    "phi-4": (
        16384,
        phi3(
            *(40, 5120, 17920, 40, 10, 100352, 16384),
            original_max_position_embeddings=16384,
            rope_theta=250000,
            sliding_window=None,
        ),
    ),
    "Phi-4-mini": (
        131072,
        phi3(
            *(32, 3072, 8192, 24, 8, 200064, 131072),
            full_attn_mod=1,
            interpolate_factor=1,
            lm_head_bias=False,
            mlp_bias=False,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            rope_scaling=longrope("longrope", 48),
            sliding_window=262144,
            tie_word_embeddings=True,
        ),
    ),
    "OLMo-2-1124-7B": (4096, olmo2("olmo2", 32, 4096, 11008, 32, 32, 100352, 4096, rope_scaling=None)),
    "OLMo-3-1025-7B": (
        65536,
        olmo2(
            *("olmo3", 32, 4096, 11008, 32, 32, 100278, 65536),
            layer_types=types(32, 4),
            rope_scaling=OLMO3_YARN,
            sliding_window=4096,
        ),
    ),
    "glm-4-9b-chat-hf": (
        131072,
        config(
            *("glm", 40, 4096, 13696, 32, 2, 151552, 131072),
            attention_bias=True,
            eos_token_id=[151329, 151336, 151338],
            head_dim=128,
            hidden_act="silu",
            partial_rotary_factor=0.5,
            rms_norm_eps=1.5625e-07,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        ),
    ),
    "GLM-4-9B-0414": (
        32768,
        config(
            *("glm4", 40, 4096, 13696, 32, 2, 151552, 32768),
            attention_bias=False,
            head_dim=128,
            hidden_act="silu",
            partial_rotary_factor=0.5,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        ),
    ),
    "SmolLM3-3B": (
        65536,
        config(
            *("smollm3", 36, 2048, 11008, 16, 4, 128256, 65536),
            attention_bias=False,
            hidden_act="silu",
            layer_types=["full_attention"] * 36,
            max_window_layers=28,
            mlp_bias=False,
            no_rope_layer_interval=4,
            no_rope_layers=[int((i + 1) % 4 != 0) for i in range(36)],
            pretraining_tp=2,
            rms_norm_eps=1e-6,
            rope_scaling=None,
            rope_theta=5000000.0,
            sliding_window=None,
            use_sliding_window=False,
        ),
    ),
    "granite-3.3-2b": (131072, granite("granite", 40, 2048, 8192, 32, 8, 49159, 131072, rope_theta=10000000.0)),
    "granite-3.1-1b-a400m": (
        131072,
        granite(
            *("granitemoe", 24, 1024, 512, 16, 8, 49155, 131072),
            num_experts_per_tok=8,
            num_local_experts=32,
            output_router_logits=False,
            rope_theta=1500000.0,
            router_aux_loss_coef=0.0,
        ),
    ),
    "DeepSeek-V2-Lite": (
        163840,
        deepseek(
            *("deepseek_v2", 27, 2048, 10944, 16, 16, 102400, 163840),
            mscale=0.707,
            aux_loss_alpha=0.001,
            first_k_dense_replace=1,
            moe_intermediate_size=1408,
            n_group=1,
            n_routed_experts=64,
            n_shared_experts=2,
            norm_topk_prob=False,
            num_experts_per_tok=6,
            q_lora_rank=None,
            routed_scaling_factor=1.0,
            scoring_func="softmax",
            seq_aux=True,
            topk_group=1,
            topk_method="greedy",
        ),
    ),
    "DeepSeek-V3": (
        163840,
        deepseek("deepseek_v3", 61, 7168, 18432, 128, 128, 129280, 163840, mscale=1.0, **DEEPSEEK_V3),
    ),
    "DeepSeek-V3.1": (
        163840,
        deepseek(
            *("deepseek_v3", 61, 7168, 18432, 128, 128, 129280, 163840),
            mscale=1.0,
            **DEEPSEEK_V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
        ),
    ),
    "gpt-oss-20b": (
        131072,
        config(
            *("gpt_oss", 24, 2880, 2880, 64, 8, 201088, 131072),
            attention_bias=True,
            eos_token_id=200002,
            experts_per_token=4,
            head_dim=64,
            hidden_act="silu",
            initial_context_length=4096,
            layer_types=types(24, 2),
            num_experts_per_tok=4,
            num_local_experts=32,
            output_router_logits=False,
            pad_token_id=199999,
            quantization_config=dict(modules_to_not_convert=["model.embed_tokens"], quant_method="mxfp4"),
            rms_norm_eps=1e-5,
            rope_scaling=GPT_OSS_YARN,
            rope_theta=150000,
            router_aux_loss_coef=0.9,
            sliding_window=128,
            swiglu_limit=7.0,
            tie_word_embeddings=False,
        ),
    ),
    "gpt2": (1024, gpt2(12, 768, 12)),
    "gpt2-xl": (1024, gpt2(48, 1600, 25, output_past=True)),
    "distilgpt2": (1024, gpt2(6, 768, 12, _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})),
    "starcoder": (
        8192,
        gpt2(
            *(40, 6144, 48),
            activation_function="gelu",
            attention_softmax_in_fp32=True,
            inference_runner=0,
            max_batch_size=None,
            max_sequence_length=None,
            model_type="gpt_bigcode",
            multi_query=True,
            n_ctx=8192,
            n_inner=24576,
            n_positions=8192,
            pad_key_length=True,
            pre_allocate_kv_cache=False,
            scale_attention_softmax_in_fp32=True,
            scale_attn_weights=True,
            validate_runner_input=True,
            vocab_size=49152,
        ),
    ),
}
