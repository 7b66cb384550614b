"""The families of causal language models that transformers knows, small enough to be built and run."""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# What the default configuration lacks for a model to be built, or for each kind of its layers to show.
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ADJUSTED: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere_compass_text": ("no rope", {"rope_parameters": {"full_attention": ROPE}}),
    "dbrx": ("no rope", {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}}),
    "deepseek_v2": ("no number of experts", {"num_experts_per_tok": 2, "moe_intermediate_size": 1408}),
    "dots1": ("no number of experts", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }),
    "gemma4_assistant": ("input per layer", {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    }),
    "hunyuan_v1_dense": ("no head_dim", {"head_dim": 128}),
    "hunyuan_v1_moe": ("no head_dim", {"head_dim": 128}),
    "ministral": ("no head_dim", {"head_dim": 128}),
    "nemotron": ("no number of key-value heads", {"num_key_value_heads": 8}),
    "reformer": ("no decoder", {"is_decoder": True}),
    "bamba": ("no attention layer", {"attn_layer_indices": [1]}),
    "granitemoehybrid": ("no attention layer", {"layer_types": ["linear_attention", "full_attention"] * 16}),
    "lfm2": ("no convolution layer", {"layer_types": ["conv", "full_attention"] * 16}),
    "lfm2_moe": ("no layer types", {"layer_types": ["conv", "full_attention"] * 16}),
}  # fmt: skip
ADJUSTED["minimax_m3_vl_text"] = ("no indexer", {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30})
ADJUSTED["zamba"] = ("many layers", {"num_hidden_layers": 16})
ADJUSTED["zamba2"] = ("many layers", {
    "num_hidden_layers": 14, "layers_block_type": [*["linear_attention"] * 6, "hybrid"] * 2,
})  # fmt: skip
ADJUSTED["xlstm"] = ("many layers", {"num_hidden_layers": 4, "num_blocks": 4})
INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
ADJUSTED["qwen4_exp_text"] = ("no indexer", INDEXER)
ADJUSTED["mistral3"] = ("as Ministral 3", {"text_config": {"model_type": "ministral3"}})
ADJUSTED["qwen4_exp"] = ("no indexer", {"text_config": INDEXER})

# Built with all of their layers: which layers share keys and values, or a whole block, follows from the number.
WHOLE = frozenset({"gemma3n", "gemma3n_text", "gemma4_assistant", "gemma4_unified_assistant", "zamba", "zamba2"})

# Elsewhere four layers, or as many as it takes to show each kind.
LAYERS = 4
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "cross_attention_layers")

# The model of these types wants the configuration of its decoder.
DECODERS = {"musicgen": transformers.MusicgenDecoderConfig, "musicgen_melody": transformers.MusicgenMelodyDecoderConfig}


def configure(model_type: str) -> PreTrainedConfig:
    """The default configuration with few layers."""
    kind: Callable[..., PreTrainedConfig] = DECODERS.get(model_type) or CONFIG_MAPPING[model_type]
    config = kind(**ADJUSTED.get(model_type, ("", {}))[1])
    if model_type == "gemma3n":  # its own vision tower needs the package timm
        vars(config)["vision_config"] = SiglipVisionConfig(vocab_size=128, vocab_offset=262144, rms_norm_eps=1e-6)
    if getattr(config, "is_decoder", True) is False:  # BERT and its kin, which attend both ways otherwise
        config.is_decoder = True
    if model_type == "xmod":
        config.default_language = "en_XX"
    return config if model_type in WHOLE else shrunk(config)


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    values = vars(config)
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), 0)
    layers = LAYERS
    for name in KINDS:
        kinds = getattr(config, name, None)
        if name == "cross_attention_layers" and kinds:
            layers = max(layers, kinds[0] + 1)
        elif isinstance(kinds, list | tuple) and len(kinds) == depth:
            layers = max(layers, *(list(kinds).index(kind) + 1 for kind in set(kinds)))
    for name, value in list(values.items()):
        if name in DEPTHS and isinstance(value, int):
            values[name] = min(layers, value)
        elif isinstance(value, list) and len(value) == depth > layers:
            values[name] = value[:layers]
        elif isinstance(value, PreTrainedConfig):
            shrunk(value)
    return config


def build(model_type: str) -> PreTrainedModel:
    """A model of the default sizes and few layers, without weights."""
    with torch.device("meta"):
        if model_type in DECODERS:
            return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(configure(model_type))
        return AutoModelForCausalLM.from_config(configure(model_type))


# --- small ones, with weights

