"""A source's config.json, read key by key: a key that nothing read is refused, so that none is dropped silently."""

from exporter.errors import ExportError, shown
from exporter.source import Source

ALIASES = {  # the same thing under other architectures' names
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
    "rms_norm_eps": "norm_eps",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "sliding_window_size": "sliding_window",
    "experts_per_token": "num_experts_per_tok",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# Keys that change nothing in the text of a model: training, bookkeeping, token ids (the tokenizer has them).
NO_EFFECT = {
    "architectures",
    "auto_map",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "model_type",
    "unsloth_version",
    "unsloth_fixed",
    "is_llama_config",
    "transformers.js_config",
    "task_specific_params",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "chunk_size_feed_forward",
    "finetuning_task",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "image_token_index",
    "boi_token_index",
    "eoi_token_index",
    "mm_tokens_per_image",
    "vision_config",
    "use_cache",
    "cache_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "pretraining_tp",
    "n_ctx",
    "initial_context_length",
    "initializer_range",
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "qk_head_dim",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "inference_runner",
    "gradient_checkpointing",
    "_num_labels",
    "num_labels",
    "output_past",
    "n_special",
    "predict_special_tokens",
    "torchscript",
    "tie_encoder_decoder",
    "is_decoder",
    "is_composition",
    "keys_to_ignore_at_inference",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "tf_legacy_loss",
    "use_bfloat16",
    "prefix",
    "bos_token",
    "eos_token",
    "eos_token_ids",
    "sep_token_id",
    "decoder_start_token_id",
    "model_max_length",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    "neftune_noise_alpha",
    "dropout",
    "attn_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "embedding_dropout",
    "attention_probs_dropout_prob",
    "validate_runner_input",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "max_sequence_length",
    "max_batch_size",
    "reorder_and_upcast_attn",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
} | {  # settings of the sampler, which older versions of transformers kept here
    "max_length",
    "min_length",
    "max_new_tokens",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "output_scores",
    "return_dict_in_generate",
}

# Keys that mean something in the architectures that have a default for them, and are unknown elsewhere, but for the
# value that says that a model has no such thing.
OF_SOME = {
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": None,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": None,
    "layer_types": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_attn_weights": True,
    "multi_query": False,
    "num_experts": 0,
    "num_nextn_predict_layers": 0,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": 1,
    "no_rope_layers": None,
    "no_rope_layer_interval": 0,
    "embedding_multiplier": 1,
    "attention_multiplier": None,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "swiglu_limit": None,
}

# Keys that do, of which this project has one value: that which switches a feature off, or says what the model does
# anyway. An architecture's default takes its place; null stands for "not set".
FIXED = {
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "use_rope": (True,),
    "rope_ratio": (1,),
    "rms_norm": (True,),
    "is_causal": (True,),
    "alibi": (False,),
    "use_alibi": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "use_logn_attn": (False,),
    "use_dynamic_ntk": (False,),
    "pruned_heads": ({},),
    "shared_expert_intermediate_size": (0,),
    "num_kv_shared_layers": (0,),
    "tp": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_bidirectional_attention": (False,),
    "rope_interleaved": (False,),
    "moe_layer_freq": (1,),
    "interpolate_factor": (1,),
    "full_attn_mod": (1,),
    "lm_head_bias": (False,),
    "swiglu_alpha": (1.702,),
}


# Values by which a key that nothing has read says that the model has no such thing.
NEUTRAL = {
    "num_experts_per_tok": (0,),
    "n_shared_experts": (0,),
    "moe_intermediate_size": (0,),
    "norm_topk_prob": (False,),
    "routed_scaling_factor": (1,),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "first_k_dense_replace": (0,),
    "decoder_sparse_step": (0, 1),
    "mlp_only_layers": ([],),
    "sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attn_temperature_tuning": (False,),
    "attention_out_bias": (False,),
    "num_logits_to_keep": (0,),
    "shared_intermediate_size": (0,),
    "yarn_ext_factor": (1,),
}
OF_WINDOWS = {"sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}


# More than any model has: what is made for each of these is made before a tensor's shape is looked at.
MOST = dict.fromkeys(
    (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_experts",
    ),
    1 << 16,
)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class Keys:
    """The config of a source, its aliases resolved, with an architecture's defaults for the keys that it leaves out."""

    def __init__(self, source: Source, values: dict, defaults: dict):
        self.where = source.where
        self.notes = source.notes
        self.names = {}  # canonical name -> the file's
        self.values = {}
        self.read = set()
        for name, value in values.items():
            key = ALIASES.get(name, name)
            if key in self.values and None not in (value, self.values[key]) and self.values[key] != value:
                raise ExportError(
                    f"{self.where}: {name} is {shown(value)} but {self.names[key]} is {shown(self.values[key])}: "
                    "remove one"
                )
            if value is not None or key not in self.values:
                self.names[key], self.values[key] = name, value
        self.defaults = defaults
        for key, allowed in FIXED.items():
            allowed = (defaults[key],) if key in defaults else allowed
            if self.get(key, allowed[0]) not in allowed:
                self.refuse(key, f"only {allowed[0]!r} is supported: export another model")

    def refuse(self, key: str, expected: str):
        value = self.values.get(key, self.defaults.get(key))
        raise ExportError(f"{self.where}: {self.names.get(key, key)} is {shown(value)}: {expected}")

    def get(self, key: str, default=None):
        """The file's value, else the architecture's; `default` where that is null."""
        if key in OF_SOME and key not in self.defaults:
            return default
        self.read.add(key)
        value = self.values.get(key) if key in self.values else self.defaults.get(key)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false: fetch the file again")
        return value

    def choice(self, key: str, choices: dict, default: str | None = None):
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"known are {', '.join(choices)}: export a model that has one of these")
        return choices[value]

    def positive(self, key: str, default: int | None = None) -> int:
        return self.count(key, default, least=1)

    def count(self, key: str, default: int | None = 0, least: int = 0) -> int:
        value, most = self.get(key, default), MOST.get(key, (1 << 31) - 1)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(key, f"must be an integer from {least} to {most}: fetch the file again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not is_number(value) or not 1e-30 < value < 1e30:
            self.refuse(key, "must be a positive number: fetch the file again")
        return float(value)

    def finish(self):
        for key, value in self.values.items():
            if key not in self.read and not {key, self.names[key]} & NO_EFFECT and not self.is_off(key, value):
                self.refuse(
                    key,
                    "this key is not known, and a key that is dropped silently makes a wrong model: "
                    "export a model without it, or teach exporter/config.py what it means",
                )

    def is_off(self, key: str, value) -> bool:
        """Whether a key that no part of the model asked for says that there is no such thing."""
        if key == "layer_types":
            return isinstance(value, list) and all(layer_type == "full_attention" for layer_type in value)
        if key in OF_WINDOWS and (
            self.values.get("use_sliding_window") is False or self.values.get("sliding_window") in (None, 0)
        ):
            return True
        return value is None or (key in OF_SOME and value == OF_SOME[key]) or value in NEUTRAL.get(key, ())
