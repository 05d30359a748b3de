"""Makes tests/reference: what transformers (float32, CPU) computes for the models that the tests run.

    python tests/make_reference.py tiny [NAME ...]                  random tiny checkpoints, one or more an architecture
    python tests/make_reference.py real NAME=GGUF ...               greedy text and perplexity of real models
    python tests/make_reference.py bundled build/train              the same of models/tiny-*, from train.py's folder

Needs torch and transformers; the tests need neither. A tiny model is accepted only if
  - the same model in float64 agrees to a fifth of what the tests allow, which is then more than rounding does; and no
    expert is chosen by a hair's breadth;
  - every feature it is there for matters: without it (`matters` below) the logits move by 200 times the tolerance;
  - the text that it writes is not decided by near-ties and does not repeat one token.
"""

import copy
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).resolve().parent))
import checkpoints

TOLERANCE = 5e-5  # of the largest logit: what test_reference.py allows
N_GREEDY = 16
PROMPTS = [
    "The quick brown fox jumps over the lazy dog; 0123456789 times?",
    "for (int i = 0; i < n; i++) x[i] += y[i] * 3.14;  // done",
    "To be, or not to be: that is the Question!",
    "Once upon a time, in a land far, far away, lived (at 42) a Queen.",
    "SELECT name, size FROM files WHERE size > 1e6;",
]

# Keys of the Hub's configs that change nothing; every model carries them.
NO_EFFECT = {
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "initializer_range": 0.02,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "vocab_size": checkpoints.VOCAB_SIZE,
}
NORMS = {"norms": (r"layernorm.weight|norm.weight", 1.0)}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 3.0, 7.0, 12.0, 20.0],
}
DEEPSEEK_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


def gpt2(**changes):
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_positions": 128,
        "n_ctx": 128,
        "n_embd": 96,
        "n_head": 3,
        "n_layer": 3,
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    } | changes


def bigcode(**changes):
    return {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "activation_function": "gelu_pytorch_tanh",
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "multi_query": True,
        "n_positions": 128,
        "n_embd": 160,
        "n_head": 2,
        "n_inner": 320,
        "n_layer": 2,
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "scale_attn_weights": True,
        "inference_runner": 0,
        "max_batch_size": None,
        "max_sequence_length": None,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "validate_runner_input": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
    } | changes


def llama(model_type="llama", **changes):
    architecture = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "model_type": model_type,
        "architectures": [f"{architecture[model_type]}ForCausalLM"],
        "hidden_size": 96,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    } | changes


def gemma3(**changes):
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 12,
        "sliding_window_pattern": 3,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "pad_token_id": 0,
    } | changes


def gemma(**changes):
    own = ("sliding_window", "sliding_window_pattern", "query_pre_attn_scalar", "rope_local_base_freq")
    own += ("attn_logit_softcapping", "final_logit_softcapping", "cache_implementation", "rope_scaling")
    first = {key: value for key, value in gemma3().items() if key not in own}
    return first | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "rope_theta": 10000.0} | changes


def gemma2(**changes):
    second = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "cache_implementation": "hybrid",
    }
    return gemma(num_key_value_heads=2) | second | changes


def phi3(**changes):
    fused = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rope_scaling": None,
        "sliding_window": None,
        "pad_token_id": 0,
    }
    return llama() | fused | changes


def phi4_mini(**changes):
    """Three quarters of a head rotate; at more than original_max_position_embeddings the long factors hold."""
    own = {
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "tie_word_embeddings": True,
        "interpolate_factor": 1,
        "full_attn_mod": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "sliding_window": 262144,
    }
    return phi3() | own | changes


def olmo2(**changes):
    own = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "pad_token_id": 0}
    return llama(num_key_value_heads=3) | own | changes


def glm(model_type, **changes):
    own = {
        "model_type": model_type,
        "architectures": ["Glm4ForCausalLM" if model_type == "glm4" else "GlmForCausalLM"],
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
    }
    return llama() | own | changes


def smollm3(**changes):
    own = {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "num_hidden_layers": 5,
        "attention_bias": False,
        "mlp_bias": False,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "pad_token_id": 0,
        "pretraining_tp": 2,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }
    return llama() | own | changes


