"""Tiny, randomly initialised versions of every causal language model in ``transformers``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_LM_MODEL_TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its image encoder needs the timm package",
    "gemma4_assistant": "predicts from the keys and values of another model",
    "gemma4_unified_assistant": "predicts from the keys and values of another model",
}
"""Model types that ``tiny_causal_lm`` cannot build, or not without further packages."""

VOCAB_SIZE = 96
FIRST_ORDINARY_TOKEN = 16
"""Smaller ids are special (padding, begin, end, image, audio, ...) in every tiny model."""

_WIDTH = 32
_HEADS = 4
_HEAD_DIM = 8
_LAYERS = 2
_STD = 0.2

# Field name -> tiny value.  Fields whose default is None are left alone.
_SIZES: dict[str, Any] = {
    name: value
    for names, value in [
        # vocabularies and positions
        (
            "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
            VOCAB_SIZE,
        ),
        ("audio_vocab_size shape_vocab_size pronunciation_vocab_size", VOCAB_SIZE),
        ("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions", 128),
        ("max_source_positions context_length model_max_length", 128),
        ("original_max_position_embeddings position_bias_max_distance", 128),
        # width
        ("hidden_size d_model n_embd emb_dim embedding_dim", _WIDTH),
        ("lru_width output_embedding_size hidden_size_global", _WIDTH),
        ("shape_embed_dim pronunciation_embed_dim backbone_hidden_size router_hidden_size", _WIDTH),
        ("cross_attention_hidden_size out_hidden_size adapter_in_dim", _WIDTH),
        ("adapter_input_size adapter_out_dim input_size prompt_mid_dim vision_output_dim", _WIDTH),
        ("projector_input_dim projector_output_dim", _WIDTH),
        ("embedding_size word_embed_proj_dim input_embedding_size", _WIDTH // 2),
        # depth
        ("num_hidden_layers n_layer n_layers num_layers num_blocks", _LAYERS),
        ("encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth", _LAYERS),
        ("num_global_layers conf_num_hidden_layers num_residual_layers num_lstm_layers", 1),
        ("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
        ("num_nextn_predict_layers", 0),
        # attention
        ("num_attention_heads n_head n_heads num_heads attention_heads", _HEADS),
        ("encoder_attention_heads decoder_attention_heads num_encoder_attention_heads", _HEADS),
        ("num_decoder_attention_heads swa_num_attention_heads conf_num_attention_heads", _HEADS),
        ("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups", _HEADS // 2),
        ("num_global_key_value_heads", _HEADS // 2),
        (
            "head_dim swa_head_dim global_head_dim attention_head_size d_head d_kv kv_channels",
            _HEAD_DIM,
        ),
        ("dim_head rotary_dim v_head_dim qk_nope_head_dim qk_rope_head_dim", _HEAD_DIM),
        ("swa_v_head_dim index_head_dim", _HEAD_DIM),
        ("qk_head_dim attention_head_dim", 2 * _HEAD_DIM),
        ("query_pre_attn_scalar d_rel laurel_rank", _HEAD_DIM),
        ("q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank hc_lowrank adapter_rank", 16),
        ("sliding_window sliding_window_size attention_window_size window_size", 8),
        ("local_attention attention_chunk_size", 8),
        ("n_mamba_heads num_hash_layers o_groups", 2),
        ("index_n_heads", 16),  # with few of them, scores are often exactly zero, and tie
        ("index_topk", 6),
        # feed-forward blocks and mixtures of experts
        (
            "intermediate_size ffn_hidden_size decoder_ffn_dim encoder_ffn_dim ffn_dim dim_ff dff",
            48,
        ),
        ("d_ff d_inner n_inner feed_forward_size intermediate_size_mlp mlp_dim", 48),
        ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size", 24),
        ("shared_experts_intermediate_size moe_shared_expert_intermediate_size", 24),
        ("dense_intermediate_size prefix_dense_intermediate_size", 48),
        ("shared_intermediate_size", 24),
        ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts", 2),
        ("zero_expert_num", 2),
        ("n_group topk_group num_expert_group", 1),
        # recurrent layers
        ("state_size mamba_d_state ssm_state_size", 8),
        ("time_step_rank mamba_dt_rank", 4),
        ("mamba_n_heads mamba_num_heads", 2 * _HEADS),
        ("mamba_d_head mamba_head_dim mamba_headdim", _HEAD_DIM),
        ("mamba_d_ssm", 2 * _WIDTH),
        ("n_groups mamba_n_groups mamba_ngroups", 2),
        ("chunk_size mamba_chunk_size", 4),
        ("linear_num_key_heads", 2),
        ("linear_num_value_heads linear_num_heads", 4),
        ("linear_key_head_dim linear_value_head_dim linear_head_dim", _HEAD_DIM),
        # multipliers that default to doing nothing
        ("embedding_multiplier lm_head_multiplier logits_scaling", 3.0),
        ("residual_multiplier", 0.5),
        # vision and audio parts
        ("image_size", 32),
        ("patch_size", 16),
        ("num_mel_bins", 8),
        ("output_channels nemo_conv_channels ext_pw_out_channel", 16),
        ("depthwise_separable_out_channel", 16),
    ]
    for name in names.split()
}

# Lists with one entry per layer: reduced to the distinct values, in order.
_PER_LAYER = {
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
}

# What the two tables above cannot express, by the ``model_type`` of the (sub-)configuration.
_OVERRIDES: dict[str, dict[str, Any]] = {
    # Hybrids whose default pattern is too long (or too uniform) to show each kind of layer.
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 4],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 8,
        "num_experts_per_tok": 1,
    },
    # The attention block is shared between its occurrences, of which there must be two.
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    # Later layers reuse the keys and values of earlier ones.
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "final_logit_softcapping": 30.0,  # as in all published checkpoints
    },
    "gemma4_unified_text": {"global_head_dim": 16, "final_logit_softcapping": 30.0},
    # Sliding-window layers of dots3_note get their own sizes from arguments that are not fields.
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
    },
    # A quarter or less of each head is rotated: a head of 8 would leave nothing to rotate.
    "deepseek_v4": {
        "head_dim": 16,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "qwen3_next": {"head_dim": 16},
    "qwen3_5_text": {"head_dim": 16},
    "qwen3_5_moe_text": {"head_dim": 16},
    "qwen4_exp_text": {
        "head_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    # Optional sizes that default to None although the model needs them.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "xmod": {"default_language": "en_XX"},
    # Sizes that must be consistent with others.
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"num_hidden_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 8},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},  # multiples of 64
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "cpmant": {"prompt_length": 4},
    "xlm": {"causal": True},  # an encoder otherwise
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "hash_seed": 0,
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    # The assistants demand that all layers share keys and values (of another model).
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    },
    "gemma4_unified_assistant": {
        "text_config": {
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    },
}


def _shrink(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """Build ``config_class`` with every size it knows replaced by a tiny one."""
    overrides = _OVERRIDES.get(config_class.model_type, {}) | overrides
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    default = config_class(**{k: v for k, v in overrides.items() if isinstance(v, dict)})
    stored, aliases = vars(default), config_class.attribute_map
    values = {name: stored.get(aliases.get(name, name)) for name in names}
    fields: dict[str, Any] = {}
    special = 3
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrink(type(value), overrides.get(name, {}))
        elif name == "pad_token_id":
            fields[name] = 0
        elif name == "bos_token_id":
            fields[name] = 1
        elif name in ("eos_token_id", "decoder_start_token_id"):
            fields[name] = 2
        elif name == "forced_eos_token_id":
            fields[name] = None  # would overrule the last token that generate() chooses
        elif name in ("head_dim", "num_key_value_heads"):
            fields[name] = _SIZES[name]
        elif value is None:
            continue
        elif re.search(r"_token_(id|index)$", name):
            fields[name], special = special, special + 1
        elif name == "is_decoder":
            fields[name] = True
        elif re.search(r"drop|jitter_noise", name) and isinstance(value, float):
            fields[name] = 0.0
        elif name in _PER_LAYER and value:
            fields[name] = list(dict.fromkeys(value))
        elif name in _SIZES:
            fields[name] = _SIZES[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = _HEADS  # latent attention has as many keys as queries
    fields |= {k: v for k, v in overrides.items() if not isinstance(values.get(k), PreTrainedConfig)}
    depth = max([_LAYERS, *(len(v) for k, v in fields.items() if k in _PER_LAYER)])
    for name, value in fields.items():
        if name in _PER_LAYER:
            fields[name] = [value[i % len(value)] for i in range(depth)]
        elif name in ("num_hidden_layers", "num_layers") and name not in overrides:
            fields[name] = depth
    return config_class(**fields)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of ``model_type`` with a few layers, heads, experts and tokens."""
    return _shrink(CONFIG_MAPPING[model_type], {})


