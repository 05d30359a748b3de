"""A source's config.json, read key by key: a key that nothing read is refused, so that none is dropped silently."""

import math

from exporter.errors import ExportError
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
    "validate_runner_input",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "max_sequence_length",
    "max_batch_size",
    "reorder_and_upcast_attn",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
}

# Keys that mean something in the architectures that have a default for them, and are unknown elsewhere.
OF_SOME = {
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "scale_attn_weights",
    "multi_query",
    "num_experts",
    "num_nextn_predict_layers",
    "original_max_position_embeddings",
    "no_rope_layers",
    "no_rope_layer_interval",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "swiglu_limit",
}

# Keys that do, of which architectures without a default for them have one value; null stands for "not set".
FIXED = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_bidirectional_attention": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "moe_layer_freq": (1,),
    "interpolate_factor": (1,),
    "full_attn_mod": (1,),
    "lm_head_bias": (False,),
    "swiglu_alpha": (1.702,),
}


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Keys:
    """The config of a source, its aliases resolved, with an architecture's defaults for the keys that it leaves out."""

    def __init__(self, source: Source, values: dict, defaults: dict):
        self.where = source.where
        self.names = {}  # canonical name -> the file's
        self.values = {}
        self.read = set()
        for name, value in values.items():
            key = ALIASES.get(name, name)
            if key in self.values and None not in (value, self.values[key]) and self.values[key] != value:
                raise ExportError(
                    f"{self.where}: {name} is {value!r} but {self.names[key]} is {self.values[key]!r}: remove one"
                )
            if value is not None or key not in self.values:
                self.names[key], self.values[key] = name, value
        self.defaults = defaults
        for key, allowed in FIXED.items():
            if key not in defaults and self.get(key, allowed[0]) not in allowed:
                self.refuse(key, f"only {allowed[0]!r} is supported: export another model")

    def refuse(self, key: str, expected: str):
        value = self.values.get(key, self.defaults.get(key))
        raise ExportError(f"{self.where}: {self.names.get(key, key)} is {value!r}: {expected}")

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
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
            self.refuse(key, f"must be an integer, {least} or more: fetch the file again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not is_number(value) or value <= 0:
            self.refuse(key, "must be a positive number: fetch the file again")
        return float(value)

    def finish(self):
        for key, value in self.values.items():
            if value is not None and key not in self.read and key not in NO_EFFECT and self.names[key] not in NO_EFFECT:
                self.refuse(
                    key,
                    "this key is not known, and a key that is dropped silently makes a wrong model: "
                    "export a model without it, or teach exporter/config.py what it means",
                )