def granite(**changes):
    own = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 4.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 5.0,
        "pad_token_id": 0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    return llama() | own | changes


def gpt_oss(**changes):
    own = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "head_dim": 32,
        "hidden_size": 96,
        "initial_context_length": 64,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rope_scaling": {
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 12,
        "swiglu_limit": 0.8,
    }
    return llama() | own | changes


def deepseek_v2(**changes):
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "hidden_size": 96,
        "intermediate_size": 136,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": None,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 32,
        "v_head_dim": 40,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 40,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "pretraining_tp": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 2560,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    } | changes


def deepseek_v3(**changes):
    v3 = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "q_lora_rank": 56,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "ep_size": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    }
    return deepseek_v2() | v3 | changes


def mixtral(**changes):
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "output_router_logits": False}
    return llama("mixtral", sliding_window=None, router_aux_loss_coef=0.02, **experts) | changes


def qwen3_moe(**changes):
    experts = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    qwen3 = {"head_dim": 32, "attention_bias": False, "use_sliding_window": False, "sliding_window": None}
    return llama("qwen3", max_window_layers=2, rms_norm_eps=1e-6, **qwen3) | experts | changes


# name -> config; what must matter: a change of config, or (tensors, the value that undoes them); and how it is stored.
MODELS = {
    "gpt2": {
        "config": gpt2(),
        "matters": {
            "positions": ("wpe", 0.0),
            "biases": (r"\.bias", 0.0),
            "activation": {"activation_function": "relu"},
        },
        "strip": "transformer.",  # as OpenAI's own checkpoint names them, with the masks it holds
        "extra": {f"h.{i}.attn.bias": [1, 1, 128, 128] for i in range(3)},
    },
    "gpt2_inner": {
        "config": gpt2(n_inner=152, activation_function="gelu", n_head=2, layer_norm_epsilon=1e-3),
        "matters": {"eps": {"layer_norm_epsilon": 0.1}},
        "dtype": "F16",
    },
    "bigcode_mqa": {"config": bigcode(), "matters": {"biases": (r"\.bias", 0.0), "positions": ("wpe", 0.0)}},
    "bigcode_mha": {
        "config": bigcode(multi_query=False, n_embd=96, n_head=3),
        "matters": {"biases": (r"c_attn\.bias", 0.0)},
    },
    "llama_mha": {
        "config": llama(num_attention_heads=3, num_key_value_heads=3, pretraining_tp=1, rope_scaling=None),
        "matters": NORMS | {"theta": {"rope_theta": 500.0}, "eps": {"rms_norm_eps": 0.1}},
        "extra": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": [16] for i in range(2)},
        "shards": 2,
    },
    "llama_gqa": {"config": llama(), "matters": {"theta": {"rope_theta": 500.0}}, "dtype": "F16"},
    "llama_mqa": {
        "config": llama(num_attention_heads=5, num_key_value_heads=1, hidden_size=160),
        "matters": {"theta": {"rope_theta": 500.0}},
    },
    "llama_head_dim": {
        "config": llama(head_dim=80, num_attention_heads=3, num_key_value_heads=1),
        "matters": {"theta": {"rope_theta": 500.0}},
    },
    "llama_bias": {
        "config": llama(attention_bias=True, mlp_bias=True, num_key_value_heads=3),
        "matters": {name: (rf"{name}_proj.bias", 0.0) for name in ("q", "v", "o", "gate", "up", "down")}
        | {"k": (r"k_proj.bias", 0.5)},  # a constant on every key is nothing to a softmax, were it not for the rotation
    },
    "llama3": {
        "config": llama(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, num_attention_heads=3, num_key_value_heads=1),
        "matters": {"rope scaling": {"rope_scaling": None}},
        "dtype": "BF16",
    },
    "llama_linear": {
        "config": llama(rope_scaling={"type": "linear", "factor": 4.0}),
        "matters": {"rope scaling": {"rope_scaling": None}},
    },
    "llama_yarn": {
        "config": llama(
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            num_attention_heads=3,
            num_key_value_heads=3,
        ),
        "matters": {
            "rope scaling": {"rope_scaling": None},
            "attention factor": {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": 1.0,
                }
            },
        },
    },
    "llama_yarn_explicit": {  # in the words of transformers 5, every option given
        "config": {key: value for key, value in llama().items() if key != "rope_theta"}
        | {
            "dtype": "float32",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.25,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        },
        "matters": {"rope scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}},
    },
    "smollm2": {
        "config": llama(
            hidden_size=144,
            num_attention_heads=9,
            num_key_value_heads=3,
            num_hidden_layers=4,
            rope_theta=100000,
            rope_interleaved=False,
            rope_scaling=None,
            is_llama_config=True,
            mlp_bias=False,
            attention_bias=False,
            pretraining_tp=1,
            tie_word_embeddings=True,
        ),
        "matters": NORMS,
        "dtype": "BF16",
    },
    "mistral": {
        "config": llama("mistral", sliding_window=16, num_hidden_layers=3, head_dim=32),
        "matters": {"window": {"sliding_window": None}, "window + 1": {"sliding_window": 17}},
        "dtype": "BF16",
    },
    "qwen2": {
        "config": llama(
            "qwen2",
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            sliding_window=8,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
        "matters": {"biases": (r"[qv]_proj.bias", 0.0)},
    },
    "qwen2_window": {
        "config": llama(
            "qwen2",
            use_sliding_window=True,
            sliding_window=12,
            max_window_layers=2,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
        ),
        "matters": {"window": {"use_sliding_window": False}, "window layers": {"max_window_layers": 0}},
    },
    "qwen3": {
        "config": llama(
            "qwen3",
            head_dim=96,
            attention_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            max_window_layers=2,
            rms_norm_eps=1e-6,
            rope_theta=1000000,
        ),
        "matters": {"q norm": (r"q_norm", 1.0), "k norm": (r"k_norm", 1.0), "theta": {"rope_theta": 5000.0}},
    },
    "qwen3_yarn": {
        "config": llama(
            "qwen3",
            head_dim=32,
            attention_bias=True,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            tie_word_embeddings=True,
        ),
        "matters": {"rope scaling": {"rope_scaling": None}, "biases": (r"_proj.bias", 0.0)},
    },
    "gemma3": {
        "config": gemma3(),
        "matters": {
            "window": {"sliding_window": 256},
            "window + 1": {"sliding_window": 13},
            "pattern": {"sliding_window_pattern": 2},
            "global theta": {"rope_theta": 10000.0},
            "local theta": {"rope_local_base_freq": 1000000.0},
            "scale": {"query_pre_attn_scalar": 32},
            "activation": {"hidden_activation": "silu"},
        }
        | {name: (rf"{name}.weight", 0.0) for name in ("q_norm", "k_norm", "post_attention_layernorm")}
        | {name: (rf"{name}_feedforward_layernorm.weight", 0.0) for name in ("pre", "post")},
    },
    "gemma3_long": {  # as the 4B and larger: scaled global positions; in the words of transformers 5
        "config": {
            key: value
            for key, value in gemma3(
                num_key_value_heads=2,
                layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
                use_bidirectional_attention=False,
            ).items()
            if key not in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
        },
        "matters": {"layer types": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}},
        "dtype": "BF16",
    },
    "gemma3_cap": {
        "config": gemma3(final_logit_softcapping=3.0, num_attention_heads=2),
        "matters": {"logit cap": {"final_logit_softcapping": None}},
    },
    "deepseek_v2_lite": {
        "config": deepseek_v2(),
        "matters": {
            "rope scaling": {"rope_scaling": None},
            "mscale": {"rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "top-k": {"num_experts_per_tok": 2},
            "kv norm": (r"kv_a_layernorm", 1.0),
            "shared experts": (r"shared_experts.down", 0.0),
            "router": (r"mlp.gate.weight", 0.0),
        },
    },
    "deepseek_v2": {
        "config": deepseek_v2(
            q_lora_rank=56,
            kv_lora_rank=256,
            qk_rope_head_dim=64,
            topk_method="group_limited_greedy",
            n_routed_experts=12,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=4.0,
            rope_scaling=DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        ),
        "matters": {
            "groups": {"topk_method": "greedy"},
            "scaling factor": {"routed_scaling_factor": 1.0},
            "q norm": (r"q_a_layernorm", 1.0),
            "mscale": {"rope_scaling": DEEPSEEK_YARN | {"mscale": 0.5, "mscale_all_dim": 0.5}},
        },
        "dtype": "BF16",
        "shards": 3,
    },
    "deepseek_v2_dense": {
        "config": deepseek_v2(first_k_dense_replace=2, num_hidden_layers=2, rope_scaling=None),
        "matters": {"theta": {"rope_theta": 500.0}},
    },
    "deepseek_v3": {
        "config": deepseek_v3(num_nextn_predict_layers=1),
        "extra": {  # as published, with a layer that predicts a second token, which is not part of the model
            "model.layers.3.embed_tokens.weight": [checkpoints.VOCAB_SIZE, 96],
            "model.layers.3.enorm.weight": [96],
            "model.layers.3.hnorm.weight": [96],
            "model.layers.3.eh_proj.weight": [96, 192],
            "model.layers.3.input_layernorm.weight": [96],
            "model.layers.3.shared_head.norm.weight": [96],
            "model.layers.3.shared_head.head.weight": [checkpoints.VOCAB_SIZE, 96],
        },
        "matters": {
            "correction bias": (r"e_score_correction_bias", 0.0),
            "groups": {"topk_group": 4},
            "normalisation": {"norm_topk_prob": False},
            "scaling factor": {"routed_scaling_factor": 1.0},
            "rope scaling": {"rope_scaling": None},
            "mscale": {"rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        },
    },
    "deepseek_v3_plain": {
        "config": deepseek_v3(
            q_lora_rank=None,
            norm_topk_prob=False,
            rope_scaling=None,
            kv_lora_rank=96,
            v_head_dim=64,
            rms_norm_eps=0.1,  # Moonlight's is not 1e-6, which that of the latents' norms stays
        ),
        "matters": {
            "correction bias": (r"e_score_correction_bias", 0.0),
            "normalisation": {"norm_topk_prob": True},
            "eps": {"rms_norm_eps": 1e-6},
        },
        "dtype": "BF16",
    },
    "deepseek_v3_fp8": {  # as published: float8 in blocks of 128 x 128
        "config": deepseek_v3(
            hidden_size=192,
            num_hidden_layers=2,
            quantization_config={
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
        ),
        "matters": {},
        "dtype": "BF16",
        "fp8": r"layers.*_proj(_with_mqa)?\.weight$",
    },
    "mixtral": {
        "config": mixtral(),
        "matters": {"top-k": {"num_experts_per_tok": 1}, "router": (r"mlp.gate.weight", 0.0)},
        "dtype": "BF16",
        "shards": 2,
    },
    "mixtral_window": {
        "config": mixtral(sliding_window=14, num_key_value_heads=6, tie_word_embeddings=True),
        "matters": {"window": {"sliding_window": None}},
    },
    "qwen3_moe": {
        "config": qwen3_moe(num_hidden_layers=3, decoder_sparse_step=2),
        "matters": {"normalisation": {"norm_topk_prob": False}, "q norm": (r"q_norm", 1.0)},
    },
    "qwen3_moe_plain": {
        "config": qwen3_moe(num_hidden_layers=3, mlp_only_layers=[1], norm_topk_prob=False, num_key_value_heads=1),
        "matters": {"normalisation": {"norm_topk_prob": True}, "top-k": {"num_experts_per_tok": 2}},
        "dtype": "BF16",
    },
    "gemma": {
        "config": gemma(hidden_act="gelu"),  # as first published: it means tanh's form
        "matters": {"activation": {"hidden_act": "silu"}, "theta": {"rope_theta": 500.0}, "norms": ("norm", -0.5)},
        "dtype": "BF16",
    },
    "gemma2": {
        "config": gemma2(),
        "matters": {
            "window": {"sliding_window": 256},
            "window + 1": {"sliding_window": 13},
            "pattern": {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "scale": {"query_pre_attn_scalar": 32},
            "attention cap": {"attn_logit_softcapping": None},
            "logit cap": {"final_logit_softcapping": None},
        }
        | {name: (rf"{name}_feedforward_layernorm.weight", 0.0) for name in ("pre", "post")}
        | {"post_attention": (r"post_attention_layernorm.weight", 0.0)},
    },
    "phi3": {
        "config": phi3(sliding_window=14, num_key_value_heads=6),
        "matters": {"window": {"sliding_window": None}, "theta": {"rope_theta": 500.0}},
        "dtype": "BF16",
    },
    "phi4_mini": {
        "config": phi4_mini(max_position_embeddings=1024),
        "matters": {
            "rope scaling": {"rope_scaling": None},
            "attention factor": {"rope_scaling": LONGROPE | {"attention_factor": 1.0}},
            "rotated part": {"rope_scaling": None, "partial_rotary_factor": 0.5},
        },
    },
    "phi4_mini_long": {
        "config": phi4_mini(original_max_position_embeddings=32, num_key_value_heads=1),
        "matters": {"original length": {"original_max_position_embeddings": 256}},
        "dtype": "BF16",
    },
    "olmo2": {
        "config": olmo2(),
        "matters": {name: (rf"{name}.weight", 1.0) for name in ("q_norm", "k_norm", "post_attention_layernorm")}
        | {"post_feedforward": (r"post_feedforward_layernorm.weight", 1.0)},
    },
    "olmo2_mha": {
        "config": olmo2(num_attention_heads=3, num_key_value_heads=3),
        "matters": {"theta": {"rope_theta": 500.0}},
        "dtype": "BF16",
        "shards": 2,
    },
    "glm": {
        "config": glm("glm"),
        "matters": {"rotated part": {"partial_rotary_factor": 1.0}, "biases": (r"[qv]_proj.bias", 0.0)},
        "dtype": "BF16",
    },
    "glm4": {
        "config": glm("glm4", num_attention_heads=4, num_key_value_heads=1),
        "matters": {"rotated part": {"partial_rotary_factor": 1.0}, "biases": (r"[qv]_proj.bias", 0.0)}
        | {name: (rf"{name}_layernorm.weight", 1.0) for name in ("post_self_attn", "post_mlp", "post_attention")},
    },
    "smollm3": {
        "config": smollm3(),
        "matters": {"layers without RoPE": {"no_rope_layers": [1] * 5}},
        "dtype": "BF16",
    },
    "smollm3_window": {  # as transformers writes it again: a list of layers
        "config": smollm3(
            no_rope_layers=[1, 0, 1, 1, 0],
            use_sliding_window=True,
            sliding_window=12,
            num_key_value_heads=6,
        ),
        "matters": {
            "layers without RoPE": {"no_rope_layers": [1] * 5},
            "window": {"use_sliding_window": False},
        },
    },
    "granite": {
        "config": granite(),
        "matters": {
            name: {name: 1.0}
            for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        },
        "dtype": "BF16",
    },
    "gpt_oss": {
        "config": gpt_oss(),
        "matters": {
            "window": {"sliding_window": 256},
            "window + 1": {"sliding_window": 13},
            "pattern": {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "clamp": {"swiglu_limit": 7.0},
            "sinks": ("sinks", -20.0),
            "router bias": (r"router.bias", 0.0),
            "gate and up bias": (r"gate_up_proj_bias", 0.0),
            "down bias": (r"down_proj_bias", 0.0),
            "rope scaling": {"rope_scaling": {"rope_type": "default"}},
        },
        "dtype": "BF16",
    },
    "gpt_oss_mxfp4": {  # as published
        "config": gpt_oss(
            num_key_value_heads=1,
            quantization_config={
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
                "quant_method": "mxfp4",
            },
        ),
        "matters": {},
        "dtype": "BF16",
        "mxfp4": r"experts\.(gate_up|down)_proj$",
    },
    "olmo3": {
        "config": olmo2(
            model_type="olmo3",
            architectures=["Olmo3ForCausalLM"],
            rope_theta=500000.0,
            num_hidden_layers=4,
            sliding_window=12,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
            rope_scaling={
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.2,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            max_position_embeddings=512,
        ),
        "matters": {
            "window": {"sliding_window": 256},
            "rope scaling": {"rope_scaling": None},
            "layer types": {"layer_types": ["full_attention"] + ["sliding_attention"] * 3},
        },
        "dtype": "BF16",
    },
    "granitemoe": {
        "config": granite(
            model_type="granitemoe",
            architectures=["GraniteMoeForCausalLM"],
            intermediate_size=48,
            num_local_experts=6,
            num_experts_per_tok=3,
            output_router_logits=False,
            router_aux_loss_coef=0.0,
            num_key_value_heads=3,
        )
        | {"mlp_bias": None},
        "matters": {
            "top-k": {"num_experts_per_tok": 2},
            "router": (r"block_sparse_moe.router", 0.0),
            "residual": {"residual_multiplier": 1.0},
        },
    },
}


def hub_config(config):
    known = {
        key: value for key, value in config.items() if key not in ("model_type", "quantization_config", "auto_map")
    }
    return transformers.AutoConfig.for_model(config["model_type"], **copy.deepcopy(known))


def tensor_shapes(spec):
    """name -> shape of the checkpoint as the Hub has it: what transformers saves, plus and minus what `spec` says."""
    model = transformers.AutoModelForCausalLM.from_config(hub_config(spec["config"]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(f"{folder}/model.safetensors")
    shapes = {name.removeprefix(spec.get("strip", "")): list(tensor.shape) for name, tensor in saved.items()}
    shapes |= spec.get("extra", {})
    if "fp8" in spec:
        for name in [name for name in shapes if re.search(spec["fp8"], name)]:
            shapes[name + "_scale_inv"] = [(side + 127) // 128 for side in shapes[name]]
    for name in [name for name in shapes if "mxfp4" in spec and re.search(spec["mxfp4"], name)]:
        count, inputs, outputs = shapes.pop(name)
        shapes |= {
            name + "_blocks": [count, outputs, inputs // 32, 16],
            name + "_scales": [count, outputs, inputs // 32],
        }
    return dict(sorted(shapes.items()))


def dequantized(reference, folder):
    """The same checkpoint with torch's own float8 decoding and transformers' of MXFP4, for the CPU."""
    plain = {}
    for name in reference["tensors"]:
        dtype, array = checkpoints.stored(name, reference["tensors"], reference)
        if name.endswith(("_scale_inv", "_scales")):
            continue
        if name.endswith("_blocks"):
            _, scales = checkpoints.stored(name.replace("_blocks", "_scales"), reference["tensors"], reference)
            parts = torch.from_numpy(array), torch.from_numpy(scales)
            name, dtype = name.removesuffix("_blocks"), "F32"
            array = convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()
        if dtype == "F8_E4M3":
            values = torch.from_numpy(array).view(torch.float8_e4m3fn).float()
            _, scale = checkpoints.stored(name + "_scale_inv", reference["tensors"], reference)
            blocks = torch.from_numpy(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)
            array = (values * blocks[: array.shape[0], : array.shape[1]]).numpy()
            dtype = "F32"
        plain[name] = (dtype, array)
    checkpoints.write_safetensors(folder / "model.safetensors", plain)


def load_model(folder, config, extra):
    """transformers' model of the folder with this config; every tensor of the folder must be used but `extra`."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=hub_config(config), dtype=torch.float32, output_loading_info=True, **plain
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert not set(info["unexpected_keys"]) - set(extra), info
    return model.eval()


def all_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def greedy(model, ids, n):
    """n ids, and the smallest lead of a chosen one over the next best, of the largest logit."""
    ids, lead, n_prompt = list(ids), np.inf, len(ids)
    for _ in range(n):
        last = all_logits(model, ids)[-1]
        second, first = np.sort(last)[-2:]
        lead = min(lead, (first - second) / np.abs(last).max())
        ids.append(int(last.argmax()))
    return ids[n_prompt:], lead


def check_features(name, spec, folder, ids, logits):
    for feature, change in spec["matters"].items():
        if isinstance(change, dict):
            model = load_model(folder, spec["config"] | change, spec.get("extra", {}))
        else:
            pattern, value = change
            model = load_model(folder, spec["config"], spec.get("extra", {}))
            hit = [t for n, t in [*model.named_parameters(), *model.named_buffers()] if re.search(pattern, n)]
            assert hit, f"{name}: no tensor matches {pattern}"
            for tensor in hit:
                tensor.data.fill_(value)
        moved = np.abs(all_logits(model, ids) - logits).max() / np.abs(logits).max()
        print(f"    without {feature}: {moved:.1e}")
        assert moved > 200 * TOLERANCE, f"{name}: {feature} hardly matters"


def make_tiny(name, spec, number):
    prompt = PROMPTS[number % len(PROMPTS)]
    ids = list(prompt.encode())
    reference = {
        "config": NO_EFFECT | spec["config"],
        "dtype": spec.get("dtype", "F32"),
        "shards": spec.get("shards", 1),
        "tensors": tensor_shapes(spec | {"config": NO_EFFECT | spec["config"]}),
        "prompt": prompt,
        "positions": sorted({0, 1, len(ids) // 3, len(ids) // 2, *range(len(ids) - 8, len(ids))}),
    }
    spec = spec | {"config": reference["config"]}
    for seed in range(40):
        reference["seed"] = seed
        with tempfile.TemporaryDirectory() as temporary:
            folder = checkpoints.build(reference, temporary)
            if "fp8" in spec or "mxfp4" in spec:
                dequantized(reference, folder)
            model = load_model(folder, spec["config"], spec.get("extra", {}))
            logits = all_logits(model, ids)
            text, lead = greedy(model, ids, N_GREEDY)
            rounding = np.abs(all_logits(model.double(), ids) - logits).max() / np.abs(logits).max()
            print(f"{name}, seed {seed}: float64 differs {rounding:.1e}, lead {lead:.1e}, {len(set(text))} ids")
            if rounding > TOLERANCE / 5 or lead < 20 * TOLERANCE or len(set(text)) < 6 or max(text) > 255:
                continue
            check_features(name, spec, folder, ids, logits)
        break
    else:
        sys.exit(f"{name}: no seed will do")
    reference["greedy"] = text
    write_json(checkpoints.REFERENCE / f"tiny_{name}.json", reference)
    np.save(checkpoints.REFERENCE / f"tiny_{name}.npy", logits[reference["positions"]].astype(np.float32))


def write_json(path, value):
    """One key a line, and one tensor a line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    path.write_text(re.sub(r"\[[\s\d,]*?\]", lambda m: re.sub(r"\s+", "", m[0]).replace(",", ", "), text) + "\n")


# The first N_PROMPTS that a model continues for N_REAL ids without ending the text, and without a step where rounding
# could decide (a lead below LEAD). What the small models make of them matters little: it is the ids that count.
REAL_PROMPTS = [
    "Once upon a time, in a small village by the sea,",
    "The capital of France is",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Ingredients:\n- 2 eggs\n- 100 g of sugar\n- 1 cup of flour\n\nSteps:\n1.",
    "В начале было слово, и слово",
    "今天天气很好，我们去公园",
    "C'est l'histoire d'un petit garçon qui",
    "日本の首都は東京です。",
    "To be, or not to be, that is the question:",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Q: What is 17 + 25?\nA:",
    "The three laws of thermodynamics are:\n\n1.",
    "Die Würde des Menschen ist unantastbar.",
    "<!DOCTYPE html>\n<html>\n<head>\n\t<title>",
    "مرحبا بالعالم، اليوم",
    "#include <stdio.h>\n\nint main(void) {\n\t",
    "🙂 is an emoji that means",
    "In 1969, Neil Armstrong",
    "| Country | Capital |\n|---|---|\n| Italy | Rome |\n|",
]
N_PROMPTS, N_REAL, LEAD = 12, 64, 4e-3
# Of a GGUF file transformers reads the vocabulary and the merges but not how text is split before: it forgets that
# SmolLM2 sets each digit apart, which changes the ids of "\\n\\n1" and the perplexity by 1.5 %.
PRE_TOKENIZERS = {"smollm2": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])}
TEXT = Path("/usr/share/common-licenses/GPL-3")
CHUNK, N_CHUNKS = 512, 4
STORIES = Path(__file__).resolve().parent.parent / "models/corpus-sample.txt"
STORY_CHUNK, N_TOLD, WIDE_LEAD = 256, 24, 0.1


def continue_greedily(model, prompts, end, n):
    """For each list of ids: n ids, or fewer and `end`; and the lead in logits of each over the next best.

    The texts come from one batch, padded on the left; each is then checked, and its leads taken, in a pass of its own.
    """
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    greedy = {"max_new_tokens": n, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    batch = model.generate(padded, attention_mask=mask, **greedy)[:, longest:].tolist()
    for ids, text in zip(prompts, batch, strict=True):
        text = text[: text.index(end) + 1] if end in text else text
        logits = all_logits(model, ids + text)[len(ids) - 1 : -1]
        second, first = np.sort(logits, axis=1)[:, -2:].T
        yield text, np.where(logits.argmax(1) == text, first - second, 0)


def perplexity(model, ids, bos, chunk_size):
    """As llama.cpp's perplexity: chunks, the second half of each scored. A bos replaces a chunk's first id."""
    losses = []
    for chunk in np.array(ids[: chunk_size * N_CHUNKS]).reshape(N_CHUNKS, chunk_size):
        if bos is not None:
            chunk[0] = bos
        logits = torch.tensor(all_logits(model, chunk.tolist())[chunk_size // 2 : -1])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(chunk[chunk_size // 2 + 1 :])).item())
    return float(np.exp(np.mean(losses)))


def written_texts(name, model, tokenizer, prompts, n, least_lead):
    """n ids of the first N_PROMPTS prompts that will do."""
    end, texts = model.config.eos_token_id, []
    all_ids = [tokenizer(prompt).input_ids for prompt in prompts]
    for prompt, ids, (text, leads) in zip(prompts, all_ids, continue_greedily(model, all_ids, end, n), strict=True):
        print(f"{name}: {len(text)} ids, lead {leads.min():.4f}: {prompt!r} {tokenizer.decode(text)!r}", flush=True)
        if end not in text and leads.min() > least_lead and len(texts) < N_PROMPTS:
            written = tokenizer.decode(text, clean_up_tokenization_spaces=False)
            lead = round(leads.min().item(), 4)
            texts.append({"prompt": prompt, "ids": ids, "greedy": text, "text": written, "least_lead": lead})
    assert len(texts) == N_PROMPTS, f"{name}: {len(texts)} prompts left"
    return texts


def make_real(name, path):
    gguf = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**gguf)
    if name in PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    texts = written_texts(name, model, tokenizer, REAL_PROMPTS, N_REAL, LEAD)
    ids = tokenizer(TEXT.read_text()).input_ids
    bos = ids[0] if ids[0] == tokenizer.bos_token_id else None
    figure = perplexity(model, ids, bos, CHUNK)
    print(f"{name}: perplexity {figure:.4f}")
    reference = {"file": path.name, "perplexity": round(figure, 4), "chunk": CHUNK, "chunks": N_CHUNKS, "texts": texts}
    write_json(checkpoints.REFERENCE / f"real_{name}.json", reference)


def make_bundled(folder):
    """Their matrices are bfloat16, and with AVX512-BF16 activations are rounded so too: only wide leads stay ahead."""
    text = STORIES.read_text()
    prompts = [" ".join(story.split()[:n]) for story in text.split("\n\n") for n in range(4, 30, 2)]
    reference = {"chunk": STORY_CHUNK, "chunks": N_CHUNKS, "models": {}}
    for name in ("mha", "mqa", "gqa", "mla"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        ids = tokenizer(text).input_ids
        reference["models"][name] = {
            "perplexity": round(perplexity(model, ids, ids[0], STORY_CHUNK), 4),
            "texts": written_texts(name, model, tokenizer, prompts, N_TOLD, WIDE_LEAD),
        }
    write_json(checkpoints.REFERENCE / "bundled.json", reference)


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    checkpoints.REFERENCE.mkdir(exist_ok=True)
    kind, *arguments = sys.argv[1:]
    if kind == "real":
        for argument in arguments:
            name, path = argument.split("=", 1)
            make_real(name, Path(path))
        return
    if kind == "bundled":
        make_bundled(Path(*arguments))
        return
    for number, (name, spec) in enumerate(MODELS.items()):
        if not arguments or name in arguments:
            make_tiny(name, spec, number)


if __name__ == "__main__":
    main()