def tiny_causal_lm(model_type: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny ``model_type`` model in eval mode, with random weights large enough to matter.

    The attention implementation is the architecture's default.  The default implementation of
    mixtures of experts, ``grouped_mm``, has no float64 kernel, so float64 models use ``"eager"``.
    """
    config = tiny_config(model_type)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
        try:
            if hasattr(config, "decoder") and isinstance(config.decoder, PreTrainedConfig):
                # musicgen: the mapping names a class that only takes the decoder's configuration
                model = _model_class(model_type)._from_config(config.decoder, dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        model.to(dtype)  # a few parameters are created as float32 whatever the default type
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if sum(size > 1 for size in parameter.shape) >= 2 and "A_log" not in name:
                    parameter.normal_(0.0, _STD)
                elif name.endswith("correct_output_scale"):
                    parameter.fill_(0.5)  # gemma3n: at zero, per-layer embeddings have no effect
            for name, buffer in model.named_buffers():
                if name.endswith("tid2eid"):  # deepseek_v4: which experts each token is sent to
                    buffer.copy_(torch.rand(len(buffer), 4).argsort(dim=1)[:, : buffer.shape[1]])
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():  # what the architecture leaves uninitialised
                    tensor.masked_fill_(tensor.isnan(), 0.0)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model.eval()


class Float64Everywhere(TorchFunctionMode):
    """Turn every request for float32 inside the block into one for float64.

    Most architectures compute norms, rotary embeddings or routing in float32 whatever the type of
    the weights, which limits finite differences of a float64 model to three or four digits (and a
    few overflow: the smallest float64 is minus infinity there).  In this block no digits are lost.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)

    def __enter__(self):
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.set_default_dtype(self._default)
        return super().__exit__(*exception)


def tiny_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids of ordinary tokens, shape ``(batch, length)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE, (batch, length), generator=generator)


def _model_class(model_type: str) -> type[PreTrainedModel]:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