POSITIONS = 128
"""The longest row of a small model; the limits that a configuration calls original are half of it."""
WINDOW = 24
SIZES: list[tuple[str, Callable[[int], int]]] = [
    ("hidden_size|d_model|n_embd|dim|embed_dim|word_embed_proj_dim|embedding_size|model_dim|emb_dim", lambda w: w),
    ("intermediate_size|ffn_dim|n_inner|ffn_hidden_size|d_ff|dense_intermediate_size|block_ff_dim", lambda w: 2 * w),
    ("(encoder|decoder)_ffn_dim|intermediate_size_mlp|shared_intermediate_size", lambda w: 2 * w),
    (".*moe_intermediate_size|.*shared_expert_intermediate_size|expert_ffn_hidden_size|expert_dim", lambda w: w),
    ("(swa_)?num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads", lambda w: 4),
    (".*head_dim|kv_channels|qk_nope_head_dim", lambda w: w // 4),
    ("qk_rope_head_dim|rotary_dim", lambda w: w // 8),
    ("kv_lora_rank|q_lora_rank", lambda w: w // 4),
    ("(decoder_)?vocab_size|vocab_size_per_layer_input", lambda w: 320),
    ("num_experts|n_routed_experts|num_local_experts|moe_num_experts", lambda w: 4),
    ("num_experts_per_tok(en)?|moe_k|moe_topk|top_k", lambda w: 2),
    ("n_group|topk_group|num_group|num_expert_group|topk_groups?", lambda w: 1),
    ("max_position_embeddings|n_positions|max_sequence_length|max_seq_len|n_ctx", lambda w: POSITIONS),
    ("sliding_window|attention_window_size|window_size|attention_chunk_size|local_window_size", lambda w: WINDOW),
]
"""Names of sizes in configurations, and what they are in a model of width w."""
KEY_HEADS = "(num_|swa_num_|global_num_|num_global_)(key_value|kv)_heads|n_head_kv"


def small_config(model_type: str, width: int = 64, **changes: Any) -> PreTrainedConfig:
    """The configuration of a small model. width: of its states; changes: of the decoder's configuration."""
    config = sized(configure(model_type), width)
    _fit(config, model_type, width)
    inner = config.get_text_config()
    for name, value in changes.items():
        setattr(inner, name, value)
    return config


def small(model_type: str, width: int = 64, **changes: Any) -> PreTrainedModel:
    """A model with random weights in float32. Arguments as in `small_config`."""
    config = small_config(model_type, width, **changes)
    torch.manual_seed(0)
    if model_type in DECODERS:
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    return AutoModelForCausalLM.from_config(config)


def sized(config: PreTrainedConfig, width: int) -> PreTrainedConfig:
    """Its sizes made small, in place, at every depth."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            sized(value, width)
        elif isinstance(value, dict) and "rope" in name:
            setattr(config, name, _limited(copy.deepcopy(value)))
        elif name == "original_max_position_embeddings" and value:
            setattr(config, name, POSITIONS // 2)
        elif name.endswith("_token_id") and isinstance(value, int | list):
            setattr(config, name, value % 300 if isinstance(value, int) else [one % 300 for one in value])
        elif type(value) is int and value > 0:
            setattr(config, name, _size(name, value, width))
    return config


def _limited(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters of rotations, whose original limit lies below the longest row."""
    for name, value in values.items():
        if isinstance(value, dict):
            _limited(value)
        elif name == "original_max_position_embeddings" and value:
            values[name] = POSITIONS // 2
        elif name in ("short_factor", "long_factor"):
            values[name] = None
    return values


def _size(name: str, value: int, width: int) -> int:
    if re.fullmatch(KEY_HEADS, name):
        return min(2, value)
    new = next((size(width) for names, size in SIZES if re.fullmatch(names, name)), value)
    return (
        min(value, new)
        if name.startswith(("num_experts", "num_local_experts", "n_routed")) or "window" in name
        else new
    )


def _fit(config: PreTrainedConfig, model_type: str, width: int) -> None:
    """Sizes that follow from others."""
    for one in [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]:
        values = vars(one)
        if "qk_rope_head_dim" in values and "head_dim" in values and model_type not in ("longcat_flash",):
            one.head_dim = one.qk_rope_head_dim
        if "kv_lora_rank" in values and "num_key_value_heads" in values:
            one.num_key_value_heads = 4
        if "qk_head_dim" in values:
            one.qk_head_dim = one.qk_nope_head_dim + one.qk_rope_head_dim
        if "mamba_n_heads" in values:
            one.mamba_n_heads, one.mamba_d_head = 8, one.mamba_expand * width // 8
        following = FOLLOWING[model_type](width) if model_type in FOLLOWING else {}
        for name, value in following.items():
            if name in values:
                setattr(one, name, value)


FOLLOWING: dict[str, Callable[[int], dict[str, Any]]] = {
    "mamba2": lambda w: {"num_heads": 8, "head_dim": w // 4},
    "falcon_h1": lambda w: {"mamba_d_ssm": 2 * w},
    "hunyuan_v1_moe": lambda w: {"num_experts": 4, "moe_topk": 2},
    "zamba": lambda w: {"attention_hidden_size": 2 * w, "attention_head_dim": w // 2, "mamba_dt_rank": 8},
    "zamba2": lambda w: {"attention_hidden_size": 2 * w, "attention_head_dim": w // 2, "mamba_headdim": w // 4},
    "xlstm": lambda w: {"embedding_dim": w, "num_heads": 4},
    "reformer": lambda w: {"axial_pos_embds_dim": (w // 4, w - w // 4), "axial_pos_shape": (8, 16)},
}
"""Sizes of one family."""
